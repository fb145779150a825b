"""Kills runs at moments drawn from a seed and resumes them: each must end like one never stopped.

    python tests/survive.py --times 100 --seed 0
    python tests/survive.py --times 100 --requests   # a second request, marked, after the first

A forked child makes every run. A moment is not a time but an event: an optimiser step, measuring,
or a change of a file in the run folder. The first kill of a run falls into each phase in turn; one
run in three is killed again. One that has its config.json is resumed, others are begun again.
"""

import argparse
import collections
import contextlib
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

import torch  # noqa: E402
from world import TEXTS, make_inputs, make_requests, memorise  # noqa: E402, F401

import metrics  # noqa: E402

# --- moments: what happens in a run, seen from outside icu.py ---

# first: the measuring of epoch 0; log: metrics.jsonl and its like; start: config.json.
PHASES = ("train", "measure", "save", "log", "export", "start", "first")
WORK = [(torch.Tensor, "backward", "train"), (torch.optim.Adam, "step", "train")]
WORK += [(metrics, name, "measure") for name in ("el_ma_and_spans", "beam_generate", "bertscore")]
# Python's audit events of changes: the arguments that are the file, and its folder's descriptor.
CHANGES = {"open": (0, None), "os.remove": (0, 1), "os.rename": (1, 3), "os.rmdir": (0, 1)}
CHANGES |= {"os.mkdir": (0, 2), "os.truncate": (0, None)}
WATCHERS = {}  # run folder -> whom to call


class Moment(NamedTuple):
    """One event of a run, just before it."""

    phase: str  # one of PHASES
    what: str  # the function, or the audit event
    path: str  # of the file, from the run folder; empty for training and measuring


class Killed(BaseException):
    """Ends a run in this process as SIGKILL would: nothing in icu.py catches it and tidies up."""


def on_audit(event, args):
    """Tells the watchers of a change in their run folder."""
    if not WATCHERS or event not in CHANGES or (event == "open" and not args[2] & os.O_CREAT):
        return
    file, folder = (None if i is None else args[i] for i in CHANGES[event])
    if isinstance(file, int):
        return
    if folder not in (None, -1):
        file = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fspath(file))
    path = Path(os.path.abspath(os.fspath(file)))
    for out, at in WATCHERS.items():
        if out in path.parents:
            inside = str(path.relative_to(out))
            at(Moment(phase_of(inside), event, inside))


sys.addaudithook(on_audit)


@contextlib.contextmanager
def watched(out, at):
    """Calls at(Moment) before all work and every change of a file in the run folder `out`.

    The run has a cache of its own, so that it measures the untouched model itself. From the second
    epoch on it measures the last sample's F1 as -1, so that Eq. 5 takes out samples after two
    epochs, on whatever processor.
    """
    out = Path(out).resolve()

    def watching(name, phase, call):
        def watched_call(*args, **kwargs):
            epochs = bytes_of(out / "metrics.jsonl").count(b"\n")
            first = phase == "measure" and epochs == 0
            at(Moment("first" if first else phase, name, ""))
            result = call(*args, **kwargs)
            if name == "bertscore" and epochs >= 2:
                result[2][-1] = -1
            return result

        return watched_call

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.dict(os.environ, ICU_CACHE=f"{out}.cache"))
        for owner, name, phase in WORK:
            new = watching(name, phase, getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, new))
        patches.enter_context(mock.patch.dict(WATCHERS, {out: at}))
        yield


def phase_of(path):
    """What a run is doing when it changes this file of its folder."""
    first = path.split(os.sep)[0]
    if first in ("state", "best"):
        return "save"
    if first.startswith(("model", "summary.json")):
        return "export"
    return "log" if first.endswith(".jsonl") else "start"


def moment(wanted, act):
    """An `at` for `watched`: calls act() once, at moment number `wanted` or the first that fits."""
    seen, done = [], []

    def at(now):
        seen.append(now)
        if not done and (len(seen) == wanted + 1 if isinstance(wanted, int) else wanted(now)):
            done.append(now)
            act()

    return at


# --- children ---


def in_child(job, log):
    """Exit status of a forked child that does `job`, its output in the file `log`; -9: SIGKILL."""
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
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_icu(flags, out, at=lambda now: None):
    """`python icu.py FLAGS --out OUT` in this process, watched."""
    sys.argv = ["icu.py", *flags, "--out", str(out)]
    with watched(out, at):
        runpy.run_path(str(ROOT / "icu.py"), run_name="__main__")


def kill_at(number):
    """An `at` that kills this process at moment `number`."""
    return moment(number, lambda: os.kill(os.getpid(), signal.SIGKILL))


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
    """One run killed once or twice and gone on with: {"killed": the first moment, "codes"}."""
    kills = [rng.choice([i for i, now in enumerate(moments) if now.phase == phase])]
    kills += [rng.randrange(len(moments))] if rng.random() < 1 / 3 else []
    outcome, more = {"killed": moments[kills[0]], "codes": []}, []
    while not outcome["codes"] or outcome["codes"][-1] == -signal.SIGKILL:
        at = kill_at(kills.pop(0)) if kills else lambda now: None
        job = lambda at=at, more=more: run_icu([*flags, *more], out, at)  # noqa: E731
        outcome["codes"].append(in_child(job, out.with_suffix(".log")))
        more = ["--resume"] if (out / "config.json").is_file() else []
    return outcome


def difference(out, straight):
    """The names of what in a run folder is not as in the straight run; empty: the same."""
    names = [{str(p.relative_to(top)) for p in top.rglob("*")} for top in (out, straight)]
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
    if in_child(lambda: make(folder), log := folder / "inputs.log"):
        raise SystemExit(log.read_text())
    flags = make(folder)
    straight, moments = straight_run(flags, folder)
    counts = collections.Counter(now.phase for now in moments)
    print(f"{len(moments)} moments in a run: {dict(counts)}", flush=True)
    rng, totals = random.Random(args.seed), collections.Counter()
    for number in range(args.times):
        out = folder / f"killed{number}"
        outcome = experiment(flags, out, moments, PHASES[number % len(PHASES)], rng)
        differs = difference(out, straight) if outcome["codes"][-1] == 0 else ["exit codes"]
        totals.update(runs=1, kills=len(outcome["codes"]) - 1, identical=not differs)
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
    with tempfile.TemporaryDirectory(prefix="survive-") as folder:
        (folder := args.keep or Path(folder)).mkdir(parents=True, exist_ok=True)
        sys.exit(experiments(folder, args))


if __name__ == "__main__":
    main()
