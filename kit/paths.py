"""What may be written: never a file that the same command reads, nothing that is no plain file, and over an old file
only where it is what this command writes there. All of it is asked before any work.
"""

import os
import re
import tempfile
from pathlib import Path

from kit import data

GROWING = (
    "metrics.jsonl",
    "samples.jsonl",
    "timing.jsonl",
)  # of a run folder: an epoch adds to them
OLD_CONFIG = "config.json.old"  # config.json of a run that is being removed: it is none any more
# In the order in which they are removed. The last one says that those before it may go, also after a kill.
RUN_FILES = (
    "summary.json", "state", "model", "model.part", "tasks-before", "tasks-after", "table.md", "table.csv", "cases.md",
    "explain.html", "curves.png", "tradeoff.png", "tasks.md", "judge.json", "judge.jsonl", "people.json", "sheet.html",
    "sheet-key.json", "audit.json", "audit.md", "audit.png", "certificate.json", "certificate.json.sig",
    "certificate.html", "hashes.json", *GROWING, OLD_CONFIG,
)  # fmt: skip


# --- files ---


def check_outputs(outputs, *, reads=(), overwrite=False, ask=True):
    """ValueError unless each file of `outputs` can be written without harm.

    outputs: (path, own) each, where own(path) says whether a file that is there is one that this command writes.
    reads: files of the same command, and folders of models: nothing in them is written.
    ask: an old file needs `overwrite`, whatever it holds; else only one that is not the command's own.
    """
    resolved = {}
    for path, own in outputs:
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name a file")
        if os.path.lexists(path) and not path.is_file():
            raise ValueError(
                f"{path} is no plain file (a device, a pipe, a link to nothing): name another file"
            )
        check_writable(path)
        place = path.resolve()
        if place in resolved:
            raise ValueError(
                f"{path} would be written twice, also as {resolved[place]}: name another file"
            )
        resolved[place] = path
        for read in filter(None, reads):
            if Path(read).exists() and is_part_of(path, read):
                raise ValueError(f"{path} is read by this command (in {read}): name another file")
        if path.exists():
            check_replaceable(path, own, overwrite, ask)


def is_part_of(path, read):
    """Whether `path` is the file `read`, under whatever name, or lies in the folder `read`."""
    path, read = Path(path), Path(read)
    if path.exists() and path.samefile(read):
        return True
    return read.is_dir() and path.resolve().is_relative_to(read.resolve())


def check_replaceable(path, own, overwrite, ask):
    """ValueError for a file that is there and may not be replaced; an empty one holds nothing to lose."""
    ours = path.stat().st_size == 0 or own(path)
    if ask and overwrite and not ours:
        raise ValueError(
            f"{path} is not what this command writes, so it is not replaced: name another file"
        )
    if not overwrite and (ask or not ours):
        what = "exists already" if ours else "exists already and is not what this command writes"
        raise ValueError(
            f"{path} {what}: pass {'--overwrite to replace it' if ours or not ask else 'another file'}"
        )


def check_writable(path):
    """ValueError where no file can be made beside `path`, or in the nearest folder that is there."""
    folder = next(
        parent for parent in path.absolute().parents if os.path.lexists(parent)
    )  # a link to nothing, too
    try:
        tempfile.TemporaryFile(dir=folder).close()
        (
            folder / f"{path.name}.{os.getpid()}.tmp"
        ).exists()  # how it is written; OSError: the name is too long
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error} ({folder})") from None


# own(path) for `check_outputs`


def begins_with(*starts):
    """A file whose first characters are one of these."""
    starts = tuple(start.encode("latin-1") for start in starts)

    def own(path):
        with open(path, "rb") as file:
            return file.read(max(map(len, starts))).startswith(starts)

    return own


def holds(*names, lines=False):
    """A JSON document with these fields, or JSON lines whose first has them."""

    def own(path):
        try:
            found = next(data.numbered_jsonl(path))[1] if lines else data.read_json(path)
        except (ValueError, OSError):
            return False
        return isinstance(found, dict) and set(names) <= found.keys()

    return own


def is_cases(path):
    """A cases.md of evals/report.py."""
    return re.match(rb"### [^\n]*\n\n\| \| \|\n", path.read_bytes()) is not None


is_explanation = begins_with("<!doctype html>\n<!-- explain.html: ")  # of evals/report.py --explain


# --- run folders ---


def check_run_folder(args):
    """--out can become a run folder and holds nothing that the run reads; ValueError."""
    if not args.out:
        return
    out = Path(args.out)
    check_out(out, args.overwrite or args.resume)
    reads = [
        ("--model", args.model),
        ("--pairs", args.pairs),
        ("--bert", args.bert),
        ("--unseen", args.unseen),
    ]
    for flag, path in [*reads, *(("--ppl", item.partition("=")[2]) for item in args.ppl)]:
        if path and Path(path).exists() and Path(path).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--out {out}: {flag} {path} lies in it; choose another folder")
    config = out / "config.json"
    if args.resume and holds("purged")(config):
        raise ValueError(
            f"--resume: {out} was purged: its texts are gone; begin again with --overwrite"
        )
    if config.exists() and not (out / ".lock").exists() and not holds("thresholds_used")(config):
        raise ValueError(
            f"--out {out}: holds files that are no run (a config.json of something else); choose another"
        )


def check_out(out, overwrite):
    """`out` can become a run folder: writable, and not already one, or ValueError."""
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, not a folder")
    is_run = (out / "config.json").exists()
    if is_run and not overwrite:
        raise ValueError(
            f"--out {out}: already holds a run; pass --overwrite to replace it, or --resume to go on"
        )
    # Without config.json: what a process killed in start_run_folder has left. It removes nothing but an old run (then
    # OLD_CONFIG is there), holds the lock and writes a state, and hashes.json with --redact.
    started = ["state", "hashes.json"] if (out / ".lock").exists() else []
    names = RUN_FILES if (out / OLD_CONFIG).exists() else started
    own = {out / name for name in (".lock", *names)} | set(leftovers(out))
    if out.is_dir() and not set(out.iterdir()) <= own and not is_run:
        raise ValueError(f"--out {out}: holds files that are no run; choose another folder")
    check_writable(out / "config.json")


def leftovers(out):
    """What a killed process left of a JSON file that it was writing."""
    return list(out.glob("*.json.*.tmp"))
