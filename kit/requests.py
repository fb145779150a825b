"""Requests that follow each other: the runs that a run goes on from (--after), the texts that they forgot, watched.

A watched text is measured with the new ones every epoch and has no step of its own, until it comes back: then it joins
the active set with its partner, as Eq. 5 lets one leave. Cost goes with what is new and what comes back.
"""

import contextlib
import hmac
import secrets
from pathlib import Path
from typing import NamedTuple

from kit import data, models
from kit.processes import print0
from kit.text import gram_hashes, letters, plain

MARGIN = (
    0.05  # how far above its own run's end the MA of a text may lie before it counts as come back
)


class Earlier(NamedTuple):
    """A text of an earlier request, as its own run left it."""

    pair: dict  # of that run's pairs.jsonl; its id is RUN/ID
    ma: float | None  # MA at the end, of a marked text over its spans
    forgotten: bool  # by Eq. 5
    joined: str | None = None  # the new text that it is joined to, since one holds the other


def chain_of(after):
    """(folder, config) of the run `after` and those that it went on from, the latest first. ValueError names what is
    wrong with one of them.
    """
    found = []
    while after:
        folder = Path(after)
        missing = [
            name for name in ("config.json", "summary.json") if not (folder / name).is_file()
        ]
        if missing:
            raise ValueError(
                f"--after {folder}: no {missing[0]}; name a run that has ended (or end it with --resume)"
            )
        config = data.read_json(folder / "config.json")
        known = isinstance(config, dict) and isinstance(config.get("sha256"), dict)
        texts = (str, str, str | None)
        if not known or not all(
            map(isinstance, map(config.get, ("model", "pairs", "after")), texts)
        ):
            raise ValueError(f"{folder / 'config.json'}: is not what a run wrote there")
        if folder.resolve() in [other.resolve() for other, _ in found]:
            raise ValueError(f"--after {folder}: goes on from itself")
        found.append((folder, config))
        after = config.get("after")
    return found


def is_purged(config):
    """Whether the texts of a run are gone, or were never to stay."""
    return bool(config.get("redact") or config.get("purged"))


def pairs_of(folder, config):
    """The pairs of an earlier request, their ids RUN/ID. ValueError: not those that the run was made with."""
    if models.fingerprint(config["pairs"]) != config["sha256"].get("pairs"):
        raise ValueError(
            f"{folder}: {config['pairs']} is not there, or not what the run was made with (sha256)"
        )
    return [
        pair | {"id": f"{folder.name}/{pair['id']}"} for pair in data.read_pairs(config["pairs"])
    ]


def earlier_pairs(after):
    """The pairs of all requests up to the run `after` whose texts are still there, the latest request's first."""
    return [
        pair
        for folder, config in chain_of(after)
        if not is_purged(config)
        for pair in pairs_of(folder, config)
    ]


def targets(after):
    """What no partner may hold: (`earlier_pairs`, hashes.json of each of the requests whose texts are gone)."""
    purged = []
    for folder in [folder for folder, config in chain_of(after) if is_purged(config)]:
        hashes = (
            data.read_json(folder / "hashes.json") if (folder / "hashes.json").is_file() else {}
        )
        if not isinstance(hashes, dict) or not {"salt", "texts", "grams"} <= hashes.keys():
            raise ValueError(
                f"{folder}: its texts are gone, and it has no hashes.json that tells partners from them"
            )
        purged.append(hashes)
    return earlier_pairs(after), purged


def with_earlier(args, pairs):
    """(the pairs and, behind them, those of earlier requests; {index: Earlier} of the latter), the latest run's first.

    A run whose texts were purged is named and passed over: knn.py still keeps its texts out of the partners.
    """
    found = []
    for folder, config in chain_of(args.after) if args.watch else ():
        if is_purged(config):
            print0(
                f"note: {folder}: its texts are gone (purged, or --redact): they cannot be watched"
            )
            continue
        rows = data.read_jsonl(folder / "samples.jsonl")
        ends = {
            f"{folder.name}/{row['id']}": row for row in rows if row["epoch"] == rows[-1]["epoch"]
        }
        for pair in pairs_of(folder, config):
            end = ends.get(pair["id"], {})
            found.append(
                Earlier(pair, end.get("ma_spans", end.get("ma")), end.get("forgotten", False))
            )
    watched = [old._replace(joined=overlapping(old.pair, pairs)) for old in found]
    for old in watched:
        if old.joined:
            print0(
                f"note: {old.pair['id']}, of an earlier request, and {old.joined} overlap: both are trained on"
            )
    return [*pairs, *(old.pair for old in watched)], dict(enumerate(watched, start=len(pairs)))


def overlapping(pair, others):
    """The id of the first of other pairs whose text holds this one's or lies in it, by letters; or None."""
    spelt = lambda p: letters(plain(p["prefix"] + p["suffix"]))  # noqa: E731
    mine = spelt(pair)
    return next(
        (other["id"] for other in others if mine in spelt(other) or spelt(other) in mine), None
    )


def watch(forgotten, rows, *, under_eq5, watched, epoch):
    """The set of forgotten samples, with those of the watched that came back taken out, and the others put in.

    rows: the measures of all samples; under_eq5: indices that Eq. 5 calls forgotten now; watched: {index: Earlier}. A
    text comes back that Eq. 5 called forgotten and does no longer, or whose MA is over its own run's end by more than
    MARGIN. One that is joined to a new text begins with it, before the first epoch.
    """
    for i, old in watched.items():
        ma = rows[i].get("ma_spans", rows[i]["ma"])
        back = (old.forgotten and i not in under_eq5) or (
            None not in (ma, old.ma) and ma > old.ma + MARGIN
        )
        forgotten = forgotten - {i} if back or (epoch == 0 and old.joined) else forgotten | {i}
    return forgotten


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


# --- the model that all began with ---


def fill(args):
    """--model of a run that goes on from another, and what hangs on it, checked: args.earlier, the fingerprints of the
    pairs that are watched, and args.original, where the model that the chain began with is.
    """
    args.earlier = []
    if not args.after:
        if not args.model:
            raise ValueError(
                "--model DIR is missing: the causal LM, a folder or a name on the hub (or --after RUN)"
            )
        return
    if args.model:
        raise ValueError("--after RUN goes on from RUN/model: leave --model out")
    chain = chain_of(args.after)
    (folder, config), (_, first) = chain[0], chain[-1]
    if args.out and Path(args.out).resolve() in [run.resolve() for run, _ in chain]:
        raise ValueError(
            f"--out {args.out}: is an earlier request that this one goes on from; choose another folder"
        )
    if not (folder / "model").is_dir():
        raise ValueError(f"--after {folder}: has no model/ to go on from")
    args.model, args.revision = str(folder / "model"), None
    args.earlier = [
        each["sha256"].get("pairs") for _, each in chain if args.watch and not is_purged(each)
    ]
    args.original = {"model": first["model"], "revision": first.get("revision")}
    sha256 = first["sha256"].get("model")
    if args.anchor == "original" and models.fingerprint(first["model"]) != sha256:
        raise ValueError(
            f"--anchor original: {first['model']} (sha256 {sha256}), which the first request began with, is not there "
            "or has changed: bring it back, or pass --anchor previous"
        )
    differ = [
        name
        for name in ("protocol", "context", "num_beams")
        if config.get(name) != getattr(args, name)
    ]
    differ += [] if config["sha256"].get("bert") == models.fingerprint(args.bert) else ["bert"]
    if differ:
        raise ValueError(
            f"--after {folder}: was measured otherwise ({', '.join(differ)}): pass the same flags"
        )


@contextlib.contextmanager
def anchored(model, args):
    """The model that Eq. 4's frozen copy is a copy of: with --after the one that the first request began with."""
    if not args.after or args.anchor == "previous":
        yield model
        return
    how = {
        "dtype": args.dtype,
        "allow_pickle": args.allow_pickle,
        "revision": args.original["revision"],
    }
    yield models.load_model(args.original["model"], device=args.device, **how)[0]
