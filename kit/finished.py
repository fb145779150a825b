"""A finished run folder is input like any other: what evals/report.py reads of it, every field checked.

What is no such folder, or one that was damaged, is a ValueError of one line that names the file (and the line), what
is wrong and what to do. Fields that nothing here asks for may be missing or hold anything: older runs are read.
"""

import re
from pathlib import Path

from kit import data, models, requests
from kit.protocols import PROTOCOLS
from kit.runs import OF_SPANS

# Flags that make two runs of one method different rows; runs that differ in others only (seed, pairs) are averaged.
BEFORE_SETTINGS = (
    "model",
    "protocol",
    "context",
    "bert",
    "num_beams",
    "dtype",
)  # what the measures before depend on
SETTINGS = (
    *BEFORE_SETTINGS, "targets", "alpha", "beta", "forget_weight", "lr", "batch_size", "refine", "answer", "answers",
    "method_file", "dpo_beta", "thresholds", "bert_threshold", "bleu_threshold", "max_epochs",
)  # fmt: skip
WAY_OUT = (
    "this is not what a run wrote there: copy the folder again, make the run again, or leave it out"
)

# --- checks: (what a value has to be, in words; whether it is) ---


def number(low, high, kinds=(int, float)):
    """A finite number in a range; true and false are none."""
    what = "whole number" if float not in kinds else "number"
    return (
        f"a {what} from {low:g} to {high:g}",
        lambda value: type(value) in kinds and low <= value <= high,
    )


def whole(low, high=1e9):
    return number(low, high, kinds=(int,))


def null_or(check):
    what, fits = check
    return f"{what}, or null", lambda value: value is None or fits(value)


def list_of(check):
    what, fits = check
    return (
        f"a list, each item {what}",
        lambda value: isinstance(value, list) and all(map(fits, value)),
    )


def is_text(value):
    """Whether it is a string that can be written: JSON can spell half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


TEXT = "a text", is_text
NAME = "a text that is not blank", lambda value: is_text(value) and value.strip() != ""
BOOL = "true or false", lambda value: isinstance(value, bool)
OBJECT = "an object {...}", lambda value: isinstance(value, dict)
PROTOCOL = (
    f"one of {', '.join(PROTOCOLS)}",
    lambda value: isinstance(value, str) and value in PROTOCOLS,
)
SHARE = null_or(number(0, 1))
SIZE = number(0, 1e308)
PLAIN = (TEXT, BOOL, number(-1e308, 1e308))
FLAG = (
    "a number, a text, true, false or null",
    lambda value: value is None or any(fits(value) for _, fits in PLAIN),
)
SETTING = f"{FLAG[0]}, or a list of them", lambda value: FLAG[1](value) or list_of(FLAG)[1](value)

# --- the fields of each file; one that ends in ? may be missing ---

MEASURES = {"el10": SHARE, "ma": SHARE, "bleu": SHARE, "entropy": null_or(number(0, 64))}
MEASURES |= {"bertscore": null_or(number(-1.01, 1.01))}
MARKED = {
    f"{name}?": SHARE for name in OF_SPANS
}  # of texts of which a part is marked, and of runs that have some
CONFIG = {f"{name}?": SETTING for name in SETTINGS}
CONFIG |= {
    "model": NAME,
    "protocol": PROTOCOL,
    "num_beams?": whole(1, 1000),
    "sha256?": OBJECT,
    "redact?": BOOL,
}
CONFIG |= {"earlier?": list_of(null_or(TEXT))}
CONFIG |= {
    f"{name}?": null_or(TEXT) for name in ("after", "pairs", "preset", "published", "revision")
}
SUMMARY = {
    "method": NAME,
    "protocol": PROTOCOL,
    "stopped": TEXT,
    "epochs": whole(0),
    "collapsed": BOOL,
}
SUMMARY |= {"thresholds": OBJECT, "before": OBJECT, "after": OBJECT}
THRESHOLDS = {f"{name}?": null_or(number(0, 1e9)) for name in ("el10", "ma", "bleu", "bertscore")}
EPOCH = {"epoch": whole(0), "active": whole(0)} | MEASURES | MARKED
SAMPLE = (
    {"epoch": whole(0), "id": NAME, "generation": null_or(TEXT), "watched?": BOOL}
    | MEASURES
    | MARKED
)
AVERAGES = {"cls": SHARE, "dia": SHARE, "cls_missing": list_of(TEXT), "dia_missing": list_of(TEXT)}
GRADES = {
    "gpt": "judge.json",
    "human": "people.json",
}  # of evals/judge.py, by the measure that evals/report.py has of them
GRADED = {"mean": null_or(number(0, 10)), "n": whole(0)}
TASK = {
    "value?": SIZE,
    "bad_rows?": whole(0),
    "bad?": list_of(TEXT),
    "missing?": TEXT,
    "error?": TEXT,
}


def check(value, fields, where):
    """The dict `value` if it has these fields and each is what it has to be, or ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: is not an object {{...}}; {WAY_OUT}")
    for name, (what, fits) in fields.items():
        name, optional = name.removesuffix("?"), name.endswith("?")
        if name in value and not fits(value[name]):
            raise ValueError(
                f"{where}: `{name}` is {repr(value[name])[:40]}, not {what}; {WAY_OUT}"
            )
        if name not in value and not optional:
            raise ValueError(f"{where}: no `{name}`; {WAY_OUT}")
    return value


# --- reading ---


def read_run(folder):
    """A finished run as a dict: folder, config, summary, metrics, samples, tasks and redacted. ValueError otherwise.

    gpt, human: judge.json and people.json of evals/judge.py, where they are; their means also stand in the summary.
    tasks: {when: tasks.json of tasks-WHEN}, as far as there are any; their averages also stand in the summary.
    redacted: whether the folder holds no text to show (icu.py --redact).
    """
    folder = Path(folder)
    check_finished(folder)
    run = {"folder": folder, "tasks": {}}
    for name, fields in (("config", CONFIG), ("summary", SUMMARY)):
        run[name] = check(data.read_json(folder / f"{name}.json"), fields, folder / f"{name}.json")
    config, summary, path = run["config"], run["summary"], folder / "summary.json"
    check(config.get("sha256", {}), {"pairs?": null_or(TEXT)}, f"{folder / 'config.json'}: sha256")
    check(summary["thresholds"], THRESHOLDS, f"{path}: thresholds")
    for when in ("before", "after"):
        fields = dict.fromkeys(summary[when], null_or(SIZE)) | MEASURES | MARKED  # and ppl_NAME
        check(summary[when], fields, f"{path}: {when}")
        if (tasks := folder / f"tasks-{when}" / "tasks.json").is_file():
            run["tasks"][when] = found = read_tasks(tasks)
            averages = {f"{kind}_avg": found["averages"].get(kind) for kind in ("cls", "dia")}
            summary[when] |= {name: value for name, value in averages.items() if value is not None}
    if (folder / "audit.json").is_file():
        run["audit"] = read_audit(folder / "audit.json")
        for when in ("before", "after"):
            summary[when] |= run["audit"]["headline"].get(when, {})
    for name, file in GRADES.items():
        if (folder / file).is_file():
            run[name] = read_grades(folder / file)
            for when in ("before", "after"):
                summary[when][name] = run[name][when]["mean"]
    summary["after"]["epochs"] = summary["epochs"]
    run["metrics"] = read_metrics(folder / "metrics.jsonl", summary["epochs"])
    run["samples"] = read_samples(folder / "samples.jsonl", summary["epochs"])
    run["redacted"] = config.get("redact", False) or run["samples"][0]["generation"] is None
    return run


def read_never_saw(args):
    """The measures of --never-saw, a finished --eval-only run over the same pairs, measured alike. ValueError."""
    run = read_run(args.never_saw)
    if run["summary"]["method"] != "none":
        raise ValueError(
            f"--never-saw {args.never_saw}: a run that has trained; make one with --eval-only"
        )
    measured = [name for name in BEFORE_SETTINGS if name != "model"]
    differ = [name for name in measured if run["config"].get(name) != getattr(args, name)]
    if differ or run["config"].get("sha256", {}).get("pairs") != models.fingerprint(args.pairs):
        raise ValueError(
            f"--never-saw {args.never_saw}: measured otherwise ({differ[0] if differ else 'other pairs'})"
        )
    return run["summary"]["before"]


def models_of(run):
    """{"before", "after"}: (folder or name, revision) of the models of a run. ValueError if it has none of its own."""
    after, revision = run["folder"] / "model", run["config"].get("revision")
    if not after.is_dir():
        why = "diverged" if run["summary"]["stopped"] == "diverged" else "only measured"
        raise ValueError(f"{run['folder']}: this run {why}; it has no model of its own")
    if revision is not None and not re.fullmatch("[0-9a-f]{7,40}", revision):
        raise ValueError(
            f"{run['folder'] / 'config.json'}: `revision` is {revision[:40]!r}, which names no commit"
        )
    return {"before": (run["config"]["model"], revision), "after": (str(after), None)}


def check_finished(folder):
    """ValueError for what is no run folder, and for a run that has not ended."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: "
            + ("is no folder: name a run folder" if folder.exists() else "no such folder")
        )
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{folder}: no config.json, so not a run folder: name one that icu.py --out has written"
        )
    if not (folder / "summary.json").exists():
        raise ValueError(
            f"{folder}: no summary.json: the run is in progress or was interrupted; wait for its end, or go on with it "
            "by icu.py --resume"
        )


def read_tasks(path):
    """The tasks.json of evals/tasks.py. ValueError."""
    found = check(data.read_json(path), {"averages": OBJECT}, path)
    check(found["averages"], AVERAGES, f"{path}: averages")
    results = {name: result for name, result in found.items() if name != "settings"}
    for name, result in results.items():
        check(result, {} if name == "averages" else TASK, f"{path}: {name[:40]}")
    return results


def read_audit(path):
    """An audit.json of evals/audit.py; its headline figures have the names of evals/report.py's columns. ValueError."""
    found = check(data.read_json(path), {"headline": OBJECT, "models": OBJECT}, path)
    for model, figures in found["headline"].items():
        check(
            figures,
            dict.fromkeys(figures, null_or(number(-1e308, 1e308))),
            f"{path}: headline of {str(model)[:40]}",
        )
    return found


def read_grades(path):
    """A judge.json or people.json of evals/judge.py. ValueError."""
    names = {"judge": NAME, "prompt": NAME} if path.name == "judge.json" else {}
    found = check(data.read_json(path), {"before": OBJECT, "after": OBJECT, **names}, path)
    for when in ("before", "after"):
        check(found[when], GRADED, f"{path}: {when}")
    return found


def read_metrics(path, last):
    """The rows of metrics.jsonl, one an epoch, 0 to `last`. ValueError."""
    rows = []
    for line, row in data.numbered_jsonl(path):
        check(row, EPOCH, f"{path} line {line}")
        if row["epoch"] != len(rows):
            raise ValueError(
                f"{path} line {line}: epoch {row['epoch']} where {len(rows)} should follow; {WAY_OUT}"
            )
        rows.append(row)
    if len(rows) != last + 1:
        raise ValueError(
            f"{path}: {len(rows)} lines, and summary.json ends in epoch {last}; {WAY_OUT}"
        )
    return rows


def read_samples(path, last):
    """The rows of samples.jsonl: the same ids in the same order for each epoch, 0 to `last`. ValueError."""
    lines = [
        (line, check(row, SAMPLE, f"{path} line {line}")) for line, row in data.numbered_jsonl(path)
    ]
    ids = [row["id"] for _, row in lines if row["epoch"] == 0] or [None]
    for number, (line, row) in enumerate(lines):
        epoch, place = divmod(number, len(ids))
        if (row["epoch"], row["id"]) != (epoch, ids[place]):
            found, due = (
                f"{row['id'][:40]!r} of epoch {row['epoch']}",
                f"{str(ids[place])[:40]!r} of epoch {epoch}",
            )
            raise ValueError(f"{path} line {line}: {found} where {due} should follow; {WAY_OUT}")
        if (row["generation"] is None) != (lines[place][1]["generation"] is None):
            raise ValueError(
                f"{path} line {line}: some lines have a generation, others null; {WAY_OUT}"
            )
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path}: an id stands twice in epoch 0; {WAY_OUT}")
    if len(lines) != len(ids) * (last + 1):
        raise ValueError(
            f"{path}: {len(lines)} lines, and {len(ids)} samples in epochs 0 to {last} are {len(ids) * (last + 1)}; "
            + WAY_OUT
        )
    return [row for _, row in lines]


def read_pairs_of(run):
    """{id: pair} of the run's pairs file, and of the earlier requests that it watched. ValueError: changed since."""
    file = run["config"].get("pairs") or "the pairs file"
    try:
        earlier = requests.earlier_pairs(run["config"].get("after"))
        pairs = {pair["id"]: pair for pair in [*data.read_pairs(file), *earlier]}
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{error} (the pairs of {run['folder']}; without its texts: --redact)"
        ) from None
    texts = (row["id"] for row in run["samples"] if row["generation"] is not None)
    if lost := next((id for id in texts if id not in pairs), None):
        raise ValueError(
            f"{file}: no pair {lost}, which {run['folder']} has: the file was made again after the run"
        )
    return pairs
