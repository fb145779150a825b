"""Several processes: DeepSpeed's ZeRO on CPU over gloo gives the run of one process, and outlives a dead rank.

    python -m pytest tests/test_distributed.py -q

A launch costs 10 to 20 seconds, so one launch makes several runs: this file is also what the deepspeed launcher (two
processes) and torch.distributed.run (four) start, and each process calls icu.main for every job of a list.
"""

import contextlib
import functools
import importlib
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
from transformers import AutoModelForCausalLM

import experiment
import icu
import metrics
from kit import data, processes, runs

ROOT = Path(__file__).resolve().parents[1]


def why_not():
    """Why DeepSpeed can not run here, or None."""
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    if not (shutil.which("g++") or shutil.which("c++")):
        return "no C++ compiler: DeepSpeed compiles a small op"
    if not (shutil.which("ninja") or importlib.util.find_spec("ninja")):
        return "no ninja: DeepSpeed compiles a small op"
    return None


needs_deepspeed = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


EXAMPLES = ("simnpo", "undial", "rmu", "lora", "task_vector")

# --- one job: a run of icu.py with something arranged, in one process or in many ---


@contextlib.contextmanager
def arranged(how, rank, world, steps):
    """Arranges what a job needs and writes each step's losses, unrounded, to the file `steps`.

    how: None; "forgotten": Eq. 5 forgets rows 0, 2 and 4, the whole share of rank 0 of 2, then row 1 too;
    "nan": in the second step the last process alone has a gradient that is not finite under a finite loss;
    "die": the last process gets SIGKILL at its fourth step; "size": Adam with an epsilon of 1, whose steps shrink with
    the gradient, where the usual Adam takes the same step for half the gradient, and a term that no text gives;
    "leave0", "leave2": every process leaves that epoch when it is measured, as if it were killed there; "planted": as
    "leave2", and the state then has a pickle in it; "parts": ZeRO-3 shards small weights, too, and what a process holds
    of them while it measures is written to the file `steps` with the suffix .held; one of EXAMPLES: its method.
    """
    count_step, adam, calls = runs.Progress.count_step, torch.optim.Adam.__init__, []

    def counted(progress, values):
        with open(steps, "a") as file:
            file.write(json.dumps(values) + "\n")
        count_step(progress, values)

    method = (
        getattr(importlib.import_module(f"examples.{how}"), how) if how in EXAMPLES else icu.icu
    )

    @functools.wraps(method)
    def loss(batch, args):
        terms = method(batch, args)
        calls.append(1)
        if how == "nan" and len(calls) == 2 and rank == world - 1:
            terms["forget"][1].register_hook(lambda gradient: gradient * float("nan"))
        if how == "die" and len(calls) == 4 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "size":
            terms["decay"] = (
                1e-3,
                batch.once(sum(weight.square().sum() for weight in batch.model.parameters())),
            )
        return terms

    def leave(means, n_active, epoch, stop_reason=icu.stop_reason, **rest):
        if epoch == (2 if how == "planted" else int(how[-1])):
            raise Left
        return stop_reason(means, n_active, epoch, **rest)

    def shard_all(path, read=data.read_json):
        value = read(path)
        if (
            Path(path).name == "ds_config.json"
        ):  # a tiny model's weights are otherwise kept, or fetched all at once
            value["zero_optimization"] |= {
                "stage3_param_persistence_threshold": 0,
                "stage3_prefetch_bucket_size": 0,
            }
        return value

    def held(model, *args, el_ma_and_spans=metrics.el_ma_and_spans, **kwargs):
        """As measured; notes the weights that this process holds before, at most in it and after it, and their sum."""
        count = lambda: sum(p.numel() for p in model.parameters())  # noqa: E731
        before, during = count(), []
        hooks = [
            module.register_forward_pre_hook(lambda *_: during.append(count()))
            for module in model.modules()
        ]
        result = el_ma_and_spans(model, *args, **kwargs)
        for hook in hooks:
            hook.remove()
        with open(steps.with_suffix(".held"), "a") as file:
            file.write(
                json.dumps(
                    [before, max(during), count(), sum(p.ds_numel for p in model.parameters())]
                )
                + "\n"
            )
        return result

    def refine(forgotten, *_):
        return {0, 2, 4} | forgotten | ({1} if forgotten else set())

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(runs.Progress, "count_step", counted))
        if how == "size":
            wide = functools.partialmethod(adam, eps=1.0)
            stack.enter_context(mock.patch.object(torch.optim.Adam, "__init__", wide))
        if how == "forgotten":
            stack.enter_context(mock.patch.object(icu, "refine", refine))
        if how == "parts":
            stack.enter_context(mock.patch.object(data, "read_json", shard_all))
            stack.enter_context(mock.patch.object(metrics, "el_ma_and_spans", held))
        if how in ("leave0", "leave2", "planted"):
            stack.enter_context(mock.patch.object(icu, "stop_reason", leave))
            stack.enter_context(contextlib.suppress(Left))
        yield loss


class Left(BaseException):
    """Nothing in icu.py catches it."""


def do_jobs(path):
    """What each started process does: the jobs of a JSON file, [[name, how, flags], ...], into its folder."""
    torch.set_num_threads(1)
    for name, how, flags in data.read_json(path):
        out = Path(path).parent / name
        # ZeRO-3 leaves DeepSpeed's own F.linear behind in the process, which rounds otherwise: not for the next run.
        with mock.patch.object(torch.nn.functional, "linear", torch.nn.functional.linear):
            steps = out.with_suffix(f".{processes.RANK}.steps")
            with arranged(how, processes.RANK, processes.WORLD_SIZE, steps) as loss:
                icu.main(loss, argv=[*flags, "--out", str(out)])
            if how in ("leave0", "leave2"):
                icu.main(argv=[*flags, "--out", str(out), "--resume"])
            if how == "planted":
                plant(runs.states(out)[0], out.with_suffix(f".{processes.RANK}.ran"))
                try:
                    icu.main(argv=[*flags, "--out", str(out), "--resume"])
                except ValueError as error:
                    out.with_suffix(f".{processes.RANK}.refused").write_text(str(error))


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def plant(state, file):
    """Each process's DeepSpeed file of a state becomes a pickle that makes `file`; the manifest says it is right."""
    processes.wait_for_all()
    (path,) = state.glob(f"zero/*zero_pp_rank_{processes.RANK}_*optim_states.pt")
    torch.save({"optimizer_state_dict": Payload(file)}, path)
    processes.wait_for_all()
    if processes.is_main:
        manifest = data.read_json(state / "manifest.json")
        for name in manifest:
            manifest[name] = {
                "bytes": (state / name).stat().st_size,
                "sha256": data.sha256_of(state / name),
            }
        data.write_json(state / "manifest.json", manifest)
    processes.wait_for_all()


def launch(n, command, launcher):
    """Exit code and output of n processes of a Python command."""
    port = experiment.free_port()
    torchrun = ["torch.distributed.run", "--nproc_per_node", str(n), "--master_addr", "127.0.0.1"]
    deepspeed = [
        "deepspeed.launcher.runner",
        "--quiet",
        "--no_local_rank",
        "--num_gpus",
        str(n),
    ]  # as run.sh does it
    started = [
        sys.executable,
        "-m",
        *(torchrun if launcher == "torch" else deepspeed),
        "--master_port",
        port,
    ]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [*started, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        cwd=ROOT,
    )
    assert not [
        *Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*")
    ]  # 66 MiB a process
    return done.returncode, done.stdout + done.stderr


# --- the runs ---


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """{name: (how, flags)} of all runs, by name; a name begins with the number of processes."""
    root = tmp_path_factory.mktemp("inputs")
    folders = {name: root / name for name in ("five", "three", "llama", "march")}
    for folder in folders.values():
        folder.mkdir()
    five = survive.make_inputs(folders["five"])
    for name in ("three", "march"):
        shutil.copytree(folders["five"] / "model", folders[name] / "model")
    march = survive.make_requests(
        folders["march"]
    )  # 2 marked texts, and 3 of an earlier request, watched
    three = survive.make_inputs(folders["three"], rows=3)
    llama = [*survive.make_inputs(folders["llama"], kind="llama"), "--dtype", "float64"]
    return {
        "1-five": (None, five),  # 5 samples, batch 2: the last batch of an epoch has one row
        "1-three": (None, three),
        "1-forgotten": ("forgotten", five),
        "1-march": (None, march),
        "1-nan": ("nan", five),
        "1-size": ("size", [*five, "--lr", "3e-3"]),
        "1-double": (None, llama),  # GPT-Neo computes its attention in float32 whatever the dtype
        "2-five": (None, five),
        "2-zero3": ("parts", [*five, "--zero", "3"]),
        "2-forgotten": ("forgotten", five),
        "2-march": (None, march),
        "2-nan": ("nan", five),
        "2-size": ("size", [*five, "--lr", "3e-3"]),
        "2-double": (None, llama),
        **{f"{n}-{name}": (name, five) for name in EXAMPLES for n in (1, 2)},
        "2-left": ("leave0", five),
        "2-left3": ("leave2", [*five, "--zero", "3"]),
        "2-planted": ("planted", five),
        "2-die": ("die", five),  # the last of its launch
        "4-five": (None, five),
        "4-three": (None, three),
        "4-zero3": ("parts", [*three, "--zero", "3"]),
    }


def launched(n, jobs, folder):
    """The jobs of n processes, run in `folder`: (exit code, output)."""
    mine = [
        [name, how, [*flags, "--timeout", "5"]]
        for name, (how, flags) in jobs.items()
        if name[0] == str(n)
    ]
    (folder / "jobs.json").write_text(json.dumps(mine))
    return launch(n, [__file__, folder / "jobs.json"], launcher="torch" if n == 4 else "deepspeed")


@pytest.fixture(scope="module")
def one(jobs, tmp_path_factory):
    """Folder of the runs of one process, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("one")
    for name, (how, flags) in jobs.items():
        if name[0] == "1":
            with arranged(how, 0, 1, folder / f"{name}.0.steps") as loss:
                icu.main(loss, argv=[*flags, "--out", str(folder / name)])
    return folder


@pytest.fixture(scope="module")
def two(jobs, tmp_path_factory):
    """(folder, exit code, output) of the runs of two processes, the last of which loses one."""
    folder = tmp_path_factory.mktemp("two")
    return folder, *launched(2, jobs, folder)


@pytest.fixture(scope="module")
def four(jobs, tmp_path_factory):
    """(folder, exit code, output) of the runs of four processes."""
    folder = tmp_path_factory.mktemp("four")
    return folder, *launched(4, jobs, folder)


@pytest.fixture(scope="module")
def resumed(jobs, two):
    """(exit code, output) of the run that lost a process, gone on with by icu.py under the deepspeed launcher."""
    flags = [*jobs["2-die"][1], "--timeout", "5", "--out", two[0] / "2-die", "--resume"]
    names = [state.name for state in runs.states(two[0] / "2-die")]
    return *launch(2, ["icu.py", *flags], launcher="deepspeed"), names


def steps_of(folder, name):
    """The losses of each step of a run, the same on every process: a list of dicts."""
    found = [data.read_jsonl(path) for path in sorted(folder.glob(f"{name}.*.steps"))]
    assert len(found) == int(name[0]) and all(other == found[0] for other in found)
    return found[0]


def worst(folder, name, one, reference, steps):
    """The largest relative difference of a loss term over these steps (a slice) from those of one process."""
    pairs = list(zip(steps_of(folder, name), steps_of(one, reference), strict=True))[steps]
    assert pairs and all(list(a) == list(b) for a, b in pairs)
    # Relative to the loss, not to each term: a term may be near 0.
    return max(abs(a[key] - b[key]) / abs(b["loss"]) for a, b in pairs for key in b)


def same_result(run, reference):
    """Measures and forgotten samples of every epoch are those of the reference run."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows, expected = data.read_jsonl(run / name), data.read_jsonl(reference / name)
        assert len(rows) == len(expected)
        for row, other in zip(rows, expected, strict=True):
            assert row.keys() == other.keys()
            for key, value in other.items():
                if isinstance(value, float):
                    # 1e-4: three epochs of float32 sums in another order. Forgotten sets and texts are exact.
                    assert row[key] == pytest.approx(value, rel=1e-4, abs=1e-4), (
                        name,
                        row["epoch"],
                        key,
                    )
                else:
                    assert row[key] == value, (name, row["epoch"], key)


# --- the claims ---


def test_the_configuration_holds_no_recipe():
    """No learning rate, batch size or dtype anywhere in ds_config.json; clipping is written out as 0.0."""

    def names(value):
        return [key for key in value if isinstance(value, dict)] + [
            name for item in value.values() if isinstance(item, dict) for name in names(item)
        ]

    config = json.loads((ROOT / "ds_config.json").read_text())
    found = names(config)
    assert "stage" in found and config["zero_optimization"]["stage"] == 2
    for word in (
        "lr",
        "optimizer",
        "scheduler",
        "batch",
        "accumulation",
        "fp16",
        "bf16",
        "dtype",
        "amp",
    ):
        assert not [
            name for name in found if word in name and name != "zero_force_ds_cpu_optimizer"
        ]
    assert config["gradient_clipping"] == 0.0


RUNS = [("two", "2-five", "1-five"), ("two", "2-zero3", "1-five"), ("four", "4-five", "1-five")]
RUNS += [
    ("two", "2-forgotten", "1-forgotten"),
    ("four", "4-three", "1-three"),
    ("four", "4-zero3", "1-three"),
]
# How many samples are forgotten after each epoch, and how many steps each takes: batches of two, and of one at the end.
REACHED = {"1-five": ([0, 2, 2, 2], [3, 2, 2]), "1-three": ([0, 1, 1, 1], [2, 1, 1])}
REACHED["1-forgotten"] = [0, 3, 4, 4], [3, 1, 1]
RUNS += [("two", "2-march", "1-march")]
REACHED["1-march"] = [1, 2, 2, 2], [2, 2, 2]


@needs_deepspeed
@pytest.mark.parametrize("launch_name, name, reference", RUNS, ids=[name for _, name, _ in RUNS])
def test_several_processes_give_the_run_of_one(launch_name, name, reference, one, request):
    """Losses to 1e-5 over the first epoch; forgotten set, texts and final measures the same; all numbers finite.

    5 samples in batches of 2, and the 3 that Eq. 5 leaves of them, leave a rank without a row once an epoch, 4 ranks
    have more ranks than rows in every step, and where 3 samples are all there are a rank never has one; in "forgotten"
    rank 0 loses its whole share, then all samples but one are forgotten.
    """
    folder, _, output = request.getfixturevalue(launch_name)
    assert (folder / name / "summary.json").exists(), output[-3000:]
    forgotten, steps = REACHED[reference]
    assert [
        row["forgotten"] for row in data.read_jsonl(one / reference / "metrics.jsonl")
    ] == forgotten
    assert len(steps_of(one, reference)) == sum(steps)
    assert worst(folder, name, one, reference, slice(0, steps[0])) < 1e-5
    same_result(folder / name, one / reference)
    assert all(abs(value) < 1e3 for step in steps_of(folder, name) for value in step.values())


@needs_deepspeed
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_on_two_processes_is_its_run_on_one(name, one, two):
    """A process without a row, frozen weights, adapters, weights swapped to measure: nothing a method has to know."""
    folder, _, output = two
    assert (folder / f"2-{name}" / "summary.json").exists(), output[-3000:]
    assert worst(folder, f"2-{name}", one, f"1-{name}", slice(0, 3)) < 1e-5
    same_result(folder / f"2-{name}", one / f"1-{name}")
    steps = steps_of(one, f"1-{name}")
    assert len({step["loss"] for step in steps}) == len(steps)  # it trained


@needs_deepspeed
def test_all_launches_end_well(four):
    """Four processes end with 0."""
    assert four[1] == 0, four[2][-3000:]


@needs_deepspeed
def test_gradients_have_the_size_of_one_process(one, two):
    """With steps that shrink with the gradient the losses still agree to 1e-5: the ranks' parts add up, no mean."""
    folder, _, output = two
    assert (folder / "2-size" / "summary.json").exists(), output[-3000:]
    assert worst(folder, "2-size", one, "1-size", slice(0, 3)) < 1e-5
    losses = [step["loss"] for step in steps_of(one, "1-size")]
    assert (
        abs(losses[3] - losses[0]) > 1e-2
    )  # the steps were not so small that their size could not matter


@needs_deepspeed
def test_float64_agrees_to_what_deepspeed_keeps(one, two):
    """The first step to 1e-12; behind it DeepSpeed's float32 master weights leave 1e-6 over the first epoch."""
    folder, _, output = two
    assert (folder / "2-double" / "summary.json").exists(), output[-3000:]
    assert worst(folder, "2-double", one, "1-double", slice(0, 1)) < 1e-12
    assert worst(folder, "2-double", one, "1-double", slice(0, 3)) < 1e-6


@needs_deepspeed
@pytest.mark.parametrize("name", ["2-five", "2-zero3"])
def test_the_exported_model_loads_with_plain_transformers(name, one, two):
    """model/ of a ZeRO run gives the logits of one process's model, and not those of the model that went in."""
    ids = torch.arange(5, 45).view(2, 20)
    config = json.loads((one / "1-five" / "config.json").read_text())
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        .eval()(input_ids=ids)
        .logits
        for folder in (two[0] / name / "model", one / "1-five" / "model", config["model"])
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
    assert (logits[0] - logits[2]).abs().max() > 0.1


@needs_deepspeed
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(one, two):
    """One rank's NaN: all count one skipped step, and what follows is what one process does without that step."""
    rows = data.read_jsonl(two[0] / "2-nan" / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows][1:] == [1] * (len(rows) - 1)
    assert len(steps_of(two[0], "2-nan")) == len(steps_of(one, "1-nan"))
    assert (
        worst(two[0], "2-nan", one, "1-nan", slice(0, 2)) < 1e-5
    )  # of the first epoch's three steps two were made
    same_result(two[0] / "2-nan", one / "1-nan")


@needs_deepspeed
def test_a_dead_rank_ends_the_job_with_its_states_whole(two, resumed):
    """SIGKILL to one of two in epoch 2: the launcher ends nonzero and says so; the newest state is epoch 1's end."""
    _, code, output = two
    assert code != 0 and "exits with return code = -9" in output, output[-3000:]
    assert resumed[2] == ["epoch00002-step000000", "epoch00001-step000000"]


@needs_deepspeed
def test_a_run_that_lost_a_rank_goes_on(two, resumed):
    """--resume under the deepspeed launcher: the measures of the run of two that lost none, byte for byte."""
    code, output, _ = resumed
    assert code == 0 and "resumed from epoch00002-step000000" in output, output[-3000:]
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (two[0] / "2-die" / name).read_bytes() == (two[0] / "2-five" / name).read_bytes()


@needs_deepspeed
@pytest.mark.parametrize("name, other, epoch", [("2-left", "2-five", 0), ("2-left3", "2-zero3", 2)])
def test_a_run_left_while_it_is_measured_goes_on(name, other, epoch, two):
    """--resume, also from the state without weights that a run begins with: the files of the run that was not left."""
    assert f"resumed from epoch0000{epoch}-step000000" in two[2], two[2][-3000:]
    for file in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
        assert (two[0] / name / file).read_bytes() == (two[0] / other / file).read_bytes()


@needs_deepspeed
def test_a_pickle_planted_in_a_state_never_runs(two):
    """A state whose manifest fits, with code in DeepSpeed's files: every process refuses it in one line."""
    for rank in range(2):
        assert not (two[0] / f"2-planted.{rank}.ran").exists()
        refused = (two[0] / f"2-planted.{rank}.refused").read_text()
        assert (
            f"epoch00002-step000000: cannot be loaded (ValueError: zero_pp_rank_{rank}_" in refused
        )
        assert "\n" not in refused
    (planted,) = runs.states(two[0] / "2-planted")[0].glob("zero/*rank_0_*optim_states.pt")
    torch.load(planted, weights_only=False)
    assert (two[0] / "2-planted.0.ran").exists()  # the pickle works where one lets it


# --- the launch ---


def plain(command, **environment):
    """Exit code and output of a Python command under these variables."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_world_size_alone_is_no_launch(jobs, tmp_path):
    """With WORLD_SIZE or RANK left in the environment, as in many a container, it is a run of one process."""
    flags = [*jobs["1-three"][1], "--out", tmp_path / "run", "--max-epochs", "1"]
    code, stdout, stderr = plain(["icu.py", *flags], WORLD_SIZE="4", RANK="3", LOCAL_RANK="x")
    assert (code, stderr) == (0, "") and "stopped after epoch 1" in stdout
    assert data.read_json(tmp_path / "run" / "config.json")["processes"] == 1


@needs_deepspeed
def test_a_start_that_hangs_ends_after_the_timeout(jobs, tmp_path):
    """The second process never comes: one line, exit 2."""
    port = experiment.free_port()
    launch = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    flags = [*jobs["1-three"][1], "--out", tmp_path / "run", "--timeout", "0.05"]
    code, _, stderr = plain(["icu.py", *flags], DS_ACCELERATOR="cpu", **launch)
    assert code == 2 and stderr.splitlines()[-1].startswith("rank 0: error: "), stderr
    assert "--timeout" in stderr and not (tmp_path / "run").exists()


@needs_deepspeed
def test_a_lock_is_removed_unless_a_process_holds_it(tmp_path, monkeypatch, capsys):
    """What a start killed while it compiled has left goes, that of a process that compiles stays; both are said."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("left", "held"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    with open(tmp_path / "held" / "lock"):
        processes.clear_stale_locks()
    assert not (tmp_path / "left" / "lock").exists() and (tmp_path / "held" / "lock").exists()
    assert f"waiting for process {os.getpid()}, which compiles held" in (
        said := capsys.readouterr().out
    )
    assert f"removed {tmp_path / 'left' / 'lock'}" in said


@needs_deepspeed
@pytest.mark.parametrize("launch_name", ["two", "four"])
def test_zero_3_never_holds_the_whole_model(launch_name, request):
    """While it measures a process holds no weight between two calls of the model and a layer's inside of one."""
    folder, _, output = request.getfixturevalue(launch_name)
    files = sorted(folder.glob("*-zero3.*.held"))
    assert len(files) == {"two": 2, "four": 4}[launch_name], output[-3000:]
    for before, during, after, whole in (
        json.loads(line) for file in files for line in file.read_text().splitlines()
    ):
        assert before == after == 0 and 0 < during < whole / 4


if __name__ == "__main__":
    do_jobs(sys.argv[-1])
