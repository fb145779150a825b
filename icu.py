"""Iterative Contrastive Unlearning: make a language model forget given texts and keep its language.

    python icu.py --pairs pairs.jsonl --model DIR --out runs/mine             # ICU, the 125M recipe
    python icu.py --pairs pairs.jsonl --model DIR --out runs/npo --method npo  # one of baselines.py
    python icu.py --pairs pairs.jsonl --model DIR --out runs/opt --eval-only   # only measure
    deepspeed --no_local_rank --num_gpus 3 icu.py ...            # the same run, several processes

"Learn while Unlearn", arXiv:2407.20271; Eq. numbers are the paper's. pairs.jsonl comes from knn.py
(Eq. 2), the measures from metrics.py (Eq. 7-10). A method of your own is a file that ends in
`icu.main(Mine)`, as in examples/, or a copy of this file, edited between the `change me` marks.
Departures from the paper's text, each a comment where it happens:
  1. Losses are means over target tokens where Eq. 1, 3, 4 are sums: a row's weight should not be
     its length.
  2. The frozen copy of Eq. 4 runs once, before training, and its last hidden states are kept
     (--teacher cached).
  3. --protocol released does what the authors' released code computes (kit/protocols.py). The
     default follows the text.
  4. Eq. 6 gets a --forget-weight (1). A run also ends when nothing is active, and at an epoch cap.
Measured (dev/LOG.md; 128 texts of the Pile, a GPT-Neo of 6M parameters that knows them, three
seeds, 2 CPU cores, torch 2.13.0): EL10 0.110 -> 0.045, MA 0.658 -> 0.519, perplexity on the Pile
246 -> 236, entropy 3.74 -> 3.17 bits.
"""

import argparse
import contextlib
import copy
import functools
import importlib
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import metrics
from kit import data, flags, models, processes, requests, runs
from kit.processes import autocast, gathered, print0
from kit.protocols import PROTOCOLS
from kit.runs import MEASURES, is_below, mean_measures, number, stop_means

# --- samples: a line of pairs.jsonl -> token ids with a boundary ---


class Text(NamedTuple):
    """One text as the model reads it. Positions are 0-based indices into ids."""

    ids: list  # front (as BOS), then (released, --context: context,) prefix, suffix
    t0: int  # the first target
    cut: int  # where the suffix begins: t0 in the paper's protocol
    prompt: list  # what a generation starts from: front, (--context: context) and prefix
    span_positions: tuple | None = None  # the only targets, where a part of the text is marked
    rendered: bool = False  # a conversation: its answer alone is a target, and measured

    @property
    def targets(self):
        """The positions that are predicted, in order: from t0 on, and never position 0."""
        first = max(self.t0, 1)
        if self.span_positions is None:
            return [*range(first, len(self.ids))]
        return [t for t in self.span_positions if t >= first]


class Sample(NamedTuple):
    """One line of pairs.jsonl: a text to forget and its learn partner (Eq. 2)."""

    id: str
    suffix: str
    forget: Text
    learn: Text
    positions: int | None = None  # of the model: no text of a method's own may be longer
    secrets: tuple = ()  # (in the prompt, in the suffix) of each string that its spans mark
    further: list = ()  # its second neighbour, its third, ...: Texts (knn.py --neighbours)


def build_samples(
    pairs, tokenizer, *, protocol, positions, context=False, targets=None, what="pair"
):
    """pairs (list of dicts) -> (list of Sample, notes: what a reader of the results must know).

    positions: the model's; the end of a longer learn partner is cut. context: each text's context
    stands in front of its prefix. targets: of the losses, "suffix" or "all" (default: the
    protocol's). what: a row's name in a ValueError, of a part without a token or a text without
    room.
    """
    # Released code: every position is a target; Eq. (1), (3), (4): those from t0, the suffix.
    targets = targets or PROTOCOLS[protocol].targets
    # Released code: the 100 tokens before the prefix belong to the sequence, though not to the
    # prompt; paper: the text is prefix and suffix.
    with_context = context or PROTOCOLS[protocol].context
    fields = data.PARTS if with_context else data.PARTS[1:]
    build = functools.partial(
        make_text,
        tokenizer=tokenizer,
        front=models.front_of(tokenizer),
        fields=fields,
        context=context,
        targets=targets,
        positions=positions,
    )
    samples, inside, longer = [], [], 0
    for row, pair in enumerate(pairs):
        where = f"{what} {row + 1} (id {pair['id']})"
        forget, moved = build(pair, "", where)
        near = [build(row, "learn_", where)[0] for row in [pair, *pair.get("further", [])]]
        inside += [where] * moved
        longer += sum(len(text.ids) > positions for text in near)
        learn, *further = [text._replace(ids=text.ids[:positions]) for text in near]
        secrets = data.secrets_of(pair, data.as_text(tokenizer, forget.ids[forget.cut :]))
        own = pair["id"], pair["suffix"], forget, learn
        samples.append(Sample(*own, positions, secrets, further))
    notes = [f"{longer} learn partners are cut to the model's positions"] if longer else []
    if inside:
        notes.append(
            f"in {len(inside)} texts, first {inside[0]}, prefix and suffix meet inside a token: "
            "the suffix begins where a token does"
        )
    return samples, notes


def make_text(pair, side, where, *, tokenizer, front, fields, context, targets, positions):
    """A side, "" or "learn_", of a pair: (Text, whether one of `fields` begins inside a token)."""
    body, starts, moved = models.read_parts(tokenizer, pair, [f"{side}{name}" for name in fields])
    ids = models.begin(front, body)  # [front | context | prefix | suffix]
    first = len(ids) - len(body)
    cut, begin = first + starts[-1], first + starts[0] if starts[1:] else first
    models.check_parts(ids[begin:cut], ids[cut:], side, where)
    models.check_room(side, ids, cut, positions=positions, where=where)
    span_positions = None
    if not side:  # spans exist on the forget side only
        span_positions = data.span_positions(pair, tokenizer, ids, where)
    template = pair.get(f"{side}template")
    data.check_template(tokenizer, template, where)
    suffix_only = (targets == "suffix" or template) and span_positions is None
    t0 = cut if suffix_only else max(len(front), 1)  # position 0 is never a target
    prompt = ids[:cut] if context else models.begin(front, ids[begin:cut])
    return Text(ids, t0, cut, prompt, span_positions, bool(template)), moved


def collate(texts, device="cpu"):
    """B texts -> ids (B, T) int64, attention_mask (B, T) int64, target_mask (B, T) bool.

    Right-padded; by length, never by `id == pad`, since pad is EOS for these models. target_mask is
    true where token i is predicted.
    """
    T = max((len(text.ids) for text in texts), default=0)
    ids, attention_mask = (torch.zeros(len(texts), T, dtype=torch.long) for _ in range(2))
    target_mask = torch.zeros(len(texts), T, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        attention_mask[row, : len(text.ids)] = 1
        target_mask[row, text.targets] = True
    return ids.to(device), attention_mask.to(device), target_mask.to(device)


# --- what a model says at the targets ---


class Side(NamedTuple):
    """The M target tokens of this process's texts of one side of a batch, and the model's words.

    A loss is this process's part of a mean over the global batch (`mean`, `mean_rows`): the parts
    add up to it. Over no token it is 0, with a gradient of 0.
    """

    logits: torch.Tensor  # (M, V), float32 at least: they predict `ids`; the shift by one is done
    ids: torch.Tensor  # (M,)
    row: torch.Tensor  # (M,) which of the texts each token is in
    hidden: torch.Tensor | None  # (M, H) at these tokens, of the layer that the method names
    n_tokens: int  # targets of this side in the whole global batch
    n_rows: int  # texts of this side in the whole global batch
    B: int  # texts of this side that this process has

    @property
    def logp(self):
        """(M,) log p(x_t | x_<t), in nats."""
        return -F.cross_entropy(self.logits, self.ids, reduction="none")

    def mean(self, values):
        """The mean over the global batch's targets, of values (M,)."""
        return values.sum() / max(self.n_tokens, 1)

    def mean_rows(self, values):
        """The mean over the global batch's texts, of values (B,)."""
        return values.sum() / max(self.n_rows, 1)

    def by_row(self, values):
        """(M,) -> (B,): summed within each text."""
        return values.new_zeros(self.B).index_add(0, self.row, values)


def at_targets(model, texts, layer=None):
    """A model's words at the M targets of B texts: logits (M, V), ids (M,), row (M,), hidden (M, H)
    or None."""
    ids, attention_mask, mask = collate(texts, model.device)  # (B, T) each
    out = model(
        input_ids=ids,
        attention_mask=attention_mask,
        use_cache=False,
        output_hidden_states=layer is not None,
    )
    logits = out.logits[:, :-1][mask[:, 1:]]  # the shift by one: position t-1 predicts token t
    hidden = None if layer is None else out.hidden_states[layer][mask]
    return in_float32(logits), ids[mask], mask.nonzero()[:, 0], hidden


def in_float32(logits):
    """float32 at least: a softmax in bf16 loses the small probabilities that a KL is made of."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


# --- losses: pure functions of a side ---


def forget_loss(side):
    """Eq. (1), the mean of log p_theta(x_t | x_<t) over target tokens, in nats, <= 0.

    Minimised, so the text becomes less likely. Paper: a sum.
    """
    return -learn_loss(side)  # Eq. (1): Eq. (3) with its sign turned


def learn_loss(side):
    """Eq. (3), the negative log-likelihood -mean log p_theta(x_t | x_<t), in nats."""
    # Eq. (3): -log p_theta(x_t | x_<t), summed, then the mean over target tokens
    total = F.cross_entropy(side.logits, side.ids, reduction="sum")
    return total / max(side.n_tokens, 1)


def kl_loss(side, frozen, *, cross_entropy=False):
    """Eq. (4), the mean over target tokens of KL[p_theta0 || p_theta], in nats, >= 0.

    side, frozen: the model and its frozen copy at the same targets; no gradient reaches the copy.
    """
    logp, ref_logp = side.logits.log_softmax(-1), frozen.logits.detach().log_softmax(-1)  # (M, V)
    # Eq. (4): KL[p_theta0 || p_theta] = sum_v p_theta0 (log p_theta0 - log p_theta), then the mean.
    # Released code: the cross-entropy H(p_theta0, p_theta), the same gradient but another number.
    inner = -logp if cross_entropy else ref_logp - logp
    return (ref_logp.exp() * inner).sum() / max(side.n_tokens, 1)


def kl(logq, logp):
    """KL[q || p] at each target, in nats: (M, V), (M, V) -> (M,)."""
    return (logq.exp() * (logq - logp)).sum(-1)


def kl_term(side, frozen, args):
    """Eq. (4) as the protocol computes it."""
    cross_entropy = PROTOCOLS[args.protocol].cross_entropy_kl
    return kl_loss(side, frozen, cross_entropy=cross_entropy)


# --- what a method is, and what it sees ---


class Batch:
    """Some samples (`rows`, their indices) of a global batch, of which this process has `mine`."""

    def __init__(self, model, sides, rows, *, frozen=None, layer=None, epoch=1):
        self.model, self.sides, self.rows, self.epoch = model, sides, rows, epoch
        self.frozen_copy, self.layer = frozen, layer
        self.mine, self.shares = processes.share(rows), processes.WORLD_SIZE

    def parts(self, size):
        """Batches of at most `size` of its rows (None: all), as many on every process, so some are
        empty."""
        longest = -(-len(self.rows) // self.shares)
        n = -(-longest // (size or longest or 1)) or 1
        parts = [copy.copy(self) for _ in range(n)]
        for i, part in enumerate(parts):
            part.mine, part.shares = self.mine[i::n], self.shares * n
        return parts

    def texts(self, name, rows):
        """The texts of a side of these samples."""
        return [text for row in rows for text in self.sides[name][row]]

    def forward(self, name, model=None):
        """Runs the model, or another one (a teacher), on the side "forget", "learn" or one that the
        method brings: a Side."""
        texts = self.texts(name, self.mine)
        # A process without a text still runs the model: the others wait for its gradients.
        out = at_targets(model or self.model, texts or [Text([0, 0], 2, 2, [])], self.layer)
        return Side(*out, *self.counts(name))

    def frozen(self, name):
        """The frozen copy's Side, without gradient, of a side in the method's `frozen_sides`."""
        out = self.frozen_copy(name, self.mine, self.texts(name, self.mine))
        return Side(*out, *self.counts(name))

    def counts(self, name):
        """Targets and texts in the global batch, and texts that this process has."""
        everyones, mine = self.texts(name, self.rows), self.texts(name, self.mine)
        return sum(len(text.targets) for text in everyones), len(everyones), len(mine)

    def once(self, value):
        """This process's part of a value that comes of no text, such as a distance of weights."""
        return value / self.shares


class Method:
    """What the loop needs of a method: subclass it, write `loss`, set or override what differs.

    It is called by its class's name in lower case, and hashed with its file and the files beside it
    that this one imports: --resume and `compare` see every change.
    """

    # Defaults of the flags of these names, and what the authors' released code has instead.
    forget_weight, alpha, beta, lr, refine, min_epochs = 1.0, 1.0, 1.0, 5e-6, False, 0
    released = {}
    targets = None  # "suffix": the prompt is never a target, whatever --targets says
    frozen_sides = ()  # what the frozen copy of Eq. 4 reads, once, before training
    layer = None  # sides also have `hidden`: of this layer, 0 the embeddings'
    published = None  # the row of Tables 1 and 4 that it computes under the released protocol

    def loss(self, batch, args):
        """{"name": (weight, value), ...}: the weighted sum is minimised; a value is a scalar."""
        raise NotImplementedError

    def sides(self, samples, tokenizer, epoch, args):
        """Further sides, {name: a list of Text for each sample}; random ones draw from
        (args.seed, epoch), so that they are the same whenever they are asked for."""
        return {}

    def prepare(self, model, tokenizer, samples, args, folder):
        """Before training: freeze layers, add adapters, train a helper model. What is costly goes
        into `folder` (a Path, yours to make; None in a notebook): --resume finds it there."""

    def trains(self, name):
        """Whether the weights of this name are trained."""
        return True

    def begin_epoch(self, model, optimizer, epoch):
        """Before the sides and steps of each epoch from 1 on: noise, a rate, another phase. Plain
        engine only: DeepSpeed has its own copies of weights."""

    def backward(self, loss, batch, args):
        """Fills the gradients of a step; the optimiser then moves the weights. Override it for two
        backward passes or perturbed weights (`terms_of` gives the terms anew). Plain engine only:
        DeepSpeed makes its own gradients."""
        loss.backward()

    def swap_weights(self, model):
        """A generator: the weights become those to measure and export, then those to train."""
        yield

    def own_measures(self, model, tokenizer, samples, args):
        """Measures of its own, {name: number} an epoch: columns own_NAME of metrics.jsonl and of
        the report. The model is as `swap_weights` leaves it, in eval mode."""
        return {}

    def state(self):
        """{name: tensor} of the method itself (a moving average), saved with every state."""
        return {}

    def load_state(self, tensors):
        """Takes up again what `state` gave."""

    # What follows is the toolkit's; of it only `name` may be set.

    @property
    def file(self):
        """The file that it is written in; typed at a prompt, none that is there."""
        return Path(getattr(sys.modules[type(self).__module__], "__file__", "a prompt"))

    @property
    def name(self):
        """icu, npo, ...; a copy of this file that kept the class's name is called by its file."""
        name = type(self).__name__.lower()
        return name if name != "icu" else self.file.stem

    def overrides(self, *names):
        return any(getattr(type(self), name) is not getattr(Method, name) for name in names)

    @property
    def touches_weights(self):
        """Whether what is measured may be another model than the one loaded, before training."""
        return self.overrides("prepare", "swap_weights")

    def sha256(self):
        """Of its file and this one, and of what these import beside them."""
        return runs.code_sha256(self.file, __file__)


# --- change me: the method ---


class ICU(Method):
    """Eq. (6): L = L_fgt + alpha L_lrn + beta L_kl (section 5.4)."""

    alpha, beta, refine, frozen_sides, published = 0.5, 1.0, True, ("learn",), "icu"

    def loss(self, batch, args):
        forget, learn = batch.forward("forget"), batch.forward("learn")
        return {  # Eq. (6)
            "forget": (args.forget_weight, forget_loss(forget)),
            "learn": (args.alpha, learn_loss(learn)),
            "kl": (args.beta, kl_term(learn, batch.frozen("learn"), args)),
        }


METHOD = ICU  # what this file runs

# --- end of change me ---


def terms_of(method, batch, args):
    """The terms of a batch: the sums of its parts' (--micro-batch), which the backward pass makes
    again one by one, so that every engine sees one loss a step."""
    parts = batch.parts(args.micro_batch)
    if len(parts) == 1:
        return terms_of_part(method, batch, args)
    # early_stop leaves a module in the middle, which ZeRO-3 does not expect.
    again = functools.partial(checkpoint, terms_of_part, use_reentrant=False, early_stop=False)
    made = [again(method, part, args) for part in parts]
    first = made[0].items()
    return {name: (weight, sum(terms[name][1] for terms in made)) for name, (weight, _) in first}


def terms_of_part(method, batch, args):
    """The method's terms and, where only spans are to be forgotten, Eq. (4) over the other tokens
    of their texts."""
    with autocast(args):
        terms = method.loss(batch, args)
        if "kept" in batch.sides:
            kept = kl_term(batch.forward("kept"), batch.frozen("kept"), args)
            terms = terms | {"kept": (args.beta, kept)}
    return terms


def weighted_sum(terms):
    return sum(weight * value for weight, value in terms.values())


def sides_of(samples, tokenizer, epoch, args, method):
    """{name: a list of Text for each sample}: both sides of the pairs, what is kept of texts with
    spans, and the method's own."""
    sides = {"forget": [[sample.forget] for sample in samples]}
    sides |= {"learn": [[sample.learn] for sample in samples]}
    return sides | data.kept_side(samples) | method.sides(samples, tokenizer, epoch, args)


def keep_start(model):
    """For `prepare`: the model remembers the weights that it starts from (for `scaled`)."""
    model.start = [parameter.detach().clone() for parameter in model.parameters()]


def scaled(model, scale):
    """For `swap_weights`: the weights theta_0 + scale (theta - theta_0), theta what is trained."""
    trained = [parameter.data for parameter in model.parameters()]
    for parameter, start in zip(model.parameters(), model.start, strict=True):
        parameter.data = start + scale * (parameter.data - start)
    yield
    for parameter, weights in zip(model.parameters(), trained, strict=True):
        parameter.data = weights


# --- the frozen copy (theta_0 of Eq. 4) ---


def freeze(model, sides, args, method):
    """What a copy of the model that never changes says of the sides that the method names.

    Returns ask(name, rows, texts), as `at_targets` of the texts, which are those of `rows`.
    """
    names = [*method.frozen_sides, *(["kept"] if "kept" in sides else [])]
    make = cached_copy if args.teacher == "cached" else live_copy
    with autocast(args):
        copied = make(model, {name: sides[name] for name in names}, method.layer) if names else None

    def ask(name, rows, texts):
        if name not in names:
            raise ValueError(f"frozen({name!r}): {method.name} must name it in `frozen_sides`")
        return copied(name, rows, texts)

    return ask


def live_copy(model, sides, layer=None):
    """A second model, which runs at every step: the readable reference for `cached_copy`."""
    frozen = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def ask(name, rows, texts):
        return at_targets(frozen, texts or [Text([0, 0], 2, 2, [])], layer)

    return ask


@torch.no_grad()
def cached_copy(model, sides, layer=None, batch_size=8):
    """The same from hidden states that are computed now, once.

    The last hidden states at the targets (M, H) and a copy of the output head give the exact KL
    without a second model or forward pass. ValueError: the model's logits are not its head applied
    to its last hidden state (logit scaling or capping), or the texts have changed.
    """
    head, kept = frozen_head(model), {}
    for name, rows in sides.items():
        texts, states = [text for row in rows for text in row], []
        for chunk in data.chunks(texts, batch_size):
            ids, attention_mask, mask = collate(chunk, model.device)
            inputs = {"input_ids": ids, "attention_mask": attention_mask, "use_cache": False}
            out = model.base_model(**inputs, output_hidden_states=layer is not None)
            last = out.last_hidden_state[:, :-1][mask[:, 1:]]  # (M, H), the shift by one
            if not states:
                logits = model(**inputs).logits[:, :-1][mask[:, 1:]]
                if not torch.allclose(head(last), logits, atol=1e-3, equal_nan=True):
                    kind = type(model).__name__
                    raise ValueError(f"{kind} changes its logits after its head: --teacher live")
            hidden = last if layer is None else out.hidden_states[layer][mask]
            sizes = [len(text.targets) for text in chunk]
            parts = [part.split(sizes) for part in (last, ids[mask], hidden)]
            states += zip(*parts, strict=True)
            no_states = [(last[:0], ids[mask][:0], hidden[:0])]  # of a process without a text
        remaining = iter(zip(texts, states, strict=True))
        kept[name] = [[next(remaining) for _ in row] for row in rows]

    @torch.no_grad()
    def ask(name, rows, texts):
        known = [pair for row in rows for pair in kept[name][row]]
        if [text for text, _ in known] != texts:
            raise ValueError(f"side {name!r} has other texts each epoch: pass --teacher live")
        states = [states for _, states in known] or no_states
        last, ids, hidden = (torch.cat(parts) for parts in zip(*states, strict=True))
        sizes = torch.tensor([len(own) for _, own, _ in states])
        row = torch.arange(len(states)).repeat_interleave(sizes).to(ids.device)
        return in_float32(head(last)), ids, row, None if layer is None else hidden

    return ask


def frozen_head(model):
    """states (M, H) -> logits (M, V), by a copy of the model's output head, a linear layer."""
    output = model.get_output_embeddings()
    with gathered(output.parameters()):
        copied = {name: p.detach().clone() for name, p in output.named_parameters()}
    # weight (V, H) and, in some models, bias (V,)
    return lambda states: F.linear(states, **copied)


# --- measuring (section 5.2) ---


def measure(model, tokenizer, samples, args, *, with_el=True):
    """Every measure of section 5.2 for every sample, active or not: a line of samples.jsonl each.

    Fractions are 0-1, entropy in bits. el10 is None for a text without a 10-gram, and unless
    `with_el`; all are None where the logits are not finite.
    """

    def measure_share(samples):
        with autocast(args):
            try:
                memory = memorisation(model, tokenizer, samples, args, with_el=with_el)
                rows = speech(model, tokenizer, samples, args)
            except FloatingPointError:
                return [{"id": s.id, **dict.fromkeys(MEASURES), "generation": ""} for s in samples]
        order = {"id": None, **dict.fromkeys(MEASURES)}  # of the fields
        return [order | one | other for one, other in zip(memory, rows, strict=True)]

    return processes.over_processes(measure_share, samples)


def memorisation(model, tokenizer, samples, args, *, with_el=True):
    """EL10 (Eq. 7, 8) and MA (Eq. 9) of each sample, and of its marked spans and the rest."""
    first, protocol = 1 + len(models.front_of(tokenizer)), PROTOCOLS[args.protocol]
    texts = [sample.forget for sample in samples]
    ids, attention_mask, _ = collate(texts, args.device)
    starts = [text.cut if text.rendered else first for text in texts]
    el, ma, parts = metrics.el_ma_and_spans(
        model,
        ids,
        attention_mask,
        data.span_parts(samples),
        n=10 if with_el else None,
        ma_start=starts,
        # Released code: EL over t = 150 .. T-n of 200, that is from the suffix on, as a share of
        # the reference's n-grams; Eq. (7), (8): over t = 1 .. T-n, as a share of the generation's.
        start=[text.cut for text in texts] if protocol.el_from_suffix else starts,
        share_of=protocol.el_share_of,
    )
    return [
        {"id": sample.id, "el10": number(one), "ma": number(other)}
        | {name: number(value) for name, value in part.items()}
        for sample, one, other, part in zip(samples, el, ma, parts, strict=True)
    ]


def speech(model, tokenizer, samples, args):
    """What the model says after each prompt: BLEU and BERTScore (F1) to the suffix, the entropy
    (Eq. 10) of the generation, and whether it says a secret."""
    generations = metrics.beam_generate(
        model,
        [sample.forget.prompt for sample in samples],
        [len(sample.forget.ids) - sample.forget.cut for sample in samples],
        num_beams=args.num_beams,
    )
    texts = models.decode(tokenizer, generations)
    suffixes = models.true_suffixes(tokenizer, samples)
    f1 = metrics.bertscore(texts, suffixes, args.bert, device=args.device)[2]
    rows = []
    for i, sample in enumerate(samples):
        row = {
            "bleu": number(metrics.bleu(texts[i], suffixes[i])),
            "bertscore": number(f1[i]),
            "entropy": number(metrics.token_entropy(generations[i])),
        }
        if sample.forget.span_positions:
            row |= data.secret_said(sample, texts[i])
        rows.append(row | {"generation": texts[i]})
    return rows


def measure_perplexities(model, tokenizer, texts, args):
    """{"ppl_NAME": perplexity} of the --ppl files, {name: texts}."""
    perplexities = {}
    with autocast(args):
        for name in texts:
            perplexities[f"ppl_{name}"] = number(
                metrics.perplexity(
                    model,
                    tokenizer,
                    texts[name],
                    released=PROTOCOLS[args.protocol].joined_perplexity,
                    added_up=processes.added_up,
                )
            )
    return perplexities


# --- refinement (Eq. 5) and the stop rule ---

# EL10 and MA, section 5.4: what GPT-Neo scores on Pile text that it was not trained on.
PAPER_THRESHOLDS = 0.0499, 0.5994


def refine(forgotten, rows, thresholds, args):
    """Eq. (5): the set of samples whose generation no longer resembles their suffix.

    forgotten: indices so far; rows: the measures of all samples.
    """
    protocol = PROTOCOLS[args.protocol]

    def is_forgotten(row):
        # Eq. (5): BERTScore < a and BLEU < b. Released code: or. A row without a BERTScore, which
        # the encoder cannot read, is not under a.
        if "ma_spans" not in row:
            return protocol.forgotten_by(
                is_below(row[name], thresholds[name]) for name in ("bertscore", "bleu")
            )
        # Only spans are to go, and the rest of the text is to stay: no secret is said or guessed.
        return not row["secret_said"] and is_below(row["ma_spans"], thresholds["ma"])

    now = {i for i, row in enumerate(rows) if is_forgotten(row)}
    # Released code: a sample comes back when a later epoch measures it as remembered; paper: a
    # forgotten one stays out.
    return now if protocol.comes_back else forgotten | now


def stop_reason(means, n_active, epoch, *, thresholds, args):
    """Why to stop after this epoch, or None."""
    if args.eval_only:
        return "eval only"
    cap = "max epochs" if epoch >= args.max_epochs else None
    if epoch < args.min_epochs or (epoch == 0 and not PROTOCOLS[args.protocol].stops_at_start):
        return cap
    measured = [name for name in ("el10", "ma") if means[name] is not None]
    if measured and all(means[name] < thresholds[name] for name in measured):
        return "thresholds"
    if n_active == 0:
        return "all forgotten"
    return cap


def calibrate(model, tokenizer, inputs, args):
    """The thresholds of this run: {"el10", "ma", "bertscore", "bleu"}.

    --thresholds auto: EL and MA of the original model on --unseen, as the paper's are; never-saw:
    of a model that never saw these texts. --bert-threshold auto: the mean F1 between the true
    suffixes of different samples.
    """
    thresholds = {"bleu": args.bleu_threshold, "bertscore": args.bert_threshold}
    if args.thresholds in ("auto", "never-saw"):
        means = inputs.never_saw
        if args.thresholds == "auto":
            means = mean_measures(measure(model, tokenizer, inputs.unseen, args))
        # Text never seen is often never extracted: EL 0, which nothing can be under. The paper's
        # figure is the floor.
        el10 = max(means["el10"] or 0, PAPER_THRESHOLDS[0])
        thresholds |= {"el10": el10, "ma": means["ma"]}
    else:
        thresholds |= dict(zip(("el10", "ma"), args.thresholds, strict=True))
    if args.bert_threshold == "auto":
        suffixes = models.true_suffixes(tokenizer, inputs.samples)
        f1 = metrics.unrelated_bertscore(suffixes, args.bert, device=args.device)
        thresholds["bertscore"] = number(f1)
    return thresholds


# --- the loop: train, measure, refine, stop ---


class Diverged(RuntimeError):
    """Five steps in a row without a finite loss and gradient."""


def run_epochs(model, tokenizer, inputs, args, *, method, run):
    """Epoch after epoch: train on what is not forgotten, measure, refine, until the stop rule."""
    samples = inputs.samples
    prepare_model(method, model, tokenizer, samples, args, run.method_folder)
    engine, frozen = processes.make_engine(model, args), None
    if not args.eval_only:
        with weights_to_measure(method, model, args):  # still the original weights
            original = requests.anchor_model(model, args)
            sides = sides_of(samples, tokenizer, 0, args, method)
            frozen = freeze(original, sides, args, method)
            del original
        check_loss(engine.model, tokenizer, samples, frozen, args, method)
    with weights_to_measure(method, model, args):
        # The first process's for all: a last digit may differ.
        thresholds = run.thresholds or calibrate(model, tokenizer, inputs, args)
        run.thresholds = processes.gather([thresholds])[0]
    print0(runs.thresholds_text(run.thresholds, args))
    progress = run.start(engine)
    while not progress.stopped:
        losses, reason = {}, None
        if progress.epoch > 0:
            active = [i for i in range(len(samples)) if i not in progress.forgotten]
            method.begin_epoch(model, engine.optimizer, progress.epoch)
            sides = sides_of(samples, tokenizer, progress.epoch, args, method)
            try:
                losses = train_epoch(engine, sides, active, args, method, frozen=frozen, run=run)
            except Diverged as diagnosis:
                print0(f"epoch {progress.epoch}: {diagnosis}; these steps were left out")
                reason = "diverged"
        end_epoch(
            model, tokenizer, inputs, args, method=method, run=run, losses=losses, reason=reason
        )


def prepare_model(method, model, tokenizer, samples, args, folder):
    """The model as the method trains it. ValueError: nothing of it is left to train."""
    if args.eval_only:
        return
    method.prepare(model, tokenizer, samples, args, folder)
    for name, weights in model.named_parameters():
        if not method.trains(name):
            weights.requires_grad_(False)
    if not processes.trainable(model):
        raise ValueError(f"{method.name} trains no weight of this model: see its `trains`")


@contextlib.contextmanager
def weights_to_measure(method, model, args):
    """A context in which the weights are those to measure and export; then those to train."""
    steps = iter(()) if args.eval_only else method.swap_weights(model)
    next(steps, None)
    try:
        yield
    finally:
        next(steps, None)


def check_loss(model, tokenizer, samples, frozen, args, method):
    """Runs the loss on one batch, so that a slip in it shows before minutes of measuring."""
    sides = sides_of(samples, tokenizer, 1, args, method)
    rows = [*range(len(samples))][: args.batch_size]
    state = {name: tensor.clone() for name, tensor in method.state().items()}
    with torch.random.fork_rng():
        batch = Batch(model, sides, rows, frozen=frozen, layer=method.layer)
        terms = terms_of(method, batch, args)
    for name, term in terms.items():
        if not isinstance(term, tuple | list) or len(term) != 2 or term[1].shape != ():
            what = "is not (weight, value), the value one number (Side.mean)"
            raise ValueError(f"{method.name}: its term {name!r} {what}")
    if not weighted_sum(terms).requires_grad:
        raise ValueError(f"{method.name}: no value of its loss has a gradient")
    if state:
        method.load_state(state)


def train_epoch(engine, sides, active, args, method, *, frozen, run):
    """One pass over the active samples, packed densely into batches.

    Returns {"loss": mean over steps, "loss_forget": ...}. The order is a function of (seed, epoch).
    A step whose loss or gradient is not finite is left out; five in a row: Diverged.
    """
    progress, sums, steps, bad_in_a_row = run.progress, {}, 0, 0
    # Released code: batches of all samples, of which the active ones count; paper: batches of
    # active samples.
    drawn = range(len(sides["forget"])) if PROTOCOLS[args.protocol].steps_on_all else active
    order = np.random.default_rng([args.seed, progress.epoch]).permutation(drawn).tolist()
    batches = data.chunks(order, args.batch_size)
    for rows in batches:
        rows = [row for row in rows if row in active]
        batch = Batch(
            engine.model, sides, rows, frozen=frozen, layer=method.layer, epoch=progress.epoch
        )
        terms = terms_of(method, batch, args)
        loss = weighted_sum(terms)
        parts = {"loss": loss} | {f"loss_{name}": value for name, (_, value) in terms.items()}
        totals = processes.sum_over_ranks([*parts.values()], args.device)
        values = dict(zip(parts, totals, strict=True))
        backward = functools.partial(method.backward, batch=batch, args=args)
        if math.isfinite(values["loss"]) and engine.step(loss, backward):
            bad_in_a_row = 0
            if rows:
                steps += 1
                sums |= {name: sums.get(name, 0.0) + value for name, value in values.items()}
        else:
            progress.skipped_steps, bad_in_a_row = progress.skipped_steps + 1, bad_in_a_row + 1
            if bad_in_a_row == 5:
                raise Diverged(
                    f"loss {values['loss']:.4g}; it or its gradient was not finite in five steps "
                    "in a row"
                )
        run.show_step(values["loss"], len(active), 1 / len(batches))
    return {name: total / steps for name, total in sums.items()}


def end_epoch(model, tokenizer, inputs, args, *, method, run, losses, reason):
    """Measures all samples, refines, decides whether to stop (`reason`: why it must), and writes
    the epoch down."""
    epoch, forgotten, thresholds = run.progress.epoch, run.progress.forgotten, run.thresholds
    lazy = args.el == "lazy" and epoch > 0
    started = time.time()
    with weights_to_measure(method, model, args):
        rows, perplexities = measure_epoch(model, tokenizer, inputs, args, method, epoch, not lazy)
        finite = mean_measures(rows)["ma"] is not None  # else nothing is known of any text
        # Released code: the filter also runs before the first epoch; paper: after each one.
        if finite and args.refine and (epoch > 0 or PROTOCOLS[args.protocol].filter_at_start):
            forgotten = refine(forgotten, rows, thresholds, args)
        if finite and inputs.watched:
            now = refine(set(), rows, thresholds, args)
            forgotten = requests.watch(
                forgotten, rows, forgotten_now=now, watched=inputs.watched, epoch=epoch
            )

        def stop(rows):
            if not finite:
                return "diverged"
            means, n_active = stop_means(rows, inputs.watched), len(rows) - len(forgotten)
            return reason or stop_reason(means, n_active, epoch, thresholds=thresholds, args=args)

        stopped = stop(rows)
        if lazy and stopped and finite:  # EL decides, and stands in the last row
            el = el_of(model, tokenizer, inputs, args)
            rows = [row | one for row, one in zip(rows, el, strict=True)]
            stopped = stop(rows)
        if epoch > 0 and (stopped or args.keep_best):
            perplexities = measure_perplexities(model, tokenizer, inputs.ppl_texts, args)
        run.keep_if_best(model, tokenizer, stop_means(rows, inputs.watched), perplexities)
        with torch.no_grad():
            own = {}
            if not args.eval_only:
                own = method.own_measures(model, tokenizer, inputs.samples, args)
    run.write_epoch(
        mean_measures(rows) | {f"own_{name}": number(value) for name, value in own.items()},
        rows,
        forgotten=forgotten,
        stopped=stopped,
        watched=inputs.watched,
        losses=losses,
        perplexities=perplexities,
        seconds=time.time() - started,
    )


def measure_epoch(model, tokenizer, inputs, args, method, epoch, with_el):
    """(the measures of all samples, the perplexities: before the first epoch and after the last).

    The untouched model is looked up if a run has measured the same before.
    """
    if epoch > 0:
        return measure(model, tokenizer, inputs.samples, args, with_el=with_el), {}
    return runs.remembered(
        args,
        method,
        inputs,
        lambda: [
            measure(model, tokenizer, inputs.samples, args),
            measure_perplexities(model, tokenizer, inputs.ppl_texts, args),
        ],
    )


def el_of(model, tokenizer, inputs, args):
    """What an epoch that was measured without EL lacks (--el lazy): the rows of `memorisation`."""

    def share(samples):
        with autocast(args):
            return memorisation(model, tokenizer, samples, args)

    return processes.over_processes(share, inputs.samples)


# --- flags ---


# fmt: off
def make_parser():
    """The flags of a run. Defaults are the paper's 125M recipe (section 5.4)."""
    parser = flags.command_parser(__doc__.split("\n\n")[0])
    add_data_flags(parser)
    add_method_flags(parser)
    add_running_flags(parser)
    return parser


def add_data_flags(parser):
    """What a run reads, and where it writes."""
    add = parser.add_argument_group("data and models").add_argument
    add("--pairs", metavar="FILE", help="pairs.jsonl from knn.py")
    add("--model", metavar="DIR", help="the causal LM: a folder, or a name on the hub")
    add("--revision", metavar="SHA", help="hub revision of --model")
    add("--bert", default="bert-base-uncased", metavar="DIR",
        help="BERTScore's encoder: a folder, a hub name, or minilm (%(default)s)")
    add("--ppl", nargs="+", default=[], metavar="NAME[=FILE]",
        help="texts for perplexity before and after; pile and wikitext are known")
    add("--unseen", metavar="FILE", help="for --thresholds auto: records never trained on")
    add("--never-saw", metavar="RUN",
        help="for --thresholds never-saw: an --eval-only run of a model that never saw the texts")
    add("--data", metavar="DIR", help="folder of the known files (default: fetched and cached)")
    add("--out", metavar="DIR", help="the run folder to write")
    add("--overwrite", action="store_true", help="replace a run that is there")
    add("--resume", action="store_true", help="go on with the interrupted run in --out")

    add = parser.add_argument_group("after earlier requests").add_argument
    add("--after", metavar="RUN", help="go on from a finished run; its texts are watched")
    add("--anchor", default="original", type=flags.one_of(["original", "previous"]),
        help="Eq. 4's copy: the model before the first request, or that of --after (%(default)s)")
    add("--watch", action=argparse.BooleanOptionalAction, default=True,
        help="measure earlier texts too; one that comes back is trained on again (%(default)s)")


def add_method_flags(parser):
    """What is done to the model. Where no default stands here, it is the method's own."""
    above, one_of, positive, weight = flags.above, flags.one_of, flags.positive, flags.weight
    add = parser.add_argument_group("method").add_argument
    add("--method", metavar="NAME", help="this file's (the default), or one of baselines.py")
    add("--protocol", default="paper", type=one_of(list(PROTOCOLS)),
        help="the paper's text, or the authors' released code (%(default)s)")
    add("--context", action="store_true", help="each text's context stands in front of its prefix")
    add("--targets", type=one_of(["suffix", "all"]), help="what the losses see (suffix)")
    add("--forget-weight", type=weight, help="weight of the forget term (icu: 1)")
    add("--alpha", type=weight, help="weight of the learn or answer term, Eq. 6 (icu: 0.5)")
    add("--beta", type=weight, help="weight of the KL term, Eq. 6 (icu: 1)")
    add("--teacher", default="cached", type=one_of(["cached", "live"]),
        help="the frozen copy: its cached states, or a second model (%(default)s)")
    add("--dpo-beta", default=0.1, type=above(0), help="dpo, npo: b (%(default)s)")
    add("--answers", default=5, type=positive, help="llmu: answers a row (%(default)s)")
    add("--answer", default="neighbour", type=one_of(["neighbour", "refusal"]),
        help="po, dpo: the other answer, which is preferred (%(default)s)")

    add = parser.add_argument_group("training").add_argument
    add("--lr", type=above(0), help="Adam's learning rate (icu: 5e-6)")
    add("--batch-size", default=8, type=positive, help="forget rows a step (%(default)s)")
    add("--micro-batch", type=positive, metavar="N",
        help="rows that a process holds at once: the same step in less memory, slower (all)")
    add("--min-epochs", type=flags.natural, help="the stop rule waits for it (icu: 0)")
    add("--max-epochs", default=100, type=positive, help="epoch cap (%(default)s)")
    add("--seed", default=0, type=flags.natural, help="of order and answers (%(default)s)")

    add = parser.add_argument_group("refinement and stop rule").add_argument
    add("--refine", action=argparse.BooleanOptionalAction, help="Eq. 5's filter (icu: on)")
    add("--thresholds", default="paper", type=flags.thresholds_flag,
        help="paper (0.0499,0.5994), auto, never-saw, or EL,MA (%(default)s)")
    add("--bert-threshold", default=0.3, type=flags.auto_or_number,
        help="a of Eq. 5, or auto (%(default)s)")
    add("--bleu-threshold", default=0.01, type=above(0), help="b of Eq. 5 (%(default)s)")
    add("--num-beams", default=2, type=positive, help="of Eq. 5's generation (%(default)s)")
    add("--el", default="every", type=one_of(["every", "lazy"]),
        help="lazy: EL only where it can decide, and at the end: the same run (%(default)s)")


def add_running_flags(parser):
    """How, and on what."""
    add = parser.add_argument_group("several processes (deepspeed's launcher)").add_argument
    add("--zero", default=2, type=int, choices=(2, 3),
        help="ZeRO stage: 2 shards gradients and Adam, 3 the weights too, slowly (%(default)s)")
    add("--offload", action="store_true", help="keep Adam's state in the CPU's memory")
    add("--timeout", default=30, type=flags.above(0), metavar="MINUTES",
        help="how long a process waits for the others (%(default)s)")

    add = parser.add_argument_group("running").add_argument
    flags.add_model_flags(add, models.DTYPES)
    add("--checkpointing", action="store_true",
        help="keep a layer's input, not what is in it: the same step in less memory, slower")
    add("--keep-best", action="store_true",
        help="model/ is of the epoch nearest to the stop rule, at the lowest --ppl")
    add("--track", type=flags.one_of(["trackio", "wandb"]), help="who gets each epoch's numbers")
    add("--save-every", default=1, type=flags.positive, metavar="EPOCHS",
        help="how often a state is saved for --resume (%(default)s)")
    add("--eval-only", action="store_true", help="measure the model on the pairs, train nothing")
    add("--dry-run", action="store_true", help="check everything, print the plan, do nothing")
    add("--redact", action="store_true",
        help="no text in the run folder and the cache, only ids and numbers")
    add("--preset", help="the preset's name, for the published row in the report")
# fmt: on

PUBLISHED = "baselines"  # the module of the published methods: it imports this one
OWN_DEFAULTS = (
    "forget_weight",
    "alpha",
    "beta",
    "lr",
    "refine",
    "min_epochs",
)  # of a method, where no flag is


def method_named(name, own):
    """An instance of `own`, the class of the script, or of a class in baselines.py."""
    if name in (None, own().name):
        return own()
    baselines = vars(importlib.import_module(PUBLISHED)).values()
    classes = [each for each in baselines if isinstance(each, type) and issubclass(each, Method)]
    named = {method().name: method for method in [*classes, ICU, own] if method is not Method}
    try:
        return named[flags.one_of(sorted(named))(name)]()
    except argparse.ArgumentTypeError as error:
        way_out = "a method in a file of its own: python FILE.py, or run.sh --script FILE.py"
        raise ValueError(f"--method: {error} ({way_out})") from None


def resolve(args, method):
    """What a run is: (its settings with nothing left open, its method), final from here on.

    args: the flags; method: the script's class. ValueError: they do not go together.
    """
    method, protocol = method_named(args.method, method), PROTOCOLS[args.protocol]
    settings = vars(args) | {"method": method.name}
    for name in OWN_DEFAULTS:
        if settings[name] is None:
            released = method.released if protocol.own_defaults else {}
            settings[name] = released.get(name, getattr(method, name))
    settings["targets"] = method.targets or args.targets or protocol.targets
    settings["published"] = method.published if protocol.published else None
    if args.thresholds == "paper":
        settings["thresholds"] = list(PAPER_THRESHOLDS)
    settings["device"] = processes.device_of(args.device)
    settings["el"] = "every" if args.keep_best else args.el  # to compare epochs
    settings["bert"] = models.default_encoder() if args.bert == "minilm" else args.bert
    args = argparse.Namespace(**settings)
    flags.check_together(args)
    processes.check_flags(args, method)
    return argparse.Namespace(**settings | requests.resolve(args)), method


# --- main ---


class Inputs(NamedTuple):
    """Everything that a run reads, but the weights."""

    tokenizer: object
    samples: list  # of Sample: the texts to forget, then those of earlier requests
    watched: dict = {}  # {index of a sample: requests.Earlier}
    unseen: list = []  # of Sample
    never_saw: dict | None = None  # {measure: mean} of a model that never saw the texts
    ppl_texts: dict = {}  # {name: texts}
    notes: list = []  # of `build_samples`


def read_inputs(args):
    """Reads and checks the Inputs of a run, before a weight is loaded or a file is written."""
    if not args.dry_run and not (args.out and args.pairs):
        raise ValueError(f"{'--pairs FILE' if args.out else '--out DIR'} is missing")
    runs.check_run_folder(args)
    pairs = data.read_pairs(args.pairs) if args.pairs else []
    pairs, watched = requests.with_earlier(args, pairs)
    config, tokenizer = models.check_model(
        args.model, allow_pickle=args.allow_pickle, revision=args.revision
    )
    own = {"tokenizer": tokenizer, "render": data.renderer(tokenizer, pairs)}
    records = data.read_unseen(args.unseen, **own) if args.unseen else []
    models.check_bert(args.bert, args.allow_pickle)
    samples, notes = samples_of(pairs, tokenizer, config, args)
    unseen, _ = samples_of(records, tokenizer, config, args, what="unseen row")
    flags.check_samples(args, samples)
    ppl_texts = {}
    for item in args.ppl:
        file = data.perplexity_file(item, args.data)
        ppl_texts[item.partition("=")[0]] = data.read_texts(file)
    models.check_readable(args.bert, models.true_suffixes(tokenizer, samples), "--bert")
    models.check_inputs(config, tokenizer, {"pair": samples, "unseen row": unseen}, ppl_texts)
    needs_never_saw = args.pairs and args.thresholds == "never-saw"
    never_saw = runs.read_never_saw(args) if needs_never_saw else None
    return Inputs(tokenizer, samples, watched, unseen, never_saw, ppl_texts, notes)


def samples_of(pairs, tokenizer, config, args, what="pair"):
    """`build_samples` as the flags say."""
    return build_samples(
        pairs,
        tokenizer,
        protocol=args.protocol,
        positions=models.positions_of(config) or 1 << 30,
        context=args.context,
        targets=args.targets,
        what=what,
    )


def unlearn(model, tokenizer, pairs, method=METHOD, **settings):
    """ICU, or another method, as a function: for a notebook. Returns a runs.Run.

    model, tokenizer: models.load_model's; the model is changed. pairs: data.read_pairs'. settings:
    flags of icu.py (lr=1e-4, bert="minilm"). The Run's `metrics` and `samples` are as metrics.jsonl
    and samples.jsonl. Nothing is written: models.save_model(model, tokenizer, DIR) does that.
    ValueError: a setting that is none, a text that does not fit.
    """
    defaults = vars(make_parser().parse_args([]))
    if unknown := settings.keys() - defaults.keys() | settings.keys() & NOT_IN_A_NOTEBOOK:
        raise ValueError(f"unlearn: {sorted(unknown)[0]} is no setting of a run in a notebook")
    settings = defaults | {"model": model.name_or_path, "device": str(model.device)} | settings
    args, method = resolve(argparse.Namespace(**settings), method)
    samples, notes = samples_of(pairs, tokenizer, model.config, args)
    processes.seed_everything(args.seed)
    with runs.running(args, method) as run:
        run_epochs(
            model, tokenizer, Inputs(tokenizer, samples, notes=notes), args, method=method, run=run
        )
    return run


# What names files of a run, or other processes.
NOT_IN_A_NOTEBOOK = {
    "out", "pairs", "after", "resume", "overwrite", "ppl", "unseen", "never_saw", "keep_best",
}  # fmt: skip


def main(method=METHOD, argv=None):
    """Reads flags, checks everything, unlearns by `method` (--method names another), and leaves a
    run folder. Returns its runs.Run; None after a dry run, or where the run had ended.

    Without argv it is a command: an error is one line and exit 2.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise TypeError("icu.main takes a class that subclasses icu.Method")
    if argv is None:
        file = method().file
        own_file = None if file.name == "icu.py" else file  # a slip in it gets its traceback
        return flags.run_cli(lambda: main(method, sys.argv[1:]), own_file=own_file)
    args, method = resolve(make_parser().parse_args(argv), method)
    inputs = read_inputs(args)
    print0(runs.plan_text(args, inputs))
    if args.dry_run:
        print0("dry run: everything is in place; no weights were loaded and nothing was written")
        return None
    before = runs.check_resume(args, method) if args.resume else None
    if before and runs.is_finished(args.out):
        return None
    processes.seed_everything(args.seed)
    processes.start(args.device, timeout=args.timeout, zero=2 if args.eval_only else args.zero)
    model, tokenizer = models.load_model(
        args.model,
        dtype=args.dtype,
        device="cpu" if processes.lockstep else args.device,  # ZeRO-3: too large for one, perhaps
        allow_pickle=args.allow_pickle,
        revision=args.revision,
        tokenizer=inputs.tokenizer,
    )
    with runs.running(args, method, before) as run:
        run_epochs(model, tokenizer, inputs, args, method=method, run=run)
        with weights_to_measure(method, model, args):
            run.export(model, tokenizer)
    return run


if __name__ == "__main__":
    # baselines.py imports icu: this very file, also where it is an edited copy under another name.
    sys.modules["icu"] = sys.modules["__main__"]
    main()
