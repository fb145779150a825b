"""States: what a run keeps so that it can go on after any interruption, complete or not there at all."""

import errno
import os
import random
import shutil

import numpy as np
import torch

from kit import data
from kit.flags import first_line
from kit.processes import RANK, is_main, print0, wait_for_all


class Diverged(RuntimeError):
    """Five steps in a row without a finite loss and gradient; the weights are as they were before them."""


class Progress:
    """Where a run is, besides its weights: what a state keeps so that it can go on from there."""

    def __init__(self):
        self.forgotten = set()  # indices of samples left out of training (Eq. 5)
        self.epoch, self.step = (
            0,
            0,
        )  # the epoch in progress (0: the measuring before) and its batches done
        self.steps_taken, self.sums = (
            0,
            {},
        )  # of the epoch in progress: steps and the sums of their losses
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.stopped = None  # why, once it has
        self.files = {}  # {name: [bytes, sha256]} of the run's files at the end of the last whole epoch

    def count_step(self, values):
        self.step, self.steps_taken, self.skipped_in_a_row = (
            self.step + 1,
            self.steps_taken + bool(values),
            0,
        )
        self.sums |= {name: self.sums.get(name, 0.0) + value for name, value in values.items()}

    def skip_step(self, loss):
        self.step, self.skipped_steps = self.step + 1, self.skipped_steps + 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == 5:
            raise Diverged(
                f"loss {loss:.4g}; it or its gradient was not finite in five steps in a row"
            )

    def mean_losses(self):
        """{"loss": mean over the steps taken in this epoch, ...}"""
        return {name: value / self.steps_taken for name, value in self.sums.items()}

    def next_epoch(self):
        self.epoch, self.step, self.steps_taken, self.sums = self.epoch + 1, 0, 0, {}


def save_state(out, engine, progress):
    """A complete state or none: written aside, synced, a manifest with sizes and sha256 last, then renamed.

    Every process takes part; the two newest are kept. The state of epoch 0 has no weights: they are still those of
    --model. A full disk leaves the states before as they were (ValueError).
    """
    folder = out / "state" / f"epoch{progress.epoch:05d}-step{progress.step:06d}"
    if (
        folder.exists()
    ):  # a signal before the next step: to write the same again would be a moment without it
        return
    part = folder.with_name(folder.name + ".part")
    try:
        if is_main:
            for left in folder.parent.glob("*.part"):  # by a process that was killed
                shutil.rmtree(left)
            part.mkdir(parents=True, exist_ok=True)
        wait_for_all()
        if progress.epoch > 0:
            engine.save(part)
        data.write_json(part / f"random-{RANK}.json", random_states())
        wait_for_all()
        if is_main:
            data.write_json(
                part / "progress.json", vars(progress) | {"forgotten": sorted(progress.forgotten)}
            )
            written = sorted(path for path in part.rglob("*") if path.is_file())
            for path in written:
                path.chmod(0o600)  # weights are written by others
                sync(path)
            data.write_json(part / "manifest.json", {
                str(path.relative_to(part)): {"bytes": path.stat().st_size, "sha256": data.sha256_of(path)}
                for path in written
            })  # fmt: skip
            sync(part / "manifest.json")
            sync(part)
            part.rename(folder)
            sync(folder.parent)
            for old in states(out)[2:]:
                shutil.rmtree(old)
    except Exception as error:  # OSError, and safetensors' and torch's own for a full disk
        shutil.rmtree(part, ignore_errors=True)
        why = f"no state could be written ({first_line(error)}); {way_out(out, error)}"
        raise ValueError(f"{out / 'state'}: {why}") from error
    wait_for_all()


def way_out(out, error):
    """What to do after an error of the file system; safetensors' and torch's own for a full disk have no number."""
    kept = ", ".join(state.name for state in states(out))
    room = (
        "Make room, then "
        if getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT)
        else "Then "
    )
    return (
        f"states intact: {kept or 'none'}. {room}{'--resume' if kept else 'the same command again'}"
    )


def sync(path):
    """What was written to a file or folder is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def states(out):
    """The complete states of a run, newest first."""
    found = (out / "state").glob("epoch*-step*") if (out / "state").is_dir() else []
    return sorted(
        (path for path in found if path.is_dir() and path.suffix != ".part"), reverse=True
    )


def broken_part(state):
    """What is wrong with a state, measured against its manifest, or None."""
    try:
        manifest = data.read_json(state / "manifest.json")
        for name, expected in manifest.items():
            path = state / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if data.sha256_of(path) != expected["sha256"]:
                return f"{name} has changed (sha256)"
        found = {str(path.relative_to(state)) for path in state.rglob("*") if path.is_file()}
        if strange := sorted(found - set(manifest) - {"manifest.json"}):
            return f"{strange[0]} is not in its manifest"
        return None if "progress.json" in manifest else "progress.json is missing"
    except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        return f"manifest.json is unreadable ({first_line(error)})"


def newest_state(out):
    """The newest state that is whole; a broken one is named. ValueError where there is none."""
    for state in states(out):
        problem = broken_part(state)
        if problem is None:
            return state
        print0(f"warning: state {state.name} is damaged: {problem}; looking for an older one")
    raise ValueError(f"--resume: no valid state in {out / 'state'}; start again with --overwrite")


def load_state(state, engine):
    """Weights, optimiser and random states become those of `state`; returns its Progress.

    ValueError for a state that keeps its checksums and still is not what save_state writes.
    """
    try:
        progress, found = Progress(), data.read_json(state / "progress.json")
        if found.keys() != vars(progress).keys():
            raise ValueError("it is of another version of this software")
        vars(progress).update(found)
        progress.forgotten = set(progress.forgotten)
        progress.files = {
            name: [int(size), str(sha256)] for name, (size, sha256) in progress.files.items()
        }
        if progress.epoch > 0:
            engine.load(state)
        restore_random_states(data.read_json(state / f"random-{RANK}.json"))
    except Exception as error:  # KeyError, TypeError, SafetensorError, ...
        raise ValueError(
            f"{state}: cannot be loaded ({type(error).__name__}: {first_line(error)})"
        ) from error
    return progress


def random_states():
    """The random states of python, numpy and torch, as JSON holds them."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    found = {"python": [version, list(internal), gauss], "numpy": [kind, keys.tolist(), *rest]}
    found["torch"] = torch.get_rng_state().tolist()
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state().tolist()
    return found


def restore_random_states(found):
    version, internal, gauss = found["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(found["numpy"]))
    torch.set_rng_state(torch.tensor(found["torch"], dtype=torch.uint8))
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(found["cuda"], dtype=torch.uint8))
