"""Several processes: DeepSpeed's ZeRO on CPU over gloo gives the run of one process.

A launch is slow, so one makes many runs: this file is also what the launchers start (DeepSpeed's
two processes, torch's four), and each process runs every job of a list.
"""

import contextlib
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils import cpp_extension
from transformers import AutoModelForCausalLM
from world import make_inputs, make_requests

import experiment
import icu
import metrics
from examples import lora, rmu, task_vector
from kit import data, flags, processes

ROOT = Path(__file__).resolve().parents[1]
CAN_COMPILE = (shutil.which("g++") or shutil.which("c++")) and (
    shutil.which("ninja") or importlib.util.find_spec("ninja")
)
needs_deepspeed = pytest.mark.skipif(
    not (importlib.util.find_spec("deepspeed") and CAN_COMPILE),
    reason="needs deepspeed, a C++ compiler and ninja: it compiles a small op",
)
# Frozen, new and swapped weights.
EXAMPLES = {"rmu": rmu.RMU, "lora": lora.LoRA, "task_vector": task_vector.TaskVector}

# --- one job: a run with something arranged, in one process or in many ---


class Left(BaseException):
    """Nothing in icu.py catches it."""


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def stepping(kind, step):
    """An engine's `step` with something arranged at one of its calls, in the last process."""
    calls = []

    def arranged(engine, loss, backward):
        calls.append(1)
        if processes.RANK == processes.WORLD_SIZE - 1:
            if kind == "nan" and len(calls) == 2:  # under a finite loss
                loss.register_hook(lambda gradient: gradient * float("nan"))
            if kind == "die" and len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        return step(engine, loss, backward)

    return arranged


def leaving(epoch, stop_reason=icu.stop_reason):
    """icu.stop_reason that leaves the run when this epoch is measured, as if killed there."""

    def leave(means, n_active, now, **rest):
        if now == epoch:
            raise Left
        return stop_reason(means, n_active, now, **rest)

    return leave


def forgetting(forgotten, *_):
    """icu.refine that forgets rows 0, 2 and 4, all that rank 0 of 2 has, then row 1 too."""
    return {0, 2, 4} | forgotten | ({1} if forgotten else set())


def sharding_all(path, read_json=data.read_json):
    """data.read_json; ZeRO-3 would keep a tiny model's weights on every process."""
    value = read_json(path)
    if Path(path).name == "ds_config.json":
        limits = ("stage3_param_persistence_threshold", "stage3_prefetch_bucket_size")
        value["zero_optimization"] |= dict.fromkeys(limits, 0)
    return value


def watching(file, el_ma_and_spans=metrics.el_ma_and_spans):
    """el_ma_and_spans that notes the weights held before, in and after it, and all weights."""

    def watched(model, *args, **kwargs):
        held = lambda: sum(p.numel() for p in model.parameters())  # noqa: E731
        before, during = held(), []
        hooks = [
            module.register_forward_pre_hook(lambda *_: during.append(held()))
            for module in model.modules()
        ]
        result = el_ma_and_spans(model, *args, **kwargs)
        for hook in hooks:
            hook.remove()
        everything = sum(p.ds_numel for p in model.parameters())
        with open(file, "a") as lines:
            lines.write(json.dumps([before, max(during), held(), everything]) + "\n")
        return result

    return watched


@contextlib.contextmanager
def arranged(kind, out):
    """What a job needs: a run that forgets, dies, has a NaN, is left, or is looked into."""
    with pytest.MonkeyPatch.context() as patch:
        for engine in (processes.PlainEngine, processes.ZeroEngine):
            patch.setattr(engine, "step", stepping(kind, engine.step))
        if kind == "forgotten":
            patch.setattr(icu, "refine", forgetting)
            # Steps that shrink with the gradient, which Adam's usually do not.
            adam = torch.optim.Adam
            patch.setattr(adam, "__init__", functools.partialmethod(adam.__init__, eps=1.0))
        if kind in ("parts", "left"):
            patch.setattr(data, "read_json", sharding_all)
        if kind == "parts":
            file = out.with_suffix(f".{processes.RANK}.held")
            patch.setattr(metrics, "el_ma_and_spans", watching(file))
        if kind == "left":
            patch.setattr(icu, "stop_reason", leaving(2))
        with contextlib.suppress(Left):
            yield


def do_job(kind, out, words):
    """One run into `out`."""
    with arranged(kind, out):
        icu.main(EXAMPLES.get(kind, icu.METHOD), argv=[*words, "--out", str(out)])
    if kind == "left":
        resume_a_planted_state(out, words)
        icu.main(argv=[*words, "--out", str(out), "--resume"])


def resume_a_planted_state(out, words):
    """Resumes once from files of the state that are pickles which make a file; notes the error."""
    rank, planted = processes.RANK, []

    def load(engine, folder, load=processes.ZeroEngine.load):
        processes.wait_for_all()
        (path,) = folder.glob(f"zero/*zero_pp_rank_{rank}_*optim_states.pt")
        planted.extend([path, path.read_bytes()])
        torch.save({"optimizer_state_dict": Payload(out.with_suffix(f".{rank}.ran"))}, path)
        load(engine, folder)

    with mock.patch.object(processes.ZeroEngine, "load", load):
        try:
            icu.main(argv=[*words, "--out", str(out), "--resume"])
        except Exception as error:
            out.with_suffix(f".{rank}.refused").write_text(str(error))
    path, content = planted
    shutil.copy(path, out.with_suffix(f".{rank}.planted"))
    path.write_bytes(content)
    processes.wait_for_all()


def do_jobs(path):
    """What each started process does: the jobs of a JSON file, [[name, kind, flags], ...]."""
    torch.set_num_threads(1)
    for name, kind, words in data.read_json(path):
        # ZeRO-3 leaves DeepSpeed's own F.linear in the process, which rounds otherwise.
        with mock.patch.object(torch.nn.functional, "linear", torch.nn.functional.linear):
            do_job(kind, Path(path).parent / name, words)


# --- the launches ---


def launch(n, command):
    """Exit code and output of n processes: two by DeepSpeed's launcher, four by torch's."""
    port = experiment.free_port()
    started = {
        2: ["deepspeed.launcher.runner", "--quiet", "--no_local_rank", "--num_gpus", "2"],
        4: ["torch.distributed.run", "--nproc_per_node", "4", "--master_addr", "127.0.0.1"],
    }[n]
    done = subprocess.run(
        [sys.executable, "-m", *started, "--master_port", port, *map(str, command)],
        capture_output=True, text=True, timeout=600, cwd=ROOT,
        env=os.environ
        | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert [*Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*")] == []  # 66 MiB each
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """{name: (kind, flags)} of all runs; a name begins with the number of processes."""
    root = tmp_path_factory.mktemp("inputs")
    for name in ("five", "three", "llama", "march"):
        (root / name).mkdir()
    five = make_inputs(root / "five")
    for name in ("three", "march"):
        shutil.copytree(root / "five" / "model", root / name / "model")
    march = make_requests(root / "march")  # 2 marked texts, and 3 of an earlier request, watched
    three = make_inputs(root / "three", rows=3)
    double = [*make_inputs(root / "llama", kind="llama"), "--dtype", "float64"]
    both = {
        "five": (None, five),  # 5 samples, batch 2: the last batch of an epoch has one row
        "forgotten": ("forgotten", [*five, "--lr", "3e-3"]),
        "march": (None, march),
        "nan": ("nan", [*double, "--max-epochs", "2"]),
        **{name: (name, five) for name in EXAMPLES},
    }
    four, small = [*five, "--batch-size", "4"], ["--micro-batch", "1", "--checkpointing"]
    return {
        **{f"{n}-{name}": job for n in (1, 2) for name, job in both.items()},
        "1-three": (None, three),
        "1-parts": (None, four),
        "1-bf16": (None, [*four, "--dtype", "bf16-weights"]),
        "2-parts": (None, [*four, *small]),
        "2-bf16": (None, [*four, *small, "--dtype", "bf16-weights"]),
        "2-parts3": (None, [*four, *small, "--zero", "3"]),
        "2-zero3": ("parts", [*five, "--zero", "3"]),
        "2-left": ("left", [*five, "--zero", "3"]),
        "2-die": ("die", five),  # the last of its launch
        "4-three": (None, three),
        "4-zero3": ("parts", [*three, "--zero", "3"]),
    }


def launched(n, jobs, folder):
    """The jobs of n processes, run in `folder`: (folder, exit code, output)."""
    mine = [
        [name, kind, [*words, "--timeout", "5"]]
        for name, (kind, words) in jobs.items()
        if name.startswith(f"{n}-")
    ]
    (folder / "jobs.json").write_text(json.dumps(mine))
    return folder, *launch(n, [__file__, folder / "jobs.json"])


@pytest.fixture(scope="module")
def one(jobs, tmp_path_factory):
    """Folder of the runs of one process, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("one")
    for name, (kind, words) in jobs.items():
        if name.startswith("1-"):
            do_job(kind, folder / name, words)
    # Steps of "forgotten" shrink with the gradient, and are so large that its size matters.
    losses = [row["loss"] for row in data.read_jsonl(folder / "1-forgotten" / "metrics.jsonl")]
    assert abs(losses[2] - losses[1]) > 1e-2
    return folder


@pytest.fixture(scope="module")
def two(jobs, tmp_path_factory):
    """(folder, exit code, output) of two processes, the last run of which loses one.

    An earlier start was killed while it compiled DeepSpeed's op: its lock is there.
    """
    stale = Path(cpp_extension._get_build_directory("deepspeed_shm_comm", False), "lock")
    stale.touch()
    result = launched(2, jobs, tmp_path_factory.mktemp("two"))
    assert not stale.exists()
    return result


@pytest.fixture(scope="module")
def four(jobs, tmp_path_factory):
    """(folder, exit code, output) of the runs of four processes."""
    return launched(4, jobs, tmp_path_factory.mktemp("four"))


def check_same_run(run, reference):
    """Losses of the first epoch to 1e-5; measures, texts and forgotten samples of all epochs."""
    first, other = (data.read_jsonl(folder / "metrics.jsonl")[1] for folder in (run, reference))
    losses = {name: value for name, value in other.items() if "loss" in name and value is not None}
    assert losses and {name: first[name] for name in losses} == pytest.approx(
        losses, rel=1e-5, abs=5e-6
    )
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows, expected = data.read_jsonl(run / name), data.read_jsonl(reference / name)
        assert len(rows) == len(expected)
        for row, other in zip(rows, expected, strict=True):
            # 1e-4: three epochs of float32 sums in another order. Texts and sets are exact.
            approximately = {
                key: pytest.approx(value, rel=1e-4, abs=1e-4) if isinstance(value, float) else value
                for key, value in other.items()
            }
            assert row == approximately, (name, row["epoch"])


# --- the claims ---


# How many samples are forgotten after each epoch.
REACHED = {"five": [0, 2, 2, 2], "three": [0, 1, 1, 1], "forgotten": [0, 3, 4, 4]}
REACHED |= {"march": [1, 2, 2, 2]}
RUNS = {
    **{f"2-{name}": f"1-{name}" for name in ("five", "forgotten", "march", "nan")},
    **{f"2-{name}": f"1-{name}" for name in EXAMPLES},
    "2-zero3": "1-five",
    "2-parts": "1-parts",
    "2-parts3": "1-parts",
    "4-three": "1-three",
    "4-zero3": "1-three",
}


@needs_deepspeed
@pytest.mark.parametrize("name", RUNS)
def test_several_processes_give_the_run_of_one(name, one, request):
    """Whatever share of the rows a process has, and whatever the method does with the weights.

    Two processes have a step with one row and lose all rows of rank 0 in "forgotten"; four have
    more ranks than rows in every step. Examples freeze, adapt and swap weights.
    """
    folder, code, output = request.getfixturevalue("four" if name[0] == "4" else "two")
    assert (folder / name / "summary.json").exists(), output[-3000:]
    assert name[0] == "2" or code == 0, output[-3000:]
    rows = data.read_jsonl(one / RUNS[name] / "metrics.jsonl")
    expected = REACHED.get(RUNS[name][2:], [row["forgotten"] for row in rows])
    assert [row["forgotten"] for row in rows] == expected
    assert len({row["loss"] for row in rows}) == len(rows)  # it trained
    check_same_run(folder / name, one / RUNS[name])


@needs_deepspeed
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(two):
    """One rank's NaN: all count one skipped step."""
    rows = data.read_jsonl(two[0] / "2-nan" / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, *[1] * (len(rows) - 1)]


@needs_deepspeed
@pytest.mark.parametrize("name", ["2-five", "2-zero3"])
def test_the_exported_model_loads_with_plain_transformers(name, one, two):
    """model/ of a ZeRO run gives the logits of one process's model, not of the original."""
    original = data.read_json(one / "1-five" / "config.json")["model"]
    ids = torch.arange(5, 45).view(2, 20)
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
        for folder in (two[0] / name / "model", one / "1-five" / "model", original)
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
    assert (logits[0] - logits[2]).abs().max() > 0.1


@needs_deepspeed
def test_weights_of_bf16_train_in_several_processes(one, two):
    """DeepSpeed's own bf16: the losses of the plain engine's to 1 %; the model's weights are it."""
    folders = two[0] / "2-bf16", one / "1-bf16"
    losses = [[row["loss"] for row in data.read_jsonl(f / "metrics.jsonl")[1:]] for f in folders]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    for folder in folders:
        assert data.read_json(folder / "model" / "config.json")["dtype"] == "bfloat16"


@needs_deepspeed
def test_zero_3_never_holds_the_whole_model(two, four):
    """While it measures a process holds a layer's weights in a call, and none between calls."""
    files = [*two[0].glob("*-zero3.*.held"), *four[0].glob("*-zero3.*.held")]
    assert len(files) == 2 + 4
    for line in (line for file in files for line in file.read_text().splitlines()):
        before, during, after, everything = json.loads(line)
        assert before == after == 0 and 0 < during < everything / 4


@needs_deepspeed
def test_a_dead_rank_ends_the_job_and_the_run_goes_on(jobs, two):
    """SIGKILL to one of two ends both; --resume gives the measures of a run that lost none."""
    folder, code, output = two
    assert code != 0 and "exits with return code = -9" in output, output[-3000:]
    words = [*jobs["2-die"][1], "--timeout", "5", "--out", folder / "2-die", "--resume"]
    code, output = launch(2, ["icu.py", *words])
    assert code == 0 and "resumed from epoch" in output, output[-3000:]
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (folder / "2-die" / name).read_bytes() == (folder / "2-five" / name).read_bytes()


@needs_deepspeed
def test_a_run_that_was_left_while_it_measured_goes_on(two):
    """ZeRO-3 from its state: the files of the run that was not left, byte for byte."""
    for file in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
        left, straight = two[0] / "2-left" / file, two[0] / "2-zero3" / file
        assert left.read_bytes() == straight.read_bytes()


@needs_deepspeed
def test_a_pickle_planted_in_a_state_never_runs(two):
    """Every process refuses it."""
    for rank in range(2):
        assert not (two[0] / f"2-left.{rank}.ran").exists()
        assert "Weights only load failed" in (two[0] / f"2-left.{rank}.refused").read_text()
    torch.load(two[0] / "2-left.0.planted", weights_only=False)
    assert (two[0] / "2-left.0.ran").exists()  # the pickle works where one lets it


# --- the start ---


def test_world_size_alone_is_no_launch(monkeypatch):
    """With WORLD_SIZE or RANK in the environment, as in many a container, it is one process."""
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "x"}.items():
        monkeypatch.setenv(name, value)
    assert not flags.launched()


@needs_deepspeed
def test_a_start_that_hangs_ends_after_the_timeout(jobs, tmp_path):
    """The second process never comes: one line, exit 2."""
    launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    launch |= {"MASTER_PORT": experiment.free_port(), "DS_ACCELERATOR": "cpu"}
    words = [*jobs["1-three"][1], "--out", str(tmp_path / "run"), "--timeout", "0.05"]
    done = subprocess.run(
        [sys.executable, "icu.py", *words], capture_output=True, text=True, cwd=ROOT, timeout=240,
        env=os.environ | launch,
    )  # fmt: skip
    assert done.returncode == 2 and "--timeout" in done.stderr.splitlines()[-1], done.stderr
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    do_jobs(sys.argv[-1])
