"""Kills runs with SIGKILL at moments drawn from a seed and resumes them; each must end like a run never stopped.

    python tests/survive.py --times 200 --seed 0
    python tests/survive.py --times 200 --requests    # a second request, with marked texts, that watches the first

One process imports torch and then forks a child for every run, so a kill costs about two seconds instead of ten. A
child executes icu.py as `python icu.py` would. A moment is not a time but an event: the k-th optimiser step, measuring,
or change of a file in the run folder, before or after it. A file that is about to be synced also loses its last bytes,
as it may when it was never on the disk. The first kill of an experiment falls into each phase of a run in turn; in one
of three the run is killed again. A run whose config.json is there is resumed, and must be able to; before that the same
command begins it.

test_survival.py and test_distributed.py use the same parts: `make_inputs`, `watched` and `moment`.
"""

import argparse
import builtins
import collections
import contextlib
import functools
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from world import LEARN, STRANGERS, TEXTS, make_inputs, make_requests, memorise  # noqa: E402, F401

import metrics  # noqa: E402

# --- moments: what happens in a run, seen from outside icu.py ---


# first: the measuring of epoch 0; log: metrics.jsonl and its like; start: config.json.
PHASES = ("train", "measure", "save", "log", "export", "start", "first")


class Moment(NamedTuple):
    """One event of a run. `phase` is one of PHASES."""

    phase: str
    what: str  # the function called
    when: str  # before or after
    path: str  # of the file, from the run folder; empty for training and measuring


# What is watched besides files, and its phase.
WORK = [(torch.Tensor, "backward", "train"), (torch.optim.Adam, "step", "train")]
WORK += [(metrics, name, "measure") for name in ("el_ma_and_spans", "beam_generate", "bertscore")]
# Functions that change files, and which of their arguments names the file.
CHANGES = [(os, name, 0) for name in ("fsync", "unlink", "rmdir", "mkdir", "truncate")]
CHANGES += [
    (os, "rename", 1),
    (os, "replace", 1),
    (builtins, "open", 0),
    (safetensors.torch, "serialize_file", 1),
]


@contextlib.contextmanager
def watched(out, at):
    """Calls at(Moment) before and after every piece of work, and every change of a file in the run folder `out`.

    A run has a cache of its own, so that it measures the untouched model itself. From the second epoch on it measures
    the last sample's F1 as -1, so that Eq. 5 takes out samples after two epochs, on whatever processor.
    """
    out, plain = Path(out).resolve(), []
    cache, os.environ["ICU_CACHE"] = os.environ.get("ICU_CACHE"), f"{out}.cache"

    def inside(name, dir_fd):
        """The path of a file named by path or descriptor, from the run folder, or None where it lies elsewhere."""
        if isinstance(name, int):
            name = os.readlink(f"/proc/self/fd/{name}")
        elif dir_fd is not None:
            name = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), name)
        path = Path(os.path.abspath(os.fspath(name)))
        return str(path.relative_to(out)) if out in path.parents else None

    def epochs():
        """How many lie behind the run, the measuring before the first included."""
        return bytes_of(out / "metrics.jsonl").count(b"\n")

    def work_phase(phase):
        return "first" if phase == "measure" and epochs() == 0 else phase

    def last_one_goes(*args, bertscore=metrics.bertscore, **kwargs):
        precision, recall, f1 = bertscore(*args, **kwargs)
        if epochs() >= 2:
            f1[-1] = -1
        return precision, recall, f1

    def wrap(owner, name, find):
        call = getattr(owner, name)

        @functools.wraps(call)
        def watching(*args, **kwargs):
            found = find(args, kwargs)  # (phase, path) or None
            if found:
                at(Moment(found[0], name, "before", found[1]))
            result = call(*args, **kwargs)
            if found:
                at(Moment(found[0], name, "after", found[1]))
            return result

        plain.append((owner, name, call))
        setattr(owner, name, watching)

    def changed(name, argument):
        def find(args, kwargs):
            mode = args[1] if len(args) > 1 else kwargs.get("mode", "r")
            if name == "open" and not set("wax+") & set(mode) or len(args) <= argument:
                return None
            path = inside(args[argument], kwargs.get("dir_fd"))
            return path and (phase_of(path), path)

        return find

    try:
        plain.append((metrics, "bertscore", metrics.bertscore))
        metrics.bertscore = last_one_goes
        for owner, name, phase in WORK:
            wrap(owner, name, lambda args, kwargs, phase=phase: (work_phase(phase), ""))
        for owner, name, argument in CHANGES:
            wrap(owner, name, changed(name, argument))
        yield
    finally:
        for owner, name, call in reversed(plain):
            setattr(owner, name, call)
        if cache is None:
            del os.environ["ICU_CACHE"]
        else:
            os.environ["ICU_CACHE"] = cache


def phase_of(path):
    """What a run is doing when it changes this file of its folder."""
    first = path.split(os.sep)[0]
    if first == "state":
        return "save"
    if first.startswith(("model", "summary.json")):
        return "export"
    return "log" if first.endswith(".jsonl") else "start"


def moment(wanted, act):
    """An `at` for `watched`: calls act(moment) at the moment number `wanted` (from 0), or at the first that it accepts.

    wanted: an int, or a function of a Moment.
    """
    seen = []

    def at(now):
        number = len(seen)
        seen.append(now)
        if number == wanted if isinstance(wanted, int) else not at.done and wanted(now):
            at.done = True
            act(now)

    at.done = False
    return at


# --- children ---


def in_child(job, log):
    """Exit status of a forked child that does `job` with its output in the file `log`; -9: killed by SIGKILL."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(log, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            job()
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_icu(flags, out, log, at=lambda now: None):
    """Exit status of `python icu.py FLAGS --out OUT` in a child."""

    def job():
        sys.argv = ["icu.py", *flags, "--out", str(out)]
        with watched(out, at):
            runpy.run_path(str(ROOT / "icu.py"), run_name="__main__")

    return in_child(job, log)


def kill_at(number, out, note):
    """An `at` that kills this process with SIGKILL at moment `number`, having written the moment to the file `note`."""

    def kill(now):
        note.write_text(" ".join(now))
        if now.what == "fsync" and now.when == "before" and (out / now.path).is_file():
            os.truncate(
                out / now.path, (out / now.path).stat().st_size - 5
            )  # the end of it was not on the disk yet
        os.kill(os.getpid(), signal.SIGKILL)

    return moment(number, kill)


# --- the experiment ---


def straight_run(flags, folder):
    """A run that nothing stops: (its folder, its moments)."""
    out, moments = folder / "straight", folder / "moments.jsonl"

    def job():
        seen = []
        sys.argv = ["icu.py", *flags, "--out", str(out)]
        with watched(out, seen.append):
            runpy.run_path(str(ROOT / "icu.py"), run_name="__main__")
        moments.write_text("".join(json.dumps(now) + "\n" for now in seen))

    if in_child(job, folder / "straight.log"):
        raise SystemExit((folder / "straight.log").read_text())
    return out, [Moment(*json.loads(line)) for line in moments.read_text().splitlines()]


def experiment(flags, folder, number, moments, rng):
    """One run killed once or twice and gone on with: {"kills": [...], "begun_again", "codes", "out"}.

    "begun_again": how often it was no run yet, for want of a config.json, so that the same command had to begin it.
    """
    out, note, log = (
        folder / f"killed{number}",
        folder / f"killed{number}.kill",
        folder / f"killed{number}.log",
    )
    phase = PHASES[number % len(PHASES)]
    first = rng.choice([i for i, now in enumerate(moments) if now.phase == phase])
    again = rng.randrange(len(moments)) if rng.random() < 1 / 3 else None
    found = {"kills": [], "begun_again": 0, "codes": [], "out": str(out)}
    kills, how = [first] if again is None else [first, again], []
    while True:
        at = kill_at(kills.pop(0), out, note) if kills else lambda now: None
        code = run_icu([*flags, *how], out, log, at)
        found["codes"].append(code)
        if code != -signal.SIGKILL:
            return found
        found["kills"].append(note.read_text())
        how = ["--resume"] if (out / "config.json").is_file() else []
        found["begun_again"] += not how


def difference(out, straight):
    """What of a run folder is not as in the straight run, as a list of names; empty: the same."""
    names = [{str(p.relative_to(folder)) for p in folder.rglob("*")} for folder in (out, straight)]
    compared = ["metrics.jsonl", "samples.jsonl", "summary.json"]
    compared += sorted(str(p.relative_to(straight)) for p in (straight / "model").rglob("*"))
    changed = [
        name
        for name in compared
        if name in names[0] and bytes_of(out / name) != bytes_of(straight / name)
    ]
    return sorted(names[0] ^ names[1]) + changed


def bytes_of(path):
    return path.read_bytes() if path.is_file() else b""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--times", type=int, default=200, help="how many runs are killed (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which moments (%(default)s)")
    parser.add_argument("--requests", action="store_true", help="kill the run of a second request")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="leave the run folders there")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        ""  # a fork does not get on with CUDA, and only a CPU is bit for bit
    )
    folder = args.keep or Path(tempfile.mkdtemp(prefix="survive-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        sys.exit(experiments(folder, args))
    finally:
        if not args.keep:
            shutil.rmtree(folder)


def experiments(folder, args):
    """Runs all, prints a line each and the counts; 1 where one did not survive."""
    make = make_requests if args.requests else make_inputs
    # In a child: a process that has run autograd with CUDA about can not be forked.
    if in_child(lambda: make(folder), folder / "inputs.log"):
        raise SystemExit((folder / "inputs.log").read_text())
    flags = make(folder)
    straight, moments = straight_run(flags, folder)
    counts = collections.Counter(now.phase for now in moments)
    print(f"{len(moments)} moments in a run: {dict(counts)}", flush=True)
    rng, phases, totals = random.Random(args.seed), collections.Counter(), collections.Counter()
    for number in range(args.times):
        found = experiment(flags, folder, number, moments, rng)
        wrong = (
            difference(Path(found["out"]), straight) if found["codes"][-1] == 0 else ["exit codes"]
        )
        phases.update(kill.split()[0] for kill in found["kills"])
        totals.update(
            runs=1, kills=len(found["kills"]), resumes=found["codes"].count(-signal.SIGKILL)
        )
        totals.update(begun_again=found["begun_again"], identical=not wrong)
        found.pop("out")
        print(json.dumps({"run": number, **found, "differs": wrong}), flush=True)
        if not args.keep and not wrong:
            shutil.rmtree(folder / f"killed{number}")
        elif wrong:
            print((folder / f"killed{number}.log").read_text(), flush=True)
    totals["resumes"] -= totals["begun_again"]
    print(f"kills by phase: {dict(sorted(phases.items()))}")
    print(", ".join(f"{name.replace('_', ' ')} {count}" for name, count in totals.items()))
    return int(totals["identical"] < args.times)


if __name__ == "__main__":
    main()
