"""Kills runs with SIGKILL at moments drawn from a seed and resumes them: each must end like a run never stopped.

    python tests/survive.py --times 100 --seed 0
    python tests/survive.py --times 100 --requests   # a second request, marked, that watches the first

One process imports torch and forks a child for every run, so a kill costs two seconds. A moment is not a time but an
event: an optimiser step, measuring, or a change of a file in the run folder, before or after it. A file that is about
to be synced also loses its last bytes, as it may when it never was on the disk. The first kill of a run falls into each
phase in turn; one run in three is killed again. A run that has its config.json is resumed, one without is begun again.
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
from unittest import mock

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
    """One event of a run."""

    phase: str  # one of PHASES
    what: str  # the function called
    when: str  # before or after
    path: str  # of the file, from the run folder; empty for training and measuring


class Killed(BaseException):
    """Ends a run in this process as SIGKILL would: nothing in icu.py catches it and tidies up."""


# What is watched besides files, and its phase.
WORK = [(torch.Tensor, "backward", "train"), (torch.optim.Adam, "step", "train")]
WORK += [(metrics, name, "measure") for name in ("el_ma_and_spans", "beam_generate", "bertscore")]
# Functions that change files, and which of their arguments names the file.
CHANGES = [(os, name, 0) for name in ("fsync", "unlink", "rmdir", "mkdir", "truncate")]
CHANGES += [(os, "replace", 1), (os, "rename", 1), (builtins, "open", 0)]
CHANGES += [(safetensors.torch, "serialize_file", 1)]


@contextlib.contextmanager
def watched(out, at):
    """Calls at(Moment) before and after all work, and every change of a file in the run folder `out`.

    The run has a cache of its own, so that it measures the untouched model itself. From the second epoch on it measures
    the last sample's F1 as -1, so that Eq. 5 takes out samples after two epochs, on whatever processor.
    """
    out = Path(out).resolve()

    def epochs():
        return bytes_of(out / "metrics.jsonl").count(b"\n")

    def last_one_goes(*args, bertscore=metrics.bertscore, **kwargs):
        precision, recall, f1 = bertscore(*args, **kwargs)
        if epochs() >= 2:
            f1[-1] = -1
        return precision, recall, f1

    def watching(owner, name, event):
        call = getattr(owner, name)

        @functools.wraps(call)
        def watched_call(*args, **kwargs):
            phase_and_path = event(args, kwargs)
            for when in ("before", "after"):
                if phase_and_path:
                    at(Moment(phase_and_path[0], name, when, phase_and_path[1]))
                if when == "before":
                    result = call(*args, **kwargs)
            return result

        patches.enter_context(mock.patch.object(owner, name, watched_call))

    def work(phase):
        first = lambda: phase == "measure" and epochs() == 0  # noqa: E731
        return lambda args, kwargs: ("first" if first() else phase, "")

    def change(name, argument):
        def event(args, kwargs):
            mode = args[1] if len(args) > 1 else kwargs.get("mode", "r")
            if len(args) <= argument or (name == "open" and not set("wax+") & set(mode)):
                return None
            path = inside(out, args[argument], kwargs.get("dir_fd"))
            return path and (phase_of(path), path)

        return event

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.dict(os.environ, ICU_CACHE=f"{out}.cache"))
        patches.enter_context(mock.patch.object(metrics, "bertscore", last_one_goes))
        for owner, name, phase in WORK:
            watching(owner, name, work(phase))
        for owner, name, argument in CHANGES:
            watching(owner, name, change(name, argument))
        yield


def inside(out, file, folder=None):
    """The path of a file named by path or descriptor, from the run folder; None where it lies elsewhere."""
    if isinstance(file, int):
        file = os.readlink(f"/proc/self/fd/{file}")
    elif folder is not None:
        file = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), file)
    path = Path(os.path.abspath(os.fspath(file)))
    return str(path.relative_to(out)) if out in path.parents else None


def phase_of(path):
    """What a run is doing when it changes this file of its folder."""
    first = path.split(os.sep)[0]
    if first == "state":
        return "save"
    if first.startswith(("model", "summary.json")):
        return "export"
    return "log" if first.endswith(".jsonl") else "start"


def moment(wanted, act):
    """An `at` for `watched`: calls act(moment) once, at moment number `wanted` or at the first that it accepts."""
    seen, done = [], []

    def at(now):
        seen.append(now)
        if not done and (len(seen) == wanted + 1 if isinstance(wanted, int) else wanted(now)):
            done.append(now)
            act(now)

    return at


# --- children ---


def in_child(job, log):
    """Exit status of a forked child that does `job` with its output in the file `log`; -9: SIGKILL."""
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
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_icu(flags, out, at=lambda now: None):
    """`python icu.py FLAGS --out OUT` in this process, watched."""
    sys.argv = ["icu.py", *flags, "--out", str(out)]
    with watched(out, at):
        runpy.run_path(str(ROOT / "icu.py"), run_name="__main__")


def kill_at(number, out, note):
    """An `at` that kills this process at moment `number`, having written the moment to the file `note`."""

    def kill(now):
        note.write_text(" ".join(now))
        if now.what == "fsync" and now.when == "before" and (out / now.path).is_file():
            os.truncate(out / now.path, max((out / now.path).stat().st_size - 5, 0))
        os.kill(os.getpid(), signal.SIGKILL)

    return moment(number, kill)


# --- the experiment ---


def straight_run(flags, folder):
    """A run that nothing stops: (its folder, its moments)."""
    out, moments, log = folder / "straight", folder / "moments.json", folder / "straight.log"

    def job():
        seen = []
        run_icu(flags, out, seen.append)
        moments.write_text(json.dumps(seen))

    if in_child(job, log):
        raise SystemExit(log.read_text())
    return out, [Moment(*now) for now in json.loads(moments.read_text())]


def experiment(flags, out, moments, phase, rng):
    """One run killed once or twice and gone on with: {"kills", "begun_again", "codes"}.

    begun_again: how often the run had no config.json yet, so that the same command had to begin it.
    """
    first = rng.choice([i for i, now in enumerate(moments) if now.phase == phase])
    again = [rng.randrange(len(moments))] if rng.random() < 1 / 3 else []
    outcome, kills, more = {"kills": [], "begun_again": 0, "codes": []}, [first, *again], []
    note, log = out.with_suffix(".kill"), out.with_suffix(".log")
    while True:
        at = kill_at(kills.pop(0), out, note) if kills else lambda now: None
        code = in_child(lambda at=at, more=more: run_icu([*flags, *more], out, at), log)
        outcome["codes"].append(code)
        if code != -signal.SIGKILL:
            return outcome
        outcome["kills"].append(note.read_text())
        more = ["--resume"] if (out / "config.json").is_file() else []
        outcome["begun_again"] += not more


def difference(out, straight):
    """The names of what in a run folder is not as in the straight run; empty: the same."""
    names = [{str(p.relative_to(folder)) for p in folder.rglob("*")} for folder in (out, straight)]
    same = {
        name for name in names[0] & names[1] if bytes_of(out / name) == bytes_of(straight / name)
    }
    return sorted((names[0] | names[1]) - same - {".lock", "timing.jsonl", "config.json"})


def bytes_of(path):
    return path.read_bytes() if path.is_file() else b""


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
    rng, totals = random.Random(args.seed), collections.Counter()
    for number in range(args.times):
        out = folder / f"killed{number}"
        outcome = experiment(flags, out, moments, PHASES[number % len(PHASES)], rng)
        differs = difference(out, straight) if outcome["codes"][-1] == 0 else ["exit codes"]
        totals.update(runs=1, kills=len(outcome["kills"]), identical=not differs)
        print(json.dumps({"run": number, **outcome, "differs": differs}), flush=True)
        if differs:
            print(out.with_suffix(".log").read_text(), flush=True)
        elif not args.keep:
            shutil.rmtree(out)
    print(", ".join(f"{name} {count}" for name, count in totals.items()))
    return int(totals["identical"] < args.times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--times", type=int, default=100, help="runs that are killed (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which moments (%(default)s)")
    parser.add_argument("--requests", action="store_true", help="kill the run of a second request")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="leave the run folders there")
    args = parser.parse_args()
    # A fork does not get on with CUDA, and only a CPU is bit for bit.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    folder = args.keep or Path(tempfile.mkdtemp(prefix="survive-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        sys.exit(experiments(folder, args))
    finally:
        if not args.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
