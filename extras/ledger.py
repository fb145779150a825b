"""A ledger of certificates: one line a run, each with the sha256 of the line before, so that a change shows.

    python evals/report.py RUN --certificate --ledger DIR    # adds a line to DIR/ledger.jsonl
    python evals/report.py --verify DIR/ledger.jsonl         # finds a changed, missing or reordered line

ledger.head names the last line: the chain alone cannot tell that lines are gone from its end. Who may write to DIR can
write a whole new chain and head, so a copy of ledger.head elsewhere (a letter, an e-mail) is what pins the past.
"""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import filelock

from kit import data, runs

NAME, HEAD = "ledger.jsonl", "ledger.head"
WAIT = 60  # seconds for another process that is adding a line


def add(folder, row):
    """Adds the dict `row` as the next line, on disk when this returns; its number, also if it stands there already.

    ValueError: a ledger that `differences` finds something in, or one that another process holds for a minute.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", mode=0o600, timeout=WAIT):
            lines = whole_lines(folder)
            for old in map(json.loads, lines):
                if row == {name: old.get(name) for name in row}:
                    return old["line"]
            number, previous = len(lines) + 1, sha256(lines[-1]) if lines else None
            runs.append(folder / NAME, [{"line": number, "previous": previous, **row}])
            write_head(folder)
            return number
    except filelock.Timeout:
        raise ValueError(f"--ledger {folder}: another process holds it; try again") from None


def whole_lines(folder):
    """The lines of a ledger that nothing is wrong with, as bytes. A kill may have left a piece of one, which is cut
    off, or an old head, which is made new.
    """
    path = folder / NAME
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if not whole and not (folder / HEAD).exists():
        data.write_json(folder / HEAD, {"line": 0, "sha256": None})
    if found := differences(path, whole):
        raise ValueError(
            f"--ledger {folder}: nothing is added to a damaged ledger ({found[0]}); begin another one"
        )
    if whole != content:
        data.write_bytes(path, whole)
    if whole:
        write_head(folder)
    return whole.splitlines()


def write_head(folder):
    """ledger.head: the number and the sha256 of the last line."""
    lines = (folder / NAME).read_bytes().splitlines()
    data.write_json(folder / HEAD, {"line": len(lines), "sha256": sha256(lines[-1])})


def differences(path, content=None):
    """What is wrong with a ledger, a list of sentences; data: its bytes, if they are not to be read from `path`."""
    lines = (Path(path).read_bytes() if content is None else content).splitlines()
    numbers, previous = [], []
    for place, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            numbers.append(int(row["line"]))
            previous.append(row["previous"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return [f"line {place} of the file: damaged, or none of a ledger"]
    found = [missing(a, b) for a, b in pairwise([0, *sorted(numbers)]) if b - a > 1]
    found += [f"line {b}: stands behind line {a}" for a, b in pairwise(numbers) if b <= a]
    hashes = dict(zip(numbers, map(sha256, lines), strict=True))
    for number, said in zip(numbers, previous, strict=True):
        if said != hashes.get(number - 1, said):
            found.append(
                f"line {number - 1}: changed, or line {number}, which says another sha256 of it"
            )
    try:  # the head is behind the lines where a kill came between the two files
        head = data.read_json(Path(path).with_name(HEAD))
        number, said = int(head["line"]), head["sha256"]
    except (ValueError, KeyError, TypeError):
        return [*found, f"{HEAD}: missing or damaged, so lines may be gone from the end"]
    last, changed = max(hashes, default=0), hashes.get(number, said) != said
    return (
        found
        + [missing(last, number + 1)] * (number > last)
        + [f"line {number}: not as {HEAD} has it"] * changed
    )


def missing(a, b):
    return f"line {a + 1}: missing" if b - a == 2 else f"lines {a + 1} to {b - 1}: missing"


def sha256(line):
    return hashlib.sha256(line).hexdigest()
