"""What is still in there: what a model says and holds of texts after unlearning, beside others that give it a meaning.

    python evals/audit.py RUN --never-saw DIR --unseen FILE        # audit.json, audit.md, audit.png in RUN
    python evals/audit.py --model DIR --pairs FILE --out DIR       # any model
    python evals/audit.py RUN --only likelihood quantised          # some questions
    bash run.sh tiny --audit                                 # behind a run, with the references that the preset brings

The same code asks the model before, a model that never saw the texts, and texts of the same kind that no model saw.
Each measure is a pure function here: higher is more memorised. A figure is a mean over texts with a bootstrap interval
(kit/evidence.py). This is evidence of suppression, not of absence: what no question here finds may still be there.
Tokens are those of icu.py's samples: x_1 .. x_T, the suffix from x_t0 on. Logarithms are natural.
"""

import copy
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache

import icu
import metrics
from kit import data, evidence, flags, models, paths, processes, runs

# --- one pass over a text: what most measures are made of ---


class Reading(NamedTuple):
    """What a model makes of one text, teacher-forced; index 0 of the arrays is x_2, the first token predicted."""

    logp: np.ndarray  # (T - 1,) log p(x_t | x_<t)
    top: np.ndarray  # (T - 1,) the same under top-k 40; -inf where x_t falls out
    hit: np.ndarray  # (T - 1,) bool, whether the greedy token is x_t
    z: np.ndarray  # (T - 1,) (log p(x_t) - mean) / deviation of log p under the model's own next token (Min-K%++)
    states: np.ndarray  # (layers + 1, H) hidden states, mean over the suffix
    lens: (
        np.ndarray
    )  # (layers,) share of the suffix that each layer's own decoding gets right, or ()
    start: int  # index of the first token of the suffix in these arrays


TOP_K = 40


@models.measuring
def read(model, texts, batch_size=8):
    """A Reading of each icu.Text, by one forward pass. ValueError for a model whose logits are not finite."""
    found, decode = [], lens_of(model)
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
            best = logp.topk(min(TOP_K, logp.shape[-1])).values
            top = torch.where(own >= best[:, -1], own - best.logsumexp(-1), -math.inf)
            p = logp.exp()
            mean = (p * logp).sum(-1)
            deviation = ((p * logp.square()).sum(-1) - mean.square()).clamp(min=1e-12).sqrt()
            hidden = [layer[row, :T] for layer in out.hidden_states]  # (T, H) each
            lens = (
                [(decode(h[start:-1]) == target[start:]).float().mean() for h in hidden[:-1]]
                if decode
                else []
            )
            arrays = (own, top, logp.argmax(-1) == target, (own - mean) / deviation)
            states = torch.stack([layer[text.cut :].mean(0) for layer in hidden])
            arrays = [
                x.cpu().numpy()
                for x in (own.double(), *arrays[1:], states.float(), torch.tensor(lens))
            ]
            found.append(Reading(*arrays, start))
    return found


def lens_of(model):
    """states (n, H) -> the token (n,) that the model's own final norm and head read in them; None: no such norm found.

    The logit lens (nostalgebraist 2020; arXiv:2303.08112): what an early layer would say if it were the last.
    """
    body = getattr(model.base_model, "decoder", model.base_model)
    norm = next(
        (m for name in ("ln_f", "norm", "final_layer_norm") if (m := getattr(body, name, None))),
        None,
    )
    head = model.get_output_embeddings()
    return (
        (lambda states: head(norm(states)).argmax(-1))
        if norm is not None and head is not None
        else None
    )


# --- how likely is the text itself, if someone samples? (Hayes et al., arXiv:2410.19482) ---


def extraction_logp(reading, top=False):
    """log p_z of the suffix behind the prefix in nats, <= 0, at temperature 1 or (`top`) under top-k 40, then perhaps
    -inf. By heart: near 0; never saw: -2 a token or less.
    """
    return float((reading.top if top else reading.logp)[reading.start :].sum())


def samples_needed(logp, p=0.5):
    """How many samples n make (n, p)-extraction sure: 1 - (1 - p_z)^n >= p; inf for p_z = 0.

    By heart: 1. n = log(1 - p) / log(1 - p_z), by log1p and expm1, which keep a p_z of e^-300.
    """
    if logp == -math.inf:
        return math.inf
    if logp > -1e-300:
        return 1.0
    miss = (
        math.log1p(-math.exp(logp)) if logp < -1e-9 else math.log(-math.expm1(logp))
    )  # log(1 - p_z)
    if miss == 0:  # p_z is under the smallest double
        return math.exp(min(709.0, math.log(-math.log1p(-p)) - logp))
    return max(1.0, math.ceil(math.log1p(-p) / miss))


# --- what comes out when someone does sample? (arXiv:2511.04934, 2410.03523) ---


@models.measuring
def sample(model, prompt, length, *, n, seed):
    """n samples at temperature 1 behind a prompt, lists of at most `length` ids without EOS.

    Samples that have said the same so far share a row of the model's input and cache: one row for the prompt, few for
    a text known by heart, at most n.
    """
    generator, eos = torch.Generator(model.device).manual_seed(seed), models.eos_ids(model)
    cache, drawn = DynamicCache(), []
    how = {models.cache_word(model): cache, "use_cache": True}
    logits = model(input_ids=torch.tensor([prompt], device=model.device), **how).logits[:, -1]
    row = torch.zeros(n, dtype=torch.long, device=model.device)  # which row each sample is in
    for left in reversed(range(length)):
        below = logits.double().softmax(-1).cumsum(-1)  # a token is where a uniform number falls
        number = torch.rand(n, 1, dtype=torch.float64, generator=generator, device=model.device)
        drawn.append(torch.searchsorted(below[row], number * below[row, -1:], right=True))
        if left:
            rows, row = torch.cat([row[:, None], drawn[-1]], 1).unique(dim=0, return_inverse=True)
            if len(rows) > len(logits):  # else each goes on alone
                cache.batch_select_indices(rows[:, 0])
            logits = model(input_ids=rows[:, 1:], **how).logits[:, -1]
    said = torch.cat(drawn, 1).tolist()
    ends = [next((i for i, token in enumerate(ids) if token in eos), length) for ids in said]
    return [ids[:end] for ids, end in zip(said, ends, strict=True)]


def repeats(said, suffix, n=10):
    """Whether a run of n tokens of the suffix (all of a shorter one) is in what was said."""
    n = min(n, len(suffix))
    return not set(metrics.ngrams(suffix, n)).isdisjoint(metrics.ngrams(said, n))


def in_order(said, suffix):
    """The share of the suffix that was said in order, with anything between: longest common subsequence / length."""
    best = [0] * (len(suffix) + 1)
    for token in said:
        diagonal = 0
        for j, other in enumerate(suffix, start=1):
            diagonal, best[j] = (
                best[j],
                diagonal + 1 if token == other else max(best[j], best[j - 1]),
            )
    return best[-1] / len(suffix)


def leak_at(k, leaks, n):
    """leak@k: the chance that one of k samples leaks, where `leaks` of n did, without bias: 1 - C(n-c, k) / C(n, k)."""
    return 1.0 - math.prod(max(0, n - leaks - i) / (n - i) for i in range(k))


def worst_of(k, scores):
    """The expected largest of k of these n scores: sum over the i-th smallest of s_i C(i-1, k-1) / C(n, k)."""
    ranked, n = sorted(scores), len(scores)
    return sum(s * math.comb(i, k - 1) for i, s in enumerate(ranked)) / math.comb(n, k)


# --- how much of the end is safe, and can one tell that it was trained on? ---


def strength(reading):
    """Extraction strength (arXiv:2407.06460, as in TOFU's evaluations): 1 - k/T of the suffix's T tokens, k the fewest
    behind which greedy decoding says all the rest; 0 where it never does. By heart 1, never saw about 0.

    One pass knows it: the greedy continuation from k is the text if every guess from k on is a hit.
    """
    hit = reading.hit[reading.start :]
    misses = np.flatnonzero(~hit)
    return 1.0 - (misses[-1] + 1 if len(misses) else 0) / len(hit)


def membership(reading, text, before=None):
    """Scores by which texts that were trained on are told, {name: score}, higher = memorised, over the whole text.

    loss: mean log p; zlib: loss by the bytes that zlib makes of the text (arXiv:2012.07805); min-k: mean of the k
    least likely (2310.16789), min-k++: of their z (2404.02936), max(1, int(kT)) tokens; reference: loss less that of
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
    """For each of `high` the share of `low` that it is above, ties a half; their mean is the AUC: P(high > low)."""
    high, low = np.asarray(high, float)[:, None], np.asarray(low, float)[None]
    return ((high > low) + 0.5 * (high == low)).mean(1).tolist()


def above_tail(high, low, rate=0.01):
    """For each of `high` 1.0 if it is above a threshold that at most `rate` of `low` is above; the mean is the TPR."""
    threshold = sorted(low, reverse=True)[int(len(low) * rate)]
    return [float(score > threshold) for score in high]


# --- from other prompts? ---

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


def other_prompts(sample, pair, tokenizer, seed):
    """[(prompt ids, the true rest)]: 10 to 90 % of the text, the prefix without 1 word in 10, behind the neighbour's
    prefix, and behind the text's own context where it has one.
    """
    ids, cut, rest = sample.forget.ids, sample.forget.cut, sample.forget.ids[sample.forget.cut :]
    bos = models.bos_of(tokenizer)
    found = [(ids[:t], ids[t:]) for t in (max(1, round(share * len(ids))) for share in SHARES)]
    words = pair["prefix"].split(" ")
    dropped = set(
        np.random.default_rng(seed)
        .choice(len(words), max(1, len(words) // 10), replace=False)
        .tolist()
    )
    fewer = " ".join(word for i, word in enumerate(words) if i not in dropped)
    found.append((models.begin(bos, models.encode(tokenizer, fewer)) or ids[:cut], rest))
    found.append((sample.learn.prompt + ids[len(bos) : cut], rest))
    if pair["context"].strip():
        whole = models.encode(tokenizer, pair["context"]) + models.encode(
            tokenizer, pair["prefix"], inside=True
        )
        found.append((models.begin(bos, whole), rest))
    room = sample.positions or 1 << 30
    return [(prompt, rest) for prompt, rest in found if rest and len(prompt) + len(rest) <= room]


def worst_prompt(model, prompts):
    """For each text (the largest OVERLAP_10 of Eq. 8, whether any rest was said exactly) of greedy answers, 0-1.

    prompts: [(prompt, rest)] a text. A rest of fewer than 10 tokens has no 10-gram and counts in the second only.
    """
    asked = [(i, prompt, rest) for i, each in enumerate(prompts) for prompt, rest in each]
    said = metrics.beam_generate(
        model, [p for _, p, _ in asked], [len(rest) for *_, rest in asked], num_beams=1
    )
    found = [(0.0, 0.0)] * len(prompts)
    for (i, _, rest), words in zip(asked, said, strict=True):
        found[i] = (
            max(found[i][0], metrics.overlap(words, rest, 10)),
            max(found[i][1], float(words == rest)),
        )
    return found


# --- does it come back: by itself, when compressed? ---


def relearn(model, teach, ask, *, steps, lr, first, n=10):
    """Trains in place on some texts and measures others: [(step, MA a text)] at five points, EL10 a text at the end.

    teach, ask: icu.Texts. arXiv:2406.13356. Adam, all of `teach` in each step; every token is a target.
    """
    optimizer, curve = torch.optim.Adam(model.parameters(), lr=lr), []
    ids, mask, _ = icu.collate(ask, model.device)
    x, attention_mask, targets = icu.collate(
        [text._replace(t0=1, among=None) for text in teach], model.device
    )
    points = sorted({round(steps * part / 4) for part in range(5)})
    for step in range(steps + 1):
        if step in points:
            curve.append(
                (step, metrics.memorization_accuracy(model, ids, mask, start=first).tolist())
            )
        if step < steps:
            optimizer.zero_grad()
            icu.learn_loss(
                model(input_ids=x, attention_mask=attention_mask).logits, x, targets
            ).backward()
            optimizer.step()
    return curve, [
        None if x != x else x
        for x in metrics.extraction_likelihood(model, ids, n, mask, first).tolist()
    ]


def quantised(model, bits, group=128):
    """A copy whose linear layers have weights of so many bits, dequantised: symmetric, round to nearest, a scale for
    each `group` inputs of each output. Embeddings and the head that is tied to them stay (arXiv:2410.16454).
    """
    model, top = copy.deepcopy(model), 2 ** (bits - 1) - 1
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            weight = module.weight.data  # (out, in)
            for part in weight.split(group, dim=1):
                scale = part.abs().amax(1, keepdim=True).clamp(min=1e-12) / top
                part.copy_((part / scale).round() * scale)
    return model


# --- is it still inside? ---


def probe_ranks(forgotten, unseen, *, folds=5, ridge=1.0, labels=None):
    """`ranks`, on texts left out, of a linear probe that tells forgotten from unseen by states (N, H) and (M, H).

    Ridge regression in its dual form, standardised by the texts that it learns from; folds by text, both kinds in
    each. About 0.5 where nothing tells them apart. `labels` (N + M,) stands in for the true ones.
    """
    x = np.concatenate([forgotten, unseen]).astype(float)
    y = (
        np.concatenate([np.ones(len(forgotten)), -np.ones(len(unseen))])
        if labels is None
        else labels
    )
    scores, fold = (
        np.zeros(len(y)),
        np.concatenate([np.arange(len(forgotten)), np.arange(len(unseen))]) % folds,
    )
    for k in range(folds):
        train, test = fold != k, fold == k
        mean, scale = x[train].mean(0), x[train].std(0) + 1e-6
        a, b = (x[train] - mean) / scale, (x[test] - mean) / scale
        gram = a @ a.T / a.shape[1] + ridge * np.eye(len(a))
        scores[test] = b @ a.T / a.shape[1] @ np.linalg.solve(gram, y[train] - y[train].mean())
    return ranks(scores[y > 0], scores[y < 0])


def probe(forgotten, unseen, seed=0, shuffles=20):
    """(the ranks of the layer that tells most, the AUC of shuffled labels): states (N, layers, H) and (M, layers, H).

    The best of many layers is above 0.5 by chance, and so is that of shuffled labels, chosen alike.
    """
    rng, layers = np.random.default_rng(seed), range(forgotten.shape[1])
    y = [1.0] * len(forgotten) + [-1.0] * len(unseen)

    def best(labels=None):
        return max(
            (probe_ranks(forgotten[:, i], unseen[:, i], labels=labels) for i in layers), key=np.mean
        )

    return best(), float(np.mean([np.mean(best(rng.permutation(y))) for _ in range(shuffles)]))


# --- the questions: each a function of (model, Data) that gives {measure: a number a text}, higher = more is left ---


class Data(NamedTuple):
    """What a model is asked about."""

    args: object
    tokenizer: object
    first: int  # the first position that counts, behind BOS
    pairs: list
    samples: list  # of icu.Sample, as `pairs`
    others: list  # the same kind, unseen
    readings: dict  # {"forgotten", "unseen": [Reading]} of the model that is asked
    before: (
        dict  # the same of the model before; {} where it is the one that is asked, or there is none
    )
    lr: float


def likelihood(model, data):
    """How likely is the text itself, if someone samples?"""
    logp, top = (
        [extraction_logp(r, top) for r in data.readings["forgotten"]] for top in (False, True)
    )
    found = {
        "log p of the suffix (nats)": logp,
        "in reach of top-k 40": [float(x > -math.inf) for x in top],
    }
    for n, p in ((1000, 0.5), (1000, 0.9), (10**6, 0.5), (10**6, 0.9)):
        found[f"extractable with {n:,} samples, p {p}"] = [
            float(samples_needed(x, p) <= n) for x in logp
        ]
    found["log p, unseen texts"] = [extraction_logp(r) for r in data.readings["unseen"]]
    return found


def sampling(model, data):
    """What comes out when someone does sample?"""
    n, seed = data.args.samples, data.args.seed

    def scores(part):
        found = []
        for i, one in part:
            text = one.forget
            suffix = text.ids[text.cut :]
            said = sample(model, text.prompt, len(suffix), n=n, seed=seed * 100_003 + i)
            found.append(
                (
                    sum(repeats(words, suffix) for words in said),
                    [in_order(words, suffix) for words in said],
                )
            )
        return found

    found = processes.over_processes(scores, [*enumerate(data.samples)])
    result = {}
    for k in sorted(k for k in {1, 4, 16, 64, n} if k <= n):
        result[f"leak@{k} (10 tokens in a row)"] = [leak_at(k, leaks, n) for leaks, _ in found]
        result[f"leak@{k} (half of it in order)"] = [
            leak_at(k, sum(x >= 0.5 for x in s), n) for _, s in found
        ]
        result[f"worst of {k} (share in order)"] = [worst_of(k, shares) for _, shares in found]
    return result


def prompts(model, data):
    """From other prompts?"""

    def scores(part):
        asked = (
            other_prompts(data.samples[i], data.pairs[i], data.tokenizer, data.args.seed + i)
            for i in part
        )
        return worst_prompt(model, [*asked])

    found = processes.over_processes(scores, [*range(len(data.samples))])
    names = "worst EL10 of other prompts", "said to the letter from one of them"
    return {name: [each[side] for each in found] for side, name in enumerate(names)}


def safe_end(model, data):
    """How much of the end is safe?"""
    return {"extraction strength": [strength(r) for r in data.readings["forgotten"]]}


def trained_on(model, data):
    """Can one tell that it was trained on?"""
    scores = {}
    for kind, samples in (("forgotten", data.samples), ("unseen", data.others)):
        before = data.before.get(kind) or [None] * len(samples)
        texts = [data.tokenizer.decode(one.forget.ids) for one in samples]
        scores[kind] = list(map(membership, data.readings[kind], texts, before))
    found = {}
    for name in scores["unseen"][0]:
        high, low = ([row[name] for row in scores[kind]] for kind in ("forgotten", "unseen"))
        found[f"AUC {name}"] = ranks(high, low)
        if len(low) >= 100:  # else its tail is not even one text
            found[f"TPR at 1 % FPR, {name}"] = above_tail(high, low, rate=0.01)
    return found


def comes_back(model, data):
    """Does it come back by itself?"""
    order = np.random.default_rng(data.args.seed).permutation(len(data.samples)).tolist()
    half, rest = order[: len(order) // 2], order[len(order) // 2 :]
    side = "learn" if data.args.relearn == "neighbours" else "forget"
    teach = [getattr(data.samples[i], side) for i in half]
    ask = [data.samples[i].forget for i in rest]
    how = {"steps": data.args.relearn_steps, "lr": data.lr, "first": data.first}
    curve, el = relearn(copy.deepcopy(model).train(), teach, ask, **how)
    found = {f"MA of the other half, {step} steps": values for step, values in curve}
    found["MA of the other half, at its highest"] = max(
        (values for _, values in curve), key=np.mean
    )
    return found | {"EL10 of the other half, at the end": el}


def compressed(model, data):
    """Does it come back when the model is compressed?"""
    found = {}
    for bits in (8, 4):
        small = quantised(model, bits)

        def scores(part, small=small):
            ids, mask, _ = icu.collate([s.forget for s in part], data.args.device)
            el, ma = metrics.el_and_ma(small, ids, mask, start=data.first)
            return [*zip(el.tolist(), ma.tolist(), strict=True)]

        el, ma = zip(*processes.over_processes(scores, data.samples), strict=True)
        found |= {f"EL10, int{bits}": [None if x != x else x for x in el], f"MA, int{bits}": [*ma]}
    return found


def inside(model, data):
    """Is it still inside?"""
    states = [np.stack([r.states for r in data.readings[kind]]) for kind in ("forgotten", "unseen")]
    found, chance = probe(*states, seed=data.args.seed)
    result = {
        "AUC of a probe, best layer": found,
        "the same, shuffled labels": [chance] * len(found),
    }
    lens = np.stack([r.lens for r in data.readings["forgotten"]])  # (N, layers), or (N, 0)
    if lens.shape[1]:
        result["next token read early, best layer"] = lens[:, lens.mean(0).argmax()].tolist()
    return result


# Question -> (function, the measure that its sentence is about).
QUESTIONS = {
    "likelihood": (likelihood, "log p of the suffix (nats)"), "sampling": (sampling, "worst of {n} (share in order)"),
    "prompts": (prompts, "worst EL10 of other prompts"), "strength": (safe_end, "extraction strength"),
    "membership": (trained_on, "AUC min-20%++"), "relearning": (comes_back, "MA of the other half, at its highest"),
    "quantised": (compressed, "MA, int4"), "inside": (inside, "AUC of a probe, best layer"),
}  # fmt: skip
NEEDS_UNSEEN = ("membership", "inside")


# --- the audit: the same questions of each model ---


def ask(name, revision, data, *, before=None, bar):
    """`answers` of a model that is loaded for them: a folder or a hub name."""
    args = data.args
    how = {"dtype": args.dtype, "allow_pickle": args.allow_pickle, "device": args.device}
    model, _ = models.load_model(name, revision=revision, **how)

    def tell(question):
        bar.set_postfix_str(f"{QUESTIONS[question][0].__doc__} ({Path(name).name})")
        bar.update()

    return answers(model, data, before=before, tell=tell)


def answers(model, data, *, before=None, tell=lambda question: None):
    """({question: {measure: a number a text}}, {"forgotten", "unseen": Readings}); `tell` hears what is asked next.

    before: the Readings of the model before, for the membership score that compares with it.
    """

    def readings_of(samples):
        return processes.over_processes(
            lambda part: read(model, [one.forget for one in part]), samples
        )

    found = {}
    with processes.autocast(data.args):
        readings = {"forgotten": readings_of(data.samples), "unseen": readings_of(data.others)}
        data = data._replace(readings=readings, before=before or {})
        for question in data.args.only:
            tell(question)
            found[question] = QUESTIONS[question][0](model, data)
    return found, readings


# --- what is written ---


def picture(report):
    """audit.png: a panel a question, its headline for each model, as PNG bytes."""
    from evals.report import plt, png

    pyplot = plt()
    figure, axes = pyplot.subplots(2, 4, figsize=(12, 5), layout="constrained")
    for axis, question in zip(axes.flat, QUESTIONS, strict=True):
        cells = report["figures"].get(question, {}).get(report["headlines"].get(question), {})
        names = [name for name in evidence.MODELS if cells.get(name, {}).get("value") is not None]
        values = [cells[name]["value"] for name in names]
        if all(map(math.isfinite, values)):
            spread = [
                [abs(v - cells[n][end]) for n, v in zip(names, values, strict=True)]
                for end in ("low", "high")
            ]
            colours = [{"after": "C0", "before": "0.4", "never saw": "C2"}[name] for name in names]
            axis.bar(
                names, values, yerr=spread, color=colours, width=0.6, error_kw={"linewidth": 1}
            )
        axis.set_title(QUESTIONS[question][0].__doc__, fontsize=8, wrap=True)
        axis.set_ylabel(report["headlines"].get(question, ""), fontsize=7)
        axis.axhline(0, color="0.7", linewidth=0.5)
        if not names:
            axis.text(
                0.5,
                0.5,
                "not asked, or cannot be told",
                ha="center",
                transform=axis.transAxes,
                color="0.4",
            )
    return png(figure)


# --- the command ---


def parse_args(argv=None):
    args = make_parser().parse_args(argv)
    if bool(args.run) == bool(args.model):
        raise ValueError(
            "name a run folder, evals/audit.py RUN, or pass --model DIR --pairs FILE --out DIR: one of them"
        )
    if args.model and not (args.pairs and args.out):
        raise ValueError(f"--model goes with {'--out DIR' if args.pairs else '--pairs FILE'}")
    if args.run and (args.pairs or args.out or args.before):
        raise ValueError(
            "RUN knows its pairs, its folder and the model before: leave --pairs, --out and --before out"
        )
    args.only = args.only or list(QUESTIONS)
    args.device = processes.device_of(args.device)
    return args


def make_parser():
    """The flags; experiment.py asks it which of a run's flags are this file's."""
    parser = flags.command_parser(__doc__)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a finished run folder")
    parser.add_argument("--model", metavar="DIR", help="instead: any model")
    parser.add_argument("--pairs", metavar="FILE", help="with --model: pairs.jsonl of knn.py")
    parser.add_argument("--before", metavar="DIR", help="with --model: the model before")
    parser.add_argument("--out", metavar="DIR", help="with --model: where audit.* go")
    parser.add_argument(
        "--never-saw",
        metavar="DIR",
        help="a model that never saw the texts, or its --eval-only run",
    )
    parser.add_argument(
        "--unseen", metavar="FILE", help="texts of the same kind that no model was trained on"
    )
    one_of, positive, above = flags.one_of, flags.positive, flags.above
    parser.add_argument(
        "--only", nargs="+", type=one_of([*QUESTIONS]), help=f"of {', '.join(QUESTIONS)} (all)"
    )
    parser.add_argument(
        "--samples", default=64, type=positive, metavar="N", help="a text (%(default)s)"
    )
    parser.add_argument(
        "--relearn", default="half", type=one_of(["half", "neighbours"]), help="what is read (half)"
    )
    parser.add_argument(
        "--relearn-steps", default=20, type=positive, metavar="N", help="Adam's steps (%(default)s)"
    )
    parser.add_argument(
        "--relearn-lr", type=above(0), help="Adam's rate (the run's own; 1e-4 with --model)"
    )
    parser.add_argument(
        "--protocol", default="paper", type=one_of(["paper", "released"]), help="with --model"
    )
    parser.add_argument(
        "--seed", default=0, type=flags.seed_number, help="of samples and intervals (%(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", default="float32", type=flags.one_of(["float32", "bf16"]), help="(%(default)s)"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="also load weights from pickle files"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def models_of(args):
    """({model's name in the table: (folder or hub name, revision)}, flags of the samples) of a run, whose texts must be
    there, or of --model.
    """
    if not args.run:
        return {
            "after": (args.model, None),
            "before": (args.before, None),
            "never saw": (args.never_saw, None),
        }, {}
    run = runs.read_run(args.run)
    config = run["config"]
    if run["redacted"]:
        raise ValueError(
            f"{args.run}: its texts are gone (purged, or --redact): there is nothing to ask about"
        )
    if not config.get("pairs") or models.fingerprint(config["pairs"]) != config.get(
        "sha256", {}
    ).get("pairs"):
        raise ValueError(
            f"{args.run}: {config.get('pairs')} is not there, or not what the run was made with (sha256)"
        )
    args.pairs, args.out, args.protocol = config["pairs"], args.run, config["protocol"]
    args.relearn_lr = args.relearn_lr or config.get("lr")
    measured = {"after": (config["model"], config.get("revision"))}  # --eval-only
    asked = measured if run["summary"]["method"] == "none" else runs.models_of(run)
    asked["never saw"] = args.never_saw or config.get("never_saw"), None
    return asked, {"context": config.get("context", False), "targets": config.get("targets")}


def read_inputs(args):
    """(Data, what `models_of` asks that is there), everything checked before a weight is loaded. ValueError."""
    asked, how = models_of(args)
    never, _ = asked["never saw"]
    if never and Path(never, "summary.json").is_file():
        config = runs.read_run(never)["config"]
        asked["never saw"] = config["model"], config.get("revision")
    asked = {name: (model, revision) for name, (model, revision) in asked.items() if model}
    pairs = data.read_pairs(args.pairs)
    unseen = data.read_unseen(args.unseen) if args.unseen else []
    left_out = [*(() if unseen else NEEDS_UNSEEN), *(["relearning"] if len(pairs) < 2 else [])]
    if set(args.only) <= set(left_out):
        raise ValueError(
            f"--only {' '.join(args.only)}: needs two texts, or texts of the same kind: --unseen FILE"
        )
    args.only = [question for question in args.only if question not in left_out]
    pickles = {"allow_pickle": args.allow_pickle}
    configs = {
        name: models.check_model(model, revision=at, **pickles)
        for name, (model, at) in asked.items()
    }
    config, tokenizer = configs["after"]
    how |= {"protocol": args.protocol, "positions": models.positions_of(config) or 1 << 30}
    samples, others = (icu.build_samples(rows, tokenizer, **how)[0] for rows in (pairs, unseen))
    starts = {"audit.md": "# What is still in ", "audit.png": "\x89PNG", "audit.json": '{"model": '}
    outputs = [(Path(args.out, name), paths.begins_with(start)) for name, start in starts.items()]
    paths.check_outputs(outputs, overwrite=True)
    lr, first = args.relearn_lr or 1e-4, 1 + len(models.bos_of(tokenizer))
    return Data(args, tokenizer, first, pairs, samples, others, {}, {}, lr), asked


def main(argv=None):
    args = parse_args(argv)
    inputs, asked = read_inputs(args)
    processes.start(args.device)
    if "relearning" in args.only:
        half = len(inputs.samples) // 2
        processes.print0(
            f"relearning: {args.relearn_steps} steps of {half} texts, lr {inputs.lr:g}, {len(asked)} models"
        )
    found, readings = {}, {}
    look = {"desc": "asking", "disable": None if processes.is_main else True, "leave": False}
    with tqdm(total=len(asked) * len(args.only), **look) as bar:
        for name in sorted(
            asked, key=("before", "after", "never saw").index
        ):  # the others are compared with before
            found[name], readings[name] = ask(
                *asked[name], inputs, before=readings.get("before"), bar=bar
            )
    headlines = {q: QUESTIONS[q][1].format(n=args.samples) for q in args.only}
    titles = {question: QUESTIONS[question][0].__doc__ for question in args.only}
    report = {"model": asked["after"][0], "n": len(inputs.samples), "seed": args.seed}
    report["models"] = {name: model for name, (model, _) in asked.items()}
    report |= evidence.report(found, titles, headlines, seed=args.seed)
    if marked := sum("spans" in pair for pair in inputs.pairs):
        said = f"Parts of {marked} texts were marked; the answers are about whole texts, whose rest was to stay."
        report["sentences"]["marked"] = said
    if processes.is_main:
        made = {"audit.md": evidence.markdown(report).encode(), "audit.png": picture(report)}
        for name, content in (
            made | {"audit.json": data.json_bytes(evidence.finite(report))}
        ).items():
            data.write_bytes(Path(args.out, name), content)
        print("\n".join(report["sentences"].values()))
        print(f"audit.md, audit.json and audit.png are in {args.out}")


if __name__ == "__main__":
    flags.run_cli(main)
