"""Speed and memory, side by side with the literal algorithms and the libraries; writes dev/BENCHMARKS.md.

    python dev/bench.py                                                      # a small model that it makes itself
    python dev/bench.py --model DIR --pairs pairs.jsonl --tasks-data DIR     # your model, your pairs
    python dev/bench.py --rows el knn --quick                                # two rows, tiny sizes, to see that they run

Each line of the table is this project ("ours") against what a reader of "Learn while Unlearn" (ICU, arXiv:2407.20271)
would write from its formulas, or against a library's plain use ("theirs"). How it measures:
  1. Both sides run in one process, in turn, and who goes first changes each repeat; what is about a whole process
     (peak memory, start) has a child process for each.
  2. With --threads 1 on a CPU, times are the process's own (what other programs do to the machine counts for little),
     else the wall clock's; a whole process is always timed by the wall clock.
  3. A ratio is taken within each repeat: the table holds their median, least and greatest. ">= 30x" is theirs / ours,
     "<= 1.15x" is ours / theirs.
  4. Where both compute the same values, the values are compared, and a goal is not met by other values.
  5. What cannot be measured here is in the table too, with the reason.
"""

import argparse
import copy
import datetime
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache, GPTNeoConfig, GPTNeoForCausalLM

import icu
import knn
import metrics
from demo import tiny
from evals import audit, tasks
from experiment import free_port
from kit import data, fast_el, flags, models, paths, processes, runs

HERE = Path(__file__).resolve().parent

# What is measured, and what --quick leaves of it.
FULL = {
    "texts": 32,  # el, bound: texts measured (--samples)
    "lengths": (100, 200),  # el, bound: their tokens
    "forgetting_steps": 400,  # el, bound: at most, until half of the positions miss
    "samples": 128,  # of the forget set in every other row
    "steps": 10,  # step, trainer, zero: training steps a repeat
    "active": (32, 128, 512, 2048),  # linear
    "pool": 1_000_000,  # knn: rows (--pool)
    "queries": 1000,  # knn
    "task_rows": 60,  # tasks: rows of each set
    "training_steps": None,  # of the model made without --model: until it knows its texts
}
QUICK = {
    "texts": 4, "lengths": (20, 40), "forgetting_steps": 4, "samples": 4, "steps": 2, "active": (4, 8),
    "pool": 2000, "queries": 20, "task_rows": 8, "training_steps": 10,
}  # fmt: skip


class NotMeasured(Exception):
    """A row, or a line of one, cannot be measured here; the message says why."""


class Bench(NamedTuple):
    """What every row may use."""

    model: torch.nn.Module
    tokenizer: object
    pairs: list  # the lines of pairs.jsonl
    model_dir: str
    pairs_file: str
    sizes: dict  # FULL or QUICK
    args: argparse.Namespace


# --- icu.py, used from here alone ---

# A run's start: imports, flags, pairs, weights and the frozen copy's answers, all that comes before the first step.
START = """
import sys, icu
from kit import models
args = icu.parse_args(sys.argv[1:])
inputs = icu.read_inputs(args)
model, tokenizer = models.load_model(args.model, dtype=args.dtype, device=args.device)
icu.freeze(model, icu.sides_of(inputs.samples, tokenizer, 0, args), args)
"""


def flags_of(bench, *more):
    """The flags of an icu.py run of this model on these pairs, the paper's recipe; `more` comes last and wins."""
    flags = [
        "--model",
        bench.model_dir,
        "--pairs",
        bench.pairs_file,
        "--out",
        "none",
        "--bert",
        "minilm",
    ]
    return [*flags, "--device", bench.args.device, *more]


def samples_of(bench):
    """The samples that every row but `el` uses, as icu.py reads them."""
    return build(bench.pairs[: bench.sizes["samples"]], bench.model, bench.tokenizer)


def build(pairs, model, tokenizer, protocol="paper"):
    """icu.py's samples of these pairs. "released": with their context, and every position a target.

    Texts are whole here: what is measured is Eq. 6, without the term that joins it where only spans are forgotten.
    """
    pairs = [{name: value for name, value in pair.items() if name != "spans"} for pair in pairs]
    positions = models.positions_of(model.config) or 1 << 30
    return icu.build_samples(pairs, tokenizer, protocol=protocol, positions=positions)[0]


def pair_sides(samples):
    """The two sides that every method has, as icu.Batch takes them."""
    return {
        "forget": [[sample.forget] for sample in samples],
        "learn": [[sample.learn] for sample in samples],
    }


def trainer(model, samples, args, make_engine=processes.PlainEngine):
    """train(active, epoch): one epoch of icu.py's loop over those samples, in place, with the method of `args`."""
    sides = icu.sides_of(samples, None, 0, args)
    frozen, engine = icu.freeze(model, sides, args), make_engine(model, args)

    def train(active, epoch):
        progress = runs.Progress()
        progress.epoch = epoch
        return icu.train_epoch(engine, sides, list(active), args, frozen=frozen, progress=progress)

    return train


def steps_of(train, batch, steps):
    """`steps` steps of such a loop on one batch, as a function that returns their mean loss."""
    return lambda: statistics.fmean(
        train(range(len(batch)), epoch).get("loss", math.nan) for epoch in range(steps)
    )


# --- measuring ---


class Timed(NamedTuple):
    """Both sides of a comparison: a number each repeat, and what each returned last."""

    ours: list
    theirs: list
    our_result: object
    their_result: object


def clock_of(device="cpu"):
    """The wall clock; for one thread of a CPU this process's own time, which a busy machine disturbs less."""
    return (
        time.process_time
        if str(device) == "cpu" and torch.get_num_threads() == 1
        else time.perf_counter
    )


def now(device="cpu", clock=None):
    """The seconds of `clock`, once a GPU's queue is empty."""
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
    return (clock or clock_of(device))()


def seconds(function, device="cpu", clock=None):
    """(seconds, result) of one call by `clock`."""
    start = now(device, clock)
    result = function()
    return now(device, clock) - start, result


def side_by_side(ours, theirs, repeats, *, device="cpu", clock=None, warm_up=True):
    """Time two functions without arguments in turn, in seconds; who goes first changes each repeat."""
    if warm_up:
        ours()
        theirs()
    times, results = {"ours": [], "theirs": []}, {}
    for repeat in range(repeats):
        sides = [("ours", ours), ("theirs", theirs)]
        for name, function in sides if repeat % 2 == 0 else sides[::-1]:
            took, results[name] = seconds(function, device, clock)
            times[name].append(took)
    return Timed(times["ours"], times["theirs"], results["ours"], results["theirs"])


def watching(model, function):
    """`function`, which then returns (its result, the shapes (B, T) that went through `model`, padding included)."""

    def watched():
        shapes = []

        def watch(module, args, kwargs):
            shapes.append(tuple(kwargs["input_ids"].shape))

        hook = model.register_forward_pre_hook(watch, with_kwargs=True)
        try:
            return function(), shapes
        finally:
            hook.remove()

    return watched


def run_python(code, *args, **variables):
    """(seconds, last line of stdout) of `python -c code args` in a process of its own, with these variables besides."""
    path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", code, *args]
    took, done = seconds(
        lambda: subprocess.run(command, capture_output=True, text=True, env=environment),
        clock=time.perf_counter,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        reason = next(
            (line for line in reversed(said) if "Error" in line), said[-1]
        )  # warnings of the exit follow it
        raise NotMeasured(f"the child process failed: {reason}")
    return took, (done.stdout.strip().splitlines() or [""])[-1]


def in_child(function, *args, **variables):
    """What a function of this file, given as JSON what it takes, returns in a process of its own (run_python)."""
    code = "import bench, json, sys; print(json.dumps(getattr(bench, sys.argv[1])(*json.loads(sys.argv[2]))))"
    return json.loads(run_python(code, function.__name__, json.dumps(args), **variables)[1])


def peak_bytes(device="cpu"):
    """The peak memory of this process so far: its resident set, or on a GPU what torch has allocated there.

    Linux counts the parent's peak in getrusage's ru_maxrss of a child, so there the kernel's own VmHWM is read.
    """
    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


# --- lines of the table ---


class Goal(NamedTuple):
    """A bound: ">=" on theirs / ours, "<=" on ours / theirs; `noise` is what a median may miss it by."""

    sign: str
    bound: float
    noise: float = 0.0

    def __str__(self):
        return f"{self.sign} {self.bound:g}x" + (
            f" ({self.noise:.0%} is noise)" if self.noise else ""
        )

    def ratios(self, ours, theirs):
        return [t / o if self.sign == ">=" else o / t for o, t in zip(ours, theirs, strict=True)]

    def holds(self, ratio):
        return (
            ratio >= self.bound - self.noise
            if self.sign == ">="
            else ratio <= self.bound + self.noise
        )


class Line(NamedTuple):
    """One line of dev/BENCHMARKS.md, as text but for `met`: None where there is no goal, or no measurement."""

    detail: str  # which of its row's lines it is
    measured: str
    goal: str = "-"
    met: bool | None = None
    work: str = ""


def ratio_line(detail, ratios, goal, *, work, same=True):
    """A line from the ratio of each repeat. `goal` may be None; with other values (not `same`) it is not met."""
    median = statistics.median(ratios)
    measured = f"{median:.3g}x ({min(ratios):.3g}-{max(ratios):.3g})"
    return Line(
        detail, measured, str(goal or "-"), goal and bool(same and goal.holds(median)), work
    )


def timed_line(detail, timed, goal, *, work, same=True):
    """A line from what side_by_side measured; the times are put behind `work`."""
    ratios = (goal or Goal(">=", 0)).ratios(timed.ours, timed.theirs)
    times = [f"{statistics.median(side):.3g} s" for side in (timed.ours, timed.theirs)]
    return ratio_line(
        detail, ratios, goal, work=f"{work}; ours {times[0]}, theirs {times[1]}", same=same
    )


# --- el: EL (Eq. 7, 8) and MA (Eq. 9), a `generate` a prefix length ---


@torch.inference_mode()
def literal_el_and_ma(model, texts, *, n=10, start=1, batch_size=64):
    """Eq. (7)-(9) as they stand: (el, ma), a list of a float a text each, 0-1.

    texts: lists of ids; `start` is the first position predicted (0-based). Every text whose prefix x_<t is asked for
    has t tokens there, so a batch needs no padding; what a shorter text has no room for is cut off its answer.
    """
    eos = models.eos_ids(model)
    pad = min(eos, default=0)
    overlaps, ma = [[] for _ in texts], [0.0] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for batch in data.chunks(order, batch_size):
        longest = len(texts[batch[-1]])
        for t in range(start, longest - n + 1):
            asked = [i for i in batch if t <= len(texts[i]) - n]
            x = torch.tensor([texts[i][:t] for i in asked], device=model.device)  # (B, t)
            out = models.plain_generate(model, x, torch.ones_like(x), max_new_tokens=longest - t)
            for i, said in zip(asked, out[:, t:].tolist(), strict=True):
                said = said[: len(texts[i]) - t]
                end = next(
                    (k + 1 for k, token in enumerate(said) if token in eos), len(said)
                )  # EOS is said too
                overlaps[i].append(overlap(said[:end], texts[i][t:], n))
        x = torch.tensor(
            [texts[i] + [pad] * (longest - len(texts[i])) for i in batch], device=model.device
        )  # (B, T)
        hits = (
            model(input_ids=x, use_cache=False).logits[:, :-1].argmax(-1) == x[:, 1:]
        ).tolist()  # the shift by one
        for i, hit in zip(batch, hits, strict=True):
            ma[i] = statistics.fmean(hit[start - 1 : len(texts[i]) - 1])  # Eq. (9)
    return [
        statistics.fmean(values) if values else float("nan") for values in overlaps
    ], ma  # Eq. (7)


def overlap(said, text, n):
    """OVERLAP_n of Eq. (8), 0-1: the share of the n-grams of what was said that the text has; none said is 0."""
    grams, known = (
        [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)] for ids in (said, text)
    )
    known = set(known)
    return sum(gram in known for gram in grams) / len(grams) if grams else 0.0


def our_el_and_ma(model, texts, *, n=10, start=1):
    """metrics.el_and_ma on lists of ids: (el, ma), a list of a float a text each."""
    rows = [torch.tensor(text) for text in texts]
    ids, mask = (
        torch.nn.utils.rnn.pad_sequence(x, True)
        for x in (rows, [torch.ones_like(row) for row in rows])
    )
    el, ma = metrics.el_and_ma(model, ids, mask, n=n, start=start)
    return el.tolist(), ma.tolist()


def compare_values(model, texts, ours, theirs, *, start=1):
    """(whether two results (el, ma) are the same values, the same in words).

    In float32 the two best tokens can be so close that the shape of a batch decides between them. Texts whose values
    differ are measured again in float64 by both, and that decides.
    """
    gaps = [
        max((abs(a - b) for a, b in zip(mine, other, strict=True) if a == a or b == b), default=0.0)
        for mine, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
    ]
    differ = [i for i, gap in enumerate(gaps) if not gap <= 1e-6]
    if not differ:
        return True, f"identical values (largest difference {max(gaps):.0e})"
    said = f"{len(differ)} of {len(texts)} texts differ by up to {max(gaps):.1e} in float32"
    if model.dtype == torch.float64:
        return False, said.replace("float32", "float64")
    exact, again = copy.deepcopy(model).double(), [texts[i] for i in differ]
    results = [measure(exact, again, start=start) for measure in (our_el_and_ma, literal_el_and_ma)]
    same, in_double = compare_values(exact, again, *results, start=start)
    return same, f"{said}; those in float64: {in_double}"


def half_forgotten(bench, samples, first):
    """A copy of the model after steps of ascent with KL (icu.py's `kl`), until half of the positions miss."""
    model = copy.deepcopy(bench.model)
    train = trainer(
        model, samples, icu.parse_args(flags_of(bench, "--method", "kl", "--lr", "1e-4"))
    )
    batches = itertools.cycle(data.chunks(range(len(samples)), 8))
    for epoch, batch in enumerate(itertools.islice(batches, bench.sizes["forgetting_steps"])):
        if (
            statistics.fmean(
                our_el_and_ma(model, [s.forget.ids for s in samples], n=None, start=first)[1]
            )
            <= 0.5
        ):
            break
        train(batch, epoch)
    return model


def each_length(bench, lines_of):
    """The lines of lines_of(T, samples of T tokens, first position predicted) for each T, or why there are none.

    A text is the first T tokens of context, prefix and suffix, as the model once read them.
    """
    first = 1 + len(models.bos_of(bench.tokenizer))
    everything = build(bench.pairs, bench.model, bench.tokenizer, "released")
    for T in bench.sizes["lengths"]:
        samples = [s for s in everything if len(s.forget.ids) >= T][: bench.sizes["texts"]]
        samples = [s._replace(forget=s.forget._replace(ids=s.forget.ids[:T])) for s in samples]
        if samples:
            yield from lines_of(T, samples, first)
        else:
            yield unmeasured(f"T = {T}: no text of the pairs, with its context, has {T} tokens")


def memorisation(bench):
    """MA + EL10 of texts of T tokens, of the model as it is and after half of the positions miss."""
    gpu = bench.args.device == "cuda"
    goals = (Goal(">=", 100), None) if gpu else (Goal(">=", 30), Goal(">=", 10))

    def lines_of(T, samples, first):
        texts = [s.forget.ids for s in samples]
        for when, goal in zip(("before", "after"), goals, strict=True):
            model = bench.model if when == "before" else half_forgotten(bench, samples, first)
            yield memorisation_line(
                bench, model, texts, f"T = {T}, {when} unlearning", goal=goal, start=first
            )

    return each_length(bench, lines_of)


def memorisation_line(bench, model, texts, detail, *, goal, start):
    """A line: both measures of these texts, with the tokens that each side sent through the model."""
    sides = [
        watching(model, lambda measure=measure: measure(model, texts, start=start))
        for measure in (our_el_and_ma, literal_el_and_ma)
    ]
    for measure in (our_el_and_ma, literal_el_and_ma):
        measure(model, [texts[0][: start + 11]], start=start)  # warm: two prefixes of one text
    timed = side_by_side(*sides, bench.args.repeats, device=bench.args.device, warm_up=False)
    (ours, shapes), (theirs, their_shapes) = timed.our_result, timed.their_result
    tokens, their_tokens = (
        sum(map(math.prod, all_shapes)) for all_shapes in (shapes, their_shapes)
    )
    same, values = compare_values(model, texts, ours, theirs, start=start)
    work = f"{len(texts)} texts, MA {statistics.fmean(ours[1]):.2f}; {values}"
    work += f"; {tokens:,} tokens through the model against {their_tokens:,}"
    return timed_line(detail, timed, goal, work=work, same=same)


# --- bound: EL and MA against the least that exact decoding takes ---


@torch.inference_mode()
def must_be_decoded(model, texts, *, n=10, start=1):
    """[(t, tokens)]: where the greedy token is not the text's, x_<t is continued by this many tokens, 1 at least.

    The first token of a continuation comes from the whole pass, and the last is not fed; it ends as EL's definition and
    EOS say, or where its overlap is certain to be 0. Prefixes whose continuations run into the same one share it.
    """
    ids, found = torch.tensor(texts), {}
    starts = [start] * len(texts)
    for row, text, guess, said in fast_el.guesses_and_continuations(
        model, ids, torch.ones_like(ids), starts, n=n
    ):
        for t, tokens in said.items():
            miss = next(
                (p for p in range(t, t + len(tokens)) if guess[p] != text[p]), None
            )  # None: hits, then EOS
            if miss is not None:
                found[row, miss] = t + len(tokens) - miss - 1
    return [(t, tokens) for (_, t), tokens in found.items() if tokens]


@torch.inference_mode()
def decoding_seconds(model, prefix, rows, steps):
    """Seconds of plain cached greedy decoding of `steps` tokens for `rows` rows behind a prefix of their own.

    The time does not depend on what is said, so the rows are copies of one.
    """
    cache, device, word = DynamicCache(), model.device, models.cache_word(model)
    out = model(input_ids=torch.tensor([prefix], device=device), use_cache=True, **{word: cache})
    token = out.logits[:, -1:].argmax(-1).expand(rows, 1)  # (B, 1)
    cache.batch_repeat_interleave(rows)
    start = now(device.type)
    for _ in range(steps):
        token = model(input_ids=token, use_cache=True, **{word: cache}).logits[:, -1:].argmax(-1)
    return now(device.type) - start


def bound(bench):
    """Our EL + MA after unlearning against the least time that exact decoding, a token at a time, can take.

    The bound is the time of one whole pass over the texts, which gives MA, and of the tokens that must be decoded, at
    the speed of plain cached decoding: batches as large as ours, all rows alive, from where ours start to where they
    end on average. It leaves out what an algorithm has to do besides: moving keys and values of the pass into batches,
    rows of unequal lengths, and telling when to stop. Only guessing several tokens at once could beat it.
    """

    def lines_of(T, samples, first):
        model = half_forgotten(bench, samples, first)
        yield bound_line(
            model,
            [s.forget.ids for s in samples],
            f"T = {T}",
            start=first,
            repeats=bench.args.repeats,
        )

    return each_length(bench, lines_of)


def bound_line(model, texts, detail, *, start, repeats):
    """A line: our time for these texts, of one length, against the bound's."""
    measure, device = functools.partial(our_el_and_ma, model, texts, start=start), model.device.type
    (_, ma), shapes = watching(model, measure)()
    rows = [B for B, T in shapes if T == 1]  # of each step of our decoding
    missing = sorted(
        must_be_decoded(model, texts, start=start)
    )  # ours decodes those of like t together
    batches, ours, bounds, decoding = data.chunks(missing, max(rows, default=1)), [], [], []

    @torch.inference_mode()
    def whole_pass():
        for part in data.chunks(texts, 64):  # as ours
            model(input_ids=torch.tensor(part, device=device), use_cache=True).logits.argmax(
                -1
            ).tolist()

    def decode(batch):
        t, tokens = (statistics.fmean(values) for values in zip(*batch, strict=True))
        steps = round(tokens)
        return decoding_seconds(model, texts[0][: round(t)], len(batch), steps) * tokens / steps

    for _ in range(repeats):
        ours.append(seconds(measure, device)[0])
        decoding.append(sum(map(decode, batches)))
        bounds.append(seconds(whole_pass, device)[0] + decoding[-1])
    tokens = sum(tokens for _, tokens in missing)
    work = f"{len(texts)} texts, MA {statistics.fmean(ma):.2f}; {tokens:,} tokens must be decoded, ours decoded "
    work += f"{sum(rows):,}; plain: {tokens / (statistics.median(decoding) or 1):,.0f} a second in batches of "
    work += f"{max(map(len, batches), default=0)}"
    return timed_line(detail, Timed(ours, bounds, None, None), Goal("<=", 1.5), work=work)


# --- epoch: train + refine + measure ---


def plain_epoch(model, samples, active, args):
    """Eq. (1)-(6) as they stand, in place: the frozen copy runs on every batch, and a forgotten row keeps its slot."""
    frozen = icu.live_copy(model, pair_sides(samples), icu.collate)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.98))
    for batch in data.chunks(
        np.random.default_rng(args.seed).permutation(len(samples)).tolist(), args.batch_size
    ):
        is_active = torch.tensor([i in active for i in batch], device=model.device)[
            :, None
        ]  # (B, 1)
        x, x_attention, x_mask = icu.collate(
            [samples[i].forget for i in batch], model.device
        )  # (B, T)
        y, y_attention, y_mask = icu.collate([samples[i].learn for i in batch], model.device)
        x_logits = model(
            input_ids=x, attention_mask=x_attention, use_cache=False
        ).logits  # (B, T, V)
        y_logits = model(input_ids=y, attention_mask=y_attention, use_cache=False).logits
        loss = icu.forget_loss(x_logits, x, x_mask & is_active)
        loss = loss + args.alpha * icu.learn_loss(y_logits, y, y_mask & is_active)
        z_logits, _ = frozen("learn", batch, [samples[i].learn for i in batch])
        loss = loss + args.beta * icu.kl_loss(y_logits, z_logits, y_mask & is_active)  # Eq. (6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def plain_measure(model, tokenizer, samples, args):
    """What icu.measure measures, with literal EL and MA and the library's beam search: a dict a sample."""
    start = 1 + len(models.bos_of(tokenizer))
    el, ma = literal_el_and_ma(model, [sample.forget.ids for sample in samples], start=start)
    prompts, lengths = prompts_of(samples)
    said = plain_beams(
        model, prompts, lengths, by_length(prompts, lengths), num_beams=args.num_beams
    )
    texts, true = models.decode(tokenizer, said), models.true_suffixes(tokenizer, samples)
    f1 = metrics.bertscore(texts, true, args.bert, device=args.device)[2].tolist()
    return [
        {"el10": el[i], "ma": ma[i], "bertscore": f1[i], "bleu": metrics.bleu(text, suffix),
         "entropy": metrics.token_entropy(said[i])}
        for i, (suffix, text) in enumerate(zip(true, texts, strict=True))
    ]  # fmt: skip


def whole_epoch(bench):
    """An epoch in the middle of a run: half of the samples are forgotten, all are measured. Eq. 5 is in measuring.

    With --el lazy most epochs need no EL: their times, taken behind the others, against the same literal ones.
    """
    samples, args = samples_of(bench), icu.parse_args(flags_of(bench))
    active = range(0, len(samples), 2)

    def ours(with_el=True):
        model = copy.deepcopy(bench.model)
        trainer(model, samples, args)(
            active, 1
        )  # the frozen copy's answers, asked once a run, are in it
        return icu.measure(model, bench.tokenizer, samples, args, with_el=with_el)

    def theirs():
        model = copy.deepcopy(bench.model)
        plain_epoch(model, samples, set(active), args)
        return plain_measure(model, bench.tokenizer, samples, args)

    icu.measure(
        bench.model, bench.tokenizer, samples[:1], args
    )  # loads BERTScore's encoder, which both use
    timed = side_by_side(ours, theirs, bench.args.repeats, device=bench.args.device, warm_up=False)

    def means(name):
        sides = (
            runs.mean(row[name] for row in rows) for rows in (timed.our_result, timed.their_result)
        )
        return f"{name} " + " / ".join("-" if value is None else f"{value:.3f}" for value in sides)

    work = f"{len(samples)} samples, {len(active)} of them active; ours / theirs, trained in other batches: "
    work += ", ".join(map(means, ("el10", "ma", "bleu", "bertscore")))
    yield timed_line("", timed, Goal(">=", 20), work=work)
    lazy = [seconds(lambda: ours(with_el=False), bench.args.device)[0] for _ in timed.theirs]
    yield timed_line(
        "where EL cannot decide (--el lazy)",
        timed._replace(ours=lazy),
        None,
        work="the same samples",
    )


# --- step: forget + learn + KL against a cross-entropy ---


def both_sides(samples, device="cpu"):
    """{"forget", "learn": (ids (B, T), attention mask, target mask)} of a batch."""
    return {
        side: icu.collate([getattr(s, side) for s in samples], device)
        for side in ("forget", "learn")
    }


def plain_side(model, ids, attention_mask, targets):
    """(the mean -log p over the targets in nats, logits (B, T - 1, V), labels (B, T - 1), -100 where none is)."""
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits[
        :, :-1
    ]  # the shift by one
    labels = ids.masked_fill(~targets, -100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits, labels


def plain_cross_entropy(model, samples):
    """The mean -log p over the targets of both sides, a scalar in nats: the floor of a training step."""
    return sum(plain_side(model, *side)[0] for side in both_sides(samples, model.device).values())


def training_step(bench):
    """Whole steps of icu.py's loop, Adam's included, against forward and backward of the same batch, and no more."""
    args, plain = icu.parse_args(flags_of(bench, "--lr", "1e-9")), copy.deepcopy(bench.model)
    batch, steps = samples_of(bench)[: args.batch_size], bench.sizes["steps"]
    ours = steps_of(trainer(copy.deepcopy(bench.model), batch, args), batch, steps)

    def theirs():
        for _ in range(steps):
            plain.zero_grad()
            plain_cross_entropy(plain, batch).backward()

    timed = side_by_side(ours, theirs, bench.args.repeats, device=bench.args.device)
    yield timed_line("", timed, Goal("<=", 1.15), work=step_work(batch, steps))


def step_work(batch, steps):
    """What the steps of a row were over, in words."""
    tokens = sum(len(text.ids) for sample in batch for text in (sample.forget, sample.learn))
    return f"{steps} steps of {len(batch)} + {len(batch)} rows, {tokens:,} tokens a step"


def loss_line(timed, goal, work):
    """The line of two loops, which return the mean loss of their last steps: after as many steps they are one."""
    ours, theirs = timed.our_result, timed.their_result
    same = math.isclose(ours, theirs, rel_tol=1e-3, abs_tol=1e-3)
    return timed_line(
        "", timed, goal, work=f"{work}; mean loss of the last {ours:.5f} / {theirs:.5f}", same=same
    )


# --- trainer: the same steps in transformers' own loop ---


def plain_loss(model, frozen, inputs, args):
    """Eq. (6) of what both_sides gives, as the paper writes it, with a frozen copy that runs each time: in nats."""
    forget, learn = (
        plain_side(model, *inputs[side]) for side in ("forget", "learn")
    )  # Eq. (1), (3)
    ids, attention_mask, _ = inputs["learn"]
    with torch.no_grad():
        frozen_logits = frozen(
            input_ids=ids, attention_mask=attention_mask, use_cache=False
        ).logits[:, :-1]
    logp, frozen_logp = (
        logits[learn[2] != -100].log_softmax(-1) for logits in (learn[1], frozen_logits)
    )  # (M, V)
    kl = F.kl_div(
        logp, frozen_logp, log_target=True, reduction="batchmean"
    )  # Eq. (4), the mean over the M targets
    return -args.forget_weight * forget[0] + args.alpha * learn[0] + args.beta * kl


def huggingface_steps(model, batch, args, steps):
    """(run, times): run() trains `steps` steps by transformers' Trainer, in place, and returns their mean loss.

    `times` gets the seconds of the steps alone: what train() sets up before them is not a step's.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    frozen, times, device = copy.deepcopy(model).requires_grad_(False), [], model.device.type
    model.train = lambda mode=True: model  # it asks for dropout, which ours leaves off

    class Unlearning(Trainer):
        def compute_loss(self, model, inputs, **_):
            return plain_loss(model, frozen, inputs, args)

    class Watch(TrainerCallback):
        def on_epoch_begin(self, *_, **__):
            self.start = now(device)

        def on_epoch_end(self, *_, **__):
            times.append(now(device) - self.start)

    def run():
        with models.quiet():
            return loop.train().training_loss

    with tempfile.TemporaryDirectory() as folder, models.quiet():
        settings = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=1, lr_scheduler_type="constant", max_grad_norm=0.0,
            remove_unused_columns=False, dataloader_pin_memory=False, use_cpu=device == "cpu", report_to="none",
            save_strategy="no", logging_strategy="no", logging_nan_inf_filter=False, disable_tqdm=True,
        )  # fmt: skip
        settings._n_gpu = 1  # with several it would share a batch out
        loop = Unlearning(
            model, settings, train_dataset=[batch] * steps, data_collator=lambda rows: both_sides(rows[0]),
            callbacks=[Watch], optimizers=(processes.PlainEngine(model, args).optimizer, None),
        )  # fmt: skip
    loop.remove_callback(PrinterCallback)
    return run, times


def against_trainer(bench):
    """Steps of icu.py's loop against those of a Trainer whose compute_loss is Eq. 6 as the paper writes it."""
    args, steps = icu.parse_args(flags_of(bench)), bench.sizes["steps"]
    batch = samples_of(bench)[: args.batch_size]
    theirs, times = huggingface_steps(copy.deepcopy(bench.model), batch, args, steps)
    ours = steps_of(trainer(copy.deepcopy(bench.model), batch, args), batch, steps)
    timed = side_by_side(ours, theirs, bench.args.repeats, device=bench.args.device)
    # The first is of the warm-up.
    yield loss_line(timed._replace(theirs=times[1:]), Goal(">=", 1), step_work(batch, steps))


# --- zero: the same steps by DeepSpeed's engine ---


def zero_steps(flags, texts, steps, repeats):
    """In a child, started as by a launcher: side_by_side of steps by ZeRO-2 and of steps by the plain engine."""
    args = icu.parse_args(flags)
    processes.start(args.device)
    model, tokenizer = models.load_model(args.model, dtype=args.dtype, device=args.device)
    batch = build(data.read_pairs(args.pairs)[:texts], model, tokenizer)
    engines = processes.ZeroEngine, processes.PlainEngine
    sides = [
        steps_of(trainer(copy.deepcopy(model), batch, args, engine), batch, steps)
        for engine in engines
    ]
    return side_by_side(*sides, repeats, device=args.device)


def against_zero(bench):
    """Steps by DeepSpeed's ZeRO-2 with one process, ours for several GPUs, against those of the plain engine.

    On a CPU --quick alone runs it: its times there say nothing of a GPU's.
    """
    if bench.args.device == "cpu" and not bench.args.quick:
        raise NotMeasured("ZeRO-2 is for GPUs: pass --device cuda")
    if importlib.util.find_spec("deepspeed") is None:
        raise NotMeasured("deepspeed is not installed")
    steps, flags = bench.sizes["steps"], flags_of(bench)
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    launched["MASTER_PORT"] = free_port()
    batch = samples_of(bench)[: icu.parse_args(flags).batch_size]
    timed = Timed(*in_child(zero_steps, flags, len(batch), steps, bench.args.repeats, **launched))
    yield loss_line(timed, Goal("<=", 1.2), step_work(batch, steps))


# --- generation: beam search ---


def prompts_of(samples):
    """(prompts, lengths): what a generation starts from, and how many tokens the suffix has."""
    return [s.forget.prompt for s in samples], [len(s.forget.ids) - s.forget.cut for s in samples]


def by_length(prompts, lengths, batch_size=64):
    """Indices in batches of like length."""
    return data.chunks(
        sorted(range(len(prompts)), key=lambda i: (lengths[i], len(prompts[i]))), batch_size
    )


@torch.inference_mode()
def plain_beams(model, prompts, lengths, batches, *, num_beams=2):
    """transformers' beam search, left-padded batches, each as long as its longest answer: N lists of ids, no EOS."""
    eos, said = models.eos_ids(model), [None] * len(prompts)
    pad = min(eos, default=0)
    for batch in batches:
        P = max(len(prompts[i]) for i in batch)
        x = torch.tensor(
            [[pad] * (P - len(prompts[i])) + prompts[i] for i in batch], device=model.device
        )  # (B, P)
        mask = torch.tensor(
            [[0] * (P - len(prompts[i])) + [1] * len(prompts[i]) for i in batch],
            device=model.device,
        )
        limit = max(lengths[i] for i in batch)
        out = models.plain_generate(model, x, mask, max_new_tokens=limit, num_beams=num_beams)
        for i, tokens in zip(batch, out[:, P:].tolist(), strict=True):
            said[i] = list(
                itertools.takewhile(lambda token: token not in eos, tokens[: lengths[i]])
            )
    return said


def generation(bench):
    """metrics.beam_generate against `generate` in length-sorted batches.

    A beam search that ends later may choose another beam, so the tokens are compared with those of batches in which
    all answers have the same length.
    """
    prompts, lengths = prompts_of(samples_of(bench))
    batches = by_length(prompts, lengths)
    timed = side_by_side(
        lambda: metrics.beam_generate(bench.model, prompts, lengths, num_beams=2),
        lambda: plain_beams(bench.model, prompts, lengths, batches),
        bench.args.repeats, device=bench.args.device,
    )  # fmt: skip
    same_length = [
        [i for i in range(len(prompts)) if lengths[i] == length] for length in sorted(set(lengths))
    ]
    exact = plain_beams(bench.model, prompts, lengths, same_length)
    equal = sum(a == b for a, b in zip(timed.our_result, exact, strict=True))
    work = f"{sum(lengths):,} tokens of {len(prompts)} rows; the same tokens in {equal} rows"
    yield timed_line("", timed, Goal("<=", 1, noise=0.02), work=work, same=equal == len(prompts))


# --- knn: cosine_knn against faiss ---


def random_vectors(rows, seed):
    """(rows, 384) float32, normal."""
    return np.random.default_rng(seed).standard_normal((rows, 384), dtype=np.float32)


def search_memory(rows, queries, k):
    """In a child: the peak memory of a search and its pool, divided by the pool's own bytes."""
    asked, before = random_vectors(queries, 1), peak_bytes()
    pool = random_vectors(rows, 0)
    knn.cosine_knn(asked, pool, k)
    return (peak_bytes() - before) / pool.nbytes


def search(bench):
    """cosine_knn against faiss's exact index, which is handed unit vectors and timed while it searches only."""
    import faiss

    faiss.omp_set_num_threads(bench.args.threads)
    M, Q = bench.sizes["pool"], bench.sizes["queries"]
    pool, queries = random_vectors(M, 0), random_vectors(Q, 1)
    index, unit_queries = faiss.IndexFlatIP(pool.shape[1]), queries.copy()
    faiss.normalize_L2(unit_queries)
    for start in range(0, M, 65536):  # in blocks, so that two pools are in memory and not three
        block = pool[start : start + 65536].copy()
        faiss.normalize_L2(block)
        index.add(block)
    for k in (1, 10):
        timed = side_by_side(
            lambda k=k: knn.cosine_knn(queries, pool, k),
            lambda k=k: index.search(unit_queries, k)[::-1],
            bench.args.repeats,
        )
        (found, cosine), (theirs, their_cosine) = timed.our_result, timed.their_result
        equal, gap = (found == theirs).mean(), np.abs(cosine - their_cosine).max()
        # faiss rounds to float32 as it sums: rows whose cosines are that close may change places.
        same = bool(gap < 1e-6)
        work = f"{Q:,} x {M:,} x 384; the same neighbours in {equal:.4%} of places, cosines within {gap:.0e}"
        yield timed_line(f"time, k = {k}", timed, Goal("<=", 1.2), work=work, same=same)
    ratios = [in_child(search_memory, M, Q, 10) for _ in range(bench.args.repeats)]
    work = f"pool of {pool.nbytes / 1e6:,.0f} MB; beside what the imports take"
    yield ratio_line(
        "peak memory, k = 10, against the pool itself", ratios, Goal("<=", 1.5), work=work
    )


# --- memory, linear, start: what a run takes ---


def training_memory(flags, n):
    """In a child: [peak bytes before the model is loaded, peak bytes after one epoch over n samples]."""
    args = icu.parse_args(flags)
    before = peak_bytes(args.device)
    model, tokenizer = models.load_model(args.model, dtype=args.dtype, device=args.device)
    samples = build(data.read_pairs(args.pairs)[:n], model, tokenizer)
    trainer(model, samples, args)(range(len(samples)), 1)
    return [before, peak_bytes(args.device)]


def memory(bench):
    """Peak memory of one epoch of ICU against the same epoch without the KL term, a child process each."""
    n, peaks = bench.sizes["samples"], {"icu": [], "graddiff": []}
    for _ in range(bench.args.repeats):
        for method, values in peaks.items():
            flags = flags_of(bench, "--method", method, "--alpha", "0.5")
            values.append(in_child(training_memory, flags, n))
    ours, theirs = ([after for _, after in values] for values in peaks.values())
    net = [
        statistics.median(after - before for before, after in values) for values in peaks.values()
    ]
    work = f"{min(n, len(bench.pairs))} samples; {statistics.median(ours) / 1e6:,.0f} MB against "
    work += f"{statistics.median(theirs) / 1e6:,.0f}, of them {net[0] / 1e6:,.0f} and {net[1] / 1e6:,.0f} after imports"
    goal = Goal("<=", 1.1)
    yield ratio_line("", goal.ratios(ours, theirs), goal, work=work)


def linear(bench):
    """The training time of an epoch with N active samples. All samples are measured every epoch, so that is constant.

    The samples are copies of the forget set's, sorted by length, and the active ones are evenly spread over them.
    """
    counts = bench.sizes["active"]
    largest, samples = (
        max(counts),
        sorted(samples_of(bench), key=lambda s: len(s.forget.ids) + len(s.learn.ids)),
    )
    samples = [samples[i * len(samples) // largest] for i in range(largest)]
    model, times = copy.deepcopy(bench.model), {N: [] for N in counts}
    train = trainer(
        model, samples, icu.parse_args(flags_of(bench, "--lr", "1e-9"))
    )  # many epochs, no unlearning
    train(range(8), 0)  # warm
    for epoch in range(1, bench.args.repeats + 1):
        for N in counts if epoch % 2 else counts[::-1]:
            active = range(0, largest, largest // N)
            times[N].append(
                seconds(lambda active=active, epoch=epoch: train(active, epoch), bench.args.device)[
                    0
                ]
                / N
            )
    ratios = [max(repeat) / min(repeat) for repeat in zip(*times.values(), strict=True)]
    each = ", ".join(
        f"{1000 * statistics.median(values):.3g} ms at N = {N}" for N, values in times.items()
    )
    yield ratio_line(
        "slowest N against fastest, a sample",
        ratios,
        Goal("<=", 1.2),
        work=f"time a sample: {each}",
    )


def start_up(bench):
    """From nothing to the first step, for pairs of one batch, against importing and loading alone."""
    load = "import sys, torch, transformers\n"
    load += "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).to(sys.argv[2])"
    rows = bench.pairs[:8]
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.jsonl"
        data.write_jsonl(pairs, rows)
        flags = flags_of(bench, "--pairs", str(pairs), "--out", str(Path(folder) / "run"))
        timed = side_by_side(
            lambda: run_python(START, *flags),
            lambda: run_python(load, bench.model_dir, bench.args.device),
            bench.args.repeats, clock=time.perf_counter,
        )  # fmt: skip
    work = f"flags, pairs, weights, the frozen copy's answers for {len(rows)} rows"
    yield timed_line("", timed, Goal("<=", 1.3), work=work)


# --- audit: all that is asked of a model but what training it again costs ---


def auditing(bench):
    """Every question of evals/audit.py but relearning, of one model, before and after half of the positions miss."""
    samples, first = samples_of(bench), 1 + len(models.bos_of(bench.tokenizer))
    half, args = min(bench.sizes["texts"], len(samples) // 2), icu.parse_args(flags_of(bench))
    texts, others = (
        samples[:half],
        samples[half : 2 * half],
    )  # which of them are "unseen" changes no time
    asked = audit.parse_args(
        ["--model", "-", "--pairs", "-", "--out", "-", "--device", bench.args.device]
    )
    asked.only.remove("relearning")
    data = audit.Data(asked, bench.tokenizer, first, bench.pairs, texts, others)
    for when in ("before", "after"):
        model = bench.model if when == "before" else half_forgotten(bench, texts, first)
        ours = functools.partial(audit.answers, model, data)
        theirs = functools.partial(icu.measure, model, bench.tokenizer, texts, args)
        theirs()  # loads BERTScore's encoder
        timed = side_by_side(
            ours, theirs, bench.args.repeats, device=bench.args.device, warm_up=False
        )
        work = f"{half} texts, {half} unseen ones, {asked.samples} samples a text"
        yield timed_line(f"{when} unlearning", timed, Goal("<=", 5), work=work)


# --- tasks: against lm-evaluation-harness ---


def fastest(function, sizes, device):
    """The batch size that `function` takes the least time with."""
    return min(sizes, key=lambda size: seconds(lambda: function(size), device)[0])


def share_inside(module, function):
    """The share of a call's time, 0-1, that is spent in the forward passes of `module` (on the CPU)."""
    spent, clock = [], clock_of()
    hooks = [module.register_forward_pre_hook(lambda *_: spent.append(-clock()))]
    hooks.append(module.register_forward_hook(lambda *_: spent.append(clock())))
    try:
        took, _ = seconds(function)
        return sum(spent) / took
    finally:
        for hook in hooks:
            hook.remove()


def against_harness(bench):
    """tasks.judge_choices against the harness's HFLM on the same rows, each at its best batch size.

    The bound that each line ends with is what the ratio would be if ours took no time but the body's forward passes.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    if not bench.args.tasks_data:
        raise NotMeasured("pass --tasks-data DIR with the rows of lambada, piqa, copa or pubmedqa")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every text that it cuts
    model, tokenizer = bench.model, bench.tokenizer
    harness = {
        size: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
        for size in (1, 4, 16, 64)
    }
    names, limit = ["lambada", "piqa", "copa", "pubmedqa"], bench.sizes["task_rows"]
    for name, loaded in tasks.read_sets(
        names, bench.args.tasks_data, prompts="harness", limit=limit
    ).items():
        if "rows" not in loaded:
            yield unmeasured(f"{name}: {loaded['missing']}")
            continue
        rows = loaded["rows"]
        texts = [(context, choice) for context, choices, _ in rows.values() for choice in choices]
        requests = [Instance("loglikelihood", {}, text, 0) for text in texts]

        def ours(batch_tokens, rows=rows):
            how = {"length_norm": False, "lenient": False, "desc": None}
            return tasks.judge_choices(model, tokenizer, rows, batch_tokens=batch_tokens, **how)[0]

        def theirs(batch_size, requests=requests):
            return harness[batch_size].loglikelihood(requests, disable_tqdm=True)

        device = bench.args.device
        tokens, size = (
            fastest(ours, (256, 512, 1024, 4096), device),
            fastest(theirs, harness, device),
        )
        timed = side_by_side(
            lambda ours=ours, tokens=tokens: ours(tokens), lambda theirs=theirs, size=size: theirs(size),
            bench.args.repeats, device=device,
        )  # fmt: skip
        logps = [logp for row in timed.our_result for logp in row["logp"]]
        gap = max(abs(a - b) for a, (b, _) in zip(logps, timed.their_result, strict=True))
        rates = [
            f"{len(rows) / statistics.median(side):.3g}" for side in (timed.ours, timed.theirs)
        ]
        work = f"{len(rows)} rows, {rates[0]} a second at {tokens} tokens a batch against {rates[1]} at {size} requests"
        work += f"; log p within {gap:.0e}"
        if device == "cpu":
            share = share_inside(model.base_model, lambda ours=ours, tokens=tokens: ours(tokens))
            bound = statistics.median(timed.theirs) / statistics.median(timed.ours) / share
            work += f"; {share:.0%} of our time are the body's forward passes: at most {bound:.2f}x"
        yield timed_line(name, timed, Goal(">=", 2), work=work, same=gap <= 1e-4)


# --- gpu: the paper's sizes with random weights ---

# Name: (hidden size, layers, heads, batch size of section 5.4).
GPT_NEO = {"125M": (768, 12, 12, 8), "1.3B": (2048, 24, 16, 4), "2.7B": (2560, 32, 20, 4)}

# Peak TFLOP/s, dense, (float32 without TF32, bf16), by NVIDIA's data sheets; the first name that the GPU's holds.
PEAK = {
    "H200": (67, 989), "H100 PCIe": (51, 756), "H100": (67, 989), "A100": (19.5, 312), "L40S": (91.6, 362),
    "L4": (30.3, 121), "4090": (82.6, 165), "3090": (35.6, 71),
}  # fmt: skip


def gpt_neo_config(name):
    """The config of a GPT-Neo of a published size, without dropout."""
    hidden, layers, heads, _ = GPT_NEO[name]
    return GPTNeoConfig(
        hidden_size=hidden, num_layers=layers, num_heads=heads, attention_types=[[["global", "local"], layers // 2]],
        resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


def random_gpt_neo(name):
    """A GPT-Neo of the published size with random weights, in eval mode."""
    return GPTNeoForCausalLM(gpt_neo_config(name)).eval()


def random_samples(n, T, vocab):
    """n samples of T random tokens on each side, half of them targets."""
    rng = np.random.default_rng(0)

    def text():
        ids = rng.integers(vocab, size=T).tolist()
        return icu.Text(ids, T // 2, T // 2, ids[: T // 2])

    return [icu.Sample(str(i), "", text(), text()) for i in range(n)]


def step_flops(model, tokens, T):
    """FLOPs of forward and backward of `tokens` tokens in rows of T: 6 a weight and token, and attention's products.

    PaLM, arXiv:2204.02311, Appendix B. The tied head counts once, positions do not; Adam and the KL's own head are
    left out.
    """
    config = model.config
    weights = model.num_parameters() - config.max_position_embeddings * config.hidden_size
    return tokens * (6 * weights + 12 * config.num_layers * config.hidden_size * T)


def gpu_step(name, dtype, repeats, T=100):
    """A line: the time of one ICU step of a GPT-Neo with random weights, its peak memory and its share of the peak."""
    gc.collect()  # the model before this one, also where it ran out of memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # by other rows
    with torch.device("cuda"):
        model = random_gpt_neo(name)
    B = GPT_NEO[name][-1]
    samples = random_samples(B, T, model.config.vocab_size)
    flags = ["--model", name, "--pairs", "-", "--out", "-", "--device", "cuda", "--dtype", dtype]
    train = trainer(model, samples, icu.parse_args([*flags, "--batch-size", str(B)]))
    train(range(B), 0)  # warm
    times = []
    while len(times) < 10 * repeats and sum(times) < 5:
        times.append(seconds(lambda: train(range(B), len(times) + 1), "cuda")[0])
    median, gpu = statistics.median(times), torch.cuda.get_device_name()
    peak = next((peaks[dtype == "bf16"] for known, peaks in PEAK.items() if known in gpu), None)
    flops = step_flops(model, 2 * B * T, T)
    mfu = (
        f"{flops / median / peak / 1e12:.1%} of {peak} TFLOP/s" if peak else f"unknown for a {gpu}"
    )
    measured = f"{1000 * median:.3g} ms ({1000 * min(times):.3g}-{1000 * max(times):.3g})"
    work = f"{B} + {B} rows of {T} tokens, peak memory {(peak_bytes('cuda') - before) / 2**30:.1f} GiB, MFU {mfu}"
    return Line(f"GPT-Neo {name}, {dtype}", measured, work=work)


def gpu_steps(bench):
    """An ICU step at the paper's three sizes, float32 and bf16 (autocast over float32 weights)."""
    if not torch.cuda.is_available():
        raise NotMeasured("no CUDA GPU here")
    for name, dtype in itertools.product(GPT_NEO, ("float32", "bf16")):
        try:
            yield gpu_step(name, dtype, bench.args.repeats)
        except torch.OutOfMemoryError:
            yield unmeasured(f"GPT-Neo {name}, {dtype}: the GPU's memory is too small")


# --- fits: what a run needs ---


def memory_estimate(config, samples, args, processes=1):
    """Bytes a process needs on its device, by part: {"weights", "gradients", "adam", "activations", "frozen copy"}.

    Weights, gradients and Adam's two moments are float32. ZeRO shards gradients and Adam over the processes and adds a
    float32 copy of a process's share; stage 3 shards the weights too, and each process measures all samples.
    Activations are those of a training step, or what measuring needs if that is more.
    """
    P, n, H, V = parameter_count(config), processes, config.hidden_size, config.vocab_size
    # Measuring: a pass over 64 rows with its keys, values and logits, and 2 GiB of keys and values while decoding.
    T = max((len(sample.forget.ids) for sample in samples), default=0)
    shares = 1 if args.zero == 3 else n
    measuring = (2 << 30) + 4 * min(64, -(-len(samples) // shares)) * T * (
        V + 2 * config.num_hidden_layers * H
    )
    learn_tokens = sum(len(sample.learn.ids) for sample in samples)
    return {
        "weights": 4 * P // (n if args.zero == 3 else 1),
        "gradients": 4 * P // n,
        "adam": (0 if args.offload else 8 * P // n) + (4 * P // n if n > 1 else 0),
        "activations": max(activation_bytes(config, samples, args, n), measuring),
        "frozen copy": 4 * P if args.teacher == "live" else 4 * (learn_tokens * H + V * H),
    }


def activation_bytes(config, samples, args, processes=1):
    """What autograd keeps of a step's longest batch on a process, in float32.

    By the number of floats a token: 12 H + 5 F a layer (F the width inside the MLP; less where the activation is
    simple), heads x T more where attention is not fused (GPT-Neo), and the losses' tensors of the vocabulary's size: 3
    on the forget side, 7 with the learn side's KL.
    """
    H, V, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    width = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * H
    unfused = config.num_attention_heads if config.model_type == "gpt_neo" else 0
    rows, floats = -(-min(args.batch_size, len(samples)) // processes), 0
    for side, vocabulary in (("forget", 3), ("learn", 7)):
        T = max((len(getattr(sample, side).ids) for sample in samples), default=0)
        floats += rows * T * (layers * (12 * H + 5 * width + unfused * T) + vocabulary * V)
    return 4 * floats


def parameter_count(config):
    """The parameters of a causal LM with this config, made without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def epoch_flops(config, samples):
    """Floating point operations of a whole training epoch: 6 a parameter and token (2 forward, 4 backward)."""
    tokens = sum(len(sample.forget.ids) + len(sample.learn.ids) for sample in samples)
    return 6 * parameter_count(config) * tokens


def measured_flops(device, dtype):
    """Floating point operations a second of this device in a large matrix product, the best of three."""
    n = 4096 if torch.device(device).type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    best = math.inf
    for _ in range(4):  # the first one warms up
        started = time.perf_counter()
        (a @ a).sum().item()  # .item() waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def what_fits(bench):
    """Cards of a size that a run of the paper needs: 128 samples of 200 tokens, the estimate under 90% of a card.

    With --model also what a run of it on these pairs needs, on 1 to 8 processes, and how long an epoch trains.
    """
    samples = random_samples(128, 200, 50257)
    for name, (*_, B) in GPT_NEO.items():
        config, cells = gpt_neo_config(name), []
        for card in (24, 40, 80):
            needed = []
            for offload in (False, True):
                args = argparse.Namespace(batch_size=B, offload=offload, teacher="cached", zero=2)
                sums = {
                    n: sum(memory_estimate(config, samples, args, n).values()) for n in range(1, 9)
                }
                needed.append(
                    next((str(n) for n, size in sums.items() if size < 0.9e9 * card), "over 8")
                )
            cells.append(
                f"{card} GB: {needed[0]}"
                + (f" (--offload: {needed[1]})" if needed[1] != needed[0] else "")
            )
        args = argparse.Namespace(batch_size=B, offload=False, teacher="cached", zero=2)
        alone = sum(memory_estimate(config, samples, args).values()) / 1e9
        yield Line(
            f"GPT-Neo {name}",
            "; ".join(cells),
            work=f"batch {B}, float32 weights; on one card {alone:.1f} GB",
        )
    if bench and bench.args.model:
        yield from what_this_takes(bench)


def what_this_takes(bench):
    """Lines: memory a process of a run of this model on these pairs, and the training time of a whole epoch."""
    samples, args, config = (
        samples_of(bench),
        icu.parse_args(flags_of(bench)),
        bench.model.config.get_text_config(),
    )
    for n in (1, 2, 4, 8):
        parts = memory_estimate(config, samples, args, n)
        work = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        yield Line(
            f"this model, {n} processes", f"{sum(parts.values()) / 1e9:.2f} GB a process", work=work
        )
    flops, speed = epoch_flops(config, samples), measured_flops(args.device, args.dtype)
    measured = f"about {flops / speed / 0.4:.0f} s on one {args.device}"
    work = f"{flops / 1e12:.2f} TFLOP at 40% of the measured {speed / 1e9:.0f} GFLOP/s; measuring comes on top"
    yield Line("this model, training an epoch", measured, work=work)


# --- the table ---


class Row(NamedTuple):
    """A row: `measure(bench)` yields its lines."""

    name: str
    what: str
    against: str
    measure: object


ROWS = [
    Row("el", "MA + EL10 of a sample set", "one `generate` a prefix length", memorisation),
    Row("bound", "MA + EL10 after unlearning", "one pass, and what must be decoded at plain decoding's speed",
        bound),
    Row("epoch", "a whole epoch: train + refine + measure",
        "the same epoch with literal metrics, a live frozen copy and no packing", whole_epoch),
    Row("step", "a training step (forget + learn + KL)",
        "forward + backward of the same tokens under a plain cross-entropy, the floor", training_step),
    Row("trainer", "a training step in icu.py's loop", "the same loss, plainly written, in transformers' `Trainer`",
        against_trainer),
    Row("zero", "a training step by DeepSpeed's ZeRO-2, one process", "the plain engine", against_zero),
    Row("generation", "refinement generation (beam 2)", "`generate` with the same beams, length-sorted batches",
        generation),
    Row("knn", "`cosine_knn`", "faiss-cpu IndexFlatIP, same threads", search),
    Row("memory", "peak memory of training with the teacher", "the same training without any KL", memory),
    Row("linear", "one epoch of training as samples are forgotten", "itself, with more samples active", linear),
    Row("start", "start to first step, warm", "importing torch and transformers and loading the same model", start_up),
    Row("audit", "`evals/audit.py`, one model, all but relearning", "`icu.measure` of the same texts", auditing),
    Row("tasks", "`evals/tasks.py`, rows a second", "lm-evaluation-harness, same rows and model", against_harness),
    Row("gpu", "a training step on a GPU, random weights", "-", gpu_steps),
    Row("fits", "cards that a run needs, estimated", "-", what_fits),
]  # fmt: skip


def unmeasured(reason):
    """The line of what could not be measured."""
    return Line("", "not measured: " + " ".join(str(reason).replace("|", "/").split()))


def measure_row(row, bench):
    """Lines of a row as they come; one that cannot be measured, or goes on no further, says why."""
    try:
        yield from row.measure(bench)
    except (NotMeasured, ImportError, ValueError, OSError, torch.OutOfMemoryError) as error:
        if bench.args.debug:
            raise
        yield unmeasured(error)


HEADS = ["what", "against", "ratio: median (min-max)", "goal", "met?", "work, values, median times"]


def is_table(path):
    """Whether a file holds a table of this command."""
    return " | ".join(HEADS) in path.read_text(encoding="utf-8", errors="replace")


def write_table(path, header, lines):
    """dev/BENCHMARKS.md: `header`, then a line for each of `lines`, {row's name: [Line]}, in the order of ROWS."""
    table = [HEADS, ["---"] * len(HEADS)]
    for row in ROWS:
        for line in lines[row.name]:
            what = f"{row.what}: {line.detail}" if line.detail else row.what
            met = "-" if line.met is None else "yes" if line.met else "no"
            table.append([what, row.against, line.measured, line.goal, met, line.work])
    text = header + "\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in table) + "\n"
    data.write_bytes(path, text.encode("utf-8"))


def describe(bench, command):
    """The header: command, machine, versions, model."""
    versions = {"python": platform.python_version()}
    for package in (
        "torch",
        "transformers",
        "numpy",
        "faiss-cpu",
        "lm-eval",
        "accelerate",
        "deepspeed",
    ):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    made = "" if bench.args.model else ", made by dev/bench.py"
    sizes = "; --quick: sizes so small that the ratios mean nothing" if bench.args.quick else ""
    return "\n".join([
        "# Benchmarks", "", f"`{command}`", "",
        f"- {datetime.date.today()}; CPU {cpu_name()}, {os.cpu_count()} cores, {bench.args.threads} threads; "
        f"GPU {gpu}; models run on {bench.args.device}, {bench.args.repeats} repeats{sizes}; times by the "
        + ("process's own clock" if clock_of(bench.args.device) is time.process_time else "wall clock"),
        "- " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"- model: {type(bench.model).__name__}, {bench.model.num_parameters() / 1e6:.1f}M parameters{made}; "
        f"{len(bench.pairs)} pairs",
        "- a ratio is taken within each repeat, both sides in turn: `>=` goals bound theirs / ours, `<=` goals ours / "
        "theirs; where values differ a goal is not met", "",
    ])  # fmt: skip


def cpu_name():
    """The processor's name, or what Python knows of it."""
    info = Path("/proc/cpuinfo")  # of Linux
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --- the model made without --model ---


def make_memorised(folder, n, steps):
    """A small GPT-Neo that knows n texts by heart, and their pairs, in `folder`, unless they are there.

    The texts are those of tiny.py on end, cut like the Pile's rows: 100 tokens of context, 50 of prefix, 50 of suffix.
    The next n are the learn partners, which the training sees a thirtieth as often.
    """
    if (folder / "pairs.jsonl").exists():  # written last
        return
    print(f"making a model that knows {n} texts, once, in {folder} ...", flush=True)
    rows, tokenizer = tiny.make_corpus(seed=0)
    stream = tokenizer(
        "\n".join(row["prefix"] + row["suffix"] for row in rows["pool"]), verbose=False
    )["input_ids"]
    forget, learn = data.chunks(stream, 200)[:n], data.chunks(stream, 200)[n : 2 * n]
    model = tiny.make_model()
    tiny.train(model, forget, learn, steps=steps)
    models.save_model(model, tokenizer, folder / "model")

    def fields(ids, side):
        parts = {"context": ids[:100], "prefix": ids[100:150], "suffix": ids[150:]}
        return {f"{side}{name}": tokenizer.decode(part) for name, part in parts.items()} | {
            f"{side}{name}_ids": part for name, part in parts.items()
        }

    pairs = [
        {
            "id": str(i),
            "learn_id": str(n + i),
            "similarity": 0.0,
            **fields(a, ""),
            **fields(b, "learn_"),
        }
        for i, (a, b) in enumerate(zip(forget, learn, strict=True))
    ]
    data.write_jsonl(folder / "pairs.jsonl", pairs)


# --- main ---


def parse_args(argv=None):
    """The flags; ValueError for those that are wrong or do not go together."""
    names = [row.name for row in ROWS]
    parser = flags.command_parser(__doc__.split("\n\n")[0])
    parser.add_argument("--rows", nargs="+", default=names, choices=names, metavar="NAME",
                        help=f"some of {', '.join(names)} (all)")  # fmt: skip
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes: shows that everything runs, measures nothing",
    )
    parser.add_argument(
        "--model", metavar="DIR", help="the causal LM (default: a small one, made in runs/bench)"
    )
    parser.add_argument(
        "--pairs", metavar="FILE", help="pairs.jsonl of texts that it has memorised"
    )
    parser.add_argument(
        "--tasks-data",
        metavar="DIR",
        help="the rows of lambada, piqa, copa and pubmedqa, for tasks",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        choices=["cpu", "cuda"],
        help="where the models run (%(default)s)",
    )
    parser.add_argument("--repeats", type=flags.positive, help="of each measurement (3; --quick 2)")
    parser.add_argument(
        "--threads",
        type=flags.positive,
        default=torch.get_num_threads(),
        help="CPU threads (%(default)s)",
    )
    parser.add_argument(
        "--samples", type=flags.positive, metavar="N", help="texts of el and bound (32; --quick 4)"
    )
    parser.add_argument(
        "--pool",
        type=flags.positive,
        metavar="N",
        help="pool rows of row knn (1,000,000; --quick 2,000)",
    )
    parser.add_argument(
        "--out", default="dev/BENCHMARKS.md", metavar="FILE", help="the table (%(default)s)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a file that is no table of this command"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    args.repeats = args.repeats or (2 if args.quick else 3)
    if bool(args.model) != bool(args.pairs):
        raise ValueError(
            "--model DIR and --pairs FILE go together: the pairs are texts that the model knows"
        )
    if args.threads > max(os.cpu_count() or 1, torch.get_num_threads()):
        raise ValueError(f"--threads {args.threads}: this machine has {os.cpu_count()}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA GPU here")
    if args.tasks_data and not Path(args.tasks_data).is_dir():
        raise ValueError(f"--tasks-data {args.tasks_data}: no such folder")
    reads = [args.model, args.pairs, args.tasks_data]
    paths.check_outputs([(args.out, is_table)], reads=reads, overwrite=args.overwrite, ask=False)
    return args


def set_threads(threads):
    """The same number of threads for torch, numpy's BLAS and what runs in child processes."""
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    threadpool_limits(threads)
    os.environ |= {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "OPENBLAS", "MKL")}


def prepare(args):
    """Model, pairs and sizes, read or made: a Bench."""
    sizes = dict(QUICK if args.quick else FULL)
    folder = HERE / "runs" / ("bench-quick" if args.quick else "bench")
    if not args.model:
        make_memorised(folder, sizes["samples"], sizes["training_steps"])
    sizes["texts"], sizes["pool"] = args.samples or sizes["texts"], args.pool or sizes["pool"]
    model_dir, pairs_file = (
        args.model or str(folder / "model"),
        args.pairs or str(folder / "pairs.jsonl"),
    )
    pairs = data.read_pairs(pairs_file)
    model, tokenizer = models.load_model(model_dir, device=args.device)
    return Bench(model, tokenizer, pairs, model_dir, pairs_file, sizes, args)


def main(argv=None):
    """Measures row after row, and writes the table after each, so that an interrupted run leaves what it has."""
    args = parse_args(argv)
    set_threads(args.threads)
    bench = prepare(args)
    header = describe(
        bench, shlex.join(["python", "dev/bench.py", *(sys.argv[1:] if argv is None else argv)])
    )
    reason = {True: "the run has not come to it", False: "left out by --rows"}
    lines = {row.name: [unmeasured(reason[row.name in args.rows])] for row in ROWS}
    write_table(args.out, header, lines)
    for row in (row for row in ROWS if row.name in args.rows):
        lines[row.name] = []
        for line in measure_row(row, bench):
            line = line._replace(met=None) if args.quick else line
            lines[row.name].append(line)
            met = {None: "", True: "met", False: "NOT MET"}[line.met]
            print(
                f"{row.name:10} {line.detail:30} {line.measured}  goal {line.goal} {met}",
                flush=True,
            )
        write_table(args.out, header, lines)
    print(f"the table is in {args.out}")


if __name__ == "__main__":
    flags.run_cli(main)
