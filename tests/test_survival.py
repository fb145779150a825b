"""Runs survive what happens to long runs: kills, signals, damaged states, full disks, other settings, a second process.

    python -m pytest tests/test_survival.py -q

A run that was interrupted and resumed is compared, byte for byte, with one that nothing stopped. Where and when a run
is hit is an event of survive.py, never a time. `python tests/survive.py --times 200` kills many more.
"""

import contextlib
import errno
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import survive
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import icu
from kit import data, paths, processes, runs, states
from kit import flags as kit_flags


def call(flags, out, at=lambda now: None):
    """icu.py as a command, in this process and watched by `at`: (exit code, stdout, stderr)."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    argv = ["icu.py", *map(str, flags), "--out", str(out)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            with survive.watched(out, at):
                kit_flags.run_cli(icu.main)
        except SystemExit as stopped:
            code = stopped.code
    return code, stdout.getvalue(), stderr.getvalue()


def refused(flags, out):
    """The one line on stderr of a command that must end with exit 2 and change nothing in the run folder."""
    before = contents(out)
    code, _, stderr = call(flags, out)
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert contents(out) == before
    return stderr


def contents(folder):
    """{name: bytes} of all files in a folder except the lock."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


def nth(number, **wanted):
    """Accepts the moment `number` (from 1) whose fields are as wanted."""
    seen = itertools.count(1)
    return lambda now: (
        all(getattr(now, name) == value for name, value in wanted.items()) and next(seen) == number
    )


def ask_to_stop(number):
    return lambda now: os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The flags of a run of three epochs on five records, of which Eq. 5 takes some out after each of the first two."""
    return survive.make_inputs(tmp_path_factory.mktemp("survival"))


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """(folder, moments) of a run that nothing stopped."""
    out, moments = tmp_path_factory.mktemp("straight") / "run", []
    code, _, stderr = call(flags, out, moments.append)
    assert code == 0, stderr
    rows = data.read_jsonl(out / "metrics.jsonl")
    assert (
        len(rows) == 4 and 0 < rows[1]["forgotten"] < rows[2]["forgotten"]
    )  # else the tests below prove less
    return out, moments


@pytest.fixture(scope="module")
def interrupted(flags, straight, tmp_path_factory):
    """A run folder with two states, the newer one in the middle of epoch 2."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    steps = nth(4, what="step", when="after")  # epoch 1 has three steps
    code, _, stderr = call(flags, out, survive.moment(steps, ask_to_stop(signal.SIGTERM)))
    assert code == 143, stderr
    assert [state.name for state in states.states(out)] == [
        "epoch00002-step000001",
        "epoch00002-step000000",
    ]
    return out


@pytest.fixture
def copy(interrupted, tmp_path):
    """A copy of `interrupted` to damage or to resume."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


# --- kill -9 ---


@pytest.fixture(
    scope="module", params=[(), ("--requests",)], ids=["a run", "a second request, marked"]
)
def killed(request, tmp_path_factory):
    """What survive.py leaves behind when it kills seven runs, once in each phase: its folder, and a dict a run."""
    folder = tmp_path_factory.mktemp("killed")
    command = [
        sys.executable,
        str(survive.ROOT / "tests/survive.py"),
        "--times",
        "7",
        "--seed",
        "0",
        *request.param,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--keep", folder], capture_output=True, text=True, env=environment, timeout=300
    )
    runs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(runs) == len(survive.PHASES) == 7, done.stdout + done.stderr
    if request.param:  # else it proves no more than the first
        rows = data.read_jsonl(folder / "straight" / "metrics.jsonl")
        assert [row["active"] for row in rows] == [4, 3, 2, 2]  # two new ones, two that came back
    return folder, runs


def test_a_killed_run_ends_like_one_that_was_not(killed):
    """SIGKILL in training, in measuring and while a state is saved: resumed, every file is the straight run's."""
    folder, runs = killed
    phases = {kill.split()[0] for run in runs for kill in run["kills"]}
    assert phases == set(survive.PHASES) and all(run["codes"][0] == -signal.SIGKILL for run in runs)
    for run in runs:
        for name in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
            out = folder / f"killed{run['run']}"
            assert (out / name).read_bytes() == (folder / "straight" / name).read_bytes(), run
        assert run["differs"] == []


class Killed(BaseException):
    """Ends a run like SIGKILL: nothing between the moments below and main() catches it and tidies up."""


def kill(now):
    raise Killed


FIRST_STATE = "epoch00000-step000000"
EARLY = {
    "in the first measuring": ({"what": "beam_generate", "when": "before"}, True),
    "after the first measuring": (
        {"path": "metrics.jsonl", "what": "open", "when": "before"},
        True,
    ),
    "after the first state": (
        {"path": f"state/{FIRST_STATE}", "what": "rename", "when": "after"},
        False,
    ),
    "in the first state": (
        {"path": f"state/{FIRST_STATE}", "what": "rename", "when": "before"},
        False,
    ),
}


@pytest.mark.parametrize("name", list(EARLY))
def test_a_run_killed_before_its_first_epoch_goes_on(name, flags, straight, tmp_path):
    """With a config.json --resume goes on from the first state; before that the same command simply starts."""
    out, (wanted, is_run) = tmp_path / "run", EARLY[name]
    with pytest.raises(Killed):
        call(flags, out, survive.moment(nth(1, **wanted), kill))
    assert (out / "config.json").is_file() == is_run and any((out / "state").iterdir())
    if not is_run:
        assert "holds no run" in refused([*flags, "--resume"], out)
    code, stdout, stderr = call([*flags, *(["--resume"] if is_run else [])], out)
    assert code == 0 and (f"resumed from {FIRST_STATE}" in stdout) == is_run, stderr
    assert survive.difference(out, straight[0]) == []


def test_the_first_state_is_small(flags, tmp_path):
    """No copy of the weights, which are those of --model: a state of a model of any size takes no room."""
    out, sizes = tmp_path / "run", {}

    def look(now):
        state = out / "state" / FIRST_STATE
        sizes.update({path.name: path.stat().st_size for path in state.glob("*")})
        raise Killed

    with pytest.raises(Killed):
        call(flags, out, survive.moment(nth(1, what="el_ma_and_spans"), look))
    assert (
        set(sizes) == {"progress.json", "random-0.json", "manifest.json"}
        and sum(sizes.values()) < 1 << 18
    )


def killed_while_starting(out, config, number, folder):
    """start_run_folder in a child with SIGKILL at moment `number`: whether it came that far."""

    def job():
        # A fork does not get on with CUDA.
        with mock.patch.object(torch.cuda, "is_available", lambda: False):
            with survive.watched(out, survive.kill_at(number, out, folder / "moment")):
                runs.start_run_folder(out, config)

    code = survive.in_child(job, folder / "log")
    assert code in (0, -signal.SIGKILL), (folder / "log").read_text()
    return code != 0


@pytest.mark.parametrize("old_run", ["interrupted", "straight"])
def test_a_kill_while_a_run_is_replaced_leaves_one_run_or_none(old_run, request, tmp_path):
    """SIGKILL at every moment of --overwrite: the old run whole, the new one whole, or a folder where one can start.

    Never the config.json of one run beside what the other has written.
    """
    found = request.getfixturevalue(old_run)
    old_folder = found if old_run == "interrupted" else found[0]
    old, new, endings = contents(old_folder), {"lr": 1}, []
    of_new = {"config.json"} | {
        f"state/{FIRST_STATE}/{name}.json" for name in ("manifest", "progress", "random-0")
    }
    for number in itertools.count():
        out = Path(shutil.copytree(old_folder, tmp_path / "killed" / str(number)))
        if not killed_while_starting(out, new, number, tmp_path):
            break
        if not (out / "config.json").is_file():
            paths.check_out(out, overwrite=False)
            with runs.only_owner(out):
                runs.start_run_folder(out, new)
            endings.append("none")
        else:
            endings.append("old" if contents(out) == old else "new")
        if endings[-1] != "old":
            assert set(contents(out)) == of_new and data.read_json(out / "config.json") == new
            assert states.newest_state(out).name == FIRST_STATE
    assert (
        endings == sorted(endings, key=["old", "none", "new"].index)
        and len(set(endings)) == 3
        and len(endings) > 40
    )


def test_files_that_are_no_run_are_never_removed(tmp_path):
    """A folder with a model/ or a state/ of somebody else is no run, whatever was killed in it before."""
    for name in ("model", "state", "metrics.jsonl"):
        out = tmp_path / name
        (out / name).mkdir(parents=True)
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="holds files that are no run"):
                paths.check_out(out, overwrite)
    (tmp_path / "model" / ".lock").touch()
    with pytest.raises(ValueError, match="holds files that are no run"):
        paths.check_out(tmp_path / "model", overwrite=True)


def test_the_killing_script_notices_a_run_that_did_not_survive(killed, tmp_path):
    """A changed byte, a file too many and a missing one are differences, an equal copy is none."""
    out, straight = tmp_path / "copy", killed[0] / "straight"
    shutil.copytree(straight, out)
    assert survive.difference(out, straight) == []
    (out / "summary.json.1.tmp").touch()
    (out / "metrics.jsonl").write_bytes((straight / "metrics.jsonl").read_bytes() + b" ")
    (out / "model" / "config.json").unlink()
    assert set(survive.difference(out, straight)) == {
        "summary.json.1.tmp",
        "metrics.jsonl",
        "model/config.json",
    }


def test_a_state_gets_its_name_only_when_all_of_it_is_on_the_disk(straight):
    """Every file is synced after its last write, the manifest is written last, then the folder is renamed."""
    out, moments = straight
    done = [now for now in moments if now.phase == "save" and now.when == "after"]
    named = [
        i for i, now in enumerate(done) if now.what == "rename" and now.path.startswith("state/")
    ]
    assert len(named) == 5  # before epoch 0 and after epochs 0 to 3
    for begin, end in zip([0, *named], named, strict=False):
        part = f"{done[end].path}.part"
        written, synced = {}, {}
        for i, now in enumerate(done[begin:end]):
            if now.what in ("replace", "serialize_file"):
                written[now.path] = i
            synced |= {now.path: i} if now.what == "fsync" else {}
        names = {
            f"{part}/{name}" for name in ("training.safetensors", "random-0.json", "progress.json")
        }
        names -= {
            "state/epoch00000-step000000.part/training.safetensors"
        }  # its weights are --model's
        assert set(written) == names | {f"{part}/manifest.json"}
        assert all(synced[name] > i for name, i in written.items()) and part in synced
        assert all(written[f"{part}/manifest.json"] > synced[name] for name in names)


def test_two_states_are_kept(flags, straight, tmp_path):
    """While epochs 1 to 3 are measured there are two, in epoch 0 the first, and after the end none."""
    counts = []

    def count(now):
        if now.what == "el_ma_and_spans" and now.when == "before":
            counts.append(len(states.states(tmp_path / "run")))

    assert call(flags, tmp_path / "run", count)[0] == 0
    assert counts == [1, 2, 2, 2] and not (tmp_path / "run" / "state").exists()
    assert survive.difference(tmp_path / "run", straight[0]) == []


# --- signals ---

SIGNALS = {
    "in the middle of an epoch": (signal.SIGTERM, {"number": 2, "what": "step", "when": "before"}),
    "Ctrl-C in the middle of an epoch": (
        signal.SIGINT,
        {"number": 4, "what": "backward", "when": "after"},
    ),
    "in the first measuring": (
        signal.SIGTERM,
        {"number": 1, "what": "beam_generate", "when": "before"},
    ),
    "Ctrl-C in a later measuring": (
        signal.SIGINT,
        {"number": 3, "what": "el_ma_and_spans", "when": "after"},
    ),
    "in a save": (
        signal.SIGTERM,
        {"number": 2, "what": "serialize_file", "when": "before", "phase": "save"},
    ),
}


@pytest.mark.parametrize("name", list(SIGNALS))
def test_a_signal_saves_and_the_run_goes_on(name, flags, straight, tmp_path):
    """Exit 143 or 130 with a state that keeps its checksums; resumed, every file is the straight run's."""
    number, wanted = SIGNALS[name]
    out = tmp_path / "run"
    code, stdout, _ = call(flags, out, survive.moment(nth(**wanted), ask_to_stop(number)))
    assert code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert (
        stdout.splitlines()[-1]
        == f"interrupted ({number.name}); go on with the same command and --resume"
    )
    newest = states.states(out)[0]
    assert states.broken_part(newest) is None
    if "middle" in name:
        assert not newest.name.endswith("step000000")
    code, stdout, stderr = call([*flags, "--resume"], out)
    assert code == 0 and f"resumed from {newest.name}" in stdout, stderr
    assert survive.difference(out, straight[0]) == []


def test_a_second_signal_does_not_break_the_save(flags, straight, tmp_path):
    """SIGTERM, and Ctrl-C while the state is written for it: the state is whole, the exit the first signal's."""
    out, first = tmp_path / "run", nth(1, what="step", when="after")
    second, asked = nth(1, what="serialize_file", when="after"), []

    def twice(now):
        if first(now):
            asked.append(os.kill(os.getpid(), signal.SIGTERM))
        elif asked and second(now):
            asked.append(os.kill(os.getpid(), signal.SIGINT))

    # The first epoch's state is written before: only what follows the first signal counts.
    code, _, _ = call(flags, out, twice)
    assert len(asked) == 2 and code == 143 and states.broken_part(states.states(out)[0]) is None
    assert call([*flags, "--resume"], out)[0] == 0 and survive.difference(out, straight[0]) == []


# --- damaged states ---


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_off(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "flipped weights": ("training.safetensors", flip, "training.safetensors has changed (sha256)"),
    "truncated weights": ("training.safetensors", cut_off, "training.safetensors has"),
    "flipped random state": ("random-0.json", flip, "random-0.json has changed (sha256)"),
    "lost progress": ("progress.json", Path.unlink, "progress.json is missing"),
    "truncated manifest": ("manifest.json", cut_off, "manifest.json is unreadable"),
    "emptied manifest": (
        "manifest.json",
        lambda path: path.write_text("{}"),
        "is not in its manifest",
    ),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_damaged_state_is_named_and_passed_over(name, flags, copy, capsys):
    """The older of the two states is the newest that is whole, and what is wrong with the other is said."""
    file, damage, message = DAMAGES[name]
    newest, older = states.states(copy)
    damage(newest / file)
    assert states.newest_state(copy) == older
    said = capsys.readouterr().out
    assert newest.name in said and message in said and "older" in said


def test_the_older_state_gives_the_same_run(flags, straight, copy):
    """With the newest state damaged: said on stdout, the same files at the end, and only whole states are kept."""
    newest, older = states.states(copy)
    flip(newest / "training.safetensors")
    kept = []

    def look(now):
        if now.what == "el_ma_and_spans" and now.when == "before":
            kept.append([states.broken_part(state) for state in states.states(copy)])

    code, stdout, stderr = call([*flags, "--resume"], copy, look)
    assert code == 0, stderr
    assert (
        f"{newest.name} is damaged: training.safetensors" in stdout
        and f"resumed from {older.name}" in stdout
    )
    assert kept == [[None], [None, None]]
    assert survive.difference(copy, straight[0]) == []


def test_without_a_valid_state_nothing_is_restarted(flags, copy, tmp_path):
    """All states damaged, none there, no run at all: exit 2, one line that names the way out, nothing changed."""
    for state in states.states(copy):
        cut_off(state / "training.safetensors")
    error = refused([*flags, "--resume"], copy)
    assert "no valid state" in error and "--overwrite" in error
    shutil.rmtree(copy / "state")
    assert "no valid state" in refused([*flags, "--resume"], copy)
    (tmp_path / "nothing").mkdir()
    assert "holds no run" in refused([*flags, "--resume"], tmp_path / "nothing")


def test_lost_lines_of_a_run_are_noticed(flags, copy):
    """metrics.jsonl shorter than the state remembers it: refused, never filled up."""
    with open(copy / "metrics.jsonl", "rb+") as file:
        file.truncate(10)
    assert "metrics.jsonl: 10 bytes" in refused([*flags, "--resume"], copy)


# --- other settings, other data, another process ---


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_changed_byte_of_a_run_is_noticed(name, flags, copy):
    """One digit of the numbers that are kept, one letter of what the model said: named, and nothing is touched."""
    data = (copy / name).read_bytes()
    at = next(
        at
        for at in range(len(data) // 2)
        if data[at : at + 1].isalnum() and data[at - 1 : at].isalnum()
    )
    (copy / name).write_bytes(
        data[:at] + (b"1" if data[at : at + 1] != b"1" else b"2") + data[at + 1 :]
    )
    assert f"{name}: has changed (sha256); begin again with --overwrite" in refused(
        [*flags, "--resume"], copy
    )


@pytest.mark.parametrize("left", [None, 0, 5])
def test_the_times_of_a_run_may_be_lost(left, flags, straight, copy):
    """timing.jsonl, which nothing reads: gone, empty or cut off, the run goes on to the bytes of one never stopped."""
    if left is None:
        (copy / "timing.jsonl").unlink()
    else:
        os.truncate(copy / "timing.jsonl", left)
    assert call([*flags, "--resume"], copy)[0] == 0
    for name in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
        assert (copy / name).read_bytes() == (straight[0] / name).read_bytes()


def test_a_state_of_another_version_is_refused(flags, copy):
    """Its fields are not those of this one: no field is guessed."""
    state = states.states(copy)[0]
    progress = data.read_json(state / "progress.json")
    data.write_json(
        state / "progress.json",
        {"sizes" if name == "files" else name: x for name, x in progress.items()},
    )
    manifest = data.read_json(state / "manifest.json")
    path = state / "progress.json"
    manifest[path.name] = {"bytes": path.stat().st_size, "sha256": data.sha256_of(path)}
    data.write_json(state / "manifest.json", manifest)
    assert "another version" in refused([*flags, "--resume"], copy)


def changed_pairs(flags, folder):
    pairs = data.read_pairs(flags[flags.index("--pairs") + 1])
    pairs[2]["suffix"] += "!"
    data.write_jsonl(folder / "pairs.jsonl", pairs)
    return ["--pairs", folder / "pairs.jsonl"]


def changed_model(flags, folder):
    source = Path(flags[flags.index("--model") + 1])
    shutil.copytree(source, folder / "model")
    flip(folder / "model" / "model.safetensors")
    return ["--model", folder / "model"]


CHANGES = {
    "learning rate": (lambda *_: ["--lr", "0.004"], "lr was 0.0002, is 0.004"),
    "seed": (lambda *_: ["--seed", "8"], "seed was 7, is 8"),
    "method": (lambda *_: ["--method", "npo"], "method was icu, is npo"),
    "refinement": (lambda *_: ["--no-refine"], "refine was True, is False"),
    "pairs": (changed_pairs, "sha256 of pairs was "),
    "model": (changed_model, "sha256 of model was "),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_resuming_with_other_settings_shows_the_difference(name, flags, copy, tmp_path):
    """Exit 2, one line with the old value and the new one, and the run folder as it was."""
    change, message = CHANGES[name]
    error = refused([*flags, *change(flags, tmp_path), "--resume"], copy)
    assert "other settings or data" in error and message in error


def test_what_only_measures_does_not_ask_how_it_would_have_trained(flags, tmp_path):
    """A comparison of methods, each with its own weights, measures the model that never saw the texts once."""
    assert call([*flags, "--eval-only"], tmp_path / "run")[0] == 0
    before = contents(tmp_path / "run")
    code, stdout, _ = call(
        [*flags, "--eval-only", "--resume", "--lr", "1", "--beta", "9"], tmp_path / "run"
    )
    assert code == 0 and "finished already" in stdout and contents(tmp_path / "run") == before
    assert "num_beams was" in refused(
        [*flags, "--eval-only", "--resume", "--num-beams", "3"], tmp_path / "run"
    )


def test_each_process_may_have_its_own_gpu(flags):
    """The processes of one run on several GPUs describe the same run."""
    found = []
    for device in ("cuda:0", "cuda:1"):
        args = icu.parse_args([*flags, "--out", "run"])
        args.device = device
        found.append(runs.describe_run(args, {}))
    assert found[0] == found[1] and found[0]["device"] == "cuda"


def test_a_second_process_is_told_the_owners_pid(flags, straight, copy):
    """While a process holds the run folder another gets exit 2 and its pid; when it has gone the run goes on."""
    code = "import os, sys, pathlib\nfrom kit import runs\nwith runs.only_owner(pathlib.Path(sys.argv[1])):"
    code += " print(os.getpid(), flush=True), input()"
    command, pipe = [sys.executable, "-c", code, str(copy)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=survive.ROOT) as owner:
        pid = owner.stdout.readline().strip()
        for how in ("--resume", "--overwrite"):
            assert f"process {pid} is writing this run" in refused([*flags, how], copy)
        owner.kill()
    assert int(pid) == owner.pid and call([*flags, "--resume"], copy)[0] == 0
    assert survive.difference(copy, straight[0]) == []


# --- a full disk ---


def no_room(now):
    """What the function at this moment raises when the disk is full."""
    if now.what == "serialize_file":
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("phase", ["save", "log", "export"])
def test_no_room_for_a_write_leaves_the_states_intact(phase, flags, straight, tmp_path):
    """A write of this phase that fails, drawn from a seed: exit 2, one line with the states, and the run goes on."""
    out, (truth, moments) = tmp_path / "run", straight
    begin = next(
        i for i, now in enumerate(moments) if now.what == "rename"
    )  # the first state is there
    writing = ("open", "fsync", "serialize_file")
    able = [
        i
        for i, now in enumerate(moments)
        if (now.phase, now.when) == (phase, "before") and now.what in writing
    ]
    chosen, before = random.Random(0).choice([i for i in able if i > begin]), {}

    def fail(now):
        before.update({state.name: contents(state) for state in states.states(out)})
        no_room(now)

    code, _, stderr = call(flags, out, survive.moment(chosen, fail))
    assert (
        code == 2 and stderr.count("\n") == 1 and "No space left" in stderr and "--resume" in stderr
    ), stderr
    assert before and {state.name: contents(state) for state in states.states(out)} == before
    assert all(name in stderr for name in before)
    code, _, stderr = call([*flags, "--resume"], out)
    assert code == 0 and survive.difference(out, truth) == [], stderr


def test_a_full_disk_leaves_the_states_intact(flags, straight, tmp_path):
    """On a file system with room for one state and a half: exit 2, one line, the first state whole; then it goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    weights = Path(flags[flags.index("--model") + 1], "model.safetensors").stat().st_size
    size = lambda states: f"size={int(states * 3 * weights) + (1 << 18)}"  # noqa: E731  (weights and Adam's two moments)
    mount = ["mount", "-t", "tmpfs", "-o", size(1.1), "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no command mount: {error}")
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        out = disk / "run"
        code, stdout, stderr = call(flags, out)
        assert code == 2 and stderr.count("\n") == 1 and "No space left" in stderr, stdout + stderr
        kept = states.states(out)
        assert kept and all(
            states.broken_part(state) is None and state.name in stderr for state in kept
        )
        subprocess.run(["mount", "-o", f"remount,{size(10)}", str(disk)], check=True)
        code, _, stderr = call([*flags, "--resume"], out)
        assert code == 0 and survive.difference(out, straight[0]) == [], stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- what a state holds ---


def test_a_state_holds_no_pickle(interrupted):
    """Every file is JSON or safetensors, and the latter holds Adam's two moments and step count of each weight."""
    state = states.states(interrupted)[0]
    assert {path.name for path in state.iterdir()} == {
        "training.safetensors", "progress.json", "random-0.json", "manifest.json",
    }  # fmt: skip
    for path in state.glob("*.json"):
        json.loads(path.read_text())
    tensors = load_file(state / "training.safetensors")
    names = [name for name in tensors if not name.startswith("adam.")]
    assert names and all(tensors[f"adam.step.{name}"] == 4 for name in names)
    assert all(tensors[f"adam.exp_avg_sq.{name}"].shape == tensors[name].shape for name in names)


def test_the_optimiser_comes_back_as_it_was(make_model, tmp_path):
    """Adam's own state_dict before saving and after loading into a fresh engine: equal, tensor by tensor."""
    args = Namespace(lr=1e-3)
    engine = processes.PlainEngine(make_model("opt", dtype=torch.float32), args)
    ids = torch.arange(4, 16).view(2, 6)
    for _ in range(3):
        engine.step(engine.model(input_ids=ids, labels=ids).loss)
    engine.save(tmp_path)
    fresh = processes.PlainEngine(make_model("opt", dtype=torch.float32, seed=1), args)
    fresh.load(tmp_path)
    for a, b in zip(engine.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(a, b)
    before, after = (e.optimizer.state_dict()["state"] for e in (engine, fresh))
    assert before.keys() == after.keys() and len(before) > 10
    for number, values in before.items():
        assert values.keys() == after[number].keys()
        assert all(torch.equal(values[key], after[number][key]) for key in values)


def test_random_states_are_restored(make_model, tmp_path):
    """After load_state python, numpy and torch draw the numbers that they drew after save_state."""
    engine = processes.PlainEngine(make_model("gpt_neo", dtype=torch.float32), Namespace(lr=1e-3))
    (
        random.gauss(0, 1),
        np.random.standard_normal(),
        torch.rand(3),
    )  # also the half of a pair that gauss keeps

    def draw():
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.standard_normal(3).tolist(),
            torch.rand(5).tolist(),
        ]

    states.save_state(tmp_path, engine, states.Progress())
    drawn = draw()
    assert draw() != drawn
    states.load_state(states.newest_state(tmp_path), engine)
    assert draw() == drawn
