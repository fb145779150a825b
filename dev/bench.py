"""Speed and memory beside the literal algorithms and the libraries, as a table.

    bash run.sh bench                                      # demo/tiny.py's model and texts
    bash run.sh bench --model DIR --pairs pairs.jsonl      # your model, your pairs
    bash run.sh bench --rows el knn --quick                # tiny sizes, to see that they run

Each line is this project ("ours") against what a reader of the paper would write from its formulas,
or a library's plain use ("theirs"), in turn; a ratio is of one repeat: ">= 30" bounds theirs to
ours, "<= 1.15" ours to theirs. With OMP_NUM_THREADS=1 a CPU is timed by the process's own clock.
"""

import argparse
import copy
import datetime
import importlib.metadata
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPTNeoConfig

import experiment
import icu
import knn
import metrics
from demo import tiny
from kit import data, flags, models, processes, runs

MADE = Path(__file__).resolve().parents[1] / "runs"
LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}

# texts: of el; samples: of other rows; steps: of step and zero; pool, queries: of knn.
FULL = {"texts": 32, "samples": 128, "steps": 10, "pool": 1_000_000, "queries": 1000}
QUICK = {"texts": 2, "samples": 4, "steps": 1, "pool": 2000, "queries": 20}


class Bench(NamedTuple):
    model: torch.nn.Module
    tokenizer: object
    pairs: list  # the lines of pairs.jsonl
    sizes: dict  # FULL or QUICK
    args: argparse.Namespace

    def samples(self, protocol="paper"):
        """icu.py's samples of whole texts; "released": with their context."""
        pairs = [{name: x for name, x in pair.items() if name != "spans"} for pair in self.pairs]
        room = models.positions_of(self.model.config) or 1 << 30
        samples, _ = icu.build_samples(pairs, self.tokenizer, protocol=protocol, positions=room)
        return samples[: self.sizes["samples"]]


def settings(device, *words):
    """icu.py's settings from its flags."""
    words = [*"--model - --pairs - --out - --bert minilm --device".split(), device, *words]
    return icu.resolve(icu.make_parser().parse_args(words), icu.ICU)[0]


def trainer(model, samples, args, make_engine=processes.PlainEngine):
    """train(active, epoch): one epoch of icu.py's loop over those samples, in place."""
    method = icu.method_named(args.method, icu.ICU)
    sides, run = icu.sides_of(samples, None, 0, args, method), runs.Run(args, method)
    frozen, engine = icu.freeze(model, sides, args, method), make_engine(model, args)

    def train(active, epoch):
        run.progress.epoch = epoch
        return icu.train_epoch(engine, sides, list(active), args, method, frozen=frozen, run=run)

    return train


# --- measuring ---


class Timed(NamedTuple):
    """Seconds of each repeat, results of the last."""

    ours: list
    theirs: list
    our_result: object
    their_result: object


def seconds(function, device="cpu"):
    """(seconds, result) of one call; a GPU's queue is empty before and after."""
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = clock()
    result = function()
    wait()
    return clock() - start, result


def side_by_side(ours, theirs, args):
    """Time two functions in turn; who goes first changes each repeat."""
    times, results = {ours: [], theirs: []}, {}
    for repeat in range(-1, args.repeats):  # the first warms up
        for side in (ours, theirs) if repeat % 2 == 0 else (theirs, ours):
            took, results[side] = seconds(side, args.device)
            times[side] += [took] * (repeat >= 0)
    return Timed(times[ours], times[theirs], results[ours], results[theirs])


def timed_line(detail, timed, sign=">=", bound=0, *, work, same=True):
    """A line of the table: (detail, ratio, goal, whether it is met, work)."""
    sides = zip(timed.ours, timed.theirs, strict=True)
    ratios = [b / a if sign == ">=" else a / b for a, b in sides]
    median = statistics.median(ratios)
    measured = f"{median:.3g}x ({min(ratios):.3g}-{max(ratios):.3g})"
    ours, theirs = (statistics.median(side) for side in timed[:2])
    work += f"; ours {ours:.3g}, theirs {theirs:.3g}"
    met = same and (median >= bound if sign == ">=" else median <= bound)
    return detail, measured, f"{sign} {bound:g}x", "yes" if met else "no", work


def plain_line(detail, measured, work=""):
    """A line without a goal."""
    return detail, measured, "-", "-", work


# --- el: EL (Eq. 7, 8) and MA (Eq. 9) ---


def our_el_and_ma(model, texts, start):
    """metrics.el_and_ma of N texts: (2, N) in numpy."""
    ids, mask, _ = icu.collate(texts, model.device)
    return np.array([x.tolist() for x in metrics.el_and_ma(model, ids, mask, start=start)])


def literal_el_and_ma(model, texts, start):
    """The same by the formulas: a `generate` and a pass a prefix."""
    literal = metrics.literal_extraction_likelihood, metrics.literal_memorization_accuracy
    return np.array([[f(model, text.ids, start=start) for text in texts] for f in literal])


def memorisation(bench):
    """Of texts with their context: those to forget, and their partners.

    Some may differ: in float32 the shape of a batch decides between close tokens.
    """
    start = 1 + len(models.front_of(bench.tokenizer))
    samples = bench.samples("released")[: bench.sizes["texts"]]
    for side, bound in (("forget", 30), ("learn", 10)):
        texts = [getattr(sample, side) for sample in samples]
        sides = (partial(f, bench.model, texts, start) for f in (our_el_and_ma, literal_el_and_ma))
        timed = side_by_side(*sides, bench.args)
        equal = np.isclose(*timed[2:], atol=1e-6, equal_nan=True)
        work = f"{len(texts)} texts, MA {timed.our_result[1].mean():.2f}; "
        work += f"{(~equal.all(0)).sum()} differ"
        yield timed_line(f"{side} texts", timed, ">=", bound, work=work)


# --- epoch: train + refine + measure ---


def side_loss(model, texts):
    """(mean -log p of the targets in nats, their logits (M, V)) of a side of a batch."""
    logits, ids, *_ = icu.at_targets(model, texts)
    return F.cross_entropy(logits, ids), logits


def plain_epoch(model, samples, active, args):
    """Eq. (1)-(6) as they stand: a second model runs on every batch."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.98))
    order = np.random.default_rng(args.seed).permutation(len(samples)).tolist()
    for rows in data.chunks(order, args.batch_size):
        batch = [samples[row] for row in rows if row in active]
        if not batch:
            continue
        learn = [sample.learn for sample in batch]
        forget_nll, _ = side_loss(model, [sample.forget for sample in batch])  # Eq. (1)
        learn_nll, logits = side_loss(model, learn)  # Eq. (3)
        before = side_loss(frozen, learn)[1].log_softmax(-1)
        kl = F.kl_div(logits.log_softmax(-1), before, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        (-forget_nll + args.alpha * learn_nll + args.beta * kl).backward()  # Eq. (6)
        optimizer.step()


def whole_epoch(bench):
    """An epoch with half of the samples active, all measured."""
    samples, args = bench.samples(), settings(bench.args.device)
    active, start = range(0, len(samples), 2), 1 + len(models.front_of(bench.tokenizer))

    def ours():
        model = copy.deepcopy(bench.model)
        trainer(model, samples, args)(active, 1)  # the frozen copy's answers are in it
        return icu.measure(model, bench.tokenizer, samples, args)

    def theirs():
        model = copy.deepcopy(bench.model)
        plain_epoch(model, samples, set(active), args)
        literal_el_and_ma(model, [sample.forget for sample in samples], start)
        return icu.measure(model, bench.tokenizer, samples, args, with_el=False)

    timed = side_by_side(ours, theirs, bench.args)
    ma = [np.nanmean([row["ma"] for row in rows]) for rows in timed[2:]]
    work = f"{len(samples)} samples, {len(active)} active; MA {ma[0]:.3f} / {ma[1]:.3f}"
    yield timed_line("", timed, ">=", 20, work=work)


# --- step, zero: one training step ---


def steps_of(train, batch, steps):
    """A function: `steps` steps on one batch, their mean loss."""
    return lambda: statistics.fmean(
        train(range(len(batch)), epoch).get("loss", math.nan) for epoch in range(steps)
    )


def training_step(bench):
    """Whole steps against forward and backward of the same batch."""
    args, plain = settings(bench.args.device, "--lr", "1e-9"), copy.deepcopy(bench.model)
    batch, steps = bench.samples()[: args.batch_size], bench.sizes["steps"]

    def floor():
        for _ in range(steps):
            plain.zero_grad()
            for side in ("forget", "learn"):
                side_loss(plain, [getattr(sample, side) for sample in batch])[0].backward()

    ours = steps_of(trainer(copy.deepcopy(bench.model), batch, args), batch, steps)
    timed = side_by_side(ours, floor, bench.args)
    yield timed_line("", timed, "<=", 1.15, work=f"{steps} steps of {len(batch)} pairs")


def zero_steps(bench):
    """In a child, started as by a launcher."""
    args = settings(bench.args.device)
    processes.start(args.device)
    batch, steps = bench.samples()[: args.batch_size], bench.sizes["steps"]
    ours, theirs = (
        steps_of(trainer(copy.deepcopy(bench.model), batch, args, engine), batch, steps)
        for engine in (processes.ZeroEngine, processes.PlainEngine)
    )
    return side_by_side(ours, theirs, bench.args)


def against_zero(bench):
    """Steps by DeepSpeed's ZeRO-2 against the plain engine's."""
    with mock.patch.dict(os.environ, LAUNCHED, MASTER_PORT=experiment.free_port()):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            timed = pool.submit(zero_steps, bench).result()
    work = f"{bench.sizes['steps']} steps; mean loss {timed[2]:.5f} / {timed[3]:.5f}"
    same = math.isclose(*timed[2:], rel_tol=1e-3, abs_tol=1e-3)
    yield timed_line("", timed, "<=", 1.2, work=work, same=same)


# --- knn: cosine_knn against faiss ---


def search(bench):
    """Against faiss's exact index of unit vectors."""
    import faiss

    M, Q, random = bench.sizes["pool"], bench.sizes["queries"], np.random.default_rng(0)
    pool, queries = (random.standard_normal((n, 384), dtype=np.float32) for n in (M, Q))
    index, unit = faiss.IndexFlatIP(384), queries / np.linalg.norm(queries, axis=1, keepdims=True)
    index.add(pool / np.linalg.norm(pool, axis=1, keepdims=True))
    for k in (1, 10):
        ours, theirs = partial(knn.cosine_knn, queries, pool, k), partial(index.search, unit, k)
        timed = side_by_side(ours, theirs, bench.args)
        (rows, cosine), (their_cosine, their_rows) = timed[2:]
        gap = np.abs(cosine - their_cosine).max()  # as close, rows may change places
        work = f"{Q:,} x {M:,} x 384; the same row in {(rows == their_rows).mean():.2%} of places"
        yield timed_line(f"time, k = {k}", timed, "<=", 1.2, work=work, same=gap < 1e-6)


# --- memory: a step by random weights, in the ways that save memory ---

BF16, PARTS = "--dtype bf16-weights", ("--micro-batch 1", "--checkpointing")
SMALL = " ".join(PARTS)
WAYS = "--dtype float32", "--dtype bf16", BF16, *PARTS, SMALL, f"{SMALL} {BF16}"

# Name: (hidden size, layers, heads, batch size of section 5.4).
GPT_NEO = {"125M": (768, 12, 12, 8), "1.3B": (2048, 24, 16, 4), "2.7B": (2560, 32, 20, 4)}


def gpt_neo(hidden, layers, heads, V=50257):
    """A GPT-Neo without dropout."""
    return GPTNeoConfig(
        vocab_size=V, bos_token_id=0, eos_token_id=0, resid_dropout=0.0,
        hidden_size=hidden, num_layers=layers, num_heads=heads,
        attention_types=[[["global", "local"], layers // 2]], embed_dropout=0.0,
        attention_dropout=0.0,
    )  # fmt: skip


def random_samples(n, T, vocab):
    """n samples of T random tokens a side."""
    ids = np.random.default_rng(0).integers(vocab, size=(n, 2, T)).tolist()
    sides = [[icu.Text(side, T // 2, T // 2, side[: T // 2]) for side in row] for row in ids]
    return [icu.Sample(str(i), "", *side) for i, side in enumerate(sides)]


def steps_in_all_ways(bench):
    """Time and peak memory of an ICU step: on a GPU at the paper's sizes; on a CPU small, beside
    weights and Adam, and what the estimate of `fits` says."""
    device, T = bench.args.device, 100
    sizes, V = ({"8M": (256, 8, 4, 8)}, 4000) if device == "cpu" else (GPT_NEO, 50257)
    for (name, (*size, B)), way in itertools.product(sizes.items(), WAYS):
        args, config = settings(device, "--batch-size", str(B), *way.split()), gpt_neo(*size, V)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=models.DTYPES[args.dtype]).eval()
        samples = random_samples(B, T, V)
        train = partial(trainer(model, samples, args, processes.make_engine), range(B))
        train(0)  # makes Adam's moments
        model.zero_grad()
        peak = peak_memory(partial(train, 1), device)
        gradients = sum(p.nbytes for p in model.parameters())
        estimate = gradients + activation_bytes(config, samples, args, 1)
        steps = range(10 if bench.sizes == FULL else 1)
        times = [seconds(partial(train, step), device)[0] for step in steps]
        work = f"{B} + {B} rows of {T} tokens, peak {peak / 1e6:.0f} MB"
        work += f", estimated {estimate / 1e6:.0f}" if device == "cpu" else ""
        measured = f"{1000 * statistics.median(times):.3g} ms"
        yield plain_line(f"GPT-Neo {name}, {way}", measured, work)


def peak_memory(function, device):
    """The most bytes held during a call: all of a GPU's, on a CPU those that the call allocates."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))


# --- fits: what a run needs ---


def memory_estimate(config, samples, args, n):
    """Bytes that each of n processes needs: ZeRO-2 shards gradients and Adam."""
    with torch.device("meta"):
        P = AutoModelForCausalLM.from_config(config).num_parameters()
    H, V, size = config.hidden_size, config.vocab_size, models.DTYPES[args.dtype].itemsize
    # Measuring: a pass over 64 rows with its keys, values and logits; 2 GiB of them decoding.
    T, rows = max(len(sample.forget.ids) for sample in samples), min(64, -(-len(samples) // n))
    kept = 2 if args.dtype.startswith("bf16") else size
    measuring = (2 << 30) + kept * rows * T * (V + 2 * config.num_hidden_layers * H)
    # Adam: its moments, DeepSpeed's float32 weights or the rests of bf16, and what a step makes.
    moments, copies, step = 2 * size, 2 if size == 2 else 0, size
    if n > 1 or args.offload:
        moments, copies, step = (0, 0, 0) if args.offload else (8, 4, 4)
    held = size * P + (size + moments + copies) * P // n
    frozen = size * H * (V + sum(len(sample.learn.ids) for sample in samples))
    activations = activation_bytes(config, samples, args, n)
    if args.dtype == "bf16":  # autocast's copies of the weights
        activations += 2 * P
    return held + frozen + max(activations, measuring, step * P // n)


def activation_bytes(config, samples, args, processes):
    """What autograd keeps of a step's longest batch on a process, in float32.

    Floats a token: 12 H + 5 F a layer (F the width of the MLP), heads x T more where attention is
    not fused (GPT-Neo), and 3 V of logits to forget, 7 V to learn. With --checkpointing H a layer,
    and one layer.
    """
    H, V, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    width = getattr(config, "intermediate_size", None) or 4 * H
    unfused = config.num_attention_heads if config.model_type == "gpt_neo" else 0
    rows, floats = -(-min(args.batch_size, len(samples)) // processes), 0
    rows = min(rows, args.micro_batch or rows)
    for side, logits in (("forget", 3), ("learn", 7)):
        T = max(len(getattr(sample, side).ids) for sample in samples)
        layer = 12 * H + 5 * width + unfused * T
        inside = layers * H + layer if args.checkpointing else layers * layer
        floats += rows * T * (inside + logits * V)
    return 4 * floats


def what_fits(bench):
    """Cards, 90% full, that a run needs: 128 samples of 200 tokens, or --pairs."""
    runs_of = {f"GPT-Neo {name}": (gpt_neo(*size), B) for name, (*size, B) in GPT_NEO.items()}
    runs_of = {title: (*run, random_samples(128, 200, 50257)) for title, run in runs_of.items()}
    if bench.args.model:
        config = bench.model.config.get_text_config()
        runs_of["this model"] = config, settings("cpu").batch_size, bench.samples()
    for (title, (config, B, samples)), way in itertools.product(runs_of.items(), WAYS):
        cells = []
        for card, offload in itertools.product((24, 40, 80), ("", " --offload")):
            words = f"--dry-run --batch-size {B} {way}{offload}".split()
            args = settings("cpu", *words)
            sizes = (memory_estimate(config, samples, args, n) for n in range(1, 9))
            fitting = (n for n, size in enumerate(sizes, start=1) if size < 0.9e9 * card)
            cells.append(f"{card} GB{offload}: {next(fitting, 'over 8')}")
        yield plain_line(f"{title}, {way}", "; ".join(cells), f"batch {B}")


# --- the table ---

# Name: (what, against what, the function that yields its lines).
ROWS = {
    "el": ("MA + EL10 of a sample set", "metrics.literal_*", memorisation),
    "epoch": ("a whole epoch: train + refine + measure", "the formulas as they stand", whole_epoch),
    "step": ("a training step", "forward + backward of a cross-entropy, the floor", training_step),
    "zero": ("a training step by ZeRO-2, one process", "the plain engine", against_zero),
    "knn": ("`cosine_knn`", "faiss-cpu IndexFlatIP, same threads", search),
    "memory": ("a training step, random weights", "-", steps_in_all_ways),
    "fits": ("cards that a run needs, estimated", "-", what_fits),
}


def measured_lines(name, bench):
    try:
        yield from ROWS[name][-1](bench)
    except Exception as error:  # no GPU, no faiss, too little memory
        if bench.args.debug:
            raise
        yield plain_line("", f"not measured: {flags.first_line(error)}")


def describe(bench, words):
    args, names = bench.args, ("torch", "transformers", "faiss-cpu", "deepspeed")
    versions = {package.name: package.version for package in importlib.metadata.distributions()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"""## `bash run.sh bench {" ".join(words)}`

- {datetime.date.today()}; {torch.get_num_threads()} threads; GPU: {gpu}
- {", ".join(f"{name} {versions.get(name)}" for name in names)}
- {bench.model.num_parameters() / 1e6:.1f}M parameters, {len(bench.pairs)} pairs, on \
{args.device}; {args.repeats} repeats{"; --quick means nothing" * args.quick}

| what | against | ratio: median (min-max) | goal | met? | work, median times |
|---|---|---|---|---|---|
"""


def tiny_pairs(folder):
    """Pairs of demo/tiny.py's texts, partners as they come."""
    forget, pool = (data.read_jsonl(folder / f"{name}.jsonl") for name in ("forget", "pool"))
    extra = {"context": "", "learn_context": "", "similarity": 0.0}
    return [
        row | extra | {f"learn_{name}": text for name, text in partner.items()}
        for row, partner in zip(forget, pool, strict=False)
    ]


def parse_args(argv=None):
    parser = flags.command_parser(__doc__.split("\n\n")[0])
    flag, positive = parser.add_argument, flags.positive
    # fmt: off
    flag("--rows", nargs="+", default=[*ROWS], choices=[*ROWS], metavar="NAME",
         help=f"some of {', '.join(ROWS)} (all)")
    flag("--quick", action="store_true", help="tiny sizes: everything runs, nothing is measured")
    flag("--model", metavar="DIR", help="the causal LM (default: demo/tiny.py's)")
    flag("--pairs", metavar="FILE", help="pairs.jsonl of texts that it has memorised")
    flag("--device", default="cpu", help="where the models run (%(default)s)")
    flag("--repeats", type=positive, help="of each measurement (3; --quick 2)")
    flag("--samples", type=positive, metavar="N", help="texts of el (32; --quick 4)")
    flag("--out", metavar="FILE", help="the table (default: runs/bench.md, replaced)")
    # fmt: on
    args = parser.parse_args(argv)
    args.repeats = args.repeats or (2 if args.quick else 3)
    if bool(args.model) != bool(args.pairs):
        parser.error("--model DIR and --pairs FILE go together: texts that the model knows")
    data.check_outputs([args.out])
    return args


def prepare(args):
    sizes = QUICK if args.quick else FULL
    if args.samples:
        sizes = sizes | {"texts": args.samples}
    if args.model:
        folder, pairs = args.model, data.read_pairs(args.pairs)
    else:
        tiny.main(["--out", str(MADE / "tiny-data")])
        folder, pairs = str(MADE / "tiny-data/model"), tiny_pairs(MADE / "tiny-data")
    model, tokenizer = models.load_model(folder, device=args.device)
    return Bench(model, tokenizer, pairs, sizes, args)


def main(argv=None):
    """Writes the table after each row."""
    args = parse_args(argv)
    bench, out = prepare(args), Path(args.out or MADE / "bench.md")
    table = describe(bench, sys.argv[1:] if argv is None else argv)
    for name in args.rows:
        what, against, _ = ROWS[name]
        for detail, measured, goal, met, work in measured_lines(name, bench):
            title = f"{what}: {detail}" if detail else what
            met = "-" if args.quick else met
            table += f"| {title} | {against} | {measured} | {goal} | {met} | {work} |\n"
            print(f"{name:6} {detail:30} {measured}  goal {goal} {met}", flush=True)
        data.write_bytes(out, table.encode())
    print(f"the table is in {out}")


if __name__ == "__main__":
    flags.run_cli(main)
