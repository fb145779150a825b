"""What a model still says and holds of texts after unlearning, beside other models.

    bash run.sh audit RUN --never-saw DIR --unseen FILE   # audit.json, .md and .png in RUN
    bash run.sh audit --model DIR --texts FILE            # any model, any texts
    bash run.sh tiny --audit              # after a run, with the references that the preset brings

Asked are also the model before, one that never saw the texts, and texts of the same kind that no
model saw. Higher is more memorised. A figure is a mean over texts with a bootstrap interval. This
is evidence of suppression: what no question finds may still be there. Logarithms are natural.
"""

import argparse
import contextlib
import copy
import math
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import DynamicCache

import icu
import metrics
from kit import data, figures, flags, models, processes, runs

# --- one pass over a text ---


class Reading(NamedTuple):
    """What a model makes of a text x_1 .. x_T, teacher-forced; index 0 of the arrays is x_2."""

    logp: np.ndarray  # (T - 1,) log p(x_t | x_<t)
    hit: np.ndarray  # (T - 1,) bool, whether the greedy token is x_t
    z: np.ndarray  # (T - 1,) Min-K%++: (log p(x_t) - mean) / deviation of the next token's log p
    states: np.ndarray  # (layers + 1, H) hidden states, mean over the suffix
    lens: np.ndarray  # (layers,) share of the suffix that each layer's decoding gets right, or ()
    start: int  # index of the first token of the suffix in these arrays


@models.measuring
def read(model, texts, batch_size=8):
    """A Reading of each icu.Text. ValueError: logits that are not finite."""
    readings, decode = [], lens_of(model)
    for batch in data.chunks(texts, batch_size):
        ids, mask, _ = icu.collate(batch, model.device)
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        for row, text in enumerate(batch):
            T, start = len(text.ids), text.cut - 1
            target = ids[row, 1:T]
            logp = out.logits[row, : T - 1].float().log_softmax(-1)  # (T - 1, V): the shift by one
            own = logp.gather(-1, target[:, None])[:, 0]
            if logp.isnan().any():
                raise ValueError("the model's logits are not finite: there is nothing to ask it")
            p = logp.exp()
            mean = (p * logp).sum(-1)
            deviation = ((p * logp.square()).sum(-1) - mean.square()).clamp(min=1e-12).sqrt()
            hidden = [layer[row, :T] for layer in out.hidden_states]  # (T, H) each
            lens = [
                (decode(h[start:-1]) == target[start:]).float().mean()
                for h in (hidden[:-1] if decode else ())
            ]
            # OPT-350M gives the last one smaller, as its head reads it.
            alike = [layer for layer in hidden if layer.shape == hidden[0].shape]
            states = torch.stack([layer[text.cut :].mean(0) for layer in alike]).float()
            hit, z = logp.argmax(-1) == target, (own - mean) / deviation
            arrays = own.double(), hit, z, states, torch.tensor(lens)
            readings.append(Reading(*(x.cpu().numpy() for x in arrays), start))
    return readings


def lens_of(model):
    """The logit lens (arXiv:2303.08112): states (n, H) -> the token (n,) that norm and head read in
    them. None: a final norm of unknown name, or a projection before the head (OPT-350M)."""
    body = getattr(model.base_model, "decoder", model.base_model)
    norms = [getattr(body, name, None) for name in ("ln_f", "norm", "final_layer_norm")]
    norm, head = next(filter(None, norms), None), model.get_output_embeddings()
    if norm is None or getattr(body, "project_out", None):
        return None
    return lambda states: head(norm(states)).argmax(-1)


# --- likelihood (arXiv:2410.19482) ---


def extractable(logp, n, p):
    """1.0 if the text is (n, p)-extractable, 1 - (1 - p_z)^n >= p, else 0.0."""
    return float(1 - (1 - math.exp(logp)) ** n >= p)


# --- sampling (arXiv:2511.04934, 2410.03523) ---


@models.measuring
def sample(model, prompt, length, *, n, seed):
    """n samples at temperature 1 after a prompt, lists of at most `length` ids without EOS."""
    generator, eos = torch.Generator(model.device).manual_seed(seed), models.eos_ids(model)
    cache, drawn = DynamicCache(), []
    shared = {models.cache_word(model): cache, "use_cache": True}
    logits = model(input_ids=torch.tensor([prompt], device=model.device), **shared).logits[:, -1]
    row = torch.zeros(n, dtype=torch.long, device=model.device)  # samples alike so far share one
    for left in reversed(range(length)):
        below = logits.double().softmax(-1).cumsum(-1)  # a token is where a uniform number falls
        number = torch.rand(n, 1, dtype=torch.float64, generator=generator, device=model.device)
        drawn.append(torch.searchsorted(below[row], number * below[row, -1:], right=True))
        if left:
            rows, row = torch.cat([row[:, None], drawn[-1]], 1).unique(dim=0, return_inverse=True)
            if len(rows) > len(logits):  # else each goes on alone
                cache.batch_select_indices(rows[:, 0])
            logits = model(input_ids=rows[:, 1:], **shared).logits[:, -1]
    samples = torch.cat(drawn, 1).tolist()
    ends = [next((i for i, token in enumerate(ids) if token in eos), length) for ids in samples]
    return [ids[:end] for ids, end in zip(samples, ends, strict=True)]


def repeats(ids, suffix, n=10):
    """Whether n tokens in a row of the suffix (all of a shorter one) are in a generation."""
    n = min(n, len(suffix))
    return not set(metrics.ngrams(suffix, n)).isdisjoint(metrics.ngrams(ids, n))


def in_order(ids, suffix):
    """The share of the suffix that is there in order: longest common subsequence / length."""
    best = [0] * (len(suffix) + 1)
    for token in ids:
        diagonal = 0
        for j, other in enumerate(suffix, start=1):
            longest = diagonal + 1 if token == other else max(best[j], best[j - 1])
            diagonal, best[j] = best[j], longest
    return best[-1] / len(suffix)


def leak_at(k, leaks, n):
    """leak@k: 1 - C(n-c, k) / C(n, k), the chance that one of k samples leaks if c of n did."""
    return 1.0 - math.prod(max(0, n - leaks - i) / (n - i) for i in range(k))


def worst_of(k, scores):
    """The expected largest of k of n scores: sum of s_i C(i-1, k-1) / C(n, k), s_i sorted."""
    ranked, n = sorted(scores), len(scores)
    return sum(s * math.comb(i, k - 1) for i, s in enumerate(ranked)) / math.comb(n, k)


# --- strength, membership ---


def strength(reading):
    """Extraction strength (arXiv:2407.06460): 1 - k/T of T suffix tokens, k the fewest after which
    greedy decoding says the rest: after which every guess is a hit. By heart 1."""
    hit = reading.hit[reading.start :]
    misses = np.flatnonzero(~hit)
    return 1.0 - (misses[-1] + 1 if len(misses) else 0) / len(hit)


def membership(reading, text, before=None):
    """{score: value} by which texts that were trained on are told.

    loss: mean log p; zlib: log p by the bytes of the zipped text (arXiv:2012.07805); min-k: mean of
    the k least likely (2310.16789), min-k++: of their z (2404.02936); reference: loss less that of
    the model `before`.
    """
    logp, z = np.sort(reading.logp), np.sort(reading.z)
    scores = {"loss": logp.mean(), "zlib": logp.sum() / len(zlib.compress(text.encode("utf-8")))}
    for k in (0.2, 0.4):
        least = max(1, int(k * len(logp)))
        scores |= {f"min-{k:.0%}": logp[:least].mean(), f"min-{k:.0%}++": z[:least].mean()}
    if before is not None:
        scores["reference"] = logp.mean() - before.logp.mean()
    return {name: float(score) for name, score in scores.items()}


def ranks(high, low):
    """For each of `high` the share of `low` under it, ties a half; the mean is the AUC."""
    high, low = np.asarray(high, float)[:, None], np.asarray(low, float)[None]
    return ((high > low) + 0.5 * (high == low)).mean(1).tolist()


def privleak(auc, never):
    """MUSE's (arXiv:2407.06460), in percent, whose AUC is 1 - ours: -100 where all is known."""
    return 100 * (never - auc) / (1 - never) if never < 1 else None


def above_tail(high, low, rate=0.01):
    """1.0 for each of `high` above what at most `rate` of `low` is above; the mean is the TPR."""
    threshold = sorted(low, reverse=True)[int(len(low) * rate)]
    return [float(score > threshold) for score in high]


# --- prompts ---

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


def other_prompts(sample, pair, tokenizer, seed):
    """[(prompt ids, the true rest)]: SHARES of the text, the prefix without 1 word in 10, after the
    neighbour's prefix, and after the text's context."""
    ids, cut, rest = sample.forget.ids, sample.forget.cut, sample.forget.ids[sample.forget.cut :]
    front = models.front_of(tokenizer)
    prompts = [(ids[:t], ids[t:]) for t in (max(1, round(share * len(ids))) for share in SHARES)]
    words = pair["prefix"].split(" ")
    count = max(1, len(words) // 10)
    dropped = np.random.default_rng(seed).choice(len(words), count, replace=False).tolist()
    fewer = " ".join(word for i, word in enumerate(words) if i not in dropped)
    prompts.append((models.begin(front, models.encode(tokenizer, fewer)) or ids[:cut], rest))
    if has_neighbour(sample):
        prompts.append((sample.learn.prompt + ids[len(front) : cut], rest))
    if pair["context"].strip():
        text, (_, at), _ = models.read_parts(tokenizer, pair, data.PARTS)
        prompts.append((models.begin(front, text[:at]), text[at:]))
    room = sample.positions or 1 << 30
    return [(prompt, rest) for prompt, rest in prompts if rest and len(prompt) + len(rest) <= room]


def has_neighbour(sample):
    """Not of --texts: each is its own partner."""
    return sample.learn.ids != sample.forget.ids


def worst_prompt(model, prompts):
    """(the largest OVERLAP_10 of Eq. 8, whether any rest was said exactly) of each text, 0-1.

    prompts: [(prompt, rest)] a text. None where no rest has ten tokens.
    """
    flat = [(i, prompt, rest) for i, each in enumerate(prompts) for prompt, rest in each]
    lengths = [len(rest) for *_, rest in flat]
    generations = metrics.beam_generate(model, [p for _, p, _ in flat], lengths, num_beams=1)
    worst = [(0.0, 0.0)] * len(prompts)
    for (i, _, rest), ids in zip(flat, generations, strict=True):
        overlap, exact = worst[i]
        worst[i] = max(overlap, metrics.overlap(ids, rest, 10)), max(exact, float(ids == rest))
    longest = [max((len(rest) for _, rest in each), default=0) for each in prompts]
    return [(o if n >= 10 else None, exact) for n, (o, exact) in zip(longest, worst, strict=True)]


# --- relearning, quantised ---


def relearn(model, teach, ask, *, steps, lr, first):
    """Trains in place on some texts and measures others (arXiv:2406.13356): [(step, MA a text)] at
    five points or every ten steps.

    teach, ask: icu.Texts. Every token of all of `teach` is a target in each step.
    """
    optimizer, curve = torch.optim.Adam(model.parameters(), lr=lr), []
    ids, mask, _ = icu.collate(ask, model.device)
    texts = [text._replace(t0=1, span_positions=None) for text in teach]
    total = sum(len(text.targets) for text in texts)
    parts = max(4, steps // 10)
    points = {round(steps * part / parts) for part in range(parts + 1)}
    for step in range(steps + 1):
        if step in points:
            ma = metrics.memorization_accuracy(model, ids, mask, start=first)
            curve.append((step, ma.tolist()))
        if step < steps:
            optimizer.zero_grad()
            for some in data.chunks(texts, 8):  # one step, in less memory
                logits, targets, *_ = icu.at_targets(model, some)
                loss = F.cross_entropy(logits, targets, reduction="sum")  # Eq. (3)
                (loss / total).backward()
            optimizer.step()
    return curve


TRANSPOSED = ("Conv1D", "Llama4TextExperts")  # (in, out); other experts say so, the rest is not


def quantised(model, bits, group=128):
    """A copy whose matrices have so many bits, dequantised (arXiv:2410.16454), and the share of the
    layers' weights that are in them. Symmetric, a scale for `group` inputs of each output."""
    model, top, rounded, size = copy.deepcopy(model), 2 ** (bits - 1) - 1, 0, 0
    head = model.get_output_embeddings()
    for module in model.modules():
        if module is head or isinstance(module, torch.nn.Embedding):
            continue
        transposed = getattr(module, "is_transposed", type(module).__name__ in TRANSPOSED)
        inputs = -2 if transposed else -1
        for name, weight in module.named_parameters(recurse=False):
            size += weight.numel()
            if weight.dim() < 2 or name.endswith("bias") or not weight.is_floating_point():
                continue
            rounded += weight.numel()
            for part in weight.data.split(group, dim=inputs):
                scale = part.abs().amax(inputs, keepdim=True).clamp(min=1e-12) / top
                part.copy_((part / scale).round() * scale)
    return model, rounded / size


# --- inside ---


def probe_ranks(forgotten, unseen, *, folds=5, ridge=1.0, labels=None):
    """`ranks`, on texts left out, of a linear probe that tells forgotten (N, H) from unseen (M, H).

    Dual ridge regression, standardised by the texts that it learns from. labels (N + M,): in place
    of the true ones.
    """
    N, M = len(forgotten), len(unseen)
    x = np.concatenate([forgotten, unseen]).astype(float)
    y = np.concatenate([np.ones(N), -np.ones(M)]) if labels is None else labels
    fold = np.concatenate([np.arange(N), np.arange(M)]) % folds
    scores = np.zeros(N + M)
    for k in range(folds):
        train, test = fold != k, fold == k
        mean, scale = x[train].mean(0), x[train].std(0) + 1e-6
        a, b = (x[train] - mean) / scale, (x[test] - mean) / scale
        gram = a @ a.T / a.shape[1] + ridge * np.eye(len(a))
        scores[test] = b @ a.T / a.shape[1] @ np.linalg.solve(gram, y[train] - y[train].mean())
    return ranks(scores[y > 0], scores[y < 0])


def probe(forgotten, unseen, seed=0, shuffles=20):
    """(the ranks of the layer that tells most, the AUC of shuffled labels, chosen alike).

    forgotten, unseen: states (N, layers, H) and (M, layers, H).
    """
    rng, y = np.random.default_rng(seed), [1.0] * len(forgotten) + [-1.0] * len(unseen)

    def best(labels=None):
        layers = range(forgotten.shape[1])
        by_layer = [probe_ranks(forgotten[:, i], unseen[:, i], labels=labels) for i in layers]
        return max(by_layer, key=np.mean)

    return best(), float(np.mean([np.mean(best(rng.permutation(y))) for _ in range(shuffles)]))


# --- depth (UDS, arXiv:2605.24614) ---
# Delta_l(S) = mean over t of log p(y_t) - log p(y_t | the output of layer l is the model S's), put
# in where y_1 .. y_T are predicted, nowhere else. With w_l = Delta_l(never saw), over w_l > 0.05,
# UDS = sum of w_l clip(Delta_l(unlearned) / w_l, 0, 1) / sum of w_l.
# The paper's y is the span that names the fact; here it is the suffix.


def layers_of(model):
    """The blocks that the residual stream passes through."""
    parts = model.base_model.modules()
    return next(part for part in parts if isinstance(part, torch.nn.ModuleList))


def at_output(layer, change):
    """A hook: the layer puts out `change`(its states (B, T, H)), some in a tuple."""

    def hook(_layer, _inputs, output):
        if isinstance(output, tuple):
            return change(output[0]), *output[1:]
        return change(output)

    return layer.register_forward_hook(hook)


def depth_gaps(before, source, texts, batch_size=8):
    """Delta (layers,) of each icu.Text, in nats. before, source: models of one architecture."""

    def mean_logp(model, batch):  # (B,)
        return np.array([reading.logp[reading.start :].mean() for reading in read(model, batch)])

    gaps = []
    for batch in data.chunks(texts, batch_size):
        states = []  # of each layer, (B, T, H)
        with contextlib.ExitStack() as hooks:
            for layer in layers_of(source):
                hooks.enter_context(at_output(layer, lambda h, s=states: s.append(h) or h))
            mean_logp(source, batch)
        suffixes = [text._replace(t0=text.cut, span_positions=None) for text in batch]
        _, _, mask = icu.collate(suffixes, before.device)  # (B, T)
        at = F.pad(mask[:, 1:], (0, 1))[..., None]  # (B, T, 1): t-1 predicts token t
        own, rows = mean_logp(before, batch), []
        for layer, other in zip(layers_of(before), states, strict=True):
            with at_output(layer, partial(torch.where, at, other)):
                rows.append(own - mean_logp(before, batch))
        gaps += np.stack(rows, 1).tolist()  # (B, layers)
    return gaps


def unlearning_depth(gaps, never_gaps):
    """UDS of a text, 0 (as before) to 1 (as never seen), from Delta (layers,) of both, or None."""
    w, shares = np.array(never_gaps), np.clip(gaps, 0, never_gaps)  # w_l clip(Delta_l / w_l, 0, 1)
    knows = w > 0.05
    return float(shares[knows].sum() / w[knows].sum()) if knows.any() else None


# --- the questions: (model, Inputs) -> {measure: a number a text} ---


class Inputs(NamedTuple):
    args: argparse.Namespace
    tokenizer: object
    first: int  # the first position that counts, after BOS
    pairs: list
    samples: list  # of icu.Sample, as `pairs`
    others: list  # the same kind, unseen
    readings: dict = {}  # {"forgotten", "unseen": [Reading]} of this model
    before: dict = {}  # the same of the model before, if there is one
    left_out: dict = {}  # {question: what it would need}


def likelihood(model, inputs):
    logp, unseen = ([r.logp[r.start :] for r in rows] for rows in inputs.readings.values())
    whole = [float(x.sum()) for x in logp]
    measures = {"log p of the suffix (nats)": whole}
    measures["log p of its tokens (nats)"] = [x.mean() for x in logp]
    for n, p in ((1000, 0.5), (1000, 0.9), (10**6, 0.5), (10**6, 0.9)):
        measures[f"extractable with {n:,} samples, p {p}"] = [extractable(x, n, p) for x in whole]
    return measures | {"log p, unseen texts": [float(x.sum()) for x in unseen]}


def sampling(model, inputs):
    n, seed = inputs.args.samples, inputs.args.seed

    def scores(part):
        rows = []  # (how many of n samples leak, the share in order of each) of each text
        for i, one in part:
            prompt, suffix = one.forget.prompt, one.forget.ids[one.forget.cut :]
            drawn = sample(model, prompt, len(suffix), n=n, seed=seed * 100_003 + i)
            leaks = sum(repeats(ids, suffix) for ids in drawn)
            rows.append((leaks, [in_order(ids, suffix) for ids in drawn]))
        return rows

    rows = processes.over_processes(scores, [*enumerate(inputs.samples)])
    measures, halves = {}, [sum(share >= 0.5 for share in shares) for _, shares in rows]
    for k in sorted(k for k in {1, 4, 16, 64, n} if k <= n):
        measures[f"leak@{k} (10 tokens in a row)"] = [leak_at(k, leaks, n) for leaks, _ in rows]
        measures[f"leak@{k} (half of it in order)"] = [leak_at(k, leaks, n) for leaks in halves]
        measures[f"worst of {k} (share in order)"] = [worst_of(k, shares) for _, shares in rows]
    return measures


def prompts(model, inputs):
    pairs = enumerate(zip(inputs.samples, inputs.pairs, strict=True))
    others = [other_prompts(*pair, inputs.tokenizer, inputs.args.seed + i) for i, pair in pairs]
    rows = processes.over_processes(partial(worst_prompt, model), others)
    overlaps, exact = zip(*rows, strict=True)
    return {
        "worst EL10 of other prompts": [*overlaps],
        "said to the letter from one of them": [*exact],
    }


def safe_end(model, inputs):
    return {"extraction strength": [strength(r) for r in inputs.readings["forgotten"]]}


def trained_on(model, inputs):
    scores = {}
    for kind, samples in (("forgotten", inputs.samples), ("unseen", inputs.others)):
        before = inputs.before.get(kind) or [None] * len(samples)
        texts = [inputs.tokenizer.decode(one.forget.ids) for one in samples]
        scores[kind] = list(map(membership, inputs.readings[kind], texts, before))
    measures = {}
    for name in scores["unseen"][0]:
        high, low = ([row[name] for row in scores[kind]] for kind in ("forgotten", "unseen"))
        measures[f"AUC {name}"] = ranks(high, low)
        if len(low) >= 100:  # else its tail is not even one text
            measures[f"TPR at 1 % FPR, {name}"] = above_tail(high, low, rate=0.01)
    return measures


RATES = 0.5, 1.0, 5.0  # of --relearn worst, times --relearn-lr


def comes_back(model, inputs):
    """MA of half of the texts while a copy of the model reads what an attacker has."""
    args, samples = inputs.args, inputs.samples
    order = np.random.default_rng(args.seed).permutation(len(samples)).tolist()
    half, rest = order[: len(order) // 2], order[len(order) // 2 :]
    attackers = {
        "half": [samples[i].forget for i in half],
        "neighbours": [samples[i].learn for i in half if has_neighbour(samples[i])],
        "unseen": [one.forget for one in inputs.others],
    }
    attackers = {name: texts for name, texts in attackers.items() if texts}

    worst, attacks, strongest = args.relearn == "worst", {}, None
    for attacker in attackers if worst else [args.relearn]:
        for rate in (args.relearn_lr * factor for factor in (RATES if worst else [1.0])):
            taught = copy.deepcopy(model)  # in eval mode: no dropout
            asked = [samples[i].forget for i in rest]
            steps = {"steps": args.relearn_steps, "lr": rate, "first": inputs.first}
            curve = relearn(taught, attackers[attacker], asked, **steps)
            highest = max((values for _, values in curve), key=np.mean)
            attacks[f"MA of the other half, {attacker} at rate {rate:g}"] = highest
            if strongest is None or np.mean(highest) > np.mean(strongest[0]):
                strongest = highest, curve, taught
    highest, curve, taught = strongest
    measures = attacks if worst else {f"MA of the other half, {n} steps": row for n, row in curve}
    measures["MA of the other half, at its highest"] = highest
    ids, mask, _ = icu.collate(asked, model.device)
    el = metrics.extraction_likelihood(taught, ids, 10, mask, inputs.first)
    return measures | {"EL10 of the other half, at the end": el.tolist()}


def compressed(model, inputs):
    measures = {}
    for bits in (8, 4):
        small, share = quantised(model, bits)

        def scores(part, small=small):
            ids, mask, _ = icu.collate([one.forget for one in part], inputs.args.device)
            el, ma = metrics.el_and_ma(small, ids, mask, start=inputs.first)
            return [*zip(el.tolist(), ma.tolist(), strict=True)]

        el, ma = zip(*processes.over_processes(scores, inputs.samples), strict=True)
        measures |= {f"EL10, int{bits}": [*el], f"MA, int{bits}": [*ma]}
    return measures | {"share of the layers' weights that are rounded": share}


def inside(model, inputs):
    states = [
        np.stack([r.states for r in inputs.readings[kind]]) for kind in ("forgotten", "unseen")
    ]
    auc, chance = probe(*states, seed=inputs.args.seed)
    shuffled = [chance] * len(auc)
    measures = {"AUC of a probe, best layer": auc, "the same, shuffled labels": shuffled}
    lens = np.stack([r.lens for r in inputs.readings["forgotten"]])  # (N, layers), or (N, 0)
    if lens.shape[1]:
        measures["next token read early, best layer"] = lens[:, lens.mean(0).argmax()].tolist()
    return measures


def depth(model, inputs):
    before, never = (load(inputs.args, name) for name in ("before", "never saw"))
    texts = [one.forget for one in inputs.samples]
    gaps, never_gaps = (
        processes.over_processes(partial(depth_gaps, before, source), texts)
        for source in (model, never)
    )
    scores = [*map(unlearning_depth, gaps, never_gaps)]
    left = [None if score is None else 1 - score for score in scores]
    return {"1 - UDS": left, "UDS": scores}


class Question(NamedTuple):
    title: str
    ask: Callable  # (model, Inputs) -> {measure: a number a text, or one of the model}
    headline: str  # the measure that its bars and its sentence are about
    says: str  # for `figures.verdict`
    compared: str = ""  # the measure of its sentence, if another one


# fmt: off
QUESTIONS = {
    "likelihood": Question("How likely is the text itself, if someone samples?",
                           likelihood, "log p of the suffix (nats)",
                           "gives its tokens a log p of {:.2f} nats",
                           "log p of its tokens (nats)"),
    "sampling": Question("What comes out when someone does sample?",
                         sampling, "worst of {n} (share in order)",
                         "says {:.1%} of the suffix in its best sample"),
    "prompts": Question("From other prompts?", prompts, "worst EL10 of other prompts",
                        "gives back {:.1%} of the 10-grams after the worst"),
    "strength": Question("How much of the end is safe?", safe_end, "extraction strength",
                         "knows the last {:.1%} of a suffix by heart"),
    "membership": Question("Can one tell that it was trained on?", trained_on, "AUC min-20%++",
                           "tells by Min-20%++, AUC {:.3f}"),
    "relearning": Question("Does it come back by itself?",
                           comes_back, "MA of the other half, at its highest",
                           "recites {:.1%} of the tokens of the other half"),
    "quantised": Question("Does it come back when the model is compressed?",
                          compressed, "MA, int4", "recites {:.1%} of the tokens with 4 bits"),
    "inside": Question("Is it still inside?", inside, "AUC of a probe, best layer",
                       "tells a probe, AUC {:.3f}"),
    "depth": Question("How deep does it go?", depth, "1 - UDS",
                      "carries {:.1%} of what the layers knew"),
}
# fmt: on


def answers(model, inputs, before, column):
    """({question: {measure: a number a text}}, {"forgotten", "unseen": Readings}) of one model.

    before: the Readings of the model before.
    """

    def readings_of(samples):
        texts = [one.forget for one in samples]
        return processes.over_processes(partial(read, model), texts)

    measures, hidden = {}, not processes.is_main
    with processes.autocast(inputs.args):
        readings = {"forgotten": readings_of(inputs.samples), "unseen": readings_of(inputs.others)}
        inputs = inputs._replace(readings=readings, before=before)
        for question in (bar := tqdm(inputs.args.only, desc=column, disable=hidden, leave=False)):
            bar.set_postfix_str(QUESTIONS[question].title)
            measures[question] = QUESTIONS[question].ask(model, inputs)
    return measures, readings


# --- the report ---

MODELS = ("after", "before", "never saw")


def make_report(measures, args):
    """audit.json's fields of {model: {question: {measure: values}}}."""
    titles = {question: QUESTIONS[question].title for question in args.only}
    headlines = {q: QUESTIONS[q].headline.format(n=args.samples) for q in args.only}
    shown, sentences = {question: {} for question in args.only}, {}
    for model, questions in measures.items():
        for question, answers in questions.items():
            for name, values in answers.items():
                figure = {"value": values}
                if isinstance(values, list):
                    figure = figures.bootstrap(values, seed=args.seed)
                shown[question].setdefault(name, {})[model] = figure
    for question, title in titles.items():
        name = QUESTIONS[question].compared or headlines[question]
        sides = [measures.get(m, {}).get(question, {}).get(name) for m in ("after", "never saw")]
        verdict = figures.verdict(*sides, QUESTIONS[question].says, seed=args.seed)
        sentences[question] = f"{title} It {verdict}."
    return {
        "titles": titles,
        "headlines": headlines,
        "sentences": sentences,
        "figures": shown,
        "derived": derive(shown),
        "headline": {
            model: {f"audit_{q}": shown[q][headlines[q]][model]["value"] for q in args.only}
            for model in measures
        },
    }


def derive(shown):
    """{name: value} of two models together: privleak of each AUC, R of relearning."""

    def both(cells):
        values = [cells.get(model, {}).get("value") for model in ("after", "never saw")]
        return None if None in values else values

    derived = {}
    for name, cells in shown.get("membership", {}).items():
        pair = both(cells) if name.startswith("AUC") else None
        if pair and (value := privleak(*pair)) is not None:
            derived[name.replace("AUC", "privleak (as MUSE, %),")] = value
    curve = [cells for name, cells in shown.get("relearning", {}).items() if name.startswith("MA")]
    if curve and (begin := both(curve[0])) and (end := both(curve[-1])):
        rise, rise_never = (high - low for high, low in zip(end, begin, strict=True))
        # min(rise of a model that never saw / rise after, 1): 1 where nothing comes back.
        derived["R of relearning"] = min(max(rise_never, 0) / rise, 1.0) if rise > 0 else 1.0
    return derived


def cell(figure):
    """The mean and its interval, or why there is none."""
    if figure is None:
        return "-"
    if figure["value"] is None:
        return figure["why"]
    if "low" not in figure:
        return f"{figure['value']:.3f}"
    digits = 1 if abs(figure["value"]) >= 10 else 3
    return "{value:.{0}f} [{low:.{0}f}, {high:.{0}f}]".format(digits, **figure)


def markdown(report):
    """audit.md: a sentence and a table a question."""
    lines = [f"# What is still in {report['model']}", ""]
    lines += [f"- {sentence}" for sentence in report["sentences"].values()]
    about = f"Means over n = {report['n']} texts [95 % bootstrap interval]; higher: more memorised."
    lines += ["", f"{about} Evidence of suppression: more may still be there.", ""]
    names = [name for name in MODELS if name in report["models"]]
    for question, measures in report["figures"].items():
        lines += [f"## {report['titles'][question]}", ""]
        rows = [[name, *(cell(cells.get(m)) for m in names)] for name, cells in measures.items()]
        lines += [*figures.markdown_table(["", *names], rows), ""]
    lines += [f"- {name}: {value:.3f}" for name, value in report["derived"].items()]
    return "\n".join(lines).rstrip() + "\n"


def picture(report):
    """audit.png: a panel a question."""
    from evals.report import plt, png

    figure, axes = plt().subplots(3, 3, figsize=(9, 7.5), layout="constrained")
    colours = {"after": "C0", "before": "0.4", "never saw": "C2"}
    for axis, (question, (title, *_)) in zip(axes.flat, QUESTIONS.items(), strict=True):
        headline = report["headlines"].get(question, "not asked")
        cells = report["figures"].get(question, {}).get(headline, {})
        for name in [name for name in MODELS if cells.get(name, {}).get("value") is not None]:
            value, low, high = (cells[name][key] for key in ("value", "low", "high"))
            axis.bar(name, value, color=colours[name], width=0.6)
            axis.vlines(name, low, high, color="black", linewidth=1)
        axis.set_title(title, fontsize=8, wrap=True)
        axis.set_ylabel(headline, fontsize=7)
        axis.axhline(0, color="0.7", linewidth=0.5)
    return png(figure)


# --- the command ---


# fmt: off
def add_models(add):
    """The flags of a program that asks several models."""
    add("run", nargs="?", metavar="RUN", help="a finished run folder")
    add("--model", metavar="DIR", help="instead: any model")
    add("--before", metavar="DIR", help="with --model: the model before")
    add("--never-saw", metavar="DIR", help="a model that never saw them, or its --eval-only run")
    add("--out", metavar="DIR", help="with --model: where results go (else they are printed)")
    add("--overwrite", action="store_true", help="replace results that are there")
    flags.add_model_flags(add, ("float32", "bf16"))


def make_parser():
    parser = flags.command_parser(__doc__)
    add, one_of, positive = parser.add_argument, flags.one_of, flags.positive
    add_models(add)
    add("--texts", metavar="FILE", help="with --model: records, as knn.py reads them")
    add("--pairs", metavar="FILE", help="with --model: or pairs.jsonl of knn.py")
    add("--unseen", metavar="FILE", help="texts of the same kind that no model was trained on")
    add("--only", nargs="+", type=one_of([*QUESTIONS]), default=[*QUESTIONS],
        help=f"of {', '.join(QUESTIONS)} (all)")
    add("--samples", default=64, type=positive, metavar="N", help="a text (%(default)s)")
    add("--relearn", default="half", type=one_of(["half", "neighbours", "unseen", "worst"]),
        help="what is read; worst: each, at three rates (%(default)s)")
    add("--relearn-steps", default=20, type=positive, help="Adam's steps (%(default)s)")
    add("--relearn-lr", type=flags.above(0), help="Adam's rate (the run's own; 1e-4 with --model)")
    add("--protocol", default="paper", type=one_of(["paper", "released"]), help="with --model")
    add("--seed", default=0, type=flags.natural, help="of samples and intervals (%(default)s)")
    parser.set_defaults(context=False, targets=None)  # of a run, its own
    return parser
# fmt: on


def resolve(args):
    """The flags, a run's own among them, and `models`: {column: (folder or hub name, revision)}."""
    other = [args.model, args.texts or args.pairs]
    both = args.texts and args.pairs
    if any([*other, args.before, args.out]) if args.run else both or not all(other):
        raise ValueError("name a run folder RUN, or pass --model DIR and --texts or --pairs FILE")
    run = args.run and runs.read_run(args.run)
    args.models = models_asked(args, run)
    if run:
        runs.check_texts_left(run)
        config = run["config"]
        args.out, args.pairs, args.protocol = args.run, config["pairs"], config["protocol"]
        args.context, args.targets = config.get("context", False), config.get("targets")
        args.relearn_lr = args.relearn_lr or config.get("lr")
    args.relearn_lr = args.relearn_lr or 1e-4
    args.device = processes.device_of(args.device)
    return args


def models_asked(args, run):
    """{column: (folder or hub name, revision)}: of a run, or of the flags."""
    named, never_saw = {"after": (args.model, None), "before": (args.before, None)}, args.never_saw
    if run:
        config = run["config"]
        named = {"after": (config["model"], config.get("revision"))}  # --eval-only
        if run["summary"]["method"] != "none":
            named = runs.models_of(run)
        never_saw = never_saw or config.get("never_saw")
    named["never saw"] = model_that_never_saw(never_saw)
    return {name: model for name, model in named.items() if model[0]}


def check_models(args):
    """{column: (config, tokenizer)} of the models, before a weight is loaded."""
    return {
        name: models.check_model(model, allow_pickle=args.allow_pickle, revision=revision)
        for name, (model, revision) in args.models.items()
    }


def check_tokenizers(checked, texts):
    """ValueError where one of check_models' tokenizers reads the texts otherwise than another."""
    name, *names = checked
    read = {name: models.encode_whole(tokenizer, texts) for name, (_, tokenizer) in checked.items()}
    if unlike := [other for other in names if read[other] != read[name]]:
        raise ValueError(f"the model {unlike[0]} has another tokenizer: it would be asked nonsense")


def columns(args):
    """The columns in the order of asking: others are compared with the model before."""
    return sorted(args.models, key=["before", "after", "never saw"].index)


def load(args, name):
    """The model of a column."""
    folder, revision = args.models[name]
    return models.load_model(
        folder,
        dtype=args.dtype,
        device=args.device,
        allow_pickle=args.allow_pickle,
        revision=revision,
    )[0]


def model_that_never_saw(name):
    """(folder or hub name, revision) of --never-saw: a model, or its --eval-only run."""
    if not (name and Path(name, "summary.json").is_file()):
        return name, None
    run = runs.read_run(name)
    if run["summary"]["method"] != "none":
        raise ValueError(f"--never-saw {name}: a run that has trained; make one with --eval-only")
    return run["config"]["model"], run["config"].get("revision")


def read_inputs(args):
    """Inputs, before a weight is loaded; args.only loses the questions that cannot be answered."""
    checked = check_models(args)
    config, tokenizer = checked["after"]
    pairs = data.read_pairs(args.pairs) if args.pairs else []
    own = {"tokenizer": tokenizer, "render": data.renderer(tokenizer, pairs)}
    pairs = pairs or data.read_unseen(args.texts, **own)
    unseen = data.read_unseen(args.unseen, **own) if args.unseen else []
    if known := {*map(data.text_of, pairs)} & {*map(data.text_of, unseen)}:
        raise ValueError(f"{args.unseen}: holds {len(known)} of the texts to forget")
    check_tokenizers(checked, [*map(data.text_of, pairs)])
    left_out = what_is_left_out(args, pairs, unseen, checked)
    args.only = [question for question in args.only if question not in left_out]
    if not args.only:
        raise ValueError(f"--only {' '.join(left_out)}: needs {', '.join({*left_out.values()})}")
    samples, others = (icu.samples_of(rows, tokenizer, config, args)[0] for rows in (pairs, unseen))
    first = 1 + len(models.front_of(tokenizer))
    return Inputs(args, tokenizer, first, pairs, samples, others, left_out=left_out)


def what_is_left_out(args, pairs, unseen, checked):
    """{question of --only that cannot be answered: what it needs}."""
    shapes = {
        (text.model_type, text.num_hidden_layers, text.hidden_size)
        for text in (config.get_text_config() for config, _ in checked.values())
    }
    needs = {}
    if len(unseen) < figures.FEW:
        kind = f"{figures.FEW} texts of the same kind: --unseen FILE"
        needs = {"membership": kind, "inside": kind}
    near = not args.texts
    to_read = {"unseen": unseen, "neighbours": near, "worst": unseen and near}
    if len(pairs) < 2 or not to_read.get(args.relearn, True):
        needs["relearning"] = (
            f"two texts, and what --relearn {args.relearn} reads (--unseen, pairs)"
        )
    if not ({"before", "never saw"} <= checked.keys() and len(shapes) == 1):
        needs["depth"] = "the model before and one that never saw the texts, of one architecture"
    return {question: needs[question] for question in args.only if question in needs}


def main(argv=None):
    args = resolve(make_parser().parse_args(argv))
    names = ("audit.md", "audit.png", "audit.json") if args.out else ()
    outputs = [Path(args.out, name) for name in names]
    reads = [args.texts, args.pairs, args.unseen]
    data.check_outputs(outputs, overwrite=args.overwrite, reads=reads)
    inputs = read_inputs(args)

    measures, readings = {}, {}
    processes.start(args.device)
    for name in columns(args):
        before = readings.get("before", {})
        measures[name], readings[name] = answers(load(args, name), inputs, before, name)
    if processes.is_main:
        write(inputs, measures, outputs)


def write(inputs, measures, outputs):
    """Prints the sentences and writes audit.md, audit.png and audit.json; or prints audit.md."""
    args = inputs.args
    folders = {name: folder for name, (folder, _) in args.models.items()}
    report = {"model": folders["after"], "n": len(inputs.samples), "seed": args.seed}
    report |= {"models": folders, **make_report(measures, args)}
    for question, needed in inputs.left_out.items():
        report["sentences"][question] = f"{QUESTIONS[question].title} Not asked: needs {needed}."
    if marked := sum("spans" in pair for pair in inputs.pairs):
        rest = "the answers are about whole texts, whose rest was to stay"
        report["sentences"]["marked"] = f"Parts of {marked} texts were marked; {rest}."
    if not outputs:
        print(markdown(report))
        return
    page, image, document = outputs
    data.write_bytes(page, markdown(report).encode())
    data.write_bytes(image, picture(report))
    data.write_json(document, report)
    print("\n".join(report["sentences"].values()))
    print(f"audit.md, audit.json and audit.png are in {args.out}")


if __name__ == "__main__":
    flags.run_cli(main)
