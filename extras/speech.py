"""How a model speaks after unlearning, where the entropy of Eq. 10 misleads: words that do not exist have much of it.

    python evals/report.py RUN [RUN ...] --out DIR --speech FILE    # two more columns: Said (PPL), New words (%)

The model before reads what each model said behind the prefixes: what is recited has the lowest perplexity of all,
no-words a high one. So neither column has a better end: read both beside never saw's.
"""

import functools
import math
import re

import torch
import torch.nn.functional as F

from extras import explain
from kit import data, models, processes
from kit.runs import read_pairs_of


@models.measuring
def surprise(model, prompt, said):
    """The sum over the tokens said of -log p(token | what stands before it), in nats; in float32 at least.

    prompt: ids, at least one; said: ids of what was said behind it.
    """
    ids = torch.tensor([[*prompt, *said]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[
        0, len(prompt) - 1 : -1
    ]  # the shift by one
    return F.cross_entropy(logits.float(), ids[0, len(prompt) :], reduction="sum").item()


def words(text):
    """Runs of letters, in lower case; what a script writes without spaces is one word."""
    return re.findall(r"[^\W\d_]+", text.casefold())


def words_of(records, side=""):
    """The words of records, or of a side of pairs."""
    texts = (
        text
        for row in records
        for text in (row[f"{side}context"], row[f"{side}prefix"] + row[f"{side}suffix"])
    )
    return {word for text in texts for word in words(text)}


def new_words(said, known):
    """The share of the words of texts [(prefix, what was said behind it)] that are not in the set `known`; None without
    a word. A word that the prefix has begun is left out.
    """
    found = [word for prefix, text in said for word in words(prefix + text)[len(words(prefix)) :]]
    return sum(word not in known for word in found) / len(found) if found else None


def add(runs, others, build_samples, *, allow_pickle=False):
    """`said_ppl` and `new_words` join the figures before and after of runs (`runs.read_run`).

    One model reads all, that which they began with. others: files of texts (.csv, .jsonl) whose words are not new, nor
    are those of the pairs; build_samples: icu's. ValueError before a weight is loaded: a run without texts, one whose
    pairs or model have changed since, runs that began with different models.
    """
    trained = [run["config"] for run in runs if run["summary"]["method"] != "none"] or [
        runs[0]["config"]
    ]
    readers = sorted({(config["model"], config.get("revision")) for config in trained}, key=str)
    if len(readers) > 1:
        raise ValueError(
            f"--speech: one model reads all, and these runs began with {readers[0][0]}, {readers[1][0]}"
        )
    for run in runs:
        explain.check(run, flag="--speech")
    ((name, revision),), pickles = readers, {"allow_pickle": allow_pickle}
    config, tokenizer = models.check_model(name, revision=revision, **pickles)
    room, asked = models.positions_of(config) or 1 << 30, []
    known = words_of([row for file in others for row in data.read_records(file)])
    for run in runs:
        pairs, how = read_pairs_of(run), {"protocol": run["config"]["protocol"], "positions": room}
        said = {
            id: texts
            for id, texts in explain.generations(run).items()
            if texts["before"] is not None
        }
        pairs = [pairs[id] for id in said]
        samples, _ = build_samples(
            pairs, tokenizer, context=run["config"].get("context", False), **how
        )
        asked.append(
            (pairs, samples, [*said.values()], known | words_of(pairs) | words_of(pairs, "learn_"))
        )
    model, _ = models.load_model(
        name, revision=revision, device=processes.device_of(None), **pickles
    )
    read = functools.cache(
        lambda prompt, said: surprise(model, prompt, said)
    )  # before, all say the same
    for run, (pairs, samples, said, known) in zip(runs, asked, strict=True):
        for when in ("before", "after"):
            texts = [(pair["prefix"], each[when]) for pair, each in zip(pairs, said, strict=True)]
            prompts = [tuple(sample.forget.prompt) for sample in samples]
            ids = [tuple(models.encode(tokenizer, text, inside=True)) for _, text in texts]
            ids = [one[: room - len(prompt)] for one, prompt in zip(ids, prompts, strict=True)]
            total, count = sum(map(read, prompts, ids)), sum(map(len, ids))
            ppl = math.exp(min(total / count, 700.0)) if count else None
            run["summary"][when] |= {"said_ppl": ppl, "new_words": new_words(texts, known)}
