"""Removes the texts of a run from this disk: the pairs, what models said of them, the caches.

    bash run.sh purge RUN                # and of every run beside it over the same pairs
    bash run.sh purge --all-caches       # embeddings, measures before and a judge's answers alone
    bash run.sh purge RUN --dry-run      # says what would go

Runs beside RUN are found by the sha256 of their pairs. One that went on from RUN (icu.py --after)
loses what it says of RUN's texts and keeps its own: docs/privacy.md. No link is followed. What it
cannot reach it names, and exits with 1. The same command completes a purge that was killed.
"""

import contextlib
import glob
import json
import os
import shutil
import sys
import time
from pathlib import Path

from kit import data, flags, models, runs
from kit.text import visible

CACHES = ("embeddings", "before", "judge")
TEXTS = {"samples.jsonl": "generation", "judge.jsonl": "answer"}  # the field that holds a text
SHOWN = {"cases.md": "cases", "explain.html": "explanation"}
OWN = {  # these go from a run over the pairs, and stay in one that went on from it
    "sheet.html": "sheet",
    "certificate.key": "key to the certificate's hashes",
    "hashes.json": "of an earlier version: it gives texts back",
    "state": "states to resume from",
    "best": "weights of the best epoch",
    "method": "what the method has kept",
    "tasks-before/task_rows.jsonl": "answers on tasks",
    "tasks-after/task_rows.jsonl": "answers on tasks",
}
BEYOND = """never reached: your own input files; runs over these pairs, or that went on from
them, in other folders; other pairs with the same texts; reports elsewhere; copies and backups; what
a disk keeps of removed files; what was sent to raters or to a judge; the models' weights"""


# --- what is there ---


def config_of(folder):
    """A run's config.json, or {} where there is none that names the run's pairs."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        config = data.read_json(folder / "config.json")
        if config["pairs"] and config["sha256"]["pairs"]:
            return config
    return {}


def runs_beside(run, sha):
    """{folder: config} of the runs over these pairs, of `run` and the folders beside it, and of
    those that went on from one."""
    beside = [path for path in sorted(run.parent.iterdir()) if not path.is_symlink()]
    configs = {folder: config_of(folder) for folder in [run, *beside]}
    own, later = {}, {}
    for folder, config in configs.items():
        if config and config["sha256"]["pairs"] == sha:
            own[folder] = config
        elif sha in (config.get("earlier") or ()):
            later[folder] = config
    return own, later


def left_by(own, later):
    """What a purge of these runs cannot reach: links, and caches elsewhere."""
    paths = [folder / name for folder in [*own, *later] for name in (*TEXTS, *SHOWN)]
    paths += [folder / name for folder in own for name in OWN]
    left = [f"{path}: a link" for path in paths if path.is_symlink()]
    here = str(data.cache_folder("").absolute())
    caches = {config.get("cache", here) for config in [*own.values(), *later.values()]}
    return left + [f"{cache}: purge with ICU_CACHE={cache}" for cache in caches - {here}]


# --- what goes ---


def say(line):
    """Prints a line, also if nobody reads it (| head)."""
    try:
        print(visible(line, keep="\n"), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def remove(path, what, dry_run):
    """Removes a file or a folder, and no link."""
    if path.exists() and not path.is_symlink():
        if not dry_run:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        say(f"{'would be ' * dry_run}removed: {path} ({what})")


def empty(path, field, names, dry_run):
    """Sets a field of JSON lines to null, with `names` of watched texts whose ids hold one; a line
    that was cut off by a kill goes."""
    content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    rows = []
    for line in content.decode("utf-8", "replace").split("\n"):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    for row in rows:
        if not names or row.get("watched") and any(name in row["id"] for name in names):
            row[field] = None
    emptied = b"".join(map(data.json_bytes, rows))
    if emptied != content:
        if not dry_run:
            data.write_bytes(path, emptied)
        say(f"{'would be ' * dry_run}emptied: {path} ({field}; its numbers stay)")


def empty_run(run, names, dry_run):
    """A run folder without its texts, or those of watched ones with these names."""
    for name, field in TEXTS.items():
        empty(run / name, field, names, dry_run)
    for name, what in (SHOWN if names else SHOWN | OWN).items():
        remove(run / name, what, dry_run)
    for path in sorted(run.glob("*.tmp")):
        remove(path, "half written", dry_run)


def empty_caches(dry_run):
    """Removes every file of the caches: all can be computed again."""
    for name in CACHES:
        files = [path for path in data.cache_folder(name).rglob("*") if not path.is_dir()]
        for path in [] if dry_run else files:
            path.unlink()
        if files:
            what = f"{len(files)} files, of other texts too"
            say(f"{'would be ' * dry_run}removed: {data.cache_folder(name)} ({what})")


def purge_run(run, dry_run):
    """Removes the texts of a run, the pairs last; returns what is left."""
    config = config_of(run)
    if not config:
        raise ValueError(f"{run}: holds no run (no config.json that names its pairs)")
    sha = config["sha256"]["pairs"]
    own, later = runs_beside(run, sha)
    # Of the texts in later runs: RUN-SHA/ID, and RUN/ID in earlier versions.
    names = f"-{sha[:8]}/", *(f"{folder.name}/" for folder in own)
    with contextlib.ExitStack() as held:
        for folder in [] if dry_run else [*own, *later]:
            held.enter_context(runs.only_owner(folder))
        for folder in [*own, *later]:
            empty_run(folder, () if folder in own else names, dry_run)
        if (run.parent / "table.csv").is_file():  # a report of all runs beside each other
            remove(run.parent / "cases.md", "cases", dry_run)
        empty_caches(dry_run)
        left = left_by(own, later) + remove_pairs(own, sha, dry_run)
    where = ", ".join(map(str, [*own, *later]))
    say(f"kept in {where}: numbers, plots, tables, certificate and model")
    say(BEYOND)
    return left


def remove_pairs(own, sha, dry_run):
    """Removes the pairs of these runs, which are marked before; returns what is left."""
    places = dict.fromkeys(Path(config["pairs"]).absolute() for config in own.values())
    there = [p for p in places if not p.is_symlink() and models.fingerprint(p) == sha]
    purged = any("purged" in config for config in own.values())
    lost = [] if purged else [path for path in places if path not in there]
    marks = {"redact": True} | ({} if lost else {"purged": time.strftime("%Y-%m-%d")})
    for folder, config in own.items():
        if not dry_run and "purged" not in config:
            data.write_json(folder / "config.json", config | marks)
    for path in there:
        for half in sorted(path.parent.glob(f"{glob.escape(path.name)}.*.tmp")):
            remove(half, "pairs, half written", dry_run)
        remove(path, "pairs", dry_run)
    return [f"{path}: not the pairs of the run, or not there" for path in lost]


# --- flags ---


def main(argv=None):
    parser = flags.command_parser(__doc__, prog="bash run.sh purge")
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("run", nargs="?", metavar="RUN", help="a run folder")
    either.add_argument("--all-caches", action="store_true", help="instead: the caches alone")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")
    args = parser.parse_args(argv)
    if args.all_caches:
        empty_caches(args.dry_run)
        say(f"kept: {data.cache_folder('data')}, downloads of public data")
    elif left := purge_run(Path(args.run).resolve(), args.dry_run):
        sys.exit("\n".join(f"left: {visible(line)}" for line in left))


if __name__ == "__main__":
    flags.run_cli(main)
