"""Requests that follow each other: a run goes on from another (--after), whose texts it watches.

A watched text is measured every epoch and has no step of its own, until it comes back: then it
joins the active set with its partner, as Eq. 5 lets one leave.
"""

from pathlib import Path
from typing import NamedTuple

from kit import data, models
from kit.processes import print0
from kit.text import letters, plain

MARGIN = 0.05  # a text has come back when its MA is above its own run's end by more


class Earlier(NamedTuple):
    """A text of an earlier request."""

    pair: dict  # of that run's pairs.jsonl; its id is RUN-SHA/ID
    ma: float | None  # MA at the end, of a marked text over its spans
    forgotten: bool  # by Eq. 5
    joined: str | None = None  # id of a new text that holds it, or lies in it


# --- the chain of runs ---


def chain_of(after):
    """(folder, config) of the run `after` and of those before it, the latest first."""
    chain = []
    while after:
        folder = Path(after)
        if not ((folder / "summary.json").is_file() and (folder / "model").is_dir()):
            raise ValueError(f"--after {folder}: has not ended with summary.json and model/")
        config = data.read_json(folder / "config.json")
        chain.append((folder, config))
        after = config.get("after")
    return chain


def is_purged(config):
    """Whether the texts of a run are gone, or were never to stay."""
    return bool(config.get("redact") or config.get("purged"))


def has_pairs(config):
    """Whether the pairs that a config.json names are there, and those of the run."""
    pairs, sha256 = config.get("pairs"), config.get("sha256", {}).get("pairs")
    return bool(pairs) and models.fingerprint(pairs) == sha256


def pairs_of(folder, config):
    """The pairs of an earlier request, their ids `name_of` it/ID."""
    file, name = config["pairs"], name_of(folder, config)
    if not has_pairs(config):
        raise ValueError(f"{file}: is gone, or not what {folder} was made with (sha256)")
    return [pair | {"id": f"{name}/{pair['id']}"} for pair in data.read_pairs(file)]


def name_of(folder, config):
    """RUN-SHA: other run folders may have the same name."""
    return f"{folder.name}-{config['sha256']['pairs'][:8]}"


def earlier_pairs(after):
    """The pairs that are there of all requests up to the run `after`."""
    pairs = []
    for folder, config in chain_of(after):
        if is_purged(config) and not has_pairs(config):
            print0(f"note: {folder}: its texts are gone, so nothing here knows them any more")
        else:
            pairs += pairs_of(folder, config)
    return pairs


# --- texts that are watched ---


def with_earlier(args, pairs):
    """(the pairs, followed by those of earlier requests; {index: Earlier} of the latter)."""
    watched = {}  # by id: the same texts may have been asked for twice
    for folder, config in chain_of(args.after) if args.watch else ():
        if is_purged(config):
            print0(f"note: {folder}: its texts are gone (purged, or --redact), so not watched")
            continue
        rows = data.read_jsonl(folder / "samples.jsonl")
        epochs = data.read_json(folder / "summary.json")["epochs"]  # of its model
        rows = [row for row in rows if row["epoch"] == epochs]
        ends = {f"{name_of(folder, config)}/{row['id']}": row for row in rows}
        for pair in pairs_of(folder, config):
            end, joined = ends[pair["id"]], overlapping(pair, pairs)
            if joined:
                print0(f"note: {pair['id']} and {joined} overlap: both are trained on")
            ma = end.get("ma_spans", end["ma"])
            watched.setdefault(pair["id"], Earlier(pair, ma, end["forgotten"], joined))
    everything = [*pairs, *(earlier.pair for earlier in watched.values())]
    return everything, dict(enumerate(watched.values(), start=len(pairs)))


def overlapping(pair, others):
    """The id of the first other text that holds this one or lies in it, by letters; or None."""
    own = letters(plain(data.text_of(pair)))
    for other in others:
        text = letters(plain(data.text_of(other)))
        if own in text or text in own:
            return other["id"]
    return None


def watch(forgotten, rows, *, forgotten_now, watched, epoch):
    """The set of forgotten samples: watched texts that came back leave it, the others join it.

    rows: the measures of all samples; forgotten_now: what Eq. 5 calls forgotten; watched: {index:
    Earlier}. A text comes back when it is no longer in it, or when its MA rose by more than MARGIN.
    One that is joined to a new text begins with it.
    """
    for i, earlier in watched.items():
        ma = rows[i].get("ma_spans", rows[i]["ma"])
        rose = None not in (ma, earlier.ma) and ma > earlier.ma + MARGIN
        back = rose or (earlier.forgotten and i not in forgotten_now)
        begins = epoch == 0 and earlier.joined
        forgotten = forgotten - {i} if back or begins else forgotten | {i}
    return forgotten


# --- the model that a run begins with ---


def differences(config, args, flags, files):
    """The names of flags and files (by sha256) that differ from a run's config.json."""
    return [name for name in flags if config.get(name) != getattr(args, name)] + [
        name
        for name in files
        if config["sha256"].get(name) != models.fingerprint(getattr(args, name))
    ]


def resolve(args):
    """What --after says of a run: {"model", "revision", "earlier", "original"}; else "earlier": [].

    earlier: fingerprints of the pairs that are watched; original: what the chain began with.
    """
    if bool(args.model) == bool(args.after):
        raise ValueError(
            "pass either --model DIR (a folder, or a name on the hub), or --after RUN for RUN/model"
        )
    if not args.after:
        return {"earlier": []}
    chain = chain_of(args.after)
    (folder, config), (_, first) = chain[0], chain[-1]
    sha256 = first["sha256"]["model"]
    if args.anchor == "original" and models.fingerprint(first["model"]) != sha256:
        raise ValueError(
            f"--anchor original: {first['model']} (sha256 {sha256}), which the first request began "
            "with, is not there or has changed: bring it back, or pass --anchor previous"
        )
    if differ := differences(config, args, ("protocol", "context", "num_beams"), ("bert",)):
        why = f"was measured otherwise ({', '.join(differ)}): pass the same flags"
        raise ValueError(f"--after {folder}: {why}")
    watched = [config for _, config in chain if args.watch and not is_purged(config)]
    return {
        "model": str(folder / "model"),
        "revision": None,
        "earlier": [config["sha256"]["pairs"] for config in watched],
        "original": {"model": first["model"], "revision": first.get("revision")},
    }


def anchor_model(model, args):
    """The model that Eq. 4's frozen copy copies: with --after that of the first request."""
    if not args.after or args.anchor == "previous":
        return model
    return models.load_model(
        args.original["model"],
        device=args.device,
        dtype=args.dtype,
        allow_pickle=args.allow_pickle,
        revision=args.original["revision"],
    )[0]
