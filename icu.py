"""Iterative Contrastive Unlearning: make a language model forget given texts and keep the rest of its language.

    python icu.py --pairs pairs.jsonl --model DIR --out runs/mine             # ICU, the paper's 125M recipe
    python icu.py --pairs pairs.jsonl --model DIR --out runs/npo --method npo # another method, the same loop
    python icu.py --pairs pairs.jsonl --model DIR --out runs/opt --eval-only  # only measure
    python icu.py ... --resume                                                # go on with a run that was interrupted
    deepspeed --no_local_rank --num_gpus 3 icu.py ...                         # the same run over several processes

"Learn while Unlearn", arXiv:2407.20271; Eq. numbers are the paper's. pairs.jsonl comes from knn.py. To make a new
method, copy this file and edit between the two `change me` marks. Departures from the paper's text, each a comment
where it happens:
  1. Losses are means over target tokens where Eq. 1, 3, 4 are sums: a row's weight should not be its length.
  2. The frozen copy of Eq. 4 is asked once, before training, and its last hidden states are kept (--teacher cached).
  3. --protocol released does what the authors' released code computes; the default follows the paper's text.
Measured (LOG.md; 128 texts of the Pile, a GPT-Neo of 6M parameters that knows them, three seeds, 2 CPU cores, torch
2.13.0): EL10 0.110 -> 0.045, MA 0.658 -> 0.519, perplexity on the Pile 246 -> 236, entropy 3.74 -> 3.17 bits.
"""

import argparse
import contextlib
import copy
import datetime
import difflib
import errno
import fcntl
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import knn
import metrics

# --- processes: one, or several that a launcher (deepspeed, torchrun) has started ---

RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in
                                (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # fmt: skip
LAUNCHED = "WORLD_SIZE" in os.environ  # then DeepSpeed trains, also with a single process
is_main = RANK == 0  # the one that prints and writes


def print0(text):
    """A line on stdout, once, whatever the number of processes; the progress bar stays below it."""
    if is_main:
        tqdm.write(text)


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


def lockstep(args):
    """Whether every process measures all samples instead of a share, because none of them has whole weights (ZeRO-3).

    A forward pass gathers each layer from all processes, so all must make the same calls of the model.
    """
    return LAUNCHED and args.zero == 3 and not args.eval_only


def sum_over_ranks(values, device="cpu"):
    """Numbers added up over the processes, as a list of float."""
    if WORLD_SIZE == 1:
        return [float(value) for value in values]
    total = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


# --- data: a pair of pairs.jsonl -> token ids with a boundary ---


class Text(NamedTuple):
    """One text as the model reads it. Positions are 0-based indices into ids."""

    ids: list  # BOS if the tokenizer adds one, then (released, --context: context,) prefix and suffix
    t0: int  # the first target
    cut: int  # where the suffix begins: t0 in the paper's protocol
    prompt: list  # what a generation starts from: BOS, (--context: context) and prefix


class Sample(NamedTuple):
    """One line of pairs.jsonl: a text to forget, its learn partner (Eq. 2), and the strings people read."""

    id: str
    suffix: str
    forget: Text
    learn: Text


def encode(tokenizer, text, *, inside=False):
    """Ids of a text without special tokens; `inside`: as it reads behind other text.

    SentencePiece tokenizers (Llama) put a space before all they encode. Behind a prefix that space is not in the text,
    so the text is encoded behind a line break, which is then taken off.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if inside and ids and tokenizer.convert_ids_to_tokens(ids[0]).startswith("▁"):
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        behind = tokenizer("\n" + text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = behind[len(newline) :] if behind[: len(newline)] == newline else ids
    return ids


def bos_of(tokenizer):
    """[BOS] for a tokenizer that puts it before every text (OPT, Llama), [] for others (GPT-Neo)."""
    plain, whole = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
    return whole[:1] if whole[0] == tokenizer.bos_token_id != plain[0] else []


def pairs_have_own_ids(pairs, tokenizer):
    """Whether the pairs' `*_ids` are ids of this tokenizer: they must decode to the very texts beside them.

    Decoding and encoding again does not always give the same ids, so ids are used verbatim where they can be. None fit:
    another vocabulary, its texts are encoded. Some fit and some don't: ValueError that names the first that doesn't.
    """
    names = [f"{side}{part}" for side in ("", "learn_") for part in ("context", "prefix", "suffix")]

    def fits(pair):
        ids = [pair.get(f"{name}_ids") for name in names]
        if any(part is None or any(not 0 <= i < len(tokenizer) for i in part) for part in ids):
            return False
        decoded = [tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in ids]
        return decoded == [pair[name] for name in names]

    fit = [fits(pair) for pair in pairs]
    if any(fit) and not all(fit):
        row = fit.index(False)
        raise ValueError(
            f"pair {row + 1} (id {pairs[row]['id']}): its *_ids are missing, out of the model's {len(tokenizer)} "
            "tokens or not the ids of its texts, while other rows' are; make the pairs again with knn.py"
        )
    return all(fit)


def build_samples(pairs, tokenizer, *, protocol, positions, context=False, targets=None, what="pair"):
    """pairs (list of dicts) -> (list of Sample, number of learn partners cut to the model's positions).

    `context` puts each text's context in front of its prefix, for training, measuring and asking alike: the text as
    the model once read it. `targets` is what the losses are taken over, "suffix" or "all" positions (default: as the
    protocol says). ValueError names the row, a `what`, whose prefix or suffix has no token, or that is longer than the
    model's `positions`. A learn partner may be cut, since nothing is promised about its end.
    """
    own_ids, bos, n_cut = pairs_have_own_ids(pairs, tokenizer), bos_of(tokenizer), 0
    released = protocol == "released"
    # Released code: every position is a target; Eq. (1), (3), (4): those from t0, the suffix.
    targets = targets or ("all" if released else "suffix")

    def build(pair, side, row):
        ids = lambda part, **how: (  # noqa: E731
            list(pair[f"{side}{part}_ids"]) if own_ids else encode(tokenizer, pair[side + part], **how)
        )
        # Released code: the 100 pre-prefix tokens belong to the sequence, though not to the prompt; paper: the text is
        # prefix and suffix.
        before = ids("context") if released or context else []
        prefix, suffix = ids("prefix", inside=bool(before)), ids("suffix", inside=True)
        for part, name in ((prefix, "prefix"), (suffix, "suffix")):
            if not part:
                raise ValueError(
                    f"{what} {row + 1} (id {pair['id']}): the {side}{name} has no token; give it some text"
                )
        # ids = [bos | context | prefix | suffix]; cut: where the suffix begins; t0: the first target
        cut = len(bos + before + prefix)
        t0 = len(bos) or 1 if targets == "all" else cut  # position 0 is never a target
        return Text(bos + before + prefix + suffix, t0, cut, bos + (before if context else []) + prefix)

    samples = []
    for row, pair in enumerate(pairs):
        forget, learn = build(pair, "", row), build(pair, "learn_", row)
        if len(forget.ids) > positions:
            raise ValueError(
                f"{what} {row + 1} (id {pair['id']}): {len(forget.ids)} tokens, and the model has {positions} "
                "positions; split the text into several rows"
            )
        if learn.cut >= positions:
            raise ValueError(
                f"{what} {row + 1} (id {pair['id']}): the learn prefix alone fills the model's {positions} positions; "
                "mine the pairs with a smaller --passage-words"
            )
        n_cut += len(learn.ids) > positions
        learn = learn._replace(ids=learn.ids[:positions])
        samples.append(Sample(pair["id"], pair["suffix"], forget, learn))
    return samples, n_cut


def collate(texts, device="cpu"):
    """B texts -> ids (B, T) int64, attention_mask (B, T) int64, target_mask (B, T) bool, right-padded.

    target_mask is true where token i is predicted: t0 <= i and not padding. Padding is told by length, never by
    `id == pad`, since pad is EOS for these models.
    """
    lengths = torch.tensor([len(text.ids) for text in texts])
    T = max((len(text.ids) for text in texts), default=0)
    ids = torch.tensor([text.ids + [0] * (T - len(text.ids)) for text in texts], dtype=torch.long).view(len(texts), T)
    position = torch.arange(T)[None]
    attention_mask = position < lengths[:, None]
    target_mask = attention_mask & (position >= torch.tensor([text.t0 for text in texts])[:, None]) & (position > 0)
    return ids.to(device), attention_mask.long().to(device), target_mask.to(device)


def chunks(items, size):
    """A list in pieces of `size`, the last one shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


# --- losses: pure functions of logits ---


def target_logits(logits, ids, target_mask):
    """The shift by one: logits at position t-1 predict token t. (B, T, V), (B, T), (B, T) -> (M, V), (M,).

    M is the number of targets. In float32 at least: softmax in bf16 loses the small probabilities that a KL is made of.
    """
    mask = target_mask[:, 1:]
    picked = logits[:, :-1][mask]  # (M, V)
    return picked.float() if picked.dtype in (torch.bfloat16, torch.float16) else picked, ids[:, 1:][mask]


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


def sequence_logp(logits, ids, target_mask):
    """log p_theta of each row's targets together, (B,) in nats: what DPO and NPO compare with the frozen reference."""
    mask = target_mask[:, 1:]
    picked, targets = target_logits(logits, ids, target_mask)
    logp = torch.zeros_like(mask, dtype=picked.dtype)
    return logp.masked_scatter(mask, -F.cross_entropy(picked, targets, reduction="none")).sum(1)


# --- change me: the loss ---
# A method is a function of `ask` and the flags. ask("forget"), ask("learn"), ask("answer") run the model on that side
# of the batch and return a Side. The result names its terms: {"name": (weight, value)}; the loss is their weighted sum.


class Side(NamedTuple):
    """What a loss sees of one side of a batch."""

    logits: torch.Tensor  # (B, T, V), with gradient
    ids: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, T), the target mask
    count: int  # target tokens of this side in the whole global batch
    rows: int  # rows of this side in the whole global batch
    ref_logits: torch.Tensor | None  # (B, T, V), the frozen copy's, on the learn side
    ref_logp: torch.Tensor | None  # (B,), the frozen copy's sequence_logp, for dpo and npo


def icu(ask, args):
    """Eq. (6): L = L_fgt + alpha L_lrn + beta L_kl."""
    forget, learn = ask("forget"), ask("learn")
    return {  # Eq. (6)
        "forget": (args.forget_weight, forget_loss(forget.logits, forget.ids, forget.mask, forget.count)),
        "learn": (args.alpha, learn_loss(learn.logits, learn.ids, learn.mask, learn.count)),
        "kl": (args.beta, kl_term(learn, args)),
    }


def kumpr(ask, args):
    """Jang et al., arXiv:2210.01504, Eq. 1: gradient ascent, L = mean log p on the forget side and nothing else."""
    forget = ask("forget")
    return {"forget": (args.forget_weight, forget_loss(forget.logits, forget.ids, forget.mask, forget.count))}


def graddiff(ask, args):
    """Gradient difference (TOFU, arXiv:2401.06121, section 4): ascent on the forget side, descent on the learn side."""
    forget, learn = ask("forget"), ask("learn")
    return {
        "forget": (args.forget_weight, forget_loss(forget.logits, forget.ids, forget.mask, forget.count)),
        "learn": (args.alpha, learn_loss(learn.logits, learn.ids, learn.mask, learn.count)),
    }


def kl(ask, args):
    """KL minimisation (TOFU, arXiv:2401.06121, section 4): ascent on forget, KL to the original model on learn."""
    forget, learn = ask("forget"), ask("learn")
    return {
        "forget": (args.forget_weight, forget_loss(forget.logits, forget.ids, forget.mask, forget.count)),
        "kl": (args.beta, kl_term(learn, args)),
    }


def llmu(ask, args):
    """Yao et al., arXiv:2310.10683, Eq. 2-5: ascent + random answers to the forget prompts + KL on the learn side.

    The answers are suffixes of other rows' learn partners, --answers of them a row and epoch, their tokens the targets.
    """
    forget, answer, learn = ask("forget"), ask("answer"), ask("learn")
    return {
        "forget": (args.forget_weight, forget_loss(forget.logits, forget.ids, forget.mask, forget.count)),
        "learn": (args.alpha, learn_loss(answer.logits, answer.ids, answer.mask, answer.count)),
        "kl": (args.beta, kl_term(learn, args)),
    }


def po(ask, args):
    """Preference optimisation by likelihood: cross-entropy towards another answer (--answer), no forget term.

    This is what the released code computes for the paper's "DPO" rows. TOFU (arXiv:2401.06121) calls the variant with
    refusals IdkPO.
    """
    answer = ask("answer")
    return {"learn": (args.alpha, learn_loss(answer.logits, answer.ids, answer.mask, answer.count))}


def dpo(ask, args):
    """Rafailov et al., arXiv:2305.18290, Eq. 7: the answer is preferred (w), the text to forget is not (l).

    L = -log sigmoid(b [(log p(y_w|x) - log p_0(y_w|x)) - (log p(y_l|x) - log p_0(y_l|x))]), mean over rows.
    """
    win, lose = ask("answer"), ask("forget")
    win_ratio = sequence_logp(win.logits, win.ids, win.mask) - win.ref_logp  # (B,)
    lose_ratio = sequence_logp(lose.logits, lose.ids, lose.mask) - lose.ref_logp  # (B,)
    preference = -F.logsigmoid(args.dpo_beta * (win_ratio - lose_ratio)).sum() / max(lose.rows, 1)
    return {"forget": (args.forget_weight, preference)}


def npo(ask, args):
    """Zhang et al., arXiv:2404.05868, Eq. 3: DPO's losing half.

    L = -2/b log sigmoid(-b [log p(y|x) - log p_0(y|x)]), mean over rows. With b -> 0 it is gradient ascent; with b > 0
    the gradient fades once a text is forgotten.
    """
    lose = ask("forget")
    ratio = sequence_logp(lose.logits, lose.ids, lose.mask) - lose.ref_logp  # (B,)
    bounded = -2 / args.dpo_beta * F.logsigmoid(-args.dpo_beta * ratio).sum() / max(lose.rows, 1)
    return {"forget": (args.forget_weight, bounded)}


def kl_term(learn, args):
    """Eq. (4) for a learn side, or the released code's cross-entropy."""
    released = args.protocol == "released"
    return kl_loss(learn.logits, learn.ref_logits, learn.mask, learn.count, cross_entropy=released)


METHODS = {f.__name__: f for f in (icu, kumpr, kl, llmu, po, dpo, npo, graddiff)}

# --- end of change me ---


# --- the frozen copy (theta_0 of Eq. 4) ---


def cached_teacher(model, texts, *, batch_size=8):
    """rows -> the frozen copy's logits (B, T, V) for texts[rows], from last hidden states computed once, now.

    theta_0 never changes and neither do the learn texts, so its last hidden states (N x T x H, megabytes) and a copy of
    its output head give the exact KL without a second model in memory or a second forward pass a step. ValueError for a
    model whose logits are not its head applied to its last hidden state (logit scaling or capping): use --teacher live.
    """
    output, hidden = model.get_output_embeddings(), []
    with whole(output.parameters()):
        copied = {name: p.detach().clone() for name, p in output.named_parameters()}  # weight (V, H), perhaps bias (V,)
    if not set(copied) <= {"weight", "bias"}:
        raise ValueError(f"{type(model).__name__}: its output head is no linear layer: use --teacher live")

    def head(states):  # (B, T, H) -> (B, T, V)
        return F.linear(states, **copied)

    with torch.no_grad():
        for chunk in chunks(texts, batch_size):
            ids, attention_mask, _ = collate(chunk, model.device)
            inputs = {"input_ids": ids, "attention_mask": attention_mask, "use_cache": False}
            states = model.base_model(**inputs).last_hidden_state  # (B, T, H)
            if not hidden and not torch.allclose(head(states), model(**inputs).logits, atol=1e-3):
                raise ValueError(f"{type(model).__name__} changes its logits after the output head: use --teacher live")
            hidden += [h[: len(text.ids)].clone() for h, text in zip(states, chunk, strict=True)]

    def ref_logits(rows):
        with torch.no_grad():
            return head(torch.nn.utils.rnn.pad_sequence([hidden[r] for r in rows], batch_first=True))

    return ref_logits


def live_teacher(model, texts):
    """rows -> the frozen copy's logits (B, T, V) for texts[rows], by running it: the readable reference."""
    frozen = copy.deepcopy(model).requires_grad_(False)

    def ref_logits(rows):
        ids, attention_mask, _ = collate([texts[r] for r in rows], model.device)
        with torch.no_grad():
            return frozen(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits

    return ref_logits


@torch.no_grad()
def reference_logps(model, texts, *, batch_size=8):
    """The original model's sequence_logp of each text, (N,): asked once, before training, for dpo and npo."""
    logps = []
    for chunk in chunks(texts, batch_size):
        ids, attention_mask, target_mask = collate(chunk, model.device)
        logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
        logps.append(sequence_logp(logits, ids, target_mask))
    return torch.cat(logps)


REFUSALS = (" I have nothing to say about that.", " That is not something I know.", " I do not have this information.")


def answer_texts(samples, tokenizer, epoch, args, *, positions=None):
    """Other answers to the forget prompts, a list of Text a sample, only the answer's tokens targets.

    llmu: --answers suffixes of other rows' learn partners, drawn anew each epoch from (seed, epoch). Others: one
    answer, the same all along: the suffix of the row's own partner (--answer neighbour) or a refusal. What does not fit
    into the model's `positions` is cut.
    """
    rng = np.random.default_rng([args.seed, epoch, 1])

    def answers(row, sample):
        if args.method == "llmu":
            others = np.delete(np.arange(len(samples)), row)
            picked = rng.choice(others, size=min(args.answers, len(others)), replace=False)
            suffixes = [samples[i].learn.ids[samples[i].learn.cut :] for i in picked]
        elif args.answer == "refusal":
            suffixes = [encode(tokenizer, REFUSALS[row % len(REFUSALS)], inside=True)]
        else:
            suffixes = [sample.learn.ids[sample.learn.cut :]]
        cut = sample.forget.cut
        asked = sample.forget.ids[:cut]
        return [Text((asked + suffix)[:positions], cut, cut, sample.forget.prompt) for suffix in suffixes]

    return [answers(row, sample) for row, sample in enumerate(samples)]


# --- training: one epoch of the one loop ---


def side_asker(model, samples, batch, answers, reference):
    """`ask` for the rows `batch` (indices into samples) of a global batch: returns a Side with this process's rows.

    A loss is this process's sum divided by the count of the whole batch, so the parts of all processes add up to the
    loss of one. reference: {"logits": rows -> (B, T, V) of the learn side, "forget" / "answer": (N,) sequence_logp}.
    """

    def texts_of(name, rows):
        return [text for i in rows for text in (answers[i] if name == "answer" else [getattr(samples[i], name)])]

    def ask(name):
        rows, whole = share(batch), texts_of(name, batch)
        texts = texts_of(name, rows)
        # Without a row a process still runs the model, on a text without targets: the others wait for its gradients.
        ids, attention_mask, target_mask = collate(texts or [Text([0, 0], 2, 2, [])], model.device)
        B = len(texts)
        logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits[:B]  # (B, T, V)
        ref_logits = None
        if name == "learn" and "logits" in reference:
            ref_logits = reference["logits"](rows) if rows else logits.detach()
        ref_logp = reference[name][rows] if name in reference else None
        count = sum(len(text.ids) - max(text.t0, 1) for text in whole)
        return Side(logits, ids[:B], target_mask[:B], count, len(whole), ref_logits, ref_logp)

    return ask


def train_epoch(engine, samples, active, epoch, *, answers, reference, progress, args, bar, at_step=lambda: None):
    """One pass over the active samples, packed densely into batches: {"loss": mean over steps, "loss_forget": ...}.

    The order is a function of (seed, epoch) alone, so an epoch that was interrupted goes on behind its first
    `progress.step` batches. A step whose loss or gradient is not finite never reaches the weights: it is counted and
    left out; after five in a row Diverged is raised with the weights as they were.
    """
    order = np.random.default_rng([args.seed, epoch]).permutation(active).tolist()
    batches = chunks(order, args.batch_size)
    for batch in batches[progress.step :]:
        with autocast(args):
            terms = METHODS[args.method](side_asker(engine.model, samples, batch, answers, reference), args)
            loss = sum(weight * value for weight, value in terms.values())
        names, parts = ["loss", *(f"loss_{name}" for name in terms)], [loss, *(value for _, value in terms.values())]
        values = dict(zip(names, sum_over_ranks([part.detach() for part in parts], args.device), strict=True))
        if math.isfinite(values["loss"]) and engine.step(loss):
            progress.count_step(values)
        else:
            progress.skip_step()
            if progress.skipped_in_a_row == 5:
                raise Diverged(f"loss {values['loss']:.4g}; it or its gradient was not finite in five steps in a row")
        bar.set_postfix_str(f"loss {values['loss']:.3f}, {len(active)} to forget", refresh=False)
        bar.update(1 / len(batches))
        at_step()
    return {name: value / progress.steps_taken for name, value in progress.sums.items()}


class Diverged(RuntimeError):
    """Five steps in a row without a finite loss and gradient."""


class Progress:
    """Where a run is, besides its weights: what a state keeps so that it can go on from there."""

    def __init__(self):
        self.forgotten = set()  # indices of samples left out of training (Eq. 5)
        self.epoch, self.step = 0, 0  # the epoch in progress (0: the measuring before) and its batches done
        self.steps_taken, self.sums = 0, {}  # of the epoch in progress: steps and the sums of their losses
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.stopped = None  # why, once it has
        self.sizes = {}  # bytes of the run's files at the end of the last whole epoch

    def count_step(self, values):
        self.step, self.steps_taken, self.skipped_in_a_row = self.step + 1, self.steps_taken + 1, 0
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}

    def skip_step(self):
        self.step, self.skipped_steps, self.skipped_in_a_row = (
            self.step + 1, self.skipped_steps + 1, self.skipped_in_a_row + 1
        )  # fmt: skip

    def next_epoch(self):
        self.epoch, self.step, self.steps_taken, self.sums = self.epoch + 1, 0, 0, {}


def autocast(args):
    """bf16 autocast with float32 weights: in pure bf16 an update of 5e-6 rounds to nothing."""
    device = torch.device(args.device).type
    return torch.autocast(device, torch.bfloat16) if args.dtype == "bf16" else contextlib.nullcontext()


# --- engines: who holds the optimiser ---


class PlainEngine:
    """One process: the model and Adam as they are."""

    def __init__(self, model, args):
        self.model = model
        # Adam's betas are the released code's; the paper names Adam and the learning rate.
        self.optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.98))

    def step(self, loss):
        """One optimiser step; False, and the weights as they were, where a gradient is not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
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
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / "training.safetensors")

    def load(self, folder):
        tensors = load_file(folder / "training.safetensors", device=str(self.model.device))
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(tensors[name])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in tensors]
            if keys:
                values = {key: tensors[f"adam.{key}.{name}"] for key in keys}
                self.optimizer.state[parameter] = values | {"step": values["step"].cpu()}


class ZeroEngine:
    """Several processes: DeepSpeed's ZeRO, with the same four verbs; ds_config.json is its only configuration."""

    def __init__(self, model, args):
        import deepspeed

        config = knn.read_json(Path(__file__).with_name("ds_config.json"))
        config["zero_optimization"]["stage"] = args.zero
        if args.offload:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": args.device != "cpu"}
        # DeepSpeed insists on a batch size, for its accounts only: the batches are made in train_epoch.
        config["train_micro_batch_size_per_gpu"] = 1
        if args.zero == 3:  # tensor by tensor: no device ever holds the whole model
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
            model.to(args.device)  # its buffers
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.98))
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.model = model

    def step(self, loss):
        # DeepSpeed takes the mean of the processes' gradients; ours are parts of one sum.
        self.engine.backward(loss * WORLD_SIZE)
        self.engine.step()
        return not self.optimizer.overflow  # a gradient that is not finite, on any rank: all have left the step out

    def save(self, folder):
        """DeepSpeed's own files, one a process; they are pickles, so a state is checked before it is loaded."""
        self.engine.save_checkpoint(str(folder), tag="zero", save_latest=False)

    def load(self, folder):
        path, _ = self.engine.load_checkpoint(str(folder), tag="zero")
        if path is None:
            raise ValueError("DeepSpeed found nothing to load")


def whole(parameters):
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
        with whole([tensor]):
            if is_main:
                found[name] = tensor.detach().to("cpu", copy=True)
    return found


def start_processes(device, timeout=30):
    """Joins the processes that a launcher has started, if it has.

    A process that died is noticed after `timeout` minutes at the latest; measuring can keep the others waiting long.
    """
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
    deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", timeout=wait)


def default_device():
    """cuda where there is one: with several processes, each its own."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{LOCAL_RANK}" if LAUNCHED else "cuda"


# --- evaluation ---

MEASURES = ("el10", "ma", "bleu", "bertscore", "entropy")


def measure(model, tokenizer, samples, args, *, with_el=True):
    """Every measure of section 5.2 for every sample, active or not: a list of dicts, a line of samples.jsonl each.

    Fractions are 0-1, entropy in bits; el10 is None for a text too short for one 10-gram, and for all where
    `with_el` is False. Each process measures its share of the samples (ZeRO-3: all of them), all return all.
    """
    if lockstep(args):
        # Those of the first process for all: two that differ in a last digit would go on with other samples.
        return gather([measure_share(model, tokenizer, samples, args, with_el=with_el)])[0]
    return gather(measure_share(model, tokenizer, share(samples), args, with_el=with_el))


def measure_share(model, tokenizer, samples, args, *, with_el=True):
    """`measure` for the samples of one process; a model whose logits are not finite measures nothing (None)."""
    first = 1 + len(bos_of(tokenizer))
    released = args.protocol == "released"
    ids, attention_mask, _ = collate([sample.forget for sample in samples], args.device)
    with autocast(args):
        try:
            el, ma = metrics.el_and_ma(
                model, ids, attention_mask, n=10 if with_el else None, ma_start=first,
                # Released code: EL over t = 150 .. T-n of 200, that is from the suffix on, as a share of the
                # reference's n-grams; Eq. (7), (8): over t = 1 .. T-n, as a share of the generation's.
                start=[sample.forget.cut for sample in samples] if released else first,
                share_of="reference" if released else "generation",
            )  # fmt: skip
        except FloatingPointError:
            return [{"id": sample.id, **dict.fromkeys(MEASURES), "generation": ""} for sample in samples]
        prompts = [sample.forget.prompt for sample in samples]
        lengths = [len(sample.forget.ids) - sample.forget.cut for sample in samples]
        generations = metrics.beam_generate(model, prompts, lengths, num_beams=args.num_beams)
    texts = [tokenizer.decode(g, skip_special_tokens=True, clean_up_tokenization_spaces=False) for g in generations]
    references = [sample.suffix for sample in samples]
    f1 = metrics.bertscore(texts, references, args.bert, device=args.device)[2]
    return [
        {
            "id": sample.id,
            "el10": number(el[i]),
            "ma": number(ma[i]),
            "bleu": number(metrics.bleu(text, sample.suffix)),
            "bertscore": number(f1[i]),
            "entropy": number(metrics.token_entropy(generations[i])),
            "generation": text,
        }
        for i, (sample, text) in enumerate(zip(samples, texts, strict=True))
    ]


def number(x):
    """A float for JSON, to 6 digits; None for NaN."""
    return None if math.isnan(x) else round(float(x), 6)


def mean(values):
    """The mean of what is not None; None of nothing."""
    values = [value for value in values if value is not None]
    return round(sum(values) / len(values), 6) if values else None


def mean_measures(rows):
    """The mean of each measure over the rows of `measure`."""
    return {name: mean(row[name] for row in rows) for name in MEASURES}


def measure_perplexities(model, tokenizer, texts_by_name, args):
    """{"ppl_NAME": perplexity} of the --ppl files; each process takes its share of the windows (ZeRO-3: all)."""
    found, how = {}, {"released": args.protocol == "released"} | ({} if lockstep(args) else {"part": share})
    for name, texts in texts_by_name.items():
        with autocast(args):
            sums = metrics.perplexity_sums(model, tokenizer, texts, **how)
        total, count = sums if lockstep(args) else sum_over_ranks(sums, args.device)
        found[f"ppl_{name}"] = number(metrics.perplexity_of(total, count))
    return found


def measures_before(model, tokenizer, inputs, args):
    """(measure, measure_perplexities) of the untouched model, looked up if a run has measured the same before.

    All runs of a comparison begin with the same model and texts. The answer is kept under a hash of everything it
    depends on, the code included; a model of the hub without a pinned --revision is measured anew.
    """
    pinned = args.revision if re.fullmatch("[0-9a-f]{40}", args.revision or "") else None
    weights, device = fingerprint(args.model) or pinned, torch.device(args.device).type
    about = [weights, args.model, fingerprint(args.bert), args.bert, args.protocol, args.dtype, device, args.num_beams]
    about += [[(s.id, s.suffix, s.forget) for s in inputs.samples], inputs.ppl_texts]
    about += [fingerprint(metrics.__file__), inspect.getsource(measure_share), versions()]
    shares = 1 if lockstep(args) else WORLD_SIZE
    about += [shares, torch.get_num_threads()]  # they decide the shape of batches, and so the last bits
    path = knn.cache_folder("before") / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()}.json"
    if weights and all(gather([path.is_file()])):
        with contextlib.suppress(ValueError):  # damaged: measured again
            return knn.read_json(path)
    found = [
        measure(model, tokenizer, inputs.samples, args),
        measure_perplexities(model, tokenizer, inputs.ppl_texts, args),
    ]
    if is_main and weights:
        try:
            knn.write_json(path, found)
        except OSError as error:
            print0(f"note: the measures before are not kept for the next run ({error})")
    return found


# --- refinement (Eq. 5) and the stop rule ---

THRESHOLDS = ("el10", "ma", "bertscore", "bleu")
PAPER_THRESHOLDS = 0.0499, 0.5994  # EL10 and MA, section 5.4: what GPT-Neo scores on Pile text it was not trained on


def refine(forgotten, rows, thresholds, args):
    """Eq. (5): the samples whose generation no longer resembles their suffix; following epochs leave them out.

    forgotten: indices so far; rows: the measures of all samples. Returns the new set.
    """
    a, b = thresholds["bertscore"], thresholds["bleu"]
    if args.protocol == "released":
        # Released code: OR, and a sample comes back when a later epoch measures it as remembered;
        # paper: AND, and a forgotten sample stays out.
        return {i for i, row in enumerate(rows) if row["bertscore"] < a or row["bleu"] < b}
    return forgotten | {i for i, row in enumerate(rows) if row["bertscore"] < a and row["bleu"] < b}  # Eq. (5)


def stop_reason(means, n_active, epoch, thresholds, args):
    """Why to stop after this epoch, or None: both means under their thresholds, nothing active, or the epoch cap."""
    if args.eval_only:
        return "eval only"
    measured = [(means[name], thresholds[name]) for name in ("el10", "ma") if means[name] is not None]
    if measured and all(value < threshold for value, threshold in measured):
        return "thresholds"
    if n_active == 0:
        return "all forgotten"
    return "max epochs" if epoch >= args.max_epochs else None


def calibrate(model, tokenizer, samples, unseen, args):
    """The thresholds of this run: {"el10", "ma", "bertscore", "bleu"}.

    --thresholds auto: EL and MA of the original model on text of the same kind that it was not trained on, which is
    what the fixed 0.0499 and 0.5994 are in Jang et al. --bert-threshold auto: the mean F1 between the true suffixes
    of different samples, what two unrelated texts of this kind score under this encoder.
    """
    thresholds = {"bleu": args.bleu_threshold}
    if args.thresholds == "auto":
        rows = measure(model, tokenizer, unseen, args)
        thresholds.update({name: mean(row[name] for row in rows) for name in ("el10", "ma")})
        # Text never seen is often never extracted: EL 0, which nothing can be under. The paper's figure is the floor.
        thresholds["el10"] = max(thresholds["el10"] or 0, PAPER_THRESHOLDS[0])
    else:
        thresholds.update(dict(zip(("el10", "ma"), args.thresholds, strict=True)))
    if args.bert_threshold == "auto":
        suffixes = [sample.suffix for sample in samples]
        shifted = [suffixes[k:] + suffixes[:k] for k in range(1, min(5, len(suffixes)))]
        f1 = metrics.bertscore(suffixes * len(shifted), sum(shifted, []), args.bert, device=args.device)[2]
        thresholds["bertscore"] = number(f1.mean())
    else:
        thresholds["bertscore"] = args.bert_threshold
    return thresholds


# --- plumbing: models ---


def check_model(name, flag="--model", *, allow_pickle=False, revision=None):
    """Config and tokenizer of a causal LM, without its weights: (config, tokenizer). A folder, or a name on the hub.

    ValueError in one line for a folder without config, weights (every shard of them) or tokenizer, for weights that
    are only there as pickle, for an encoder-decoder model, and for a hub that does not answer.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    huggingface_hub.logging.set_verbosity_error()  # a hub that does not answer is one line, ours
    folder = Path(name)
    if not folder.is_dir() and (folder.exists() or name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise ValueError(f"{flag} {name}: no such folder")
    if folder.is_dir():
        check_files(folder, flag, allow_pickle)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:  # OSError, ValueError, KeyError, ...: to a user they are one thing
        what = "unreadable config or tokenizer" if folder.is_dir() else "no such folder, and not to be had from the hub"
        raise ValueError(f"{flag} {name}: {what}; pass {flag} DIR ({first_line(error)})") from error
    if config.is_encoder_decoder or config.model_type not in CAUSAL:
        raise ValueError(f"{flag} {name}: a {config.model_type} is not a decoder-only language model")
    return config, tokenizer


def first_line(error):
    """The first line of an exception's message, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_files(folder, flag, allow_pickle):
    """A model folder holds config.json, a tokenizer and every weight file its index names, or ValueError."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{flag} {folder}: no config.json, so not a model folder")
    # transformers makes lists as long as a config says; a damaged one would fill the memory.
    if huge := [n for n in whole_numbers(knn.read_json(folder / "config.json")) if n > 10**8]:
        raise ValueError(f"{flag} {folder}: config.json is damaged, no model has {str(huge[0])[:20]} of anything")
    tokenizers = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
    if not any((folder / file).is_file() for file in tokenizers):
        raise ValueError(f"{flag} {folder}: no tokenizer ({', '.join(tokenizers)})")
    weights = weight_files(folder)
    if not weights:
        raise ValueError(f"{flag} {folder}: no weights (model.safetensors)")
    for file in weights:
        if not file.is_file():
            raise ValueError(f"{flag} {folder}: the weights are incomplete, {file.name} is missing")
    if weights[0].suffix != ".safetensors" and not allow_pickle:
        raise ValueError(
            f"{flag} {folder}: the weights are a pickle ({weights[0].name}), which can run code when it is loaded; "
            "convert them to safetensors, or pass --allow-pickle if you trust them"
        )


def whole_numbers(value):
    """All whole numbers in a JSON value."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if type(value) is int else [n for item in items for n in whole_numbers(item)]


def weight_files(folder):
    """The weight files of a model folder, safetensors first; those an index names, whether they are there or not."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            return [folder / f for f in sorted(set(knn.read_json(index)["weight_map"].values()))]
    return []


def load_model(name, *, dtype="float32", device="cpu", allow_pickle=False, revision=None, flag="--model"):
    """(model, tokenizer), the model in eval mode: dropout 0 (released code), and nothing else differs in these models.

    dtype "bf16" means float32 weights under autocast (see `autocast`). Errors as check_model; weights that cannot be
    read or lack a tensor of the architecture are an error too, where transformers would leave that tensor random.
    """
    from transformers import AutoModelForCausalLM, logging

    _, tokenizer = check_model(name, flag, allow_pickle=allow_pickle, revision=revision)
    logging.disable_progress_bar()
    # transformers 5 would take the dtype of the config (float16 for opt-125m), so it is always said.
    options = {"dtype": getattr(torch, "float32" if dtype == "bf16" else dtype), "revision": revision}
    options |= {"use_safetensors": None if allow_pickle else True, "output_loading_info": True}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(name, **options)
    except Exception as error:  # SafetensorError, OSError, RuntimeError, ...
        raise ValueError(f"{flag} {name}: the weights cannot be loaded ({first_line(error)})") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{flag} {name}: the weights lack {len(missing)} tensors, the first is {missing[0]}")
    return model.eval().to(device), tokenizer


def save_model(model, tokenizer, folder, weights=None):
    """Weights (default: the model's own) and tokenizer into `folder`, complete or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, state_dict=weights)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


# --- plumbing: the run folder ---

GROWING = ("metrics.jsonl", "samples.jsonl", "timing.jsonl")  # an epoch adds to them
OLD_CONFIG = "config.json.old"  # config.json of a run that is being removed: it is none any more
# In the order in which they are removed. The last one says that those before it may go, also after a kill.
RUN_FILES = (
    "summary.json", "state", "model", "model.part", "tasks-before", "tasks-after", "table.md", "table.csv", "cases.md",
    "curves.png", "tradeoff.png", "tasks.md", *GROWING, OLD_CONFIG,
)  # fmt: skip


def check_out(out, overwrite):
    """`out` can become a run folder: writable, and not already one, or ValueError."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, not a folder")
    if (out / "config.json").exists() and not overwrite:
        raise ValueError(f"--out {out}: already holds a run; pass --overwrite to replace it, or --resume to go on")
    # Without config.json: what a process killed in start_run_folder has left. It removes nothing but an old run (then
    # OLD_CONFIG is there), holds the lock and writes a state.
    names = RUN_FILES if (out / OLD_CONFIG).exists() else ["state"] if (out / ".lock").exists() else []
    own = {out / name for name in (".lock", *names)} | set(leftovers(out))
    if out.is_dir() and not set(out.iterdir()) <= own and not (out / "config.json").exists():
        raise ValueError(f"--out {out}: holds files that are no run; choose another folder")
    ancestor = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise ValueError(f"--out {out}: cannot write in {ancestor}")


def leftovers(out):
    """What a killed process left of a JSON file that it was writing."""
    return list(out.glob("*.json.*.tmp"))


def start_run_folder(out, config):
    """A run folder with its first state, then its config.json: with that it is a run, and can be gone on with.

    Every process takes part. Of a run that was there only its own files are removed, its config.json first. So a kill
    at any moment leaves the old run, the new one, or none, and then the same command starts again.
    """
    if is_main:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "config.json").is_file():
            (out / "config.json").replace(out / OLD_CONFIG)
            sync(out)
        for name in RUN_FILES:
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            else:
                (out / name).unlink(missing_ok=True)
    wait_for_all()
    save_state(out, None, Progress())
    if is_main:
        knn.write_json(out / "config.json", config)


# Flags that do not change a run.
NOT_SETTINGS = ("debug", "dry_run", "overwrite", "resume", "timeout", "save_every")


def describe_run(args, thresholds):
    """config.json: every flag, thresholds, versions, git revision and fingerprints."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    flags = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    flags["device"] = torch.device(args.device).type  # cuda:0, cuda:1, ... are the processes of one run
    return {
        **flags,
        "processes": WORLD_SIZE,
        "thresholds_used": thresholds,
        "versions": versions(),
        "git": git.stdout.strip() or None,
        "sha256": {"pairs": fingerprint(args.pairs), "model": fingerprint(args.model)}
        | {"bert": fingerprint(args.bert), "unseen": fingerprint(args.unseen) if args.unseen else None}
        | {f"ppl {item}": fingerprint(perplexity_file(item, args)) for item in args.ppl},
    }


def versions():
    names = ("torch", "transformers", "tokenizers", "numpy", "bert-score", "sacrebleu")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def fingerprint(name):
    """sha256 of a file, or of all that a model folder loads; None for a name on the hub."""
    path = Path(name)
    files = [path] if path.is_file() else []
    if path.is_dir():  # config, generation config, tokenizer, weights
        files = [*sorted(f for end in ("json", "model", "txt") for f in path.glob(f"*.{end}")), *weight_files(path)]
    return hashlib.sha256("".join(knn.sha256_of(file) for file in files).encode()).hexdigest() if files else None


def append(path, rows):
    """Rows to a JSONL file, on disk when this returns."""
    with open(path, "a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def only_owner(out):
    """Holds the run folder for this process; ValueError with the owner's pid if another one is writing it."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
        except OSError:
            lock.seek(0)
            raise ValueError(f"--out {out}: process {lock.read().strip()} is writing this run") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        for file in leftovers(out):
            file.unlink()
        yield


# --- plumbing: states, to go on after an interruption ---


def save_state(out, engine, progress):
    """A complete state or none: written aside, synced, a manifest with sizes and sha256 last, then renamed.

    Every process takes part; the two newest are kept. The state of epoch 0 has no weights: they are still those of
    --model. A full disk leaves the states before as they were (ValueError).
    """
    folder = out / "state" / f"epoch{progress.epoch:05d}-step{progress.step:06d}"
    if folder.exists():  # a signal before the next step: to write the same again would be a moment without it
        return
    part = folder.with_name(folder.name + ".part")
    try:
        if is_main:
            for left in folder.parent.glob("*.part"):  # by a process that was killed
                shutil.rmtree(left)
            part.mkdir(parents=True)
        wait_for_all()
        if progress.epoch > 0:
            engine.save(part)
        knn.write_json(part / f"random-{RANK}.json", random_states())
        wait_for_all()
        if is_main:
            knn.write_json(part / "progress.json", vars(progress) | {"forgotten": sorted(progress.forgotten)})
            files = sorted(path for path in part.rglob("*") if path.is_file())
            for path in files:
                sync(path)
            knn.write_json(part / "manifest.json", {
                str(path.relative_to(part)): {"bytes": path.stat().st_size, "sha256": knn.sha256_of(path)}
                for path in files
            })  # fmt: skip
            sync(part / "manifest.json")
            sync(part)
            part.rename(folder)
            sync(folder.parent)
            for old in states(out)[2:]:
                shutil.rmtree(old)
    except Exception as error:  # OSError, and safetensors' and torch's own for a full disk
        shutil.rmtree(part, ignore_errors=True)
        why = f"no state could be written ({first_line(error)}); {way_out(out, error)}"
        raise ValueError(f"{out / 'state'}: {why}") from error
    wait_for_all()


def way_out(out, error):
    """What to do after an error of the file system; safetensors' and torch's own for a full disk have no number."""
    kept = ", ".join(state.name for state in states(out))
    room = "Make room, then " if getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT) else "Then "
    return f"states intact: {kept or 'none'}. {room}{'--resume' if kept else 'the same command again'}"


def wait_for_all():
    if WORLD_SIZE > 1:
        dist.barrier()


def sync(path):
    """What was written to a file or folder is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def states(out):
    """The complete states of a run, newest first."""
    found = (out / "state").glob("epoch*-step*") if (out / "state").is_dir() else []
    return sorted((path for path in found if path.is_dir() and path.suffix != ".part"), reverse=True)


def broken_part(state):
    """What is wrong with a state, measured against its manifest, or None."""
    try:
        manifest = knn.read_json(state / "manifest.json")
        for name, expected in manifest.items():
            path = state / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if knn.sha256_of(path) != expected["sha256"]:
                return f"{name} has changed (sha256)"
        found = {str(path.relative_to(state)) for path in state.rglob("*") if path.is_file()}
        if strange := sorted(found - set(manifest) - {"manifest.json"}):
            return f"{strange[0]} is not in its manifest"
        return None if "progress.json" in manifest else "progress.json is missing"
    except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        return f"manifest.json is unreadable ({first_line(error)})"


def newest_state(out):
    """The newest state that is whole; a broken one is named. ValueError where there is none."""
    for state in states(out):
        problem = broken_part(state)
        if problem is None:
            return state
        print0(f"warning: state {state.name} is damaged: {problem}; looking for an older one")
    raise ValueError(f"--resume: no valid state in {out / 'state'}; start again with --overwrite")


def load_state(state, engine):
    """Weights, optimiser and random states are those of `state`; returns its Progress.

    ValueError for a state that keeps its checksums and still is not what save_state writes.
    """
    try:
        progress = Progress()
        vars(progress).update(knn.read_json(state / "progress.json"))
        progress.forgotten = set(progress.forgotten)
        if progress.epoch > 0:
            engine.load(state)
        restore_random_states(knn.read_json(state / f"random-{RANK}.json"))
    except Exception as error:  # KeyError, TypeError, SafetensorError, ...
        raise ValueError(f"{state}: cannot be loaded ({type(error).__name__}: {first_line(error)})") from error
    return progress


def cut_back(out, sizes):
    """Removes what the run's growing files hold of an epoch that was not finished."""
    have = file_sizes(out)
    for name, size in sizes.items():
        if have.get(name, 0) < size:
            raise ValueError(
                f"{out / name}: {have.get(name, 0)} bytes, and there were {size}; begin again with --overwrite"
            )
    for name in have:
        os.truncate(out / name, sizes.get(name, 0))


def file_sizes(out):
    return {name: (out / name).stat().st_size for name in GROWING if (out / name).is_file()}


def random_states():
    """The random states of python, numpy and torch, as JSON holds them."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    found = {"python": [version, list(internal), gauss], "numpy": [kind, keys.tolist(), *rest]}
    found["torch"] = torch.get_rng_state().tolist()
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state().tolist()
    return found


def restore_random_states(found):
    version, internal, gauss = found["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(found["numpy"]))
    torch.set_rng_state(torch.tensor(found["torch"], dtype=torch.uint8))
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(found["cuda"], dtype=torch.uint8))


def check_resume(args):
    """The config.json of the run to go on with; ValueError that shows what differs from this command."""
    path = Path(args.out) / "config.json"
    if not path.is_file():
        raise ValueError(f"--resume: {args.out} holds no run; begin it with the same command without --resume")
    before = knn.read_json(path)
    used = before.get("thresholds_used") if isinstance(before, dict) else None
    values = [used.get(name) for name in THRESHOLDS] if isinstance(used, dict) else [None]
    if not all(type(value) in (int, float) and 0 <= value < 1e9 for value in values):
        raise ValueError(f"{path}: is not what a run wrote there; start again with --overwrite")
    now = json.loads(json.dumps(describe_run(args, used)))
    differ = [name for name in now if name not in ("out", "versions", "git") and now[name] != before.get(name)]
    if differ:
        changes = "; ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in differ)
        raise ValueError(f"--resume: the run was started with other settings or data: {changes}")
    return before


class Stop:
    """SIGTERM and Ctrl-C: the run saves its state and ends, at the next step or out of the middle of measuring."""

    def __init__(self):
        self.signal, self.measuring = None, False

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        first, self.signal = self.signal is None, number
        # The weights do not change while measuring. Several processes have to leave together, so they wait for a step.
        if first and self.measuring and not LAUNCHED:
            raise Interrupted(number)

    def check(self):
        """Raises Interrupted on every process if one of them was asked to stop."""
        asked = self.signal or 0
        if WORLD_SIZE > 1:
            asked = int(max(gather([asked])))
        if asked:
            self.signal = asked
            raise Interrupted(asked)


class Interrupted(Exception):
    """By a signal, whose number it holds."""


# --- plumbing: what a person sees ---

LOSSES = ("loss", "loss_forget", "loss_learn", "loss_kl")
HEADER = " epoch active   EL10     MA   BLEU   BERT entropy     loss  forget   learn      kl"


def epoch_text(row):
    """One aligned line an epoch, under HEADER."""

    def cell(name, width, digits):
        value = row[name]
        return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"

    fractions = [cell(name, 6, 3) for name in ("el10", "ma", "bleu", "bertscore")]
    return " ".join(
        [f"{row['epoch']:>6} {row['active']:>6}", *fractions, cell("entropy", 7, 2)]
        + [cell(name, 8 if name == "loss" else 7, 3) for name in LOSSES]
    )


def alarms(rows):
    """What a person should hear of a run so far, given the rows of metrics.jsonl: {kind: sentence}."""
    start, now = rows[0], rows[-1]
    heard = {}
    if now["ma"] is None:
        return {"collapse": "the model's logits are not finite"}
    if now["entropy"] < 0.5 * start["entropy"]:
        fell = f"from {start['entropy']:.2f} to {now['entropy']:.2f} bits"
        heard["collapse"] = f"the entropy of the generations fell {fell}, the model repeats itself"
    for name in (name for name in now if name.startswith("ppl_")):
        before, after = (math.inf if row[name] is None else row[name] for row in (start, now))
        if after > 2 * before:
            heard["collapse"] = f"{name} went from {before:.1f} to {after:.1f}, the model lost language"
    moved = max((abs(now[name] - start[name]) for name in ("el10", "ma") if now[name] is not None), default=0)
    losses = [row["loss"] for row in (rows[1], now) if row["loss"] is not None] if now["epoch"] >= 3 else []
    if losses and moved < 1e-3 and abs(losses[-1] - losses[0]) < 1e-2 * abs(losses[0]):
        heard["still"] = f"EL10, MA and the loss have not moved in {now['epoch']} epochs: raise --lr"
    return heard


def thresholds_text(thresholds, args):
    """When the run stops and what counts as forgotten."""
    both = "or" if args.protocol == "released" else "and"
    return (
        f"stop at EL10 < {thresholds['el10']:.4f} and MA < {thresholds['ma']:.4f}; "
        f"forgotten is BERTScore < {thresholds['bertscore']:.3f} {both} BLEU < {thresholds['bleu']:g}"
    )


def plan_text(args, inputs):
    """What the run will do, in a few lines."""
    n = len(inputs.samples)
    weights = f"forget {args.forget_weight:g}, alpha {args.alpha:g}, beta {args.beta:g}"
    tokens = sum(len(sample.forget.ids) for sample in inputs.samples)
    lines = [
        f"{'measure only' if args.eval_only else args.method}, {args.protocol} protocol: {weights}, lr {args.lr:g}, "
        f"batch {min(args.batch_size, n)}, at most {args.max_epochs} epochs, seed {args.seed}",
        f"{args.model} ({args.dtype}, {args.device}), {n} pairs, {tokens} tokens",
    ]
    if inputs.n_cut:
        lines.append(f"note: {inputs.n_cut} learn partners are cut to the model's positions")
    if short := sum(len(s.forget.ids) <= 10 for s in inputs.samples):
        lines.append(f"note: {short} of {n} texts have no 10-gram to extract and count in MA only")
    return "\n".join(lines)


# --- what a run needs ---


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
    measuring = (2 << 30) + 4 * min(64, -(-len(samples) // shares)) * T * (V + 2 * config.num_hidden_layers * H)
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


def needs_text(config, samples, args):
    """Memory a process for 1 to 8 processes, and the training time of an epoch at 40% of this device's speed."""
    lines = ["memory a process, estimated (GB):"]
    for processes in (1, 2, 3, 4, 6, 8):
        parts = memory_estimate(config, samples, args, processes)
        cells = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        lines.append(
            f"  {processes} process{'es' if processes > 1 else '  '}: {sum(parts.values()) / 1e9:6.2f} = {cells}"
        )
    flops, speed = epoch_flops(config, samples), 0.4 * measured_flops(args.device, args.dtype)
    lines.append(
        f"training an epoch with all samples active: {flops / 1e12:.2f} TFLOP, about {flops / speed:.0f} s on one "
        f"{args.device} at 40% of its measured {speed / 0.4 / 1e9:.0f} GFLOP/s; measuring EL comes on top"
    )
    return "\n".join(lines)


# --- flags ---


def one_of(names):
    """An argparse type: one of `names`, or an error that names the nearest."""

    def check(value):
        if value not in names:
            near = "".join(f", did you mean {name}?" for name in difflib.get_close_matches(value, names, 1))
            raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(names)}{near}")
        return value

    return check


def above(low, kind=float, *, equal=False):
    """An argparse type: a finite number above `low` (or equal to it)."""

    def check(value):
        try:
            x = kind(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{value!r} is not a number ({kind.__name__})") from None
        if not (math.isfinite(x) and (x >= low if equal else x > low)):
            raise argparse.ArgumentTypeError(f"{value} is not a finite number {'>=' if equal else '>'} {low}")
        return x

    return check


def thresholds_flag(value):
    """An argparse type: 'paper', 'auto' or 'EL,MA'."""
    if value in ("paper", "auto"):
        return value
    try:
        el, ma = (above(0)(x) for x in value.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{value!r} is not 'paper', 'auto' or two numbers > 0, 0.05,0.6") from None
    return [el, ma]


def auto_or_number(value):
    """An argparse type: 'auto' or a number above 0."""
    return value if value == "auto" else above(0)(value)


# fmt: off
def parse_args(argv=None):
    """The flags, one a line. Defaults are the paper's 125M recipe (section 5.4)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = knn.flag_error  # one line and exit 2, like every other error
    natural, positive, weight = above(0, int, equal=True), above(0, int), above(0, equal=True)

    g = parser.add_argument_group("data and models")
    g.add_argument("--pairs", metavar="FILE", help="pairs.jsonl from knn.py")
    g.add_argument("--model", required=True, metavar="DIR", help="the causal LM: a folder, or a name on the hub")
    g.add_argument("--bert", default="bert-base-uncased", metavar="DIR", help="BERTScore's encoder: a folder, a hub name, or minilm (%(default)s)")
    g.add_argument("--ppl", nargs="+", default=[], metavar="NAME[=FILE]", help="texts to measure perplexity on before and after; pile and wikitext are known")
    g.add_argument("--data", metavar="DIR", help="where the known perplexity files lie (default: fetched and cached)")
    g.add_argument("--out", metavar="DIR", help="the run folder to write")
    g.add_argument("--overwrite", action="store_true", help="replace a run that is there")
    g.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out; give the same flags again")
    g.add_argument("--revision", metavar="SHA", help="hub revision of --model")
    g.add_argument("--allow-pickle", action="store_true", help="also load pickled weights, which can run code: only if you trust them")

    g = parser.add_argument_group("method")
    g.add_argument("--method", default="icu", type=one_of(list(METHODS)), help=f"one of {', '.join(METHODS)} (%(default)s)")
    g.add_argument("--protocol", default="paper", type=one_of(["paper", "released"]), help="the paper's text, or the authors' released code (%(default)s)")
    g.add_argument("--context", action="store_true", help="put each text's context in front of its prefix, as the model once read it")
    g.add_argument("--targets", type=one_of(["suffix", "all"]), help="the tokens that the losses see (suffix; released protocol: all)")
    g.add_argument("--forget-weight", type=weight, help="weight of the forget term (1; llmu 0.5)")
    g.add_argument("--alpha", type=weight, help="weight of the learn or answer term, Eq. 6 (icu 0.5, others 1)")
    g.add_argument("--beta", type=weight, help="weight of the KL term, Eq. 6 (1)")
    g.add_argument("--dpo-beta", default=0.1, type=above(0), help="inverse temperature of dpo and npo (%(default)s)")
    g.add_argument("--answers", default=5, type=positive, help="llmu: random answers a row and epoch (%(default)s)")
    g.add_argument("--answer", default="neighbour", type=one_of(["neighbour", "refusal"]), help="po, dpo: the answer to prefer (%(default)s)")
    g.add_argument("--teacher", default="cached", type=one_of(["cached", "live"]), help="the frozen copy: its cached states, or a second model (%(default)s)")

    g = parser.add_argument_group("training")
    g.add_argument("--lr", type=above(0), help="Adam's learning rate (5e-6; kumpr in the released protocol 5e-5)")
    g.add_argument("--batch-size", type=positive, help="forget rows a step (8; kumpr in the released protocol: all)")
    g.add_argument("--max-epochs", default=100, type=positive, help="epoch cap (%(default)s)")
    g.add_argument("--seed", default=0, type=natural, help="seed of the data order and of llmu's answers (%(default)s)")
    g.add_argument("--dtype", default="float32", type=one_of(["float32", "bf16", "float64"]), help="bf16: autocast over float32 weights (%(default)s)")
    g.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda where there is one)")

    g.add_argument("--save-every", default=1, type=positive, metavar="EPOCHS", help="how often a state is saved for --resume (%(default)s)")

    g = parser.add_argument_group("several processes (started by the deepspeed launcher; bash run.sh PRESET --gpus N)")
    g.add_argument("--zero", default=2, type=int, choices=(2, 3), help="ZeRO stage: 2 shards gradients and Adam, 3 the weights too, for a model that is too large for one device; it measures more slowly (%(default)s)")
    g.add_argument("--offload", action="store_true", help="keep Adam's state in the CPU's memory")
    g.add_argument("--timeout", default=30, type=above(0), metavar="MINUTES", help="how long a process waits for the others (%(default)s)")

    g = parser.add_argument_group("refinement and stop rule")
    g.add_argument("--refine", action=argparse.BooleanOptionalAction, help="Eq. 5's filter (on for icu, off for the others)")
    g.add_argument("--thresholds", default="paper", type=thresholds_flag, help="paper (0.0499,0.5994), auto, or EL,MA (%(default)s)")
    g.add_argument("--unseen", metavar="FILE", help="for --thresholds auto: records the model was not trained on")
    g.add_argument("--bert-threshold", default=0.3, type=auto_or_number, help="a of Eq. 5, or auto (%(default)s)")
    g.add_argument("--bleu-threshold", default=0.01, type=above(0), help="b of Eq. 5 (%(default)s)")
    g.add_argument("--num-beams", default=2, type=positive, help="beams of the generation that Eq. 5 looks at (%(default)s)")
    g.add_argument("--lazy-el", action="store_true", help="measure EL only where it can decide to stop (MA is under its threshold) and at the end: the same run, faster")

    g = parser.add_argument_group("running")
    g.add_argument("--eval-only", action="store_true", help="measure the model on the pairs, train nothing")
    g.add_argument("--dry-run", action="store_true", help="check everything, print the plan, load and write nothing; without --pairs, check the rest")
    g.add_argument("--preset", help="the preset's name, for the published row in report.py")
    g.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return fill_defaults(parser.parse_args(argv))
# fmt: on


def fill_defaults(args):
    """Defaults that depend on the method, the protocol or the machine; ValueError for flags that do not go together."""
    # (forget, alpha, beta): ICU from section 5.4, LLMU from its released code.
    published = {"icu": (1.0, 0.5, 1.0), "llmu": (0.5, 1.0, 1.0)}.get(args.method, (1.0, 1.0, 1.0))
    for name, default in zip(("forget_weight", "alpha", "beta"), published, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, default)
    # dpo compares two answers to one prompt, which is no target then.
    args.targets = "suffix" if args.method == "dpo" else args.targets
    # Released KUMPR: the whole forget set is one batch, lr 5e-5, and MA must fall under 0.2994.
    released_kumpr = args.protocol == "released" and args.method == "kumpr"
    args.lr = args.lr or (5e-5 if released_kumpr else 5e-6)
    args.batch_size = args.batch_size or (1 << 30 if released_kumpr else 8)
    if args.thresholds == "paper":
        args.thresholds = [PAPER_THRESHOLDS[0], 0.2994 if released_kumpr else PAPER_THRESHOLDS[1]]
    args.targets = args.targets or ("all" if args.protocol == "released" else "suffix")
    args.refine = args.method == "icu" if args.refine is None else args.refine
    args.device = default_device() if args.device in (None, "cuda") else args.device
    args.bert = knn.default_encoder() if args.bert == "minilm" else args.bert
    if args.thresholds == "auto" and not args.unseen:
        raise ValueError("--thresholds auto needs --unseen FILE: records of the same kind, never trained on")
    if args.zero == 3 and args.teacher == "live":
        raise ValueError("--teacher live is a whole model on every process, which --zero 3 avoids: pass --zero 2")
    if (args.offload or args.zero == 3) and not (LAUNCHED or args.dry_run):
        raise ValueError("--offload and --zero are DeepSpeed's: start with bash run.sh PRESET, or with its launcher")
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite begins it again: pass one of them")
    if not args.dry_run and not (args.out and args.pairs):
        raise ValueError(f"{'--pairs FILE' if args.out else '--out DIR'} is missing")
    return args


# --- main ---


class Inputs(NamedTuple):
    """Everything a run reads, checked, except the weights."""

    samples: list  # of Sample
    unseen: list  # of Sample, for --thresholds auto
    ppl_texts: dict  # name -> texts
    config: object  # the model's
    n_cut: int  # learn partners cut to the model's positions


def read_inputs(args):
    """All that can be wrong is found here, before a weight is loaded or a file written (ValueError, OSError)."""
    if args.out:
        check_out(Path(args.out), args.overwrite or args.resume)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {first_line(error)}") from None
    if args.out and Path(args.model).resolve().is_relative_to(Path(args.out).resolve()):
        raise ValueError(f"--out {args.out}: --model {args.model} lies in it; choose another folder")
    pairs = knn.read_pairs(args.pairs) if args.pairs else []
    if args.unseen and Path(args.unseen).suffix == ".npy":
        raise ValueError(f"--unseen {args.unseen}: token ids; pass the texts as .csv or .jsonl")
    records = knn.read_records(args.unseen) if args.unseen else []
    doubled = [{**r, **{f"learn_{key}": value for key, value in r.items()}} for r in records]
    config, tokenizer = check_model(args.model, allow_pickle=args.allow_pickle, revision=args.revision)
    check_bert(args.bert, args.allow_pickle)
    positions = getattr(config, "max_position_embeddings", None) or 1 << 30
    build = {"protocol": args.protocol, "positions": positions, "context": args.context, "targets": args.targets}
    samples, n_cut = build_samples(pairs, tokenizer, **build)
    if args.method == "llmu" and len(samples) == 1:
        raise ValueError("llmu draws its answers from other rows: it needs two pairs at least")
    if args.bert_threshold == "auto" and len(samples) == 1:
        raise ValueError("--bert-threshold auto compares suffixes of different rows: it needs two pairs at least")
    ppl_texts = {item.partition("=")[0]: knn.read_texts(perplexity_file(item, args)) for item in args.ppl}
    unseen, _ = build_samples(doubled, tokenizer, **build, what="unseen row")
    return Inputs(samples, unseen, ppl_texts, config, n_cut)


def perplexity_file(item, args):
    """The file of a --ppl NAME=FILE, or NAME for one that knn.py fetches."""
    name, equals, file = item.partition("=")
    if not equals and f"{name}.csv" not in knn.FILES:
        raise ValueError(f"--ppl {item}: say NAME=FILE; only pile and wikitext are known by name")
    return file if equals else knn.data_file(f"{name}.csv", args.data)


def check_bert(name, allow_pickle):
    """The BERTScore encoder can be had: a whole folder, or a hub that answers; else ValueError."""
    from transformers import AutoConfig

    if Path(name).is_dir():
        check_files(Path(name), "--bert", allow_pickle)
    try:
        AutoConfig.from_pretrained(name)
    except Exception as error:
        raise ValueError(
            f"--bert {name}: no BERT for BERTScore there; pass --bert DIR, or --bert minilm, which is installed"
        ) from error


class Run(NamedTuple):
    """What every step of a run shares."""

    engine: PlainEngine | ZeroEngine
    tokenizer: object
    inputs: Inputs
    thresholds: dict
    args: argparse.Namespace
    out: Path
    progress: Progress
    stop: Stop


def end_epoch(run, losses, reason=None):
    """Measure all samples, refine, decide whether to stop (`progress.stopped`) and write the epoch down.

    `reason` is why to stop whatever the measures say.
    """
    args, samples, progress, started = run.args, run.inputs.samples, run.progress, time.time()
    model, epoch = run.engine.model, progress.epoch
    run.stop.measuring = True
    lazily = args.lazy_el and epoch > 0
    if epoch == 0:
        measured, perplexities = measures_before(model, run.tokenizer, run.inputs, args)
    else:
        measured = measure(model, run.tokenizer, samples, args, with_el=not lazily)
    means = mean_measures(measured)
    # Released code: the filter also runs before the first epoch; paper: after each training epoch.
    forgotten = progress.forgotten
    if means["ma"] is None:
        reason = "diverged"
    elif args.refine and (epoch > 0 or args.protocol == "released"):
        forgotten = refine(forgotten, measured, run.thresholds, args)
    n_active = len(samples) - len(forgotten)
    stopped = reason or stop_reason(means, n_active, epoch, run.thresholds, args)
    if lazily and stopped and means["ma"] is not None:  # without EL the run would stop here: EL is asked now
        measured = measure(model, run.tokenizer, samples, args)
        means = mean_measures(measured)
        stopped = reason or stop_reason(means, n_active, epoch, run.thresholds, args)
    row = {"epoch": epoch, **means, "active": n_active, "forgotten": len(forgotten)}
    row |= {name: number(losses[name]) if name in losses else None for name in dict.fromkeys([*LOSSES, *losses])}
    row["skipped_steps"] = progress.skipped_steps
    if epoch > 0 and stopped:
        perplexities = measure_perplexities(model, run.tokenizer, run.inputs.ppl_texts, args)
    row |= perplexities if epoch == 0 or stopped else {}
    run.stop.measuring = False
    progress.forgotten, progress.stopped = forgotten, stopped
    if is_main:
        append(run.out / "metrics.jsonl", [row])
        lines = [{"epoch": epoch, **m, "forgotten": i in forgotten} for i, m in enumerate(measured)]
        append(run.out / "samples.jsonl", lines)
        append(run.out / "timing.jsonl", [{"epoch": epoch, "measure_s": round(time.time() - started, 3)}])
        say_epoch(knn.read_jsonl(run.out / "metrics.jsonl"))
        progress.sizes = file_sizes(run.out)
    progress.next_epoch()  # from here on progress.epoch is the next one


def say_epoch(rows):
    """The epoch's line, and each warning once, when it begins."""
    print0(epoch_text(rows[-1]))
    for kind, sentence in alarms(rows).items():
        if kind not in alarms(rows[:-1] or rows[:1]):
            print0(f"warning: {sentence}")


def frozen_copy(model, tokenizer, samples, args):
    """What the losses ask of the original model, asked once, before its weights change: (reference, answers).

    What one of the published methods does not ask for is left out; a new method gets everything.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    answers = answer_texts(samples, tokenizer, 0, args, positions=positions)
    with autocast(args):
        reference = {}
        if args.method not in ("kumpr", "graddiff", "po", "dpo", "npo"):
            teacher = cached_teacher if args.teacher == "cached" else live_teacher
            reference["logits"] = teacher(model, [s.learn for s in samples])
        if args.method not in ("icu", "kumpr", "graddiff", "kl", "llmu", "po"):
            reference["forget"] = reference_logps(model, [s.forget for s in samples])
            reference["answer"] = reference_logps(model, [texts[0] for texts in answers])
    return reference, answers


def unlearn(run, reference, answers):
    """Epoch after epoch: train, measure, refine, until the stop rule says so or a signal comes."""
    args, samples, progress = run.args, run.inputs.samples, run.progress
    positions = getattr(run.engine.model.config, "max_position_embeddings", None)
    look = {"bar_format": "{desc}{percentage:3.0f}%|{bar}| epoch {n:.1f} of at most {total_fmt}{postfix}"}
    look |= {"disable": None if is_main else True, "leave": False, "initial": max(progress.epoch - 1, 0)}
    with tqdm(total=args.max_epochs, **look) as bar:
        while not progress.stopped:
            run.stop.check()
            losses, reason = {}, None
            if progress.epoch > 0:
                active = [i for i in range(len(samples)) if i not in progress.forgotten]
                if args.method == "llmu":
                    answers = answer_texts(samples, run.tokenizer, progress.epoch, args, positions=positions)
                try:
                    losses = train_epoch(
                        run.engine, samples, active, progress.epoch, answers=answers, reference=reference,
                        progress=progress, args=args, bar=bar, at_step=run.stop.check,
                    )  # fmt: skip
                except Diverged as diagnosis:
                    print0(f"epoch {progress.epoch}: {diagnosis}; these steps were left out")
                    reason = "diverged"
            end_epoch(run, losses, reason)
            if args.eval_only or progress.stopped == "diverged":
                return
            run.stop.check()
            if progress.stopped or (progress.epoch - 1) % args.save_every == 0:
                save_state(run.out, run.engine, progress)


def export(run):
    """model/ and summary.json, the last things that a run writes; its states have then done their work.

    A run that diverged has no model to give away: its last good state is kept instead.
    """
    diverged = run.progress.stopped == "diverged"
    if not (run.args.eval_only or diverged):
        weights = whole_weights(run.engine.model) if lockstep(run.args) else None
        if is_main:
            save_model(run.engine.model, run.tokenizer, run.out / "model", weights)
    if is_main:
        write_summary(run, knn.read_jsonl(run.out / "metrics.jsonl"))
        if diverged:
            print0(f"lower --lr; {run.out / 'state' / states(run.out)[0].name} is the last good state")
        else:
            shutil.rmtree(run.out / "state", ignore_errors=True)
    wait_for_all()  # the launcher ends all processes when the first one fails


def write_summary(run, rows):
    """summary.json from the rows of metrics.jsonl: how the run ended, the measures of its first and its last epoch."""
    args, reason = run.args, run.progress.stopped
    if rows[-1]["epoch"] == 0 and not args.eval_only and reason != "diverged":
        reason += ", before any training"
    measures = [name for name in rows[0] if name in MEASURES or name.startswith("ppl_")]
    knn.write_json(run.out / "summary.json", {
        "method": "none" if args.eval_only else args.method, "model": args.model, "protocol": args.protocol,
        "epochs": rows[-1]["epoch"], "stopped": reason, "thresholds": run.thresholds,
        "collapsed": reason == "diverged" or "collapse" in alarms(rows),
        "before": {name: rows[0][name] for name in measures},
        "after": {name: rows[-1].get(name) for name in measures},
    })  # fmt: skip
    print0(f"stopped after epoch {rows[-1]['epoch']} ({reason}); the run is in {run.out}")


def run_through(model, tokenizer, inputs, args, *, before, stop):
    """The run itself, in a folder that this process owns: new, or resumed where `before` is its config.json."""
    out = Path(args.out)
    state = newest_state(out) if before else None
    make_engine = ZeroEngine if LAUNCHED and not args.eval_only else PlainEngine
    # ZeRO-3 takes the weights apart before the model is asked anything; other engines leave it alone until then.
    engine = make_engine(model, args) if lockstep(args) else None
    if before:
        thresholds = before["thresholds_used"]
    else:
        # Those of the first process for all: two that differ in a last digit would filter other samples.
        thresholds = gather([calibrate(model, tokenizer, inputs.samples, inputs.unseen, args)])[0]
    print0(thresholds_text(thresholds, args))
    reference, answers = (None, None) if args.eval_only else frozen_copy(model, tokenizer, inputs.samples, args)
    engine = engine or make_engine(model, args)
    if state:
        progress = load_state(state, engine)
    else:
        progress = Progress()
        start_run_folder(out, describe_run(args, thresholds) if is_main else None)
    print0(HEADER)
    if state:
        pick_up(out, state, progress)
    run = Run(engine, tokenizer, inputs, thresholds, args, out, progress, stop)
    try:
        unlearn(run, reference, answers)
        export(run)
    except Interrupted as interrupted:
        (number,) = interrupted.args
        save_state(out, engine, progress)
        print0(f"interrupted ({signal.Signals(number).name}); go on with the same command and --resume")
        raise SystemExit(128 + number) from None
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{out}: out of memory ({first_line(error)}); pass a smaller --batch-size") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{out}: the run stopped ({first_line(error)}); {way_out(out, error)}") from error
    if progress.stopped == "diverged":
        raise SystemExit(1)


def pick_up(out, state, progress):
    """The files of the run folder are those of the state again, and what it has reached is said."""
    wait_for_all()
    if is_main:
        cut_back(out, progress.sizes)
        for damaged in [other for other in states(out) if other > state]:
            shutil.rmtree(damaged)  # it would count as one of the two that are kept
        for row in knn.read_jsonl(out / "metrics.jsonl") if progress.epoch > 0 else []:
            print0(epoch_text(row))
    print0(f"resumed from {state.name}")


def main(argv=None):
    """Reads flags, checks everything, runs, and leaves a run folder."""
    args = parse_args(argv)
    inputs = read_inputs(args)
    print0(plan_text(args, inputs))
    if args.dry_run:
        if not args.eval_only:
            text = Text([0] * 200, 100, 100, [])
            samples = inputs.samples or [Sample("", "", text, text)] * 128  # the paper's, without --pairs
            try:
                print0(needs_text(inputs.config.get_text_config(), samples, args))
            except Exception as error:  # whatever an unusual architecture lacks
                print0(f"no estimate of memory for a {inputs.config.model_type} ({first_line(error)})")
        print0("dry run: everything is in place; no weights were loaded and nothing was written")
        return
    before = check_resume(args) if args.resume else None
    if before and (Path(args.out) / "summary.json").is_file():
        if (Path(args.out) / "model").is_dir():
            shutil.rmtree(Path(args.out) / "state", ignore_errors=True)  # killed while it was removed
        print0(f"{args.out}: finished already")
        return
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed)
    start_processes(args.device, args.timeout)
    device = "cpu" if lockstep(args) else args.device  # ZeRO-3: it may be too large for one device
    model, tokenizer = load_model(
        args.model, dtype=args.dtype, device=device, allow_pickle=args.allow_pickle, revision=args.revision
    )
    with only_owner(Path(args.out)) if is_main else contextlib.nullcontext(), Stop() as stop:
        run_through(model, tokenizer, inputs, args, before=before, stop=stop)


if __name__ == "__main__":
    knn.run_cli(main)
