"""explain.html: the texts of a run on one page, each token coloured by how likely a model finds it, before and after.

    python evals/report.py RUN --explain

extras/explain.html is the page; what it shows stands in it as JSON, so it is one file and reaches no network. Tokens are
shown as characters of the text itself: its pieces, put together, are the text, whatever a tokenizer makes of it.
"""

import difflib
import json
import math
from pathlib import Path

import torch

from kit import models, processes
from kit.finished import models_of
from kit.protocols import PROTOCOLS
from kit.text import breaks

PAGE = Path(__file__).with_suffix(".html")


# --- a run ---


def check(run, flag="--explain"):
    """ValueError for a run (of kit/finished.py) without texts, or whose pairs or model are no longer those it had."""
    if run["redacted"]:
        raise ValueError(
            f"{run['folder']}: holds no texts (icu.py --redact, or purged): leave it or {flag} out"
        )
    for what in ("pairs", "model"):
        path, was = run["config"].get(what) or "", run["config"].get("sha256", {}).get(what)
        if was is not None and models.fingerprint(path) != was:
            raise ValueError(
                f"{path}: not the {what} that {run['folder']} was made with (sha256 differs): put those back, or leave "
                f"out {flag}"
            )


def prepare(run, pairs, build_samples, *, allow_pickle=False):
    """What `make` needs besides the run, checked as far as it can be without a weight: its keywords. ValueError.

    pairs: {id: pair}, which has those of the run; build_samples: icu.build_samples.
    """
    config, sides, pairs = (
        run["config"],
        models_of(run),
        [pairs[id] for id in generations(run) if id in pairs],
    )
    found = [
        models.check_model(name, revision=at, allow_pickle=allow_pickle)
        for name, at in sides.values()
    ]
    (_, tokenizer), positions = (
        found[0],
        min(models.positions_of(config) or 1 << 30 for config, _ in found),
    )
    how = {
        "protocol": config["protocol"],
        "positions": positions,
        "context": config.get("context", False),
    }
    samples, _ = build_samples(pairs, tokenizer, **how)
    for model_config, _ in found:
        models.check_inputs(model_config, tokenizer, {"pair": samples}, {})
    return {"pairs": pairs, "samples": samples, "tokenizer": tokenizer, "sides": sides}


def make(run, *, pairs, samples, tokenizer, sides, allow_pickle=False):
    """explain.html of a run, as bytes. The others are what `prepare` returns.

    Both models are loaded, one after the other: in float32, on the GPU where there is one.
    """
    rows, said, texts = [sample.forget.ids for sample in samples], generations(run), []
    likely = {when: asked(*side, rows, allow_pickle=allow_pickle) for when, side in sides.items()}
    for number, (pair, sample) in enumerate(zip(pairs, samples, strict=True)):
        context = context_of(pair, run["config"])
        text, shift = context + pair["prefix"] + pair["suffix"], len(context)
        spans = [(start + shift, end + shift) for start, end in pair.get("spans", [])]
        how = {when: rows_of[number] for when, rows_of in likely.items()} | {
            "ids": rows[number],
            "spans": spans,
        }
        texts.append(
            describe(
                tokenizer, text, cut=sample.forget.cut, id=pair["id"], said=said[pair["id"]], **how
            )
        )
    config, summary = run["config"], run["summary"]
    about = {
        "run": run["folder"].resolve().name,
        "model": Path(config["model"]).name,
        "method": summary["method"],
    }
    about |= {
        "protocol": summary["protocol"],
        "stopped": f"{summary['stopped']}, epoch {summary['epochs']}",
    }
    return page(about, texts)


def asked(name, revision, rows, *, allow_pickle):
    """`probabilities` of a model that is loaded for this and then let go."""
    how = {"allow_pickle": allow_pickle, "device": processes.device_of(None)}
    model, _ = models.load_model(name, revision=revision, **how)
    return probabilities(model, rows)


def generations(run):
    """{id: {"before", "after"}}: what the model said behind each prefix, in the first and in the last epoch."""
    last, found = run["summary"]["epochs"], {}
    for row in run["samples"]:
        of_id = found.setdefault(row["id"], {})
        of_id |= {
            when: row["generation"]
            for when, at in (("before", 0), ("after", last))
            if row["epoch"] == at
        }
    return found


def context_of(pair, config):
    """What stood in front of the prefix when the run's model read a text: its context, or nothing."""
    return pair["context"] if PROTOCOLS[config["protocol"]].context or config.get("context") else ""


# --- how likely each token is ---


@models.measuring
def probabilities(model, rows):
    """p(x_t | x_<t) of each token of texts, the true tokens before it given; without gradient or dropout.

    rows: lists of ids, none longer than the model's positions -> lists of as many floats, 0-1. None for the first
    token, which nothing predicts, and for a number that is not finite. In float32 at least.
    """
    return [[None, *map(finite, chances(model, ids))] for ids in rows]


def chances(model, ids):
    """The probabilities of ids[1:] as floats. A text at a time: no padding, whatever a model makes of some."""
    x = torch.tensor(ids, device=model.device)
    logits = model(input_ids=x[None], use_cache=False).logits[
        0, :-1
    ]  # (T - 1, V): position t - 1 predicts token t
    found = []
    for part, targets in zip(
        logits.split(256), x[1:].split(256), strict=True
    ):  # (T, V) once more may be a gigabyte
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        found += part.log_softmax(1).gather(1, targets[:, None])[:, 0].exp().tolist()
    return found


def finite(p):
    return p if math.isfinite(p) else None


def mean(values):
    """The mean of those that are numbers, or None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# --- which characters are whose ---


def token_ends(tokenizer, ids, text):
    """Where each token ends in `text`: rising indices, one a token, the last len(text).

    None where a token ends inside a visible character (bytes of a letter, a letter before its accent): that character
    belongs to both. A tokenizer may say another string than `text` (lower case, Unicode NFC, a space less): then the
    two are aligned, and what only the text has belongs to the token before it.
    """
    decode = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # noqa: E731
    said = decode(ids)
    heads = [
        decode(ids[:n]) for n in range(1, len(ids))
    ]  # quadratic, and 2,048 tokens still take under a second
    place = range(len(text) + 1) if said == text else aligned(said, text)
    ends = [place[len(head)] if said.startswith(head) else None for head in heads]
    between = breaks(text)
    return [end if end in between else None for end in ends] + [len(text)]


def aligned(said, text):
    """For each place between the characters of `said`, 0 to len(said), that in `text`; the last is len(text)."""
    place = [0] * (len(said) + 1)
    blocks = difflib.SequenceMatcher(None, said, text, autojunk=False).get_opcodes()
    for _, low, high, at, end in blocks:
        place[low:high] = [min(at + step, end) for step in range(high - low)]
        place[high] = end
    return place


def pieces(tokenizer, ids, text):
    """[(first token, behind the last, first character, behind the last)]: a text in the smallest parts of whole tokens
    that are whole characters; none is empty, and together they are all tokens and all of the text.
    """
    found, token, start = [], 0, 0
    for n, end in enumerate(token_ends(tokenizer, ids, text), start=1):
        if end == start and found:  # it adds no character, so it belongs to the one before
            token, (first, _, *place) = n, found[-1]
            found[-1] = first, n, *place
        elif end is not None and end > start:
            found.append((token, n, start, end))
            token, start = n, end
    return found


# --- the page ---


def describe(tokenizer, text, *, ids, cut, before, after, spans=(), **more):
    """What the page shows of one text, as a dict of JSON values.

    text: the characters that the ids stand for (a BOS in front of them apart); cut: the index in ids where the suffix
    begins; before, after: `probabilities` of the ids; spans: [start, end) in characters of the text. What is `left` is
    the mean of `after` over the tokens of the spans, or, without any, of the suffix. `more` is shown as it is.
    """
    lead = len(ids) - len(own_ids(tokenizer, ids, text))
    parts = [
        (first + lead, last + lead, *place)
        for first, last, *place in pieces(tokenizer, ids[lead:], text)
    ]
    marked = [any(low < end and start < high for low, high in spans) for _, _, start, end in parts]
    asked = [
        n
        for (first, last, _, _), mark in zip(parts, marked, strict=True)
        if mark
        for n in range(first, last)
    ]
    asked = asked or range(cut, len(ids))
    return {
        **more,
        "pieces": [text[start:end] for _, _, start, end in parts],
        "tokens": [last - first for first, last, _, _ in parts],
        "before": [together(before[first:last]) for first, last, _, _ in parts],
        "after": [together(after[first:last]) for first, last, _, _ in parts],
        "marked": [number for number, mark in enumerate(marked) if mark],
        "cut": next(
            (number for number, (first, *_) in enumerate(parts) if first >= cut), len(parts)
        ),
        "was": mean(before[n] for n in asked),
        "left": mean(after[n] for n in asked),
    }


def own_ids(tokenizer, ids, text):
    """The ids of the text itself: without a BOS that the tokenizer has put in front."""
    bos = models.bos_of(tokenizer)
    added = (
        bos and ids[:1] == bos and tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text
    )
    return ids[1:] if added else ids


def together(values):
    """The probability of several tokens in a row, or None if one is not known."""
    return None if None in values else round(math.prod(values), 6)


def page(about, texts):
    """The file, as bytes. about: {name: text} of the run, for its head; texts: what `describe` has returned, a list."""
    data = json.dumps({"about": about, "texts": texts}, ensure_ascii=False, allow_nan=False)
    # In a script element only </script and <!-- mean something; \u003c is < to JSON.
    return (
        PAGE.read_text(encoding="utf-8")
        .replace("@DATA@", data.replace("<", "\\u003c"), 1)
        .encode("utf-8")
    )
