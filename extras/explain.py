"""What is left of each text, token by token (explain.html), and how a model speaks (two columns).

    bash run.sh explain RUN [RUN ...]                  # RUN/explain.html
    bash run.sh explain RUN [RUN ...] --speech FILE    # RUN/speech.json: two columns of the report

The page colours each token by its probability before and after. The entropy of Eq. 10 misleads
where a model speaks in words that do not exist: so the model before reads what each model said
(docs/explain.md).
"""

import argparse
import functools
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import icu
import metrics
from kit import data, flags, models, processes
from kit.figures import mean
from kit.runs import check_texts_left, models_of, read_pairs_of, read_run
from kit.text import breaks

PAGE = Path(__file__).with_suffix(".html")


# --- a run ---


def check(run):
    """ValueError for a run whose texts are gone, or whose model has changed since."""
    check_texts_left(run)
    path, sha256 = run["config"]["model"], run["config"]["sha256"]["model"]
    if sha256 is not None and models.fingerprint(path) != sha256:
        raise ValueError(f"{path}: not the model that {run['folder']} was made with: put it back")


def unlearned(runs):
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
    described = [
        describe(tokenizer, sample, answers, {"before": before, "after": after})
        for (_, sample, answers), before, after in zip(texts, *likely.values(), strict=True)
    ]
    return page(about, described)


# --- how likely each token is ---


@models.measuring
def surprises(model, ids):
    """-log p(x_t | x_<t) of ids[1:], a list of floats in nats. A text at a time: no padding."""
    return metrics.token_losses(model, [ids])[0][0].tolist()


def probabilities(model, ids):
    """p(x_t | x_<t) of each token, 0-1; None for the first, which nothing predicts, and for NaN."""
    return [None, *(None if math.isnan(x) else math.exp(-x) for x in surprises(model, ids))]


# --- the page ---


def pieces(tokenizer, ids):
    """[(characters, first token, token after the last)]: a text in the smallest parts that are
    whole tokens and whole visible characters."""
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

    answers, likely: {"before", "after"}: what was said, and the `probabilities` of its ids. `was`
    and `left` are means over the marked tokens, or over the suffix where none is marked.
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
        of_pieces = [[values[t] for t in own] for own in tokens]
        shown[when] = [None if None in p else round(math.prod(p), 6) for p in of_pieces]
    return shown


def page(about, texts):
    """The file, as bytes, what is most left first. about: {name: text}; texts: `describe`'s."""
    texts = sorted(texts, key=lambda text: 2 if text["left"] is None else -text["left"])
    content = json.dumps({"about": about, "texts": texts}, ensure_ascii=False, allow_nan=False)
    # In a script element only </script and <!-- mean something; \u003c is < to JSON.
    content = content.replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("@DATA@", content, 1).encode("utf-8")


# --- how a model speaks ---


def surprise(model, prompt, answer):
    """The sum over the ids of an answer to a prompt (ids, too) of -log p(id | ids before), nats."""
    return sum(surprises(model, [*prompt, *answer])[len(prompt) - 1 :])


def words(text):
    """Runs of letters, in lower case; what a script writes without spaces is one word."""
    return re.findall(r"[^\W\d_]+", text.casefold())


def words_of(records, side=""):
    """The set of words of records, or of a side of pairs."""
    context, prefix, suffix = (f"{side}{part}" for part in data.PARTS)
    texts = [f"{row[context]} {row[prefix]}{row[suffix]}" for row in records]
    return {word for text in texts for word in words(text)}


def new_words(answers, known):
    """The share of words in answers [(prefix, answer)], but those that a prefix has begun, that are
    not in the set `known`, or None."""
    new = [word for prefix, text in answers for word in words(prefix + text)[len(words(prefix)) :]]
    return sum(word not in known for word in new) / len(new) if new else None


def speech(runs, files, *, allow_pickle=False):
    """{RUN/speech.json: {"before", "after": {"said_ppl", "new_words"}}} of runs, read by one model.

    files: texts (.csv, .jsonl) whose words are not new, nor are those of the pairs.
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
    texts = [texts_of(run, tokenizer, config) for run in runs]
    positions = models.positions_of(config)
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
