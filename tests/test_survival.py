"""Runs survive what happens to long runs: kills, full disks, other settings, a second process.

A run that was interrupted and resumed is compared, byte for byte, with one that nothing stopped.
Where a run is hit is an event of survive.py, never a time. `python tests/survive.py` kills more.
"""

import contextlib
import errno
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import survive
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import icu
from kit import data, runs
from kit import flags as kit_flags


def call(flags, out, at=lambda now: None):
    """icu.py as a command, in this process and watched by `at`: (exit code, stdout, stderr)."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    argv = ["icu.py", *map(str, flags), "--out", str(out)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        survive.watched(out, at),
    ):
        try:
            kit_flags.run_cli(icu.main)
        except SystemExit as stopped:
            code = stopped.code
    return code, stdout.getvalue(), stderr.getvalue()


def refused(flags, out):
    """The one line of a command that ends with exit 2 and leaves the run folder as it is."""
    before = contents(out)
    code, _, stderr = call(flags, out)
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert contents(out) == before
    return stderr


def contents(folder):
    """{name: bytes} of all files in a folder except the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def nth(number, what, path=""):
    """Accepts the moment `number` (from 1) of this kind."""
    seen = itertools.count(1)
    return lambda now: (now.what, now.path) == (what, path) and next(seen) == number


def kill():
    raise survive.Killed


def resumes(flags, out, straight):
    """Resumes a run, which must end as the straight one: what it prints."""
    code, stdout, stderr = call([*flags, "--resume"], out)
    assert code == 0 and survive.difference(out, straight) == [], stderr
    return stdout


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The flags of a run of three epochs; Eq. 5 takes out samples after each of the first two."""
    return survive.make_inputs(tmp_path_factory.mktemp("survival"))


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert call(flags, out)[0] == 0
    forgotten = [row["forgotten"] for row in data.read_jsonl(out / "metrics.jsonl")]
    assert len(forgotten) == 4 and 0 < forgotten[1] < forgotten[2]  # else the tests prove less
    return out


@pytest.fixture(scope="module")
def interrupted(flags, tmp_path_factory):
    """A run folder with two states, killed in the middle of epoch 2."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(survive.Killed):  # epoch 1 has two steps
        call(flags, out, survive.moment(nth(4, "step"), kill))
    assert [state.name for state in runs.states(out)] == ["epoch00001", "epoch00000"]
    return out


@pytest.fixture
def copy(interrupted, tmp_path):
    """A copy of `interrupted` to damage or to resume."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


# --- kill -9 ---


@pytest.mark.parametrize("more, times", [([], 7), (["--requests"], 3)], ids=["run", "request"])
def test_a_killed_run_ends_like_one_that_was_not(more, times, tmp_path):
    """SIGKILL in each phase of a run, and of a second request: every file is the straight run's."""
    script = survive.ROOT / "tests" / "survive.py"
    command = [sys.executable, script, "--times", str(times), "--keep", tmp_path, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(outcomes) == times and done.returncode == 0, done.stdout + done.stderr
    assert [run["killed"][0] for run in outcomes] == list(survive.PHASES[:times])
    assert all(run["codes"][0] == -signal.SIGKILL and run["differs"] == [] for run in outcomes)
    if more:  # two new texts, two that came back: else it proves no more than the other
        rows = data.read_jsonl(tmp_path / "straight" / "metrics.jsonl")
        assert [row["active"] for row in rows] == [4, 3, 2, 2]


def test_a_kill_while_a_run_is_replaced_leaves_the_old_one_or_the_new_one(straight, tmp_path):
    """At every moment: the new config.json comes when nothing of the old run is left."""
    old, new, endings = data.read_json(straight / "config.json"), {"thresholds_used": {}}, []
    for number in itertools.count():
        out = Path(shutil.copytree(straight, tmp_path / str(number)))
        try:
            with survive.watched(out, survive.moment(number, kill)):
                runs.start_run_folder(out, new)
            break
        except survive.Killed:
            config = data.read_json(out / "config.json")
            assert config == old or set(contents(out)) == {"config.json"}
            endings.append(config == old)
    assert len(endings) > 9 and set(contents(out)) == {"config.json"}


def test_the_best_epoch_is_kept_whenever_the_run_is_killed(flags, tmp_path):
    """--keep-best: where the stop rule holds for all epochs the lowest perplexity decides."""
    data.write_jsonl(tmp_path / "texts.jsonl", [{"text": "".join(survive.TEXTS[3])}])
    flags = [*flags, "--keep-best", "--ppl", f"one={tmp_path / 'texts.jsonl'}"]
    flags += ["--thresholds", "1,1", "--min-epochs", "3"]
    straight = tmp_path / "straight"
    code, stdout, _ = call(flags, straight)
    rows = data.read_jsonl(straight / "metrics.jsonl")
    summary = data.read_json(straight / "summary.json")
    kept = rows[summary["epochs"]]
    assert code == 0 and kept["epoch"] < summary["epochs_run"] == 3 == rows[-1]["epoch"]
    lowest = min(row["ppl_one"] for row in rows)
    assert summary["after"]["ppl_one"] == kept["ppl_one"] == lowest
    assert "the model is that of" in stdout
    moments = [nth(6, "step"), nth(1, "os.rename", f"best/epoch{kept['epoch']:05d}")]
    moments += [nth(1, "os.rename", "model"), nth(1, "os.rmdir", "best")]
    for number, at in enumerate(moments):
        out = tmp_path / f"killed{number}"
        with contextlib.suppress(survive.Killed):
            call(flags, out, survive.moment(at, kill))
        resumes(flags, out, straight)


def test_the_nearest_epoch_is_kept_then_the_lowest_perplexity(flags, tmp_path):
    """Those that the stop rule holds for are equally near to it."""
    words = [*flags, "--keep-best", "--ppl", "x=y", "--out", str(tmp_path)]
    args, method = icu.resolve(icu.make_parser().parse_args(words), icu.ICU)
    run, kept = runs.Run(args, method), []
    run.thresholds = {"el10": 0.05, "ma": 0.6}
    epochs = [(0.9, 0.9, 10), (0.1, 0.7, 30), (0.1, 0.6, 90), (0.0, 0.5, 50), (0.04, 0.4, 20)]
    with mock.patch.object(runs.models, "save_model"):
        for run.progress.epoch, (el10, ma, ppl) in enumerate([*epochs, (0.0, 0.3, 40)]):
            run.keep_if_best(None, None, {"el10": el10, "ma": ma}, {"ppl_x": ppl})
            kept.append(run.progress.best[-1])
    assert kept == [0, 1, 2, 3, 4, 4]


def test_a_tracker_gets_numbers_only(flags, tmp_path, monkeypatch):
    """--track: each epoch's row without a text, all of them again after --resume."""
    code = "calls = []\ndef init(**settings): calls.append(settings)\n"
    code += "def log(row, step): calls.append((step, row))\ndef finish(): calls.append('end')\n"
    (tmp_path / "trackio.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    words = [*flags, "--track", "trackio"]
    with contextlib.suppress(survive.Killed):
        call(words, tmp_path / "run", survive.moment(nth(4, "step"), kill))
    assert call([*words, "--resume"], tmp_path / "run")[0] == 0
    calls = sys.modules["trackio"].calls
    assert calls[0]["name"] == calls[3]["name"] == "run" and calls[-1] == "end"
    assert [step for step, _ in calls[1:3] + calls[4:-1]] == [0, 1, 0, 1, 2, 3]
    values = [*calls[0]["config"].values(), *(x for _, row in calls[4:-1] for x in row.values())]
    assert values and {type(value) for value in values} <= {int, float, bool}
    assert "track" not in data.read_json(tmp_path / "run" / "config.json")
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert "pip install wandb" in refused([*flags, "--track", "wandb"], tmp_path / "none")
    (tmp_path / "wandb.py").write_text(code)
    assert call([*flags, "--track", "wandb"], tmp_path / "other")[0] == 0
    assert sys.modules["wandb"].calls[0]["settings"]["x_disable_meta"]


def test_two_states_are_kept_and_hold_no_pickle(flags, tmp_path):
    """While an epoch is measured the two before have states, of JSON and tensors; at the end none."""
    names, out = [], tmp_path / "run"

    def check(now):
        if now.what == "el_ma_and_spans":
            names.append([state.name[-1] for state in runs.states(out)])
            for file in out.glob("state/*/*"):
                assert json.loads(file.read_text()) if file.suffix == ".json" else load_file(file)

    assert call(flags, out, check)[0] == 0
    assert names == [[], ["0"], ["1", "0"], ["2", "1"]] and not (out / "state").exists()


def test_ctrl_c_says_how_to_go_on(flags, straight, tmp_path):
    """Exit 130 and no traceback, in the middle of measuring."""
    out, interrupt = tmp_path / "run", lambda: os.kill(os.getpid(), signal.SIGINT)
    code, stdout, stderr = call(flags, out, survive.moment(nth(3, "beam_generate"), interrupt))
    assert (code, stderr) == (130, "") and stdout.endswith("same command and --resume\n")
    assert "resumed from epoch00001" in resumes(flags, out, straight)


def test_a_damaged_state_is_passed_over_or_named_with_the_way_out(flags, straight, copy):
    """Half written, it has no progress.json; weights cut off are an error."""
    newest, older = runs.states(copy)
    os.truncate(newest / "training.safetensors", 99)
    assert f"{newest}: cannot be loaded; remove it" in refused([*flags, "--resume"], copy)
    (newest / "progress.json").unlink()
    assert f"resumed from {older.name}" in resumes(flags, copy, straight)


# --- other settings, other data, another process ---


def moved(flags, folder, name, change=("", "")):
    """The flag of a copy of a run's pairs or model; `change` replaces something in its files."""
    source, target = Path(flags[flags.index(f"--{name}") + 1]), folder / name
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    for file in [target] if target.is_file() else target.glob("*.json"):
        file.write_text(file.read_text().replace(*change))
    return [f"--{name}", str(target)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda *_: ["--method", "npo"], "method was icu, is npo"),
        (lambda *args: moved(*args, "pairs", ("mill", "hill")), "sha256 of pairs was "),
        (lambda *args: moved(*args, "model", ("{", "{ ")), "sha256 of model was "),
    ],
    ids=["method", "pairs", "model"],
)
def test_resuming_with_other_settings_shows_the_difference(change, message, flags, copy, tmp_path):
    """Exit 2, one line with the old value and the new one, and the run folder as it was."""
    error = refused([*flags, *change(flags, tmp_path), "--resume"], copy)
    assert "other settings or data" in error and message in error and "--resume" not in error


def test_the_same_files_at_another_place_are_the_same_run(flags, straight, copy, tmp_path):
    """Pairs, model and the run folder itself were moved: the run goes on."""
    same = "similarity", "similarity"
    moves = [word for name in ("pairs", "model") for word in moved(flags, tmp_path, name, same)]
    assert call([*flags, *moves, "--resume"], copy)[0] == 0
    assert survive.difference(copy, straight) == ["summary.json"]  # it names the model


def test_what_only_measures_does_not_ask_how_it_would_have_trained(flags, tmp_path):
    """A comparison of methods measures the model that never saw the texts once for all."""
    out, flags = tmp_path / "run", [*flags, "--eval-only"]
    assert call(flags, out)[0] == 0
    before = contents(out)
    code, stdout, _ = call([*flags, "--resume", "--lr", "1", "--beta", "9"], out)
    assert code == 0 and "finished already" in stdout and contents(out) == before
    assert "num_beams was" in refused([*flags, "--resume", "--num-beams", "3"], out)


def test_a_second_process_is_told_the_owners_pid(flags, straight, copy):
    """While a process holds the folder another gets exit 2; when it has gone the run goes on."""
    code = f"from kit.runs import Path, only_owner\nwith only_owner(Path({str(copy)!r})):"
    command = [sys.executable, "-c", f"{code} print(flush=True), input()"]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=survive.ROOT, **pipe) as owner:
        owner.stdout.readline()
        for way in ("--resume", "--overwrite"):
            assert f"process {owner.pid} is writing this run" in refused([*flags, way], copy)
        owner.kill()
    resumes(flags, copy, straight)


def test_a_run_stays_in_its_folder(flags, copy, tmp_path):
    """A link would lead out of it."""
    (copy / "samples.jsonl").rename(tmp_path / "elsewhere")
    (copy / "samples.jsonl").symlink_to(tmp_path / "elsewhere")
    assert "or a link" in refused([*flags, "--resume"], copy)


# --- too little room ---

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "path, error",
    [("state/epoch00002/progress.json", FULL), ("model", SafetensorError("No space left"))],
)
def test_no_room_for_a_write_leaves_the_states_intact(path, error, flags, straight, tmp_path):
    """Exit 2, one line that names the last state, and the run goes on."""
    out = tmp_path / "run"

    def fail(now):
        if now.path.startswith(path) and len(runs.states(out)) == 2:
            raise error

    code, _, stderr = call(flags, out, fail)
    assert code == 2 and stderr.count("\n") == 1 and "No space left" in stderr, stderr
    assert f"{runs.states(out)[0]} is complete" in stderr and "--resume" in stderr
    resumes(flags, out, straight)


def test_too_little_memory_is_one_line(flags, tmp_path):
    """It names the flag that helps."""
    full = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"))
    code, _, stderr = call(flags, tmp_path / "run", survive.moment(nth(1, "backward"), full))
    assert code == 2 and stderr.count("\n") == 1 and "--micro-batch 1" in stderr, stderr


# --- a finished run as it is read ---


def test_a_finished_run_is_read_with_what_was_evaluated(world, tmp_path):
    """The figures of the evals stand beside the measures; one that only measured has no model."""
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    averages = {"averages": {"cls": 0.5, "dia": None}, "settings": {}}
    data.write_json(run / "tasks-after" / "tasks.json", averages)
    data.write_json(run / "judge.json", {"before": {"mean": 8.0}, "after": {"mean": 3.0}})
    after = runs.read_run(run)["summary"]["after"]
    assert (after["cls_avg"], after["gpt"], after["epochs"]) == (0.5, 3.0, 2)
    assert "dia_avg" not in after
    with pytest.raises(ValueError, match="no model of its own"):
        runs.models_of(runs.read_run(world.never_saw))
