"""The certificate of a run: what was asked and done, with figures and hashes and no text; signed, and checked later.

    python evals/report.py RUN --certificate [--received DATE] [--request-id ID ...] [--approved-by NAME] [--sign KEY]
    python evals/report.py --verify RUN/certificate.json [--key KEY.pub]    # says what differs; exit 0 or 1

It is evidence of suppression. Everything in it but the request comes from files of the run folder, so it can be made
again, byte for byte, and --verify does so. config.json and samples.jsonl are hashed without what kit/purge.py changes
in them: a certificate outlives its texts. docs/certificate.md explains every line.
"""

import datetime
import hashlib
import json
import re
from pathlib import Path

import numpy as np

from extras import certificate_page, signatures
from extras.certificate_page import LABELS
from kit import data, flags, models, purge, traces
from kit.figures import AS_NEVER, FEW, LESS, MORE, resampled_means
from kit.finished import NAME, OBJECT, SETTINGS, TEXT, WAY_OUT, check, list_of, null_or, read_run
from kit.runs import OF_SPANS, mean

WHAT = (
    "Evidence of suppression: the figures below say how much less of these texts this model gives away than before its "
    "training. They are no proof that nothing of them is left in its weights."
)
NAMESPACE = "icu-certificate"
FILE, SIGNATURE, PAGE = "certificate.json", "certificate.json.sig", "certificate.html"
LEFT = ("el10", "ma", "bleu", "bertscore")  # higher = more is left
LEFT_OF_PARTS = (
    "el10_spans",
    "ma_spans",
    "secret_said",
)  # of a marked text, the rest of which is to stay
MARGIN = 0.05  # a difference that is none
NO_HASHES = "none: the run has neither its texts nor hashes of them any more"
ALWAYS_UNTESTED = (
    "paraphrases, translations and other prompts than each text's own beginning",
    "other languages",
)
NOT_REACHED = (
    "backups and other copies, of the model before and of the texts",
    "adapters, fine-tuned and merged models that were made of the model before",
    "quantised models and other exports that were made earlier",
    "the training data, its copies, caches and logs",
)
KEY = (
    "a public key of OpenSSH",
    lambda value: isinstance(value, str) and bool(signatures.KEY.fullmatch(value)),
)
FORM = {"what": TEXT, "request": OBJECT, "files": OBJECT, "signed_by": null_or(KEY), "sha256": TEXT}
REQUEST = {
    "ids": list_of(NAME),
    "received": null_or(TEXT),
    "done": TEXT,
    "approved_by": null_or(NAME),
}


# --- what it says ---


def build(folder, request, signed_by=None, kept=None):
    """The certificate of a finished run as a dict, and the hashes.json that is yet to be written, or None.

    request: {"ids", "received", "approved_by"}; kept: an earlier certificate, for what it has of the model that never
    saw the texts, should its run be gone. ValueError: no finished run, or one that has no model.
    """
    run, folder = read_run(folder), Path(folder)
    config, summary = run["config"], run["summary"]
    if summary["method"] == "none" or not (folder / "model").is_dir():
        raise ValueError(
            f"{folder}: has no model/ that a method has trained, so there is nothing to certify"
        )
    scope, hashes = scope_of(run)
    never, why = never_saw(run)
    done = datetime.datetime.fromtimestamp(
        (folder / "summary.json").stat().st_mtime, datetime.UTC
    ).date()
    found = {
        "what": WHAT,
        "request": {"done": done.isoformat()} | request,
        "scope": scope,
        "model": model_of(run),
        "code": {
            "git": config.get("git"),
            "method_file": config.get("method_file"),
            "versions": config.get("versions"),
        }
        | {"method_sha256": config.get("sha256", {}).get("method")},
        "method": {
            name: summary[name] for name in ("method", "protocol", "stopped", "epochs", "collapsed")
        }
        | {"seed": config.get("seed"), "thresholds": summary["thresholds"]},
        "configuration": {
            name: config.get(name) for name in SETTINGS if name not in ("model", "bert")
        },
        "figures": figures_of(run, never),
        "never_saw": why,
        "residual_risk": risks(run, never),
        "tasks": {when: tasks["averages"] for when, tasks in run["tasks"].items()},
        "audit": audit_of(folder),
        "not_reached": list(NOT_REACHED),
        "files": hashes_of(folder),
        "signed_by": signed_by,
    }
    if kept and never is None and kept.get("never_saw") is None:
        found |= {name: kept.get(name) for name in ("figures", "never_saw", "residual_risk")}
    found["not_tested"] = untested(found)
    return found | {"sha256": digest(found)}, hashes


def scope_of(run):
    """Counts and salted hashes of the texts, never the texts: ("scope", hashes.json yet to be written or None)."""
    sha, path = run["config"].get("sha256", {}).get("pairs"), run["folder"] / "hashes.json"
    pairs = purge.find_pairs(sha, run["folder"]) if sha and run["config"].get("pairs") else None
    ids = {row["id"] for row in own_rows(run, 0)}
    scope, found, new = {"texts": len(ids), "pairs_sha256": sha}, None, None
    if watched := sum(row["epoch"] == 0 for row in run["samples"]) - len(ids):
        scope["watched"] = (
            watched  # texts of earlier requests: measured too, and in none of these figures
        )
    if path.is_file():
        found = data.read_json(path)
        texts = found.get("texts") if isinstance(found, dict) else None
        fits = (
            isinstance(texts, dict)
            and set(texts) == ids
            and re.fullmatch("[0-9a-f]{32}", str(found.get("salt")))
        )
        if not fits or (pairs and found != traces.hashes(data.read_pairs(pairs), found["salt"])):
            raise ValueError(
                f"{path}: holds not the hashes of this run's texts; put the file of the run back"
            )
    elif pairs:
        found = new = traces.hashes(data.read_pairs(pairs))
    if found is None:
        return scope | {"salt": None, "hashes": [], "hashes_note": NO_HASHES}, None
    hashes = sorted(text["forget"] for text in found["texts"].values())
    return scope | {"salt": found["salt"], "hashes": hashes, "hashes_note": None}, new


def model_of(run):
    """Model before and after, by the sha256 of what a folder loads; a path of one's own machine is cut to its name."""
    config, sha = run["config"], run["config"].get("sha256", {}).get("model")
    name = (
        Path(config["model"]).name
        if sha or Path(config["model"]).is_absolute()
        else config["model"]
    )
    after = models.fingerprint(run["folder"] / "model")
    return {
        "name": name,
        "revision": config.get("revision"),
        "sha256_before": sha,
        "sha256_after": after,
    }


def never_saw(run):
    """The run of a model that never saw the texts, or None; and why there is none to compare with, or None."""
    config = run["config"]
    if not config.get("never_saw"):
        return None, "the run names no model that never saw the texts (--never-saw)"
    try:
        other = read_run(config["never_saw"])
    except (ValueError, OSError):
        return None, "the run of the model that never saw the texts is not where it was"
    sha = [each["config"].get("sha256", {}).get("pairs") for each in (run, other)]
    ids = [[row["id"] for row in own_rows(each, 0)] for each in (run, other)]
    if other["summary"]["method"] != "none" or sha[0] != sha[1] or ids[0] != ids[1]:
        return None, "the run of the model that never saw the texts is another one by now"
    return other, None


def figures_of(run, never):
    """{measure: {"before", "after", "never_saw", "unseen"}}; a figure is {"value", "low", "high", "n"} or None.

    Perplexities are summary.json's. ValueError where the means of samples.jsonl, all texts', are not those there.
    """
    last, unseen = run["summary"]["epochs"], run["config"].get("thresholds") == "auto"
    figures = {}
    for name in (
        *LEFT,
        "entropy",
        *(name for name in OF_SPANS if any(name in row for row in own_rows(run, 0))),
    ):
        sides = [("before", run, 0), ("after", run, last), ("never_saw", never, 0)]
        figures[name] = {
            when: side and interval(values_of(side, epoch, name)) for when, side, epoch in sides
        }
        for when, epoch in (("before", 0), ("after", last)):
            value = mean(row.get(name) for row in run["samples"] if row["epoch"] == epoch)
            said = run["summary"][when].get(name)
            if (value is None) != (said is None) or (
                value is not None and abs(value - said) > 1e-5
            ):
                why = f"`{name}` {when} is {said}, and samples.jsonl gives {value}"
                raise ValueError(f"{run['folder'] / 'summary.json'}: {why}; {WAY_OUT}")
        of_unseen = run["summary"]["thresholds"].get("ma") if unseen and name == "ma" else None
        figures[name]["unseen"] = (
            None if of_unseen is None else {"value": of_unseen}
        )  # kept as the threshold
    for name in (name for name in run["summary"]["before"] if name.startswith("ppl_")):
        sides = {"before": run["summary"]["before"], "after": run["summary"]["after"]}
        sides["never_saw"] = never["summary"]["before"] if never else {}
        figures[name] = {
            when: {"value": side[name]} if side.get(name) else None for when, side in sides.items()
        }
    return figures


def own_rows(run, epoch):
    """The rows of samples.jsonl of an epoch, without the texts of earlier requests (icu.py --after)."""
    return [row for row in run["samples"] if row["epoch"] == epoch and not row.get("watched")]


def values_of(run, epoch, name):
    """A measure of each text of the request, in the order of samples.jsonl; None where it was not to be had."""
    return [row.get(name) for row in own_rows(run, epoch)]


def left_of(row, name):
    """A measure of memory of a text; None for one of the whole text where a part is marked: the rest is to stay."""
    return None if "ma_spans" in row and name in LEFT else row.get(name)


def interval(values):
    """{"value", "low", "high", "n"}: the mean over n texts, with the bootstrap's 95% percentile interval, seeded.

    None stands for no number. low and high are None for fewer than FEW texts; None in all where there is no number.
    """
    values = np.array([value for value in values if value is not None], dtype=float)  # (n,)
    if not len(values):
        return None
    low = high = None
    if len(values) >= FEW:
        low, high = (
            round(float(x), 6) for x in np.percentile(resampled_means(values), [2.5, 97.5])
        )
    return {"value": round(float(values.mean()), 6), "low": low, "high": high, "n": len(values)}


def risks(run, never):
    """A sentence of fixed words for each measure of memory: what is left, beside a model that never saw the texts.

    By the interval of the mean difference, text by text: all above 0, all under 0, or within MARGIN of it.
    """
    sentences = []
    marked = any("ma_spans" in row for row in own_rows(run, 0))
    for name in (*LEFT, *LEFT_OF_PARTS) if marked else LEFT:
        after = [left_of(row, name) for row in own_rows(run, run["summary"]["epochs"])]
        if marked and set(after) == {None}:
            continue
        other = [left_of(row, name) for row in own_rows(never, 0)] if never else after
        found = interval(
            [a - b for a, b in zip(after, other, strict=True) if a is not None and b is not None]
        )
        said = f"cannot be told with n = {found['n'] if found else 0}"
        if not never:
            said += ", without figures of a model that never saw them"
        elif found and found["low"] is not None:
            low, high = found["low"], found["high"]
            said = (
                MORE
                if low > 0
                else LESS
                if high < 0
                else AS_NEVER
                if max(-low, high) <= MARGIN
                else said
            )
            said += f" (n = {found['n']}, difference {found['value']:+.3f}, 95% from {low:+.3f} to {high:+.3f})"
        sentences.append(
            f"{LABELS[name]}{' of texts without a mark' if marked and name in LEFT else ''}: {said}"
        )
    return sentences


def audit_of(folder):
    """The sentences of audit.json, a list or an object of them; ["not audited"] where there are none."""
    found = data.read_json(folder / "audit.json") if (folder / "audit.json").is_file() else {}
    said = found.get("sentences") if isinstance(found, dict) else None
    said = list(said.values()) if isinstance(said, dict) else said if isinstance(said, list) else []
    return [sentence for sentence in said if TEXT[1](sentence)] or ["not audited"]


def untested(found):
    """What the certificate cannot speak of, given the rest of it."""
    missing = {
        "sampling, membership inference, relearning, quantised copies (evals/audit.py)": found[
            "audit"
        ]
        == ["not audited"],
        "abilities on tasks (evals/tasks.py)": len(found["tasks"]) < 2,
        "perplexity on other texts (--ppl)": not any(
            name.startswith("ppl_") for name in found["figures"]
        ),
        f"a model that never saw the texts: {found['never_saw']}": found["never_saw"] is not None,
    }
    return [what for what, is_missing in missing.items() if is_missing] + list(ALWAYS_UNTESTED)


def hashes_of(folder):
    """{name: sha256} of the run's files and of each file of its model.

    config.json and samples.jsonl without what `purge` changes: the mark that the texts are gone, and what was said.
    """
    config = data.read_json(folder / "config.json")
    rows = [row | {"generation": None} for row in data.read_jsonl(folder / "samples.jsonl")]
    kept = {name: value for name, value in config.items() if name not in ("redact", "purged")}
    found = {"config.json": digest(kept), "samples.jsonl": digest(rows)}
    names = [
        "summary.json",
        "metrics.jsonl",
        "audit.json",
        *(f"tasks-{w}/tasks.json" for w in ("before", "after")),
    ]
    paths_of = [folder / name for name in names] + sorted((folder / "model").rglob("*"))
    return found | {str(p.relative_to(folder)): data.sha256_of(p) for p in paths_of if p.is_file()}


def digest(value):
    """sha256 of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- whether it still holds ---


def differences(path, folder, key=None):
    """What of a certificate is not so any more, a list of sentences; `folder`: its run; key: who must have signed.

    ValueError for a file that is no certificate.
    """
    found, content, signature = (
        check(data.read_json(path), FORM, path),
        path.read_bytes(),
        Path(f"{path}.sig"),
    )
    check(found["request"], REQUEST, f"{path}: request")
    unlike = []
    if (
        digest({name: value for name, value in found.items() if name != "sha256"})
        != found["sha256"]
    ):
        unlike.append(f"{path.name}: changed (not its own sha256)")
    signer = found["signed_by"]
    if signer and not signature.is_file():
        unlike.append(f"{signature.name}: missing, and the certificate says that it is signed")
    elif signer and (why := signatures.trouble(content, signature, signer, NAMESPACE)):
        unlike.append(
            f"{signature.name}: not a signature of {path.name} by the key that it names ({why})"
        )
    elif not signer and signature.is_file():
        unlike.append(f"{signature.name}: there, and the certificate says that it is not signed")
    if key and signer != signatures.public_key(key):
        unlike.append(
            f"{path.name}: " + (f"signed with another key than {key}" if signer else "not signed")
        )
    try:
        page = certificate_page.render(found)
    except (KeyError, TypeError, ValueError, AttributeError):
        unlike, page = [*unlike, f"{path.name}: lacks what a certificate has"], b""
    if path.with_name(PAGE).is_file() and path.with_name(PAGE).read_bytes() != page:
        unlike.append(f"{PAGE}: not what {path.name} says")
    return unlike + run_differences(found, folder)


def run_differences(found, folder):
    """What of a run folder is not as its certificate has it."""
    try:
        now = hashes_of(folder)
    except (ValueError, OSError) as error:
        return [f"{folder}: {flags.first_line(error)}"]
    said = found["files"]
    unlike = [
        f"{name}: {'changed' if name in now else 'missing'}"
        for name in said
        if now.get(name) != said[name]
    ]
    unlike += [f"{name}: was not there" for name in now if name not in said]
    if unlike:
        return unlike
    try:  # all of its files are what they were, so they must give the same certificate
        again, _ = build(folder, found["request"], found["signed_by"], kept=found)
    except (ValueError, OSError) as error:
        return [flags.first_line(error)]
    names = (found.keys() | again.keys()) - {"sha256"}
    unlike = [name for name in sorted(names) if found.get(name) != again.get(name)]
    return [f"{FILE}: `{name}` is not what the run's files give" for name in unlike]
