"""Runs survive what happens to long runs: kills, signals, full disks, other settings, a second process.

    python -m pytest tests/test_survival.py -q

A run that was interrupted and resumed is compared, byte for byte, with one that nothing stopped. Where a run is hit is
an event of survive.py, never a time. `python tests/survive.py --times 100` kills many more.
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

import pytest
import survive
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import icu
from kit import data, processes, runs
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
    """The one line on stderr of a command that must end with exit 2 and leave the run folder as it is."""
    before = contents(out)
    code, _, stderr = call(flags, out)
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert contents(out) == before
    return stderr


def contents(folder):
    """{name: bytes} of all files in a folder except the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def nth(number, **wanted):
    """Accepts the moment `number` (from 1) whose fields are as wanted."""
    seen = itertools.count(1)
    return lambda now: wanted.items() <= now._asdict().items() and next(seen) == number


def kill(now):
    raise survive.Killed


def resumes(flags, out, straight):
    """Resumes a run, which must end as the straight one: what it prints."""
    code, stdout, stderr = call([*flags, "--resume"], out)
    assert code == 0 and survive.difference(out, straight[0]) == [], stderr
    return stdout


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The flags of a run of three epochs on five records; Eq. 5 takes some out after each of the first two."""
    return survive.make_inputs(tmp_path_factory.mktemp("survival"))


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """(folder, moments) of a run that nothing stopped."""
    out, moments = tmp_path_factory.mktemp("straight") / "run", []
    code, _, stderr = call(flags, out, moments.append)
    assert code == 0, stderr
    forgotten = [row["forgotten"] for row in data.read_jsonl(out / "metrics.jsonl")]
    assert len(forgotten) == 4 and 0 < forgotten[1] < forgotten[2]  # else the tests prove less
    return out, moments


@pytest.fixture(scope="module")
def interrupted(flags, straight, tmp_path_factory):
    """A run folder with two states, killed in the middle of epoch 2."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(survive.Killed):  # epoch 1 has three steps
        call(flags, out, survive.moment(nth(4, what="step", when="after"), kill))
    assert [state.name for state in runs.states(out)] == ["epoch00001", "epoch00000"]
    return out


@pytest.fixture
def copy(interrupted, tmp_path):
    """A copy of `interrupted` to damage or to resume."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


# --- kill -9 ---


@pytest.mark.parametrize("more, times", [([], 7), (["--requests"], 3)], ids=["run", "request"])
def test_a_killed_run_ends_like_one_that_was_not(more, times, tmp_path):
    """SIGKILL in each phase of a run, and of a second request with marked texts: every file is the straight run's."""
    script = survive.ROOT / "tests" / "survive.py"
    command = [sys.executable, script, "--times", str(times), "--keep", tmp_path, *more]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(outcomes) == times and done.returncode == 0, done.stdout + done.stderr
    assert all(run["codes"][0] == -signal.SIGKILL and run["differs"] == [] for run in outcomes)
    phases = {kill.split()[0] for run in outcomes for kill in run["kills"]}
    assert phases >= set(survive.PHASES[:times])
    if more:  # two new texts, two that came back: else it proves no more than the other
        rows = data.read_jsonl(tmp_path / "straight" / "metrics.jsonl")
        assert [row["active"] for row in rows] == [4, 3, 2, 2]


def test_the_killing_script_notices_a_run_that_did_not_survive(straight, tmp_path):
    """A changed byte, a file too many and a missing one are differences, an equal copy is none."""
    out = Path(shutil.copytree(straight[0], tmp_path / "copy"))
    assert survive.difference(out, straight[0]) == []
    (out / "new").touch()
    (out / "metrics.jsonl").write_bytes((out / "metrics.jsonl").read_bytes() + b" ")
    (out / "model" / "config.json").unlink()
    changed = ["metrics.jsonl", "model/config.json", "new"]
    assert survive.difference(out, straight[0]) == changed


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_run_killed_before_its_first_state_begins_again(epochs, flags, straight, tmp_path):
    """Without a config.json by the same command, else by --resume: the same files."""
    out, wanted = tmp_path / "run", {"path": "config.json"} if not epochs else {"what": "serialize_file"}
    with pytest.raises(survive.Killed):
        call(flags, out, survive.moment(nth(1, when="before", **wanted), kill))
    if not epochs:
        assert "holds no run" in refused([*flags, "--resume"], out)
        assert call(flags, out)[0] == 0 and survive.difference(out, straight[0]) == []
    else:
        assert "resumed from the beginning" in resumes(flags, out, straight)


def test_a_kill_while_a_run_is_replaced_leaves_the_old_one_or_the_new_one(straight, tmp_path):
    """SIGKILL at every moment of --overwrite: the new config.json comes when nothing of the old run is left."""
    old, new, endings = data.read_json(straight[0] / "config.json"), {"thresholds_used": {}}, []
    for number in itertools.count():
        out = Path(shutil.copytree(straight[0], tmp_path / str(number)))
        at = survive.kill_at(number, out, tmp_path / "moment")

        def job(out=out, at=at):
            with survive.watched(out, at):
                runs.start_run_folder(out, new)

        if survive.in_child(job, tmp_path / "log") == 0:
            break
        config = data.read_json(out / "config.json")
        endings.append("old" if config == old else "new")
        if endings[-1] == "new":
            assert config == new and set(contents(out)) == {"config.json"}
        args = Namespace(out=out, overwrite=True, resume=False, model=None, pairs=None, bert=None,
                         unseen=None, never_saw=None, ppl=[])  # fmt: skip
        runs.check_run_folder(args)
        shutil.rmtree(out)
    assert len(endings) > 20 and endings == sorted(endings, reverse=True) and "new" in endings


def test_two_states_are_kept_and_the_last_one_is_made_of_tensors(flags, straight, tmp_path):
    """While epochs 1 to 3 are measured there is the state of each epoch before, at most two; after the end none."""
    names, out = [], tmp_path / "run"

    def look(now):
        if now.what == "el_ma_and_spans" and now.when == "before":
            names.append([state.name[-1] for state in runs.states(out)])
            for file in out.glob("state/*/*"):
                assert json.loads(file.read_text()) if file.suffix == ".json" else load_file(file)

    assert call(flags, out, look)[0] == 0
    assert names == [[], ["0"], ["1", "0"], ["2", "1"]] and not (out / "state").exists()


# --- signals ---


def test_sigterm_ends_a_run_like_any_process(flags, straight, tmp_path):
    """At once, and the run goes on from the end of the last epoch."""
    out, step = tmp_path / "run", nth(5, what="step", when="after")
    at = survive.moment(step, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    code = survive.in_child(lambda: survive.run_icu(flags, out, at), tmp_path / "log")
    assert code == -signal.SIGTERM
    assert "resumed from epoch00001" in resumes(flags, out, straight)


def test_ctrl_c_says_how_to_go_on(flags, straight, tmp_path):
    """Exit 130 and no traceback, in the middle of measuring."""
    out, measuring = tmp_path / "run", nth(3, what="beam_generate", when="before")
    at = survive.moment(measuring, lambda _: os.kill(os.getpid(), signal.SIGINT))
    code, stdout, stderr = call(flags, out, at)
    assert (code, stderr) == (130, "") and stdout.endswith("same command and --resume\n")
    assert "resumed from epoch00001" in resumes(flags, out, straight)


# --- damaged states ---


def test_a_half_written_state_is_passed_over(flags, straight, copy):
    """progress.json is written last: without it the state before counts."""
    newest, older = runs.states(copy)
    (newest / "progress.json").unlink()
    assert f"resumed from {older.name}" in resumes(flags, copy, straight)


def test_a_damaged_state_is_named_with_the_way_out(flags, straight, copy):
    """Weights cut off, lines lost: exit 2; with the folder of the state removed the one before it counts."""
    newest, older = runs.states(copy)
    os.truncate(newest / "training.safetensors", 99)
    code, _, stderr = call([*flags, "--resume"], copy)
    assert code == 2 and f"{newest}: cannot be loaded" in stderr and "remove it" in stderr
    shutil.rmtree(newest)
    lines = (copy / "metrics.jsonl").read_bytes()
    os.truncate(copy / "metrics.jsonl", 10)
    assert "metrics.jsonl: has 10 bytes of" in refused([*flags, "--resume"], copy)
    (copy / "metrics.jsonl").write_bytes(lines)
    assert f"resumed from {older.name}" in resumes(flags, copy, straight)


# --- other settings, other data, another process ---


def moved(flags, folder, name, change=None):
    """The flag of a copy of a run's pairs or model in another folder; `change` is a pattern of its files."""
    source, target = Path(flags[flags.index(f"--{name}") + 1]), folder / name
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    for file in [target] if target.is_file() else target.glob("*.json"):
        if change:
            file.write_text(file.read_text().replace(*change))
    return [f"--{name}", str(target)]


CHANGES = {
    "learning rate": (lambda *_: ["--lr", "0.004"], "lr was 0.0002, is 0.004"),
    "method": (lambda *_: ["--method", "npo"], "method was icu, is npo"),
    "refinement": (lambda *_: ["--no-refine"], "refine was True, is False"),
    "pairs": (lambda *args: moved(*args, "pairs", ("mill", "hill")), "sha256 of pairs was "),
    "model": (lambda *args: moved(*args, "model", ("{", "{ ")), "sha256 of model was "),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_resuming_with_other_settings_shows_the_difference(name, flags, copy, tmp_path):
    """Exit 2, one line with the old value and the new one, and the run folder as it was."""
    change, message = CHANGES[name]
    error = refused([*flags, *change(flags, tmp_path), "--resume"], copy)
    assert "other settings or data" in error and message in error and "--resume" not in error


def test_the_same_files_at_another_place_are_the_same_run(flags, straight, copy, tmp_path):
    """Pairs, model and the run folder itself were moved: the run goes on."""
    elsewhere = [*moved(flags, tmp_path, "pairs"), *moved(flags, tmp_path, "model")]
    assert call([*flags, *elsewhere, "--resume"], copy)[0] == 0
    changed = survive.difference(copy, straight[0])
    assert changed == ["summary.json"]  # it names the model


def test_what_only_measures_does_not_ask_how_it_would_have_trained(flags, tmp_path):
    """A comparison of methods, each with its own weights, measures the model that never saw the texts once."""
    out, flags = tmp_path / "run", [*flags, "--eval-only"]
    assert call(flags, out)[0] == 0
    before = contents(out)
    code, stdout, _ = call([*flags, "--resume", "--lr", "1", "--beta", "9"], out)
    assert code == 0 and "finished already" in stdout and contents(out) == before
    assert "num_beams was" in refused([*flags, "--resume", "--num-beams", "3"], out)


def test_each_process_may_have_its_own_gpu(flags):
    """The processes of one run on several GPUs describe the same run."""
    configs, method = [], Namespace(file="icu.py 012345", sha256=lambda: "0" * 64)
    for device in ("cuda:0", "cuda:1"):
        args = icu.parse_args([*flags, "--out", "run"])
        args.device = device
        configs.append(runs.describe_run(args, method, {}))
    assert configs[0] == configs[1] and configs[0]["device"] == "cuda"


def test_a_second_process_is_told_the_owners_pid(flags, straight, copy):
    """While a process holds the run folder another gets exit 2 and its pid; when it has gone the run goes on."""
    code = "import sys, pathlib\nfrom kit import runs\nwith runs.only_owner(pathlib.Path(sys.argv[1])):"
    command = [sys.executable, "-c", f"{code} print(flush=True), input()", str(copy)]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=survive.ROOT, **pipe) as owner:
        owner.stdout.readline()
        for way in ("--resume", "--overwrite"):
            assert f"process {owner.pid} is writing this run" in refused([*flags, way], copy)
        owner.kill()
    resumes(flags, copy, straight)


# --- whose folder it is ---

NOT_OURS = {
    "a file": (lambda out: out.write_text(""), "a file, not a folder"),
    "a model": (lambda out: (out / "model").mkdir(parents=True), "files that are no run"),
    "notes": (lambda out: data.write_json(out / "notes.json", {}), "files that are no run"),
    "a config of something else": (
        lambda out: data.write_json(out / "config.json", {"model_type": "gpt2"}),
        "config.json: is no run's",
    ),
}


@pytest.mark.parametrize("name", list(NOT_OURS))
def test_a_folder_that_is_no_run_is_left_alone(name, flags, tmp_path):
    """Whatever --overwrite says."""
    make, message = NOT_OURS[name]
    make(tmp_path / "out")
    assert message in refused([*flags, "--overwrite"], tmp_path / "out")


def test_a_run_stays_in_its_folder_and_reads_nothing_from_it(flags, copy, tmp_path):
    """A link could lead out of it, and --overwrite would remove the model that the run is to begin with."""
    assert "--resume to go on" in refused(flags, copy)
    (copy / "model").mkdir()
    inside = ["--model", copy / "model", "--overwrite"]
    assert "model, which is read, lies in it" in refused([*flags, *inside], copy)
    (copy / "samples.jsonl").rename(tmp_path / "elsewhere")
    (copy / "samples.jsonl").symlink_to(tmp_path / "elsewhere")
    assert "samples.jsonl is a link" in refused([*flags, "--resume"], copy)


# --- a full disk ---


def no_room(now):
    """What the function at this moment raises when the disk is full."""
    if now.what == "serialize_file":
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("phase", ["save", "log", "export"])
def test_no_room_for_a_write_leaves_the_states_intact(phase, flags, straight, tmp_path):
    """A write of this phase fails: exit 2, one line that names the state that is whole, and the run goes on."""
    out, moments, writes = tmp_path / "run", straight[1], ("open", "fsync", "serialize_file")
    saved = next(i for i, now in enumerate(moments) if now.path.endswith("progress.json"))
    chosen = random.Random(0).choice([
        i for i, now in enumerate(moments)
        if (now.phase, now.when) == (phase, "before") and now.what in writes and i > saved + 9
    ])  # fmt: skip
    code, _, stderr = call(flags, out, survive.moment(chosen, no_room))
    assert code == 2 and stderr.count("\n") == 1 and "No space left" in stderr, stderr
    assert f"{runs.states(out)[0]} is whole" in stderr and "--resume" in stderr
    resumes(flags, out, straight)


def test_too_little_memory_is_one_line(flags, tmp_path):
    """It names the flag that helps."""

    def full(now):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    at = survive.moment(nth(1, what="backward", when="before"), full)
    code, _, stderr = call(flags, tmp_path / "run", at)
    assert code == 2 and stderr.count("\n") == 1 and "--batch-size" in stderr, stderr


# --- what a state holds ---


class Counting:
    """A method with a tensor of its own."""

    name, file, touches_weights = "counting", "counting.py 012345", False

    def __init__(self, steps):
        self.steps = torch.tensor(steps)

    def sha256(self):
        return "0" * 64

    def state(self):
        return {"steps": self.steps}

    def load_state(self, tensors):
        self.steps = tensors["steps"]


def test_the_optimiser_and_a_methods_tensors_come_back_as_they_were(make_model, tmp_path):
    """Adam's own state_dict before saving and after loading into a fresh engine: equal, tensor by tensor."""
    args = Namespace(lr=1e-3)
    engine = processes.PlainEngine(make_model("opt", dtype=torch.float32), args)
    ids = torch.arange(4, 16).view(2, 6)
    for _ in range(3):
        engine.step(engine.model(input_ids=ids, labels=ids).loss)
    progress, method = runs.Progress(), Counting(0)
    progress.epoch, progress.forgotten = 4, {2, 1}
    runs.save_state(tmp_path, engine, progress, Counting(3))
    fresh = processes.PlainEngine(make_model("opt", dtype=torch.float32, seed=1), args)
    assert vars(runs.load_state(tmp_path, fresh, method)) == vars(progress) and method.steps == 3
    for a, b in zip(engine.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(a, b)
    before, after = (e.optimizer.state_dict()["state"] for e in (engine, fresh))
    assert before.keys() == after.keys() and len(before) > 10
    for number, values in before.items():
        assert values.keys() == after[number].keys()
        assert all(torch.equal(values[key], after[number][key]) for key in values)


def epoch_of(run, ma):
    """One epoch of a run whose only text has this MA; what is drawn at random in it."""
    drawn = torch.rand(3).tolist()
    row = {**dict.fromkeys(runs.MEASURES, ma), "id": "a", "generation": "text"}
    run.end_epoch(
        runs.mean_measures([row]), [row], forgotten=set(), stopped="max epochs" if ma < 0.5 else None,
        watched={}, losses={}, perplexities={}, seconds=0.1,
    )  # fmt: skip
    return drawn


@pytest.mark.parametrize("out", [None, "run"])
def test_a_run_needs_no_folder_and_draws_the_same_after_a_resume(out, flags, tmp_path, make_model):
    """In memory it has the same rows and summary and writes nothing; each epoch has a random state of its own."""
    out = out and str(tmp_path / out)
    args, method, folder = icu.parse_args([*flags, "--dry-run"]), Counting(1), tmp_path / "run"
    args.out = out
    engine = processes.PlainEngine(make_model("gpt_neo", dtype=torch.float32), args)
    with runs.running(args, method) as run:
        run.thresholds = dict.fromkeys(("el10", "ma", "bertscore", "bleu"), 0.5)
        assert run.begin(engine).epoch == 0
        assert run.method_folder == (folder / "method" if out else None)
        drawn = [epoch_of(run, ma) for ma in (0.9, 0.4)]
        assert drawn[0] != drawn[1] and run.samples[0]["epoch"] == 1
    if out:
        shutil.rmtree(folder / "state" / "epoch00001")
        with runs.running(args, method, data.read_json(folder / "config.json")) as run:
            assert run.begin(engine).epoch == 1 and len(run.metrics) == 1
            assert epoch_of(run, 0.4) == drawn[1]
    with mock.patch.object(runs.models, "save_model"):
        summary = run.export(engine.model, None)
    assert summary["before"]["ma"] == 0.9 and summary["after"]["ma"] == 0.4
    assert folder.exists() == bool(out) and summary["stopped"] == "max epochs"


# --- a finished run as it is read ---

DAMAGE = {
    "config.json": (lambda path: path.unlink(), "no config.json, so not a run folder"),
    "summary.json": (lambda path: path.unlink(), "no summary.json, so the run has not ended"),
    "metrics.jsonl": (lambda path: path.write_text('{"epoch": 0}\n'), "not what a run wrote there"),
    "samples.jsonl": (lambda path: path.write_text('{"id": 1}\n'), "not what a run wrote there"),
    "audit.json": (lambda path: path.write_text("[]"), "audit.json: not what a run wrote there"),
    "judge.json": (lambda path: path.write_text("{"), "judge.json: not JSON"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_a_folder_that_is_no_finished_run_is_named(name, world, tmp_path):
    """One line that names the file and what to do."""
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    damage, message = DAMAGE[name]
    damage(run / name)
    with pytest.raises(ValueError, match=message) as error:
        runs.read_run(run)
    assert str(run) in str(error.value) and "\n" not in str(error.value)


def test_a_finished_run_is_read_with_what_was_evaluated(world, tmp_path):
    """The figures of the evals stand beside the measures; one that only measured has no model."""
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    averages = {"averages": {"cls": 0.5, "dia": None}, "settings": {}}
    data.write_json(run / "tasks-after" / "tasks.json", averages)
    data.write_json(run / "judge.json", {"before": {"mean": 8.0}, "after": {"mean": 3.0}})
    after = runs.read_run(run)["summary"]["after"]
    assert (after["cls_avg"], after["gpt"], after["epochs"]) == (0.5, 3.0, 2)
    assert "dia_avg" not in after
    with pytest.raises(ValueError, match="only measured; it has no model of its own"):
        runs.models_of(runs.read_run(world.never_saw))
