"""Where texts have left traces: a line for each in a file of the cache folder, by which kit/purge.py finds them.

A line is {"pairs": fingerprint of the pairs.jsonl as config.json has it, "path": absolute, "what": one of WHAT}.
"""

import contextlib
import functools
import hmac
import json
import os
import secrets
from pathlib import Path

from kit import data
from kit.text import gram_hashes, plain

WHAT = (
    "pairs", "leak report", "embeddings", "measures before", "run", "cases", "answers of a judge", "sheet",
    "explanation",
)  # fmt: skip


def registry():
    """The file of the traces."""
    return data.cache_folder("traces.jsonl")


def note(pairs, path, what):
    """Adds a line, once; a cache that cannot be written is a note, not an error. Links are resolved: what lies behind
    them is the trace.
    """
    assert what in WHAT, what
    row = {"pairs": pairs, "path": str(Path(path).resolve()), "what": what}
    try:
        if row in rows():
            return
        registry().parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(registry(), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with open(handle, "wb", buffering=0) as file:
            file.write(
                json.dumps(row).encode() + b"\n"
            )  # one write: lines of several processes do not mix
    except OSError as error:
        say_once(
            f"note: the texts' traces are not listed, so purge will not find all of them ({error})"
        )


say_once = functools.cache(print)


def rows():
    """The lines of the registry. Anyone may have written there: what is no such line is passed over."""
    found = []
    lines = (
        registry().read_bytes().decode("utf-8", "replace").split("\n")
        if registry().exists()
        else []
    )
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and all(
                isinstance(row.get(name), str) for name in ("pairs", "path", "what")
            ):
                found.append(row)
    return found


def of(pairs):
    """(path, what) of each trace of these pairs, in the order in which they were left."""
    found = dict.fromkeys((row["path"], row["what"]) for row in rows() if row["pairs"] == pairs)
    return [(Path(path), what) for path, what in found]


# --- what stays when texts go ---


def hashes(pairs, salt=None):
    """hashes.json: enough to tell whether a text was among these pairs, for one who has the text.

    {"salt": 32 hex digits, random, "texts": {id: {"forget", "learn"}}}, each HMAC-SHA256 of prefix + suffix in UTF-8
    with the salt's 16 bytes as key; "grams": what knn.py's leak guard keeps partners of later requests free of. One who
    can guess a text, as of a name and a telephone number, can check the guess. salt: that of an earlier hashes.json.
    """
    salt = bytes.fromhex(salt) if salt else secrets.token_bytes(16)
    digest = lambda text: hmac.digest(salt, text.encode("utf-8"), "sha256").hex()  # noqa: E731
    sides = {"forget": "", "learn": "learn_"}
    texts = {
        pair["id"]: {
            name: digest(pair[f"{side}prefix"] + pair[f"{side}suffix"])
            for name, side in sides.items()
        }
        for pair in pairs
    }
    targets = [plain(pair["prefix"] + pair["suffix"]) for pair in pairs]
    return {"salt": salt.hex(), "texts": texts, "grams": gram_hashes(targets, salt)}
