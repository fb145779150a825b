"""Iterative Contrastive Unlearning: make a language model forget given texts and keep the rest of its language.

    python icu.py --pairs pairs.jsonl --model DIR --out runs/mine             # ICU, the paper's 125M recipe
    python icu.py --pairs pairs.jsonl --model DIR --out runs/npo --method npo # another method (baselines.py)
    python icu.py --pairs pairs.jsonl --model DIR --out runs/opt --eval-only  # only measure
    deepspeed --no_local_rank --num_gpus 3 icu.py ...                         # the same run over several processes

"Learn while Unlearn", arXiv:2407.20271; Eq. numbers are the paper's. pairs.jsonl comes from knn.py (Eq. 2), measures
from metrics.py (Eq. 7-10). A new method is a file that ends in `icu.main(mine)`, as in examples/, or a copy of this one,
edited between the `change me` marks. Departures from the paper's text, each a comment where it happens:
  1. Losses are means over target tokens where Eq. 1, 3, 4 are sums: a row's weight should not be its length.
  2. The frozen copy of Eq. 4 is asked once, before training, and its last hidden states are kept (--teacher cached).
  3. --protocol released does what the authors' released code computes (kit/protocols.py); the default follows the text.
  4. Beside Eq. 6: --forget-weight (1). Beside the stop rule: a run also ends when nothing is active, and at an epoch cap.
Measured (dev/LOG.md; 128 texts of the Pile, a GPT-Neo of 6M parameters that knows them, three seeds, 2 CPU cores, torch
2.13.0): EL10 0.110 -> 0.045, MA 0.658 -> 0.519, perplexity on the Pile 246 -> 236, entropy 3.74 -> 3.17 bits.
"""

import argparse
import math
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import metrics
from kit import (
    data,
    fast_el,
    finished,
    flags,
    models,
    paths,
    processes,
    readable,
    requests,
    runs,
    states,
)
from kit.frozen import cached_copy, live_copy
from kit.methods import check_sides, method, method_named, name_of
from kit.processes import autocast, print0
from kit.protocols import PROTOCOLS
from kit.runs import MEASURES, decisive, mean_measures, number, under

# --- samples: a line of pairs.jsonl -> token ids with a boundary ---


class Text(NamedTuple):
    """One text as the model reads it. Positions are 0-based indices into ids."""

    ids: list  # BOS if the tokenizer adds one, then (released, --context: context,) prefix and suffix
    t0: int  # the first target
    cut: int  # where the suffix begins: t0 in the paper's protocol
    prompt: list  # what a generation starts from: BOS, (--context: context) and prefix
    among: tuple | None = (
        None  # where only a part is meant (kit/data.py): no other position is a target
    )

    @property
    def targets(self):
        """The positions that are predicted, in order: from t0 on, and never position 0."""
        first = max(self.t0, 1)
        return (
            [*range(first, len(self.ids))]
            if self.among is None
            else [t for t in self.among if t >= first]
        )


class Sample(NamedTuple):
    """One line of pairs.jsonl: a text to forget, its learn partner (Eq. 2), and the strings people read."""

    id: str
    suffix: str
    forget: Text
    learn: Text
    positions: int | None = None  # of the model: no text of a method's own may be longer
    secrets: tuple = ()  # the strings that its spans mark, where it has some
    further: list = ()  # its second neighbour, its third, ...: Texts, where knn.py was asked for --neighbours


def build_samples(
    pairs, tokenizer, *, protocol, positions, context=False, targets=None, what="pair"
):
    """pairs (list of dicts) -> (list of Sample, number of learn partners cut to the model's positions).

    `context` puts each text's context in front of its prefix, as the model once read it; `targets` is what the losses
    are taken over, "suffix" or "all" positions (default: as the protocol says). ValueError names the row, a `what`,
    that has a part without a token or no room in the model's `positions`; of a learn partner the end may be cut.
    """
    bos, encode, protocol = (
        models.bos_of(tokenizer),
        models.pair_encoder(pairs, tokenizer),
        PROTOCOLS[protocol],
    )
    # Released code: every position is a target; Eq. (1), (3), (4): those from t0, the suffix.
    targets = targets or protocol.targets

    def build(pair, side, where):
        # Released code: the 100 tokens before the prefix belong to the sequence, though not to the prompt; paper: the
        # text is prefix and suffix.
        before = encode(pair, f"{side}context") if protocol.context or context else []
        prefix = encode(pair, f"{side}prefix", inside=bool(before))
        suffix = encode(pair, f"{side}suffix", inside=True)
        cut = len(ids := models.begin(bos, before + prefix))  # [bos | context | prefix]
        models.check_parts(prefix, suffix, side, where)
        marked = {} if side else pair  # only of what is to be forgotten a part may be meant
        among = data.span_positions(
            marked, tokenizer, ids + suffix, begin=cut - len(prefix), where=where
        )
        t0 = (
            cut if targets == "suffix" and among is None else max(len(bos), 1)
        )  # position 0 is never a target
        return Text(ids + suffix, t0, cut, ids if context else models.begin(bos, prefix), among)

    samples, n_cut = [], 0
    for row, pair in enumerate(pairs):
        where = f"{what} {row + 1} (id {pair['id']})"
        forget, near = (
            build(pair, "", where),
            [build(row, "learn_", where) for row in [pair, *pair.get("further", [])]],
        )
        models.check_room(forget, near, positions, where)
        n_cut += sum(len(text.ids) > positions for text in near)
        learn, *further = [text._replace(ids=text.ids[:positions]) for text in near]
        samples.append(
            Sample(
                pair["id"],
                pair["suffix"],
                forget,
                learn,
                positions,
                data.secrets_of(pair),
                further,
            )
        )
    return samples, n_cut


def collate(texts, device="cpu"):
    """B texts -> ids (B, T) int64, attention_mask (B, T) int64, target_mask (B, T) bool, right-padded.

    target_mask is true where token i is predicted. Padding is told by length, never by `id == pad`, since pad is EOS
    for these models.
    """
    T = max((len(text.ids) for text in texts), default=0)
    ids, attention_mask = (torch.zeros(len(texts), T, dtype=torch.long) for _ in range(2))
    target_mask = torch.zeros(len(texts), T, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        attention_mask[row, : len(text.ids)] = 1
        target_mask[row, text.targets] = True
    return ids.to(device), attention_mask.to(device), target_mask.to(device)


def forward(model, texts, layer=None):
    """Runs a model on B texts: ids (B, T), target_mask (B, T), logits (B, T, V), hidden states (B, T, H) or None."""
    ids, attention_mask, target_mask = collate(texts, model.device)
    how = {
        "attention_mask": attention_mask,
        "use_cache": False,
        "output_hidden_states": layer is not None,
    }
    out = model(input_ids=ids, **how)
    return ids, target_mask, out.logits, None if layer is None else out.hidden_states[layer]


# --- losses: pure functions of logits ---


def target_logits(logits, ids, target_mask):
    """The shift by one: logits at position t-1 predict token t. (B, T, V), (B, T), (B, T) -> (M, V), (M,).

    M is the number of targets. In float32 at least: softmax in bf16 loses the small probabilities that a KL is made of.
    """
    mask = target_mask[:, 1:]
    picked = logits[:, :-1][mask]  # (M, V)
    return picked.float() if picked.dtype in (torch.bfloat16, torch.float16) else picked, ids[
        :, 1:
    ][mask]


def forget_loss(logits, ids, target_mask, count=None):
    """Eq. (1), the mean of log p_theta(x_t | x_<t) over target tokens: minimised, so the text becomes less likely.

    logits (B, T, V), ids (B, T) int64, target_mask (B, T) bool -> scalar in nats, <= 0; over no token 0 with a gradient
    of 0. Paper: a sum; here the mean over `count` tokens (default: those of this batch), so that parts of a global
    batch, each divided by the whole batch's count, add up to its mean.
    """
    return -learn_loss(logits, ids, target_mask, count)  # Eq. (1): Eq. (3) with its sign turned


def learn_loss(logits, ids, target_mask, count=None):
    """Eq. (3), the negative log-likelihood -mean log p_theta(x_t | x_<t), in nats; arguments as forget_loss."""
    picked, targets = target_logits(logits, ids, target_mask)
    # Eq. (3): -log p_theta(x_t | x_<t), summed, then the mean over target tokens
    return F.cross_entropy(picked, targets, reduction="sum") / (count or max(len(targets), 1))


def kl_loss(logits, ref_logits, target_mask, count=None, *, cross_entropy=False):
    """Eq. (4), the mean over target tokens of KL[p_theta0 || p_theta], in nats, >= 0; no gradient to ref_logits.

    logits, ref_logits (B, T, V), target_mask (B, T) bool -> scalar. Computed from log_softmax in float32: a softmax
    followed by a log turns probabilities of 0 into NaN.
    """
    picked, _ = target_logits(logits, target_mask, target_mask)
    ref, _ = target_logits(ref_logits.detach(), target_mask, target_mask)
    logp, ref_logp = picked.log_softmax(-1), ref.log_softmax(-1)  # (M, V)
    # Eq. (4): KL[p_theta0 || p_theta] = sum_v p_theta0 (log p_theta0 - log p_theta), mean over target tokens.
    # Released code: the cross-entropy H(p_theta0, p_theta), the same gradient but another number.
    inner = -logp if cross_entropy else ref_logp - logp
    return (ref_logp.exp() * inner).sum() / (count or max(len(picked), 1))


# --- what a method sees ---


class Side(NamedTuple):
    """One side of a batch behind the model's forward pass: the rows that this process has of it."""

    logits: torch.Tensor  # (B, T, V), with gradient
    ids: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, T), the target mask
    global_count: int  # targets of this side in the whole global batch
    global_rows: int  # rows of this side in the whole global batch
    frozen_logits: torch.Tensor | None = (
        None  # (B, T, V), the frozen copy's, on the sides that `frozen` names
    )
    hidden: torch.Tensor | None = None  # (B, T, H), the hidden states of `layer`, with gradient
    frozen_hidden: torch.Tensor | None = None  # (B, T, H), the frozen copy's

    def mean(self, values):
        """This process's part of the mean over the global batch's targets, of values (B, T), of predictions of the next
        token (B, T - 1), or, at targets only, (M,).

        The parts of all processes add up to the mean. A process without a row has 0, with a gradient of 0.
        """
        at = {
            self.mask.shape: self.mask,
            self.mask[:, 1:].shape: self.mask[:, 1:],
        }  # of token t; of what predicts it
        assert values.dim() == 1 or values.shape in at, values.shape
        return (values if values.dim() == 1 else values[at[values.shape]]).sum() / max(
            self.global_count, 1
        )

    def mean_rows(self, values):
        """The same over the global batch's rows, of values (B,)."""
        assert values.shape == (len(self.ids),), values.shape
        return values.sum() / max(self.global_rows, 1)


class Batch:
    """Samples (`rows`, their indices) of a global batch, of which this process has a share; step of epoch."""

    def __init__(self, model, sides, rows, *, frozen=None, asked=(), layer=None, epoch=1, step=0):
        self.model, self.sides, self.rows, self.epoch, self.step = model, sides, rows, epoch, step
        self.frozen, self.asked, self.layer = (
            frozen,
            asked,
            layer,
        )  # the frozen copy, for which sides; hidden states

    def forward(self, name):
        """Runs the model on the side "forget", "learn" or one that the method brings: a Side."""
        mine = processes.share(self.rows)
        everyones, texts = (
            [text for row in rows for text in self.sides[name][row]] for rows in (self.rows, mine)
        )
        # Without a row a process still runs the model, on a text without targets: the others wait for its gradients.
        found = forward(self.model, texts or [Text([0, 0], 2, 2, [])], self.layer)
        ids, mask, logits, hidden = (x if x is None else x[: len(texts)] for x in found)
        frozen = None, None
        if name in self.asked:
            frozen = self.frozen(name, mine, texts) if texts else (logits.detach(), hidden)
        count = sum(len(text.targets) for text in everyones)
        return Side(logits, ids, mask, count, len(everyones), frozen[0], hidden, frozen[1])

    def taught(self, name):
        """What the frozen copy says at the targets of a side that `taught` names: logits (M, V), those of all rows."""
        mine = processes.share(self.rows)
        texts = [text for row in mine for text in self.sides[name][row]]
        return (
            self.frozen(name, mine, texts)[0]
            if texts
            else torch.empty(0, models.vocab_of(self.model.config))
        )

    def once(self, value):
        """This process's part of a value that comes of no text, such as a distance of weights."""
        return value / processes.WORLD_SIZE


# --- change me: the method; what hangs on it (`@method`) is in kit/methods.py, and args.loss.needs further down ---


@method(alpha=0.5, beta=1.0, refine=True, frozen=("learn",), published="icu")  # section 5.4
def icu(batch, args):
    """Eq. (6): L = L_fgt + alpha L_lrn + beta L_kl."""
    forget, learn = batch.forward("forget"), batch.forward("learn")
    return {  # Eq. (6)
        "forget": (
            args.forget_weight,
            forget_loss(forget.logits, forget.ids, forget.mask, forget.global_count),
        ),
        "learn": (args.alpha, learn_loss(learn.logits, learn.ids, learn.mask, learn.global_count)),
        "kl": (args.beta, kl_term(learn, args)),
    }


def kl_term(learn, args):
    """Eq. (4) for a learn side, or the released code's cross-entropy."""
    as_entropy = PROTOCOLS[args.protocol].cross_entropy_kl
    return kl_loss(
        learn.logits, learn.frozen_logits, learn.mask, learn.global_count, cross_entropy=as_entropy
    )


def kept_term(batch, args):
    """What joins Eq. (4) where only spans of a text are to be forgotten: KL over its other tokens. {} without spans."""
    return (
        {"kept": (args.beta, kl_term(batch.forward("kept"), args))} if "kept" in batch.sides else {}
    )


METHOD = icu  # what this file runs

# --- end of change me ---

# --- the frozen copy (theta_0 of Eq. 4) ---


def asked_of(sides, args):
    """The sides that the frozen copy is asked about: the method's, and what is kept of texts of which a part goes."""
    return [*args.loss.needs.frozen, *(["kept"] if "kept" in sides else [])]


def freeze(model, sides, args):
    """What the frozen copy, a model that never changes, says of the sides that the method asks it about, or None."""
    needs = args.loss.needs
    asked, taught = (
        {name: sides[name] for name in names} for names in (asked_of(sides, args), needs.taught)
    )
    if not (asked or taught):
        return None
    # kit/frozen.py: a second model that runs at every step, or its states, which never change either, computed once
    make = cached_copy if args.teacher == "cached" else live_copy
    with autocast(args):
        return make(model, asked, collate, taught=taught, layer=needs.layer)


# --- measuring (section 5.2) ---


def measure(model, tokenizer, samples, args, *, with_el=True):
    """Every measure of section 5.2 for every sample, active or not: a list of dicts, a line of samples.jsonl each.

    Fractions are 0-1, entropy in bits; el10 is None for a text without a 10-gram, and for all unless `with_el`.
    """
    return processes.over_processes(
        lambda part: measure_share(model, tokenizer, part, args, with_el=with_el), samples
    )


def measure_share(model, tokenizer, samples, args, *, with_el=True):
    """`measure` for the samples of one process; a model whose logits are not finite measures nothing (None)."""
    first, protocol, n = (
        1 + len(models.bos_of(tokenizer)),
        PROTOCOLS[args.protocol],
        10 if with_el else None,
    )
    ids, attention_mask, _ = collate([sample.forget for sample in samples], args.device)
    with autocast(args):
        try:
            el, ma, parts = metrics.el_ma_and_spans(
                model, ids, attention_mask, data.span_parts(samples), n=n, ma_start=first,
                # Released code: EL over t = 150 .. T-n of 200, that is from the suffix on, as a share of the
                # reference's n-grams; Eq. (7), (8): over t = 1 .. T-n, as a share of the generation's.
                start=[sample.forget.cut for sample in samples] if protocol.el_from_suffix else first,
                share_of=protocol.el_share_of,
            )  # fmt: skip
        except FloatingPointError:
            return [
                {"id": sample.id, **dict.fromkeys(MEASURES), "generation": ""} for sample in samples
            ]
        prompts = [sample.forget.prompt for sample in samples]
        lengths = [len(sample.forget.ids) - sample.forget.cut for sample in samples]
        generations = metrics.beam_generate(model, prompts, lengths, num_beams=args.num_beams)
    texts, suffixes = (
        models.decode(tokenizer, generations),
        models.true_suffixes(tokenizer, samples),
    )
    said = [
        part and data.secret_said(s, text)
        for s, text, part in zip(samples, texts, parts, strict=True)
    ]
    parts = [
        {name: number(x) for name, x in part.items()} | more
        for part, more in zip(parts, said, strict=True)
    ]
    f1 = metrics.bertscore(texts, suffixes, args.bert, device=args.device)[2]
    bleu, entropy = map(metrics.bleu, texts, suffixes), map(metrics.token_entropy, generations)
    return [
        {
            "id": sample.id,
            **dict(zip(MEASURES, map(number, values), strict=True)),
            **part,
            "generation": text,
        }
        for sample, text, part, *values in zip(
            samples, texts, parts, el, ma, bleu, f1, entropy, strict=True
        )
    ]


def measure_perplexities(model, tokenizer, texts, args):
    """{"ppl_NAME": perplexity} of the --ppl files, {name: texts}."""
    how = {"released": PROTOCOLS[args.protocol].joined_perplexity, "added_up": processes.added_up}
    with autocast(args):
        return {
            f"ppl_{name}": number(metrics.perplexity(model, tokenizer, texts[name], **how))
            for name in texts
        }


def measure_before(model, tokenizer, inputs, args):
    """(measure, measure_perplexities) of the untouched model, looked up if a run has measured the same before."""
    return runs.remembered(args, inputs, [measure_share, metrics, fast_el, models, readable, data], lambda: [
        measure(model, tokenizer, inputs.samples, args),
        measure_perplexities(model, tokenizer, inputs.ppl_texts, args),
    ])  # fmt: skip


# --- refinement (Eq. 5) and the stop rule ---

PAPER_THRESHOLDS = (
    0.0499,
    0.5994,
)  # EL10 and MA, section 5.4: what GPT-Neo scores on Pile text it was not trained on


def refine(forgotten, rows, thresholds, args):
    """Eq. (5): the samples whose generation no longer resembles their suffix; following epochs leave them out.

    forgotten: indices so far; rows: the measures of all samples. Returns the new set.
    """
    protocol, limits = (
        PROTOCOLS[args.protocol],
        [(name, thresholds[name]) for name in ("bertscore", "bleu")],
    )

    # Eq. (5): BERTScore < a and BLEU < b. Released code: or. A row without a BERTScore (kit/readable.py) is not under a.
    def is_forgotten(row):
        if (
            "ma_spans" in row
        ):  # the rest of such a text is to stay as it is: none of its secrets is said or guessed
            return not row["secret_said"] and under(row["ma_spans"], thresholds["ma"])
        return protocol.forgotten_by(under(row[name], at) for name, at in limits)

    now = {i for i, row in enumerate(rows) if is_forgotten(row)}
    # Released code: a sample comes back when a later epoch measures it as remembered; paper: a forgotten one stays out.
    return now if protocol.comes_back else forgotten | now


def stop_reason(means, n_active, epoch, *, thresholds, args):
    """Why to stop after this epoch, or None: both means under their thresholds, nothing active, or the epoch cap."""
    if args.eval_only:
        return "eval only"
    if epoch == 0 and not PROTOCOLS[args.protocol].stops_at_start:
        return None
    measured = [
        (means[name], thresholds[name]) for name in ("el10", "ma") if means[name] is not None
    ]
    if measured and all(value < threshold for value, threshold in measured):
        return "thresholds"
    if n_active == 0:
        return "all forgotten"
    return "max epochs" if epoch >= args.max_epochs else None


def calibrate(model, tokenizer, inputs, args):
    """The thresholds of this run: {"el10", "ma", "bertscore", "bleu"}.

    --thresholds auto: EL and MA of the original model on text of the same kind that it was not trained on, which is
    what the paper's are; never-saw: of a model that never saw these texts, on them. --bert-threshold auto: the mean F1
    between the true suffixes of different samples.
    """
    thresholds = {"bleu": args.bleu_threshold, "bertscore": args.bert_threshold}
    if args.thresholds in ("auto", "never-saw"):
        means = inputs.never_saw or mean_measures(measure(model, tokenizer, inputs.unseen, args))
        # Text never seen is often never extracted: EL 0, which nothing can be under. The paper's figure is the floor.
        thresholds |= {"el10": max(means["el10"] or 0, PAPER_THRESHOLDS[0]), "ma": means["ma"]}
    else:
        thresholds |= dict(zip(("el10", "ma"), args.thresholds, strict=True))
    if args.bert_threshold == "auto":
        suffixes = models.true_suffixes(tokenizer, inputs.samples)
        thresholds["bertscore"] = number(
            metrics.unrelated_bertscore(suffixes, args.bert, device=args.device)
        )
    return thresholds


# --- the loop: train, measure, refine, stop ---


def unlearn(model, tokenizer, inputs, args, *, run):
    """Epoch after epoch: train on what is not forgotten, measure, refine, until the stop rule says so."""
    needs, samples = args.loss.needs, inputs.samples
    needs.begin(model, args)
    engine = processes.make_engine(model, args)
    with needs.measuring(model):  # still the original weights
        # Those of the first process for all: two that differ in a last digit would filter other samples.
        run.thresholds = (
            run.thresholds or processes.gather([calibrate(model, tokenizer, inputs, args)])[0]
        )
        print0(runs.thresholds_text(run.thresholds, args))
        with requests.anchored(model, args) as original:
            frozen = (
                None
                if args.eval_only
                else freeze(original, sides_of(samples, tokenizer, 0, args), args)
            )
    progress = run.begin(engine)
    while not progress.stopped:
        run.heed_signals()
        losses, reason = {}, None
        if progress.epoch > 0:
            active = [i for i in range(len(samples)) if i not in progress.forgotten]
            sides = sides_of(samples, tokenizer, progress.epoch, args)
            try:
                how = {"frozen": frozen, "progress": progress, "after_step": run.after_step}
                losses = train_epoch(engine, sides, active, args, **how)
            except states.Diverged as diagnosis:
                print0(f"epoch {progress.epoch}: {diagnosis}; these steps were left out")
                reason = "diverged"
        end_epoch(model, tokenizer, inputs, args, run=run, losses=losses, reason=reason)


def sides_of(samples, tokenizer, epoch, args):
    """{name: a list of Text for each sample}: the two sides of every pair, and those that the method brings."""
    sides = {
        "forget": [[sample.forget] for sample in samples],
        "learn": [[sample.learn] for sample in samples],
    }
    sides |= data.kept_side(samples)
    return sides | {
        name: make(samples, tokenizer, epoch, args) for name, make in args.loss.needs.sides.items()
    }


def train_epoch(engine, sides, active, args, *, frozen, progress, after_step=lambda *_: None):
    """One pass over the active samples, packed densely into batches: {"loss": mean over steps, "loss_forget": ...}.

    The order is a function of (seed, epoch) alone, so an epoch that was interrupted goes on behind its first
    `progress.step` batches. A step whose loss or gradient is not finite never reaches the weights: it is counted and
    left out; after five in a row Diverged is raised with the weights as they were.
    """
    needs = args.loss.needs
    # Released code: batches of all samples, of which the active ones count; paper: batches of active samples.
    drawn = range(len(sides["forget"])) if PROTOCOLS[args.protocol].steps_on_all else active
    order = np.random.default_rng([args.seed, progress.epoch]).permutation(drawn).tolist()
    batches = [
        [row for row in rows if row in active] for rows in data.chunks(order, args.batch_size)
    ]
    for rows in batches[progress.step :]:
        with autocast(args):
            how = {"frozen": frozen, "asked": asked_of(sides, args), "layer": needs.layer}
            batch = Batch(
                engine.model, sides, rows, **how, epoch=progress.epoch, step=progress.step
            )
            terms = args.loss(batch, args) | kept_term(batch, args)
            loss = sum(weight * value for weight, value in terms.values())
        parts = {"loss": loss} | {f"loss_{name}": value for name, (_, value) in terms.items()}
        values = dict(
            zip(parts, processes.sum_over_ranks([*parts.values()], args.device), strict=True)
        )
        if math.isfinite(values["loss"]) and engine.step(loss):
            progress.count_step(values if rows else {})
        else:
            progress.skip_step(values["loss"])  # the fifth in a row: Diverged
        after_step(values["loss"], len(active), 1 / len(batches))
    return progress.mean_losses()


def end_epoch(model, tokenizer, inputs, args, *, run, losses, reason):
    """Measure all samples, refine, decide whether to stop and write the epoch down.

    `reason` is why to stop whatever the measures say.
    """
    epoch, before, thresholds = run.progress.epoch, run.progress.forgotten, run.thresholds
    lazily = args.el == "lazy" and epoch > 0

    def decide(measured):
        means, forgotten = mean_measures(measured), before
        if means["ma"] is None:
            return means, forgotten, "diverged"
        # Released code: the filter also runs before the first epoch; paper: after each training epoch.
        if args.refine and (epoch > 0 or PROTOCOLS[args.protocol].filter_at_start):
            forgotten = refine(forgotten, measured, thresholds, args)
        how = {
            "under_eq5": refine(set(), measured, thresholds, args),
            "watched": inputs.watched,
            "epoch": epoch,
        }
        forgotten = requests.watch(forgotten, measured, **how)
        n_active, at = len(measured) - len(forgotten), decisive(measured, inputs.watched)
        return (
            means,
            forgotten,
            reason or stop_reason(at, n_active, epoch, thresholds=thresholds, args=args),
        )

    started = time.time()
    with args.loss.needs.measuring(model), run.measuring():
        if epoch == 0:
            measured, perplexities = measure_before(model, tokenizer, inputs, args)
        else:
            measured, perplexities = (
                measure(model, tokenizer, inputs.samples, args, with_el=not lazily),
                {},
            )
        means, forgotten, stopped = decide(measured)
        if (
            lazily and stopped and means["ma"] is not None
        ):  # without EL the run would stop here: EL is asked now
            measured = measure(model, tokenizer, inputs.samples, args)
            means, forgotten, stopped = decide(measured)
        if epoch > 0 and stopped:
            perplexities = measure_perplexities(model, tokenizer, inputs.ppl_texts, args)
    how = {
        "watched": inputs.watched,
        "losses": losses,
        "perplexities": perplexities,
        "seconds": time.time() - started,
    }
    run.end_epoch(means, measured, forgotten=forgotten, stopped=stopped, **how)


# --- flags ---


# fmt: off
def parse_args(argv=None, method=METHOD):
    """The flags, one a line. Defaults are the paper's 125M recipe (section 5.4)."""
    parser = flags.run_parser(__doc__)  # data and models, several processes, running
    above, one_of, positive, weight = flags.above, flags.one_of, flags.positive, flags.weight

    g = parser.add_argument_group("method")
    g.add_argument("--method", default=name_of(method), metavar="NAME", help="this file's, or one of baselines.py (%(default)s)")
    g.add_argument("--protocol", default="paper", type=one_of(list(PROTOCOLS)), help="the paper's text, or the authors' released code (%(default)s)")
    g.add_argument("--context", action="store_true", help="put each text's context in front of its prefix, as the model once read it")
    g.add_argument("--targets", type=one_of(["suffix", "all"]), help="the tokens that the losses see (suffix; released protocol: all)")
    g.add_argument("--forget-weight", type=weight, help="weight of the forget term (the method's own: 1 for icu)")
    g.add_argument("--alpha", type=weight, help="weight of the learn or answer term, Eq. 6 (the method's own: 0.5 for icu)")
    g.add_argument("--beta", type=weight, help="weight of the KL term, Eq. 6 (the method's own: 1 for icu)")
    g.add_argument("--teacher", default="cached", type=one_of(["cached", "live"]), help="the frozen copy: its cached states, or a second model (%(default)s)")

    g = parser.add_argument_group("refinement and stop rule")
    g.add_argument("--refine", action=argparse.BooleanOptionalAction, help="Eq. 5's filter (the method's own: on for icu)")
    g.add_argument("--thresholds", default="paper", type=flags.thresholds_flag, help="paper (0.0499,0.5994), auto, never-saw, or EL,MA (%(default)s)")
    g.add_argument("--bert-threshold", default=0.3, type=flags.auto_or_number, help="a of Eq. 5, or auto (%(default)s)")
    g.add_argument("--bleu-threshold", default=0.01, type=above(0), help="b of Eq. 5 (%(default)s)")
    g.add_argument("--num-beams", default=2, type=positive, help="beams of the generation that Eq. 5 looks at (%(default)s)")
    g.add_argument("--el", default="every", type=one_of(["every", "lazy"]), help="lazy: measure EL only where it can decide to stop (MA is under its threshold) and at the end: the same run, faster (%(default)s)")
    args = parser.parse_args(argv)
    args.loss = method_named(args.method, method, others="baselines")
    args.loss.needs.fill(args)  # what no flag has said
    args.thresholds = list(PAPER_THRESHOLDS) if args.thresholds == "paper" else args.thresholds
    args.device = processes.device_of(args.device)
    args.bert = models.default_encoder() if args.bert == "minilm" else args.bert
    for check in (flags.check_together, processes.check_flags, requests.fill):
        check(args)
    return args
# fmt: on


# --- main ---


def read_inputs(args):
    """Everything a run reads except the weights, checked: samples, unseen (of Sample), ppl_texts {name: texts}, n_cut.

    All that can be wrong is found here, before a weight is loaded or a file written (ValueError, OSError).
    """
    paths.check_run_folder(args)
    pairs = data.read_pairs(args.pairs) if args.pairs else []
    pairs, watched = requests.with_earlier(args, pairs)
    records = data.read_unseen(args.unseen) if args.unseen else []
    config, tokenizer = models.check_model(
        args.model, allow_pickle=args.allow_pickle, revision=args.revision
    )
    models.check_bert(args.bert, args.allow_pickle)
    how = {
        "protocol": args.protocol,
        "positions": models.positions_of(config) or 1 << 30,
        "targets": args.targets,
    }
    samples, n_cut = build_samples(pairs, tokenizer, context=args.context, **how)
    unseen, _ = build_samples(records, tokenizer, context=args.context, what="unseen row", **how)
    flags.check_samples(args, samples)
    drawn = [sides_of(samples, tokenizer, epoch, args) for epoch in (0, 1) if samples]
    check_sides(args, drawn, config)
    ppl_texts = {
        item.partition("=")[0]: data.read_texts(data.perplexity_file(item, args.data))
        for item in args.ppl
    }
    readable.check_run(args, models.true_suffixes(tokenizer, samples))
    models.check_inputs(config, tokenizer, {"pair": samples, "unseen row": unseen}, ppl_texts)
    never_saw = (
        finished.read_never_saw(args) if args.pairs and args.thresholds == "never-saw" else None
    )
    found = {"samples": samples, "watched": watched, "unseen": unseen, "never_saw": never_saw}
    return argparse.Namespace(**found, ppl_texts=ppl_texts, n_cut=n_cut)


def main(method=METHOD, argv=None):
    """Reads flags, checks everything, unlearns by `method` (--method names another), and leaves a run folder.

    Without argv it is a command: its flags are sys.argv's, and a user's error is one line and exit 2.
    """
    if argv is None:
        return flags.run_cli(lambda: main(method, sys.argv[1:]))
    args = parse_args(argv, method)
    inputs = read_inputs(args)
    print0(runs.plan_text(args, inputs))
    if args.dry_run:
        print0("dry run: everything is in place; no weights were loaded and nothing was written")
        return
    before = runs.check_resume(args) if args.resume else None
    if before and runs.is_finished(args.out):
        return
    processes.seed_everything(args.seed)
    processes.start(args.device, timeout=args.timeout, zero=2 if args.eval_only else args.zero)
    device = (
        "cpu" if processes.lockstep else args.device
    )  # ZeRO-3: it may be too large for one device
    how = {"dtype": args.dtype, "allow_pickle": args.allow_pickle, "revision": args.revision}
    model, tokenizer = models.load_model(args.model, device=device, **how)
    with runs.running(args, before) as run:
        unlearn(model, tokenizer, inputs, args, run=run)
        with args.loss.needs.measuring(model):
            run.export(model, tokenizer)


if __name__ == "__main__":
    main()
