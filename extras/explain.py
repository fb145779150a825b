"""What is left of each text, token by token (explain.html), and how a model speaks (two columns).

    bash run.sh explain RUN [RUN ...]                  # RUN/explain.html
    bash run.sh explain RUN [RUN ...] --speech FILE    # RUN/speech.json: two columns of the report

The page colours each token by its probability before and after. It is extras/explain.html with the
texts as JSON in it, which reaches no network. Texts are shown as the tokenizer spells their ids.

The entropy of Eq. 10 misleads where a model speaks in words that do not exist. So the model before
reads what each model said after the prefixes: docs/explain.md.
"""

import argparse
import functools
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import torch

import icu
from kit import data, flags, models, processes
from kit.runs import check_texts_left, models_of, read_pairs_of, read_run
from kit.text import breaks

PAGE = Path(__file__).with_suffix(".html")


# --- a run ---


def check(run):
    """ValueError for a run without texts, or whose pairs or model have changed since."""
    check_texts_left(run)
    path, sha256 = run["config"]["model"], run["config"]["sha256"]["model"]
    if sha256 is not None and models.fingerprint(path) != sha256:
        raise ValueError(f"{path}: not the model that {run['folder']} was made with: put it back")


def unlearned(runs):
    """Those of the runs that did not only measure."""
    return [run for run in runs if run["summary"]["method"] != "none"]


def load(name, revision, allow_pickle):
    """A model in float32, on the GPU where there is one."""
    device = processes.device_of(None)
    return models.load_model(name, revision=revision, allow_pickle=allow_pickle, device=device)[0]


def texts_of(run, tokenizer, model_config):
    """[(pair, icu.Sample, {"before": generation, "after": generation})] of the texts left."""
    pairs, answers = read_pairs_of(run), {}
    for when, epoch in (("before", 0), ("after", run["summary"]["epochs"])):
        for row in run["samples"]:
            if row["epoch"] == epoch and row["generation"] is not None:
                answers.setdefault(row["id"], {})[when] = row["generation"]
    pairs = [pairs[id] for id in answers]
    settings = argparse.Namespace(**{"context": False, **run["config"], "targets": None})
    samples, _ = icu.samples_of(pairs, tokenizer, model_config, settings)
    return list(zip(pairs, samples, answers.values(), strict=True))


def make(run, *, allow_pickle=False):
    """explain.html of a run, as bytes."""
    summary, sides = run["summary"], models_of(run)
    name, revision = sides["before"]
    config, tokenizer = models.check_model(name, revision=revision, allow_pickle=allow_pickle)
    texts = texts_of(run, tokenizer, config)
    likely = {}
    for when, side in sides.items():
        model = None  # the one before is let go first
        model = load(*side, allow_pickle)
        likely[when] = [probabilities(model, sample.forget.ids) for _, sample, _ in texts]
    about = {
        "run": run["folder"].resolve().name,
        "model": Path(name).name,
        "method": summary["method"],
        "protocol": summary["protocol"],
        "stopped": f"{summary['stopped']}, epoch {summary['epochs']}",
    }
    described = []
    for (_, sample, answers), before, after in zip(texts, *likely.values(), strict=True):
        own = {"before": before, "after": after}
        described.append(describe(tokenizer, sample, answers, own))
    return page(about, described)


# --- how likely each token is ---


@models.measuring
def log_probabilities(model, ids):
    """log p(x_t | x_<t) of ids[1:], a list of floats in nats; no gradient, no dropout.

    A text at a time: no padding, whatever a model makes of some.
    """
    x = torch.tensor(ids, device=model.device)  # (T,)
    # (T - 1, V): position t - 1 predicts token t
    logits = model(input_ids=x[None], use_cache=False).logits[0, :-1]
    return logits.log_softmax(1).gather(1, x[1:, None])[:, 0].tolist()


def probabilities(model, ids):
    """p(x_t | x_<t) of each token, 0-1; None for the first, which nothing predicts, and for NaN."""
    return [None, *(None if math.isnan(p) else math.exp(p) for p in log_probabilities(model, ids))]


# --- the page ---


def pieces(tokenizer, ids):
    """[(characters, first token, token after the last)]: a text in the smallest parts that are
    whole tokens and whole visible characters. None is empty, and together they are the text.
    """
    text, ends = data.as_text(tokenizer, ids), enumerate(data.token_ends(tokenizer, ids), start=1)
    places = breaks(text)  # of visible characters
    # characters so far: tokens so far; one that adds no character joins those before
    ends = {0: 0} | {end: n for n, end in ends if end in places}
    return [
        (text[start:end], first, last)
        for (start, first), (end, last) in pairwise(sorted(ends.items()))
    ]


def describe(tokenizer, sample, answers, likely):
    """What the page shows of a text, as a dict of JSON values.

    answers, likely: {"before", "after"}: what was said, and the `probabilities` of its ids. `left`
    is the mean after, over the marked tokens, or over the suffix where none is marked.
    """
    text, bos = sample.forget, models.front_of(tokenizer)
    lead = len(bos) if text.ids[: len(bos)] == bos else 0
    parts = pieces(tokenizer, text.ids[lead:])
    tokens = [range(first + lead, last + lead) for _, first, last in parts]  # of each piece
    marked = set(text.span_positions or ())
    measured = sorted(marked) or range(text.cut, len(text.ids))
    shown = {
        "id": sample.id,
        "answers": answers,
        "pieces": [characters for characters, _, _ in parts],
        "tokens": list(map(len, tokens)),
        "marked": [n for n, own in enumerate(tokens) if marked.intersection(own)],
        "cut": sum(own.start < text.cut for own in tokens),
        "was": mean(likely["before"][t] for t in measured),
        "left": mean(likely["after"][t] for t in measured),
    }
    for when, values in likely.items():
        shown[when] = [together([values[t] for t in own]) for own in tokens]
    return shown


def together(values):
    """The probability of several tokens in a row, or None if one is not known."""
    return None if None in values else round(math.prod(values), 6)


def mean(values):
    """The mean of those that are numbers, or None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def page(about, texts):
    """The file, as bytes: what is most left comes first, what is not known last.

    about: {name: text} of the run; texts: those of `describe`, a list.
    """
    left = [-1 if text["left"] is None else text["left"] for text in texts]
    texts = [texts[i] for i in sorted(range(len(texts)), key=left.__getitem__, reverse=True)]
    content = json.dumps({"about": about, "texts": texts}, ensure_ascii=False, allow_nan=False)
    # In a script element only </script and <!-- mean something; \u003c is < to JSON.
    content = content.replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("@DATA@", content, 1).encode("utf-8")


# --- how a model speaks ---


def surprise(model, prompt, answer):
    """The sum over the ids of an answer to a prompt (ids, too) of -log p(id | ids before), nats."""
    return -sum(log_probabilities(model, [*prompt, *answer])[len(prompt) - 1 :])


def words(text):
    """Runs of letters, in lower case; what a script writes without spaces is one word."""
    return re.findall(r"[^\W\d_]+", text.casefold())


def words_of(records, side=""):
    """The set of words of records, or of a side of pairs."""
    context, prefix, suffix = (f"{side}{part}" for part in data.PARTS)
    texts = [f"{row[context]} {row[prefix]}{row[suffix]}" for row in records]
    return {word for text in texts for word in words(text)}


def new_words(answers, known):
    """The share of words in answers [(prefix, answer)] that are not in the set `known`, or None.

    A word that the prefix has begun is left out.
    """
    new = [word for prefix, text in answers for word in words(prefix + text)[len(words(prefix)) :]]
    return sum(word not in known for word in new) / len(new) if new else None


def speech(runs, files, *, allow_pickle=False):
    """{RUN/speech.json: {"before", "after": {"said_ppl", "new_words"}}} of runs.

    One model reads all, that which they began with. files: texts (.csv, .jsonl) whose words are not
    new, nor are those of the pairs. ValueError: the runs began with several models.
    """
    readers = {
        (run["config"]["model"], run["config"].get("revision"))
        for run in unlearned(runs) or runs[:1]
    }
    if len(readers) > 1:
        names = ", ".join(sorted(name for name, _ in readers))
        raise ValueError(f"--speech: one model reads all, and these runs began with {names}")
    ((name, revision),) = readers
    config, tokenizer = models.check_model(name, revision=revision, allow_pickle=allow_pickle)
    render = data.renderer(tokenizer)
    known = words_of([row for file in files for row in data.read_records(file, render=render)])
    texts, positions = (
        [texts_of(run, tokenizer, config) for run in runs],
        models.positions_of(config),
    )
    model = load(name, revision, allow_pickle)
    read = functools.cache(functools.partial(surprise, model))  # before, all say the same
    documents = {}
    for run, rows in zip(runs, texts, strict=True):
        figures = documents[run["folder"] / "speech.json"] = {}
        pairs = [pair for pair, _, _ in rows]
        old = known | words_of(pairs) | words_of(pairs, "learn_")
        for when in ("before", "after"):
            total, count = 0.0, 0
            for pair, sample, answers in rows:
                prompt = tuple(sample.forget.prompt)
                row = {"prefix": pair["prefix"], "suffix": answers[when]}
                ids, (start,), _ = models.read_parts(tokenizer, row, ("prefix", "suffix"))
                ids = ids[start:][: positions and positions - len(prompt)]
                total, count = total + read(prompt, tuple(ids)), count + len(ids)
            words_said = [(pair["prefix"], answers[when]) for pair, _, answers in rows]
            ppl = math.exp(min(total / count, 700.0)) if count else None
            figures[when] = {"said_ppl": ppl, "new_words": new_words(words_said, old)}
    return documents


def main(argv=None):
    parser = flags.command_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="finished run folders")
    add("--speech", nargs="+", metavar="FILE", help="texts whose words are not new")
    add("--allow-pickle", action="store_true", help="also load pickles, which run code")
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    runs = [read_run(folder) for folder in args.runs]
    shown = unlearned(runs) or runs
    for run in runs if args.speech else shown:
        check(run)
    if args.speech:
        for path, document in speech(runs, args.speech, allow_pickle=args.allow_pickle).items():
            data.write_json(path, document)
    for run in shown:
        path = run["folder"] / PAGE.name
        data.write_bytes(path, make(run, allow_pickle=args.allow_pickle))
        print(f"explained: {path}")


if __name__ == "__main__":
    flags.run_cli(main)
