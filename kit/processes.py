"""One process or several: ranks, what they share out and gather, and the two engines that hold the optimiser."""

import contextlib
import datetime
import os
import pickle
import random
import sys
import threading
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from kit import data
from kit.flags import first_line, launched
from kit.text import visible

LAUNCHED = launched()  # then DeepSpeed trains, also with a single process
RANK, LOCAL_RANK, WORLD_SIZE = (
    (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if LAUNCHED
    else (0, 0, 1)
)
is_main = RANK == 0  # the one that prints and writes
lockstep = False  # set by `start`: no process has whole weights (ZeRO-3), so all make the same calls of the model


def print0(text):
    """A line on stdout, once, whatever the number of processes; the progress bar stays below it."""
    if is_main:
        tqdm.write(visible(text, keep="\n"))


def share(items):
    """This process's part of a list: every WORLD_SIZE-th item. `gather` puts the parts together again."""
    return items[RANK::WORLD_SIZE]


def gather(part):
    """The whole list on every process, in its first order, from the parts that `share` gave out."""
    if WORLD_SIZE == 1:
        return part
    parts = [None] * WORLD_SIZE
    dist.all_gather_object(parts, part)
    whole = [None] * sum(map(len, parts))
    for rank, items in enumerate(parts):
        whole[rank::WORLD_SIZE] = items
    return whole


def sum_over_ranks(values, device="cpu"):
    """Numbers added up over the processes, as a list of float."""
    values = [value.item() if isinstance(value, torch.Tensor) else float(value) for value in values]
    if WORLD_SIZE == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def over_processes(function, items):
    """The list function(items), each process computing it for its share of the items; all get all of it, in order.

    In lockstep each computes all of it and the first one's counts: two that differ in a last digit would go on with
    other samples.
    """
    return gather([function(items)])[0] if lockstep else gather(function(share(items)))


def added_up(sums, device="cpu"):
    """The numbers that `sums(part)` gives on each process, added; part(items) is what a process takes of a list."""
    return sums(lambda items: items) if lockstep else sum_over_ranks(sums(share), device)


def wait_for_all():
    """Returns on each process when all have come here."""
    if WORLD_SIZE > 1:
        dist.barrier()


def seed_everything(seed):
    """Python, numpy and torch draw the same numbers for the same seed."""
    for function in (random.seed, np.random.seed, torch.manual_seed):
        function(seed)


def start(device, *, timeout=30, zero=2):
    """Joins the processes that a launcher has started, if it has; training with ZeRO stage 3 puts them in lockstep.

    A process that died is noticed after `timeout` minutes at the latest; measuring can keep the others waiting long.
    So is a start that hangs: then this process ends with one line.
    """
    global lockstep
    lockstep = LAUNCHED and zero == 3
    if not LAUNCHED:
        return
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        torch.cuda.set_device(device)
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    clear_stale_locks()
    wait = datetime.timedelta(minutes=timeout)
    watch = threading.Timer(wait.total_seconds(), give_up, [timeout])
    watch.daemon = True
    watch.start()
    deepspeed.init_distributed(
        dist_backend="gloo" if on_cpu else "nccl", timeout=wait
    )  # the first time, it compiles
    watch.cancel()
    if on_cpu:
        forget_name_of_buffer()


def forget_name_of_buffer():
    """DeepSpeed gives each process on a CPU 66 MiB of shared memory, which would outlive it by its name."""
    wait_for_all()  # all of them have it open
    where = [os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], RANK]
    Path("/dev/shm", "_".join(["deepspeed_allreduce_buffer", *map(str, where)])).unlink(
        missing_ok=True
    )


def give_up(timeout):
    """Ends a process that waits for ever: what it waits in (a lock, a process that never came) can't be interrupted."""
    print(
        f"rank {RANK}: error: the processes were not together after {timeout:g} minutes (--timeout)",
        file=sys.stderr,
    )
    os._exit(2)


def clear_stale_locks():
    """Removes what a first start, killed while it compiled, has left: every later one would wait for it, silently.

    torch keeps such a lock open while it compiles, so one that no process of this machine has open belongs to nobody.
    Every process does this, one at a time: one that already waited for the old lock would not compile when it goes.
    """
    import psutil  # DeepSpeed's own
    from torch.utils.cpp_extension import get_default_build_root

    def has_open(process, path):
        try:
            return any(file.path == str(path.resolve()) for file in process.open_files())
        except psutil.Error:  # another user's, with folders of their own
            return False

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root / ".clearing"):
        for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
            if owner := next(
                (process.pid for process in psutil.process_iter() if has_open(process, lock)), None
            ):
                print(f"waiting for process {owner}, which compiles {lock.parent.name}", flush=True)
            else:
                print(
                    f"removed {lock}: a start that was killed while it compiled has left it",
                    flush=True,
                )
                lock.unlink(missing_ok=True)


def default_device():
    """cuda where there is one: with several processes, each its own."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{LOCAL_RANK}" if LAUNCHED else "cuda"


def device_of(flag):
    """What --device means: without it default_device(), and for cuda this process's own. ValueError: none here."""
    device = flag or default_device()
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA GPU here; leave --device out to run on the CPU")
    device = default_device() if device == "cuda" else device
    check_device(device)
    return device


def autocast(args):
    """bf16 autocast with float32 weights: in pure bf16 an update of 5e-6 rounds to nothing."""
    device = torch.device(args.device).type
    return (
        torch.autocast(device, torch.bfloat16) if args.dtype == "bf16" else contextlib.nullcontext()
    )


def check_device(device):
    """ValueError where this machine has no such device."""
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {first_line(error)}") from None


def check_flags(args):
    """ValueError for flags of several processes that do not go together or are for nothing here."""
    if args.zero == 3 and args.teacher == "live":
        raise ValueError(
            "--teacher live is a whole model on every process, which --zero 3 avoids: pass --zero 2"
        )
    if args.zero == 3 and args.loss.needs.touches_weights:
        raise ValueError(
            f"{args.method} works on whole weights, which --zero 3 takes apart: pass --zero 2"
        )
    if (args.offload or args.zero == 3) and not (LAUNCHED or args.dry_run):
        raise ValueError(
            "--offload and --zero are DeepSpeed's: start with bash run.sh PRESET, or with its launcher"
        )
    deepspeed_config()


def deepspeed_config():
    """ds_config.json; ValueError where it is not DeepSpeed's."""
    config = data.read_json(path := Path(__file__).parents[1] / "ds_config.json")
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise ValueError(
            f"{path.name}: has no zero_optimization, so it is not a configuration of DeepSpeed's ZeRO"
        )
    return config


# --- engines: who holds the optimiser ---


def make_engine(model, args):
    """DeepSpeed's where a launcher started this process and the run trains, else the plain one."""
    return ZeroEngine(model, args) if LAUNCHED and not args.eval_only else PlainEngine(model, args)


def trainable(model):
    """The parameters that a method has not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class PlainEngine:
    """One process: the model and Adam as they are."""

    def __init__(self, model, args):
        self.model = model
        # Adam's betas are the released code's; the paper names Adam and the learning rate.
        self.optimizer = torch.optim.Adam(trainable(model), lr=args.lr, betas=(0.9, 0.98))

    def step(self, loss):
        """One optimiser step; False, and the weights as they were, where a gradient is not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.model.parameters() if p.grad is not None]
        )
        if torch.isfinite(norm):
            self.optimizer.step()
        return bool(torch.isfinite(norm))

    def save(self, folder):
        """Weights and optimiser state into `folder`, without pickle."""
        # Tied weights are parameters once, so a name is a tensor of its own.
        tensors = dict(self.model.named_parameters())
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{key}.{name}"] = value
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            folder / "training.safetensors",
        )

    def load(self, folder):
        tensors = load_file(folder / "training.safetensors", device=str(self.model.device))
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(tensors[name])
            keys = [
                key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in tensors
            ]
            if keys:
                values = {key: tensors[f"adam.{key}.{name}"] for key in keys}
                self.optimizer.state[parameter] = values | {"step": values["step"].cpu()}


class ZeroEngine:
    """Several processes: DeepSpeed's ZeRO, with the same four verbs; ds_config.json is its only configuration."""

    def __init__(self, model, args):
        import deepspeed

        config = deepspeed_config()
        config["zero_optimization"]["stage"] = args.zero
        if args.offload:
            config["zero_optimization"]["offload_optimizer"] = {
                "device": "cpu",
                "pin_memory": args.device != "cpu",
            }
        # DeepSpeed insists on a batch size, for its accounts only: the batches are made in train_epoch.
        config["train_micro_batch_size_per_gpu"] = 1
        if args.zero == 3:  # tensor by tensor: no device ever holds the whole model
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
            model.to(args.device)  # its buffers
        optimizer = torch.optim.Adam(trainable(model), lr=args.lr, betas=(0.9, 0.98))
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config
        )
        self.engine.checkpoint_engine.load = load_tensors
        self.model = model

    def step(self, loss):
        # DeepSpeed takes the mean of the processes' gradients; ours are parts of one sum.
        self.engine.backward(loss * WORLD_SIZE)
        self.engine.step()
        return (
            not self.optimizer.overflow
        )  # a gradient that is not finite, on any rank: all have left the step out

    def save(self, folder):
        """DeepSpeed's own files, one a process."""
        self.engine.save_checkpoint(str(folder), tag="zero", save_latest=False)

    def load(self, folder):
        path, _ = self.engine.load_checkpoint(str(folder), tag="zero")
        if path is None:
            raise ValueError("DeepSpeed found nothing to load")


def load_tensors(path, map_location=None):
    """One of DeepSpeed's files, whose own loader would run whatever the pickle says. ValueError for a strange one.

    A run folder may come from elsewhere, its manifest too. Only tensors and what DeepSpeed puts beside them are made.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        name = Path(path).name
        raise ValueError(
            f"{name} holds more than tensors: it could run code, and DeepSpeed did not write it"
        ) from None


def gathered(parameters):
    """A context in which every process has these parameters whole: under ZeRO-3 it holds a part of each."""
    parameters = list(parameters)
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def whole_weights(model):
    """The model's state_dict in the CPU's memory of the main process, {} on the others; every process takes part."""
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with gathered([tensor]):
            if is_main:
                found[name] = tensor.detach().to("cpu", copy=True)
    return found
