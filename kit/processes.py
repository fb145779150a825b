"""One process or several: ranks, what they share and gather, and the engines with the optimiser."""

import contextlib
import datetime
import functools
import os
import random
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from kit import data
from kit.flags import first_line, launched
from kit.text import visible

LAUNCHED = launched()  # then DeepSpeed trains, also with a single process
RANK, LOCAL_RANK, WORLD_SIZE = (
    int(os.environ[name]) if LAUNCHED else alone
    for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
)
is_main = RANK == 0  # the one that prints and writes
# Set by `start`: under ZeRO-3 no process has whole weights, so all make the same model calls.
lockstep = False


def print0(text):
    """A line on stdout, once, above the progress bar."""
    if is_main:
        tqdm.write(visible(text, keep="\n"))


def share(items):
    """This process's part of a list: every WORLD_SIZE-th item."""
    return items[RANK::WORLD_SIZE]


def gather(part):
    """The list, on every process, from the parts that `share` gave out."""
    if WORLD_SIZE == 1:
        return part
    parts = [None] * WORLD_SIZE
    dist.all_gather_object(parts, part)
    everything = [None] * sum(map(len, parts))
    for rank, items in enumerate(parts):
        everything[rank::WORLD_SIZE] = items
    return everything


def sum_over_ranks(values, device="cpu"):
    """Numbers or scalars added up over the processes."""
    values = [v.item() if torch.is_tensor(v) else float(v) for v in values]
    if WORLD_SIZE == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def over_processes(function, items):
    """The list function(items), on every process, each of which computes its share.

    In lockstep each computes all, and the first one's counts: a last digit may differ.
    """
    return gather([function(items)])[0] if lockstep else gather(function(share(items)))


def added_up(sums, device="cpu"):
    """The numbers of `sums(part)` added up; part(items): this process's."""
    return sums(lambda items: items) if lockstep else sum_over_ranks(sums(share), device)


def wait_for_all():
    if WORLD_SIZE > 1:
        dist.barrier()


def seed_everything(seed):
    for function in (random.seed, np.random.seed, torch.manual_seed):
        function(seed)


def start(device, *, timeout=30, zero=2):
    """Joins the processes that a launcher has started, which wait `timeout` minutes."""
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
    wait = datetime.timedelta(minutes=timeout)
    try:
        if on_cpu:
            compile_op(wait.total_seconds())
        deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", timeout=wait)
    except (dist.DistError, filelock.Timeout) as error:
        problem = f"the processes were not together after {timeout:g} minutes (--timeout)"
        raise ValueError(f"{problem}: {first_line(error)}") from error
    if on_cpu:
        # DeepSpeed gives each process 66 MiB of shared memory, which outlives it by its name.
        wait_for_all()  # all of them have it open
        place = "_".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
        name = f"deepspeed_allreduce_buffer_{os.getuid()}_{place}"
        Path("/dev/shm", name).unlink(missing_ok=True)


def compile_op(seconds):
    """Compiles DeepSpeed's op for CPUs, one process at a time, if no earlier start has.

    torch's own lock outlives a killed process. This one does not, so who has it may remove torch's.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import get_default_build_root

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        return
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root / f"{builder.name}.lock", timeout=seconds):
        for lock in root.rglob(f"{builder.name}/lock"):
            lock.unlink(missing_ok=True)
        builder.load()


def device_of(flag):
    """The device of a --device flag, by default this process's GPU if there is one."""
    gpu = f"cuda:{LOCAL_RANK}" if LAUNCHED else "cuda"
    device = gpu if flag == "cuda" or torch.cuda.is_available() and not flag else flag or "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        way_out = "leave --device out to run on the CPU"
        raise ValueError(f"--device {device}: {first_line(error)}; {way_out}") from None
    return device


def autocast(args):
    """bf16 autocast, over weights of float32 or (bf16-weights) bf16."""
    device = torch.device(args.device).type
    return torch.autocast(device, torch.bfloat16, enabled=args.dtype.startswith("bf16"))


def check_flags(args, method):
    """ValueError for flags that do not go together, or with the method."""
    if args.zero == 3 and (args.teacher == "live" or method.touches_weights):
        flag = "--teacher live" if args.teacher == "live" else method.name
        raise ValueError(f"{flag} needs whole weights on every process: pass --zero 2")
    if (args.offload or args.zero == 3 or LAUNCHED) and method.overrides("backward", "begin_epoch"):
        raise ValueError(
            f"{method.name} changes weights or gradients itself: run it on one process"
        )
    if args.micro_batch and method.overrides("state"):
        raise ValueError(f"{method.name} has a state, which parts would change: no --micro-batch")
    if (args.offload or args.zero == 3) and not (LAUNCHED or args.dry_run):
        raise ValueError("--offload and --zero are DeepSpeed's: start with its launcher, or run.sh")


# --- engines: who holds the optimiser ---


def make_engine(model, args):
    """DeepSpeed's where a launcher started a run that trains, else the plain one."""
    if args.checkpointing and not args.eval_only:
        checkpoint_layers(model)
    return ZeroEngine(model, args) if LAUNCHED and not args.eval_only else PlainEngine(model, args)


def checkpoint_layers(model):
    """Of each layer autograd keeps the input alone, and runs it again in the backward pass.

    transformers' own switch needs training mode, so dropout.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"--checkpointing: transformers has none for a {model.config.model_type}")
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def trainable(model):
    """The parameters that a method has not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class PlainEngine:
    """One process: the model and Adam as they are.

    A weight of bf16 has a `rest` in bf16, which Adam moves, and which goes over into the weight
    when it is large enough: an update of 5e-6 alone would round to nothing. Together they are good
    for updates from 2^-17 of the weight on.
    """

    def __init__(self, model, args):
        self.model = model
        self.rest = {
            name: torch.zeros_like(parameter)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.dtype == torch.bfloat16
        }
        # Adam's betas are the released code's; the paper names Adam and the learning rate.
        self.optimizer = torch.optim.Adam(trainable(model), lr=args.lr, betas=(0.9, 0.98))

    def step(self, loss, backward):
        """One step of Adam. False: a gradient was not finite, and the weights are as they were."""
        self.optimizer.zero_grad(set_to_none=True)
        backward(loss)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        finite = bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
        if finite:
            self.move()
        return finite

    def move(self):
        """Adam's step, of a weight of bf16 on its rest."""
        parameters = dict(self.model.named_parameters())
        weights = {name: parameters[name].data for name in self.rest}
        for name, rest in self.rest.items():
            parameters[name].data = rest
        self.optimizer.step()
        for name, weight in weights.items():
            total = weight.float() + self.rest[name].float()
            weight.copy_(total)
            self.rest[name].copy_(total - weight.float())
            parameters[name].data = weight

    def save(self, folder):
        """Weights and optimiser state into `folder`, without pickle."""
        # Tied weights are parameters once, so a name is a tensor of its own.
        tensors = dict(self.model.named_parameters())
        tensors |= {f"rest.{name}": rest for name, rest in self.rest.items()}
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
            if name in self.rest:
                self.rest[name].copy_(tensors[f"rest.{name}"])
            if f"adam.step.{name}" in tensors:
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[parameter] = {k: tensors[f"adam.{k}.{name}"] for k in keys}
                self.optimizer.state[parameter]["step"] = tensors[f"adam.step.{name}"].cpu()


class ZeroEngine:
    """Several processes: DeepSpeed's ZeRO, as ds_config.json says."""

    def __init__(self, model, args):
        import deepspeed

        config = data.read_json(Path(__file__).parents[1] / "ds_config.json")
        zero = config["zero_optimization"]
        zero["stage"] = args.zero
        if args.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": args.device != "cpu"}
        if args.dtype == "bf16-weights":  # its sum is Adam's own float32 copy, in shares
            config["bf16"] = {"enabled": True}
        # DeepSpeed insists on a batch size, for its accounts only.
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

    def step(self, loss, backward):
        # DeepSpeed takes the mean of the processes' gradients: ours are parts of one sum.
        self.engine.backward(loss * WORLD_SIZE)
        self.engine.step()
        # A gradient that is not finite, on any rank: all have left the step out.
        return not self.optimizer.overflow

    def save(self, folder):
        """DeepSpeed's own files, one a process."""
        self.engine.save_checkpoint(str(folder), tag="zero", save_latest=False)

    def load(self, folder):
        path, _ = self.engine.load_checkpoint(str(folder), tag="zero")
        if path is None:
            raise ValueError(f"{folder}: no state of DeepSpeed's")


def load_tensors(path, map_location=None):
    """One of DeepSpeed's files, pickles that could run code: but tensors and its own alone."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location=map_location, weights_only=True)


def gathered(parameters):
    """A context in which every process has these parameters whole."""
    parameters = list(parameters)
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def whole_weights(model):
    """The state_dict in the main process's memory, {} on others; all of them call it."""
    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with gathered([tensor]):
            if is_main:
                weights[name] = tensor.detach().to("cpu", copy=True)
    return weights
