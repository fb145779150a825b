"""Goes with its last reader: data.check_outputs is the rule of what may be overwritten, and kit/runs.py of run folders."""

import os
import re
import tempfile
from pathlib import Path

from kit import data

OLD_CONFIG = "config.json.old"

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
