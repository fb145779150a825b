"""Removes from this disk the texts of a run: the pairs, what models said of them, what was kept in the cache.

    bash run.sh purge RUN                # and of every other run over the same pairs
    bash run.sh purge --all-caches       # embeddings, measures before, a judge's answers and the list of traces, of all
    bash run.sh purge RUN --dry-run      # says what would go

What goes is found in RUN's config.json and in the list of traces (kit/traces.py). Both are input: what goes is a
regular file (links are not followed) of the kind that this software writes there; any other is named and left. Numbers,
plots, tables and model stay, and hashes.json tells one who has a text whether it was among them. Each step can be done
again, so a purge that was killed is completed by the same command.
"""

import contextlib
import json
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kit import data, flags, models, paths, runs, traces
from kit.text import visible

CACHES = {
    "embeddings": "npy",
    "before": "json",
    "judge": "jsonl",
}  # folder of the cache -> what its files end in
NOT_OURS = "a link, or not what this software has written there"
BEYOND = """not reached: your own input files of knn.py and icu.py; copies and backups, of run folders too; what a disk
keeps of removed files; what was sent to raters or to a judge elsewhere; the models' weights, before (which know the
texts) and after (the measures say how far)"""


class Trace(NamedTuple):
    """A file that goes, or that loses its texts."""

    path: Path
    what: str
    own: Callable  # own(path): whether it is what this software writes there, as in kit/paths.py
    emptied: str = ""  # the field of JSON lines that becomes null, while their numbers stay
    ids: tuple = ("",)  # of the lines whose ids begin so


# --- what is there ---


def config_of(run):
    """A run's config.json, or what it is called in a run that --overwrite was killed in."""
    old = run / paths.OLD_CONFIG
    return (
        old if is_regular(old) and not os.path.lexists(run / "config.json") else run / "config.json"
    )


def sha_of(run):
    """sha256.pairs of a run folder's config.json. ValueError for a folder that is no run."""
    config = config_of(run)
    if not run.is_dir():
        raise ValueError(
            f"{run}: " + ("is a file, not a run folder" if run.exists() else "no such run folder")
        )
    if not is_regular(config) or not paths.holds("thresholds_used", "sha256", "pairs")(config):
        raise ValueError(f"{run}: holds no run (no config.json that a run has written)")
    found = data.read_json(config)
    sha = found["sha256"].get("pairs") if isinstance(found["sha256"], dict) else None
    if not isinstance(sha, str) or not isinstance(found["pairs"], str):
        raise ValueError(f"{config}: does not say which pairs the run was made with")
    return sha


def watches(run, sha):
    """Whether a run went on from one over these pairs (icu.py --after), and has measured their texts, too."""
    earlier = data.read_json(config_of(run)).get("earlier")
    return isinstance(earlier, list) and sha in earlier


def is_regular(path):
    """Whether a file is there and is no link, folder, pipe or device."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):  # ValueError: a name that is none
        return False


def runs_over(sha, run):
    """The run and all listed ones over the same pairs; one that is not where it was is named."""
    found = [run]
    for listed in (path for path, what in traces.of(sha) if what == "run"):
        try:
            other = listed.resolve()
            same = other == run or sha_of(other) == sha or watches(other, sha)
            why = "a run over other pairs is there now"
        except (ValueError, OSError) as error:
            same, why = False, flags.first_line(error)
        if same:
            found.append(other)
        else:
            say(
                f"not found: {listed}, a run over the same pairs ({why}); if it was moved, purge it where it is"
            )
    return list(dict.fromkeys(found))


def pairs_files(sha, run):
    """Where the pairs of a run may lie, each place once."""
    named = Path(data.read_json(config_of(run))["pairs"]).absolute()
    return list(dict.fromkeys([*(path for path, what in traces.of(sha) if what == "pairs"), named]))


def find_pairs(sha, run):
    """The pairs.jsonl that a run was made with, or None where it is gone or another one by now."""
    own = are_pairs(sha)
    return next((file for file in pairs_files(sha, run) if is_regular(file) and own(file)), None)


# own(path) for a Trace


def are_pairs(sha):
    """The very pairs.jsonl with this fingerprint. The form counts too: anyone can write down a sha256."""

    def own(path):
        with contextlib.suppress(ValueError):
            return models.fingerprint(path) == sha and bool(data.read_pairs(path))
        return False

    return own


def begins_with_row(*names):
    """JSON lines whose first has these fields, whatever a kill has done to the others."""

    def own(path):
        with open(path, "rb") as file, contextlib.suppress(ValueError, RecursionError):
            row = json.loads(file.readline())
            return isinstance(row, dict) and set(names) <= row.keys()
        return False

    return own


def is_cached(folder):
    """A file that this software keeps in a folder of the cache, or what a kill has left of one."""
    name = re.compile(rf"[0-9a-f]{{64}}\.{CACHES[folder]}(\.\d+\.tmp)?")
    return lambda path: (
        path.parent == data.cache_folder(folder).resolve() and bool(name.fullmatch(path.name))
    )


def traces_of(sha, own_runs, over):
    """Every file that may hold a text of these pairs; the pairs come last, since hashes are made of them.

    own_runs: the runs over them; over: these, and those that went on from one of them, where other texts stay.
    """
    own = {
        "leak report": begins_with_row("id", "target_id", "share"),
        "cases": paths.is_cases,
        "explanation": paths.is_explanation,
        "embeddings": is_cached("embeddings"),
        "measures before": is_cached("before"),
        "answers of a judge": is_cached("judge"),
    }
    theirs = tuple(f"{run.name}/" for run in own_runs)
    for run in over:
        ids = ("",) if run in own_runs else theirs
        said = paths.begins_with('{"epoch": ')
        yield from with_leftovers(
            Trace(run / "samples.jsonl", "what the model said", said, "generation", ids)
        )
        graded = begins_with_row("epoch", "answer")
        yield from with_leftovers(
            Trace(run / "judge.jsonl", "what a judge said", graded, "answer", ids)
        )
        yield from with_leftovers(Trace(run / "cases.md", "cases", paths.is_cases))
        yield from with_leftovers(Trace(run / "explain.html", "explanation", paths.is_explanation))
    for run in own_runs:
        yield from with_leftovers(
            Trace(run / "sheet.html", "sheet", paths.begins_with("<!DOCTYPE html>"))
        )
    answers = data.cache_folder("judge").resolve() / f"{sha}.jsonl"
    yield Trace(answers, "answers of a judge", is_cached("judge"))
    for path, what in traces.of(sha):
        if what in own:
            yield from with_leftovers(Trace(path, what, own[what]))
    half = begins_with_row("id", "learn_id", "similarity")
    for path in dict.fromkeys(path for run in own_runs for path in pairs_files(sha, run)):
        yield from with_leftovers(Trace(path, "pairs", are_pairs(sha)), half)


def with_leftovers(trace, own=None):
    """A file, behind what kills have left of it while it was written (`data.write_atomically`)."""
    name = re.compile(re.escape(trace.path.name) + r"\.\d+\.tmp")
    folder = trace.path.parent
    for path in (
        sorted(folder.glob("*.tmp")) if os.path.isdir(folder) else []
    ):  # never an error, whatever is listed
        if name.fullmatch(path.name):
            yield Trace(path, f"{trace.what}, half written", own or trace.own)
    yield trace


def name_others(sha, run):
    """Says which other pairs that are listed hold some of the same texts to forget: they are of other runs."""
    mine, *_ = [
        *filter(None, (texts_in(path, are_pairs(sha)) for path in pairs_files(sha, run))),
        set(),
    ]
    for row in traces.rows():
        if row["what"] == "pairs" and row["pairs"] != sha:
            if same := mine & texts_in(Path(row["path"]), are_pairs(row["pairs"])):
                say(
                    f"note: {row['path']}, other pairs, has {len(same)} of these texts too: purge the runs over it"
                )


def texts_in(path, own):
    """The texts to forget of a pairs.jsonl; none of a file that is not `own`."""
    ours = is_regular(path) and own(path)
    return {pair["prefix"] + pair["suffix"] for pair in data.read_pairs(path)} if ours else set()


# --- what goes ---


def say(line):
    """A line on stdout; the names in it may be anyone's."""
    print(visible(line))


def treat(trace, dry_run):
    """Removes or empties a file that is one of ours, and says so; what is not there or without text is passed over."""
    path, would = trace.path, "would be " * dry_run
    try:
        found = path.lstat()
        ours, why = stat.S_ISREG(found.st_mode) and trace.own(path), NOT_OURS
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # ValueError: a path that is none
        found, ours, why = None, False, flags.first_line(error)
    if not ours and (found is None or found.st_size):
        say(f"left: {path} ({trace.what}: {why})")
    elif ours and not trace.emptied:
        if not dry_run:
            remove(path)
        say(f"{would}removed: {path} ({trace.what}, {found.st_size:,} bytes)")
    elif ours and (emptied := without(trace)) != path.read_bytes():
        if not dry_run:
            write(path, emptied)
        say(f"{would}emptied: {path} ({trace.what}; its numbers stay)")


def remove(path):
    path.unlink()


def write(path, content):
    data.write_bytes(path, content)


def without(trace):
    """A file of JSON lines, its field null where the ids say so, as bytes; a line that was cut off is left out."""
    lines = []
    for line in trace.path.read_bytes().decode("utf-8", "replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError, TypeError):
            row = json.loads(line)
            row |= {trace.emptied: None} if str(row.get("id", "")).startswith(trace.ids) else {}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8", "replace")


def keep_hashes(run, sha, dry_run):
    """hashes.json of a run that has none, while there are pairs to make it of."""
    path, pairs = run / "hashes.json", find_pairs(sha, run)
    if os.path.lexists(path):
        if not is_regular(path) or not paths.holds("salt", "texts")(path):
            say(f"left: {path} (hashes: {NOT_OURS})")
    elif pairs is None:
        say(
            f"note: no hashes for {run}: its pairs.jsonl is not there, or not the one that it was made with"
        )
    elif not dry_run:
        data.write_json(path, traces.hashes(data.read_pairs(pairs)))


def mark(run):
    """config.json says that the texts are gone, and since when."""
    config = data.read_json(config_of(run))
    if "purged" not in config:
        data.write_json(
            config_of(run), config | {"redact": True, "purged": time.strftime("%Y-%m-%d")}
        )


def purge_run(run, dry_run):
    """Every trace of the texts of a run; each of the runs over the same pairs is held while it is changed."""
    sha = sha_of(run)
    over = runs_over(sha, run)
    with contextlib.ExitStack() as held:
        for each in [] if dry_run else over:
            held.enter_context(runs.only_owner(each))
        name_others(sha, run)
        own_runs = [each for each in over if sha_of(each) == sha]
        for each in own_runs:
            keep_hashes(each, sha, dry_run)
        for trace in dict.fromkeys(traces_of(sha, own_runs, over)):
            treat(trace, dry_run)
        for each in [] if dry_run else own_runs:
            mark(each)
    say(
        f"kept in {', '.join(map(str, over))}: numbers, plots, tables, certificate, model and hashes.json"
    )
    print(BEYOND)


def purge_caches(dry_run):
    """The caches of embeddings and of measures before, and the list of traces; what is not theirs is named and left."""
    for name in CACHES:
        folder = data.cache_folder(name)
        if folder.is_symlink():
            say(f"left: {folder} (a link)")
        for path in sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []:
            treat(Trace(folder.resolve() / path.name, name, is_cached(name)), dry_run)
    treat(Trace(traces.registry(), "the list of traces", paths.begins_with('{"pairs": ')), dry_run)
    say(f"kept: {data.cache_folder('data')}, downloads of public data")
    say(
        "without the list of traces a purge finds only the run that it is given and the pairs that this one names"
    )


# --- flags ---


def parse_args(argv=None):
    parser = flags.command_parser(__doc__, prog="bash run.sh purge")
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--all-caches", action="store_true", help="instead: what the cache holds of all texts"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if bool(args.run) == args.all_caches:
        raise ValueError(
            "name a run folder, bash run.sh purge RUN, or pass --all-caches: one of them"
        )
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.all_caches:
        return purge_caches(args.dry_run)
    purge_run(Path(args.run).resolve(), args.dry_run)


if __name__ == "__main__":
    flags.run_cli(main)
