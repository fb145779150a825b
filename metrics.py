"""Section 5.2 without human and GPT: EL, MA, BLEU, BERTScore, entropy, perplexity.

    el, ma = metrics.el_and_ma(model, ids, attention_mask)     # both from one pass
    metrics.bleu("a cat sat", "the cat sat")                   # 0-1

Pure functions of a model and token ids, or of strings. Equations are those of "Learn while
Unlearn" (ICU, arXiv:2407.20271). EL and MA stand here first as their formulas say, then as they
are used: the same values by kit/fast_el.py. Departures from a literal reading:
  1. Eq. 7 divides by T - n, the number of prefixes for start = 1: it is T - n - start + 1.
  2. A generation of nothing scores 0 everywhere, where the libraries raise.
"""

from collections import Counter
from functools import lru_cache, partial
from math import exp, inf, log2, nan

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import StoppingCriteria, StoppingCriteriaList

from kit import fast_el
from kit.data import chunks
from kit.models import (
    bleu_tokens,
    encode_whole,
    eos_ids,
    measuring,
    plain_generate,
    positions_of,
    quiet,
    room_of,
    unread,
)

padded = partial(pad_sequence, batch_first=True)

# --- memorisation as the paper writes it: EL (Eq. 7, 8) and MA (Eq. 9) ---


def overlap(generation, text, n, share_of="generation", *, part=None):
    """OVERLAP_n of Eq. (8) of two lists of ids: the share of the generation's n-grams in `text`.

    0-1. The generation's n-grams are a multiset; a generation without one scores 0. With `part`, a
    set of positions in `text`, only n-grams of `text` that hold one of them count.
    """
    a, b = ngrams(generation, n), ngrams(text, n)
    if part is not None:
        b = [gram for i, gram in enumerate(b) if not part.isdisjoint(range(i, i + n))]
    # Released code: the share of the reference's n-grams; Eq. (8): of the generation's.
    if share_of == "reference":
        a, b = b, a
    known = set(b)
    return sum(gram in known for gram in a) / len(a) if a else 0.0  # Eq. (8)


def ngrams(tokens, n):
    """All runs of n tokens, in order."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


@measuring
def literal_extraction_likelihood(model, text, n=10, *, start=1):
    """Eq. (7) of one text, T ids, by a greedy `generate` a prefix: 0-1, NaN if T < start + n."""
    overlaps = []
    for t in range(start, len(text) - n + 1):
        x = torch.tensor([text[:t]], device=model.device)  # (1, t)
        # f_theta(x_<t): up to T - t tokens, or up to EOS, which counts too
        out = plain_generate(model, x, torch.ones_like(x), max_new_tokens=len(text) - t)
        overlaps.append(overlap(out[0, t:].tolist(), text[t:], n))
    return sum(overlaps) / len(overlaps) if overlaps else nan  # Eq. (7)


@measuring
def literal_memorization_accuracy(model, text, *, start=1):
    """Eq. (9) of one text, T ids, by a pass a position: 0-1, NaN without a token to predict."""
    hits = []
    for t in range(start, len(text)):
        logits = model(input_ids=torch.tensor([text[:t]], device=model.device)).logits  # (1, t, V)
        hits.append(int(logits[0, -1].argmax()) == text[t])
    return sum(hits) / len(hits) if hits else nan  # Eq. (9)


# --- the same, fast ---


def el_and_ma(model, ids, attention_mask=None, **options):
    """Both measures from one pass: (el (N,), ma (N,)). `options`: those of `el_ma_and_spans`."""
    return el_ma_and_spans(model, ids, attention_mask, [None] * len(ids), **options)[:2]


@measuring
def el_ma_and_spans(
    model, ids, attention_mask, parts, *, n=10, start=1, ma_start=None, share_of="generation"
):
    """EL and MA of each text, of the tokens in it that a user marked, and of the others.

    parts: for each row None, or (the marked positions, the others).
    Returns el (N,), ma (N,) and N dicts, {} without parts: "el10_spans", the EL of n-grams that
    hold a marked token, "ma_spans" and "ma_rest", the MA over each; 0-1, NaN where nothing counts.
    `start` and `ma_start` (default: start) are one int or one a row. n=None measures MA alone.
    FloatingPointError: the logits are not finite.
    """
    ma_start = start if ma_start is None else ma_start
    starts, ma_starts = (
        [first] * len(ids) if isinstance(first, int) else list(first) for first in (start, ma_start)
    )
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    el, ma = torch.full((len(ids),), nan), torch.full((len(ids),), nan)
    of_parts = [{} for _ in parts]
    for i, text, guess, continuations in fast_el.guesses_and_continuations(
        model, ids, mask, starts, n
    ):
        hits = {t: text[t] == guess[t] for t in range(ma_starts[i], len(text))}
        el[i] = _extraction(continuations, text, n, share_of)
        ma[i] = _mean([*hits.values()])  # Eq. (9)
        if parts[i]:
            marked, rest = ([hits[t] for t in side if t in hits] for side in parts[i])
            of_parts[i] = {
                "el10_spans": _extraction(continuations, text, n, share_of, part=parts[i][0]),
                "ma_spans": _mean(marked),
                "ma_rest": _mean(rest),
            }
    return el, ma, of_parts


def _extraction(continuations, text, n, share_of, part=None):
    """Eq. (7), the mean of OVERLAP_n over the prefixes; {t: the greedy continuation of x_<t}."""
    overlaps = []
    for t, generation in continuations.items():
        shifted = part and {position - t for position in part}
        overlaps.append(overlap(generation, text[t:], n, share_of, part=shifted))
    return _mean(overlaps)


def _mean(values):
    return sum(values) / len(values) if values else nan


def memorization_accuracy(model, ids, attention_mask=None, start=1):
    """Eq. (9): the share of tokens start .. T-1 (0-based) that the model's greedy guess gets right.

    ids (N, T) int64 and attention_mask (N, T), right-padded -> FloatTensor (N,), 0-1, higher = more
    memorised; NaN of a row with no token to predict. With a BOS at position 0 pass start=2.
    """
    return el_and_ma(model, ids, attention_mask, n=None, start=start)[1]


def extraction_likelihood(model, ids, n=10, attention_mask=None, start=1, *, share_of="generation"):
    """Eq. (7), (8): how much of a text the greedy continuations of its own prefixes give away.

    ids (N, T) int64, right-padded -> FloatTensor (N,), 0-1, higher = more memorised; NaN where
    T < start + n. share_of="reference" (the released code): how many of the text's n-grams the
    continuation contains.
    """
    return el_and_ma(model, ids, attention_mask, n=n, start=start, share_of=share_of)[0]


# --- generation (what Eq. 5 looks at) ---


class _OwnLength(StoppingCriteria):
    """Ends each row of a batch at its own number of tokens."""

    def __init__(self, ends):
        self.ends = ends  # (B,): the length, padding included, at which a row is full

    def __call__(self, input_ids, scores, **kwargs):
        beams = len(input_ids) // len(self.ends)  # (or beam candidates) a row, side by side
        return input_ids.shape[1] >= self.ends.repeat_interleave(beams)


def _beam_batches(prompts, lengths, batch_size, positions):
    """Indices of rows, in batches: one that is done is fed on, within the model's positions."""
    batch, longest = [], 0
    for i in sorted(range(len(prompts)), key=lambda i: (lengths[i], len(prompts[i]))):
        longest = max(longest, len(prompts[i]))
        # The last token is not fed, and of the rows so far row i may have the most.
        if batch and (len(batch) == batch_size or longest + lengths[i] - 1 > positions):
            yield batch
            batch, longest = [], len(prompts[i])
        batch.append(i)
    if batch:
        yield batch


@measuring
def beam_generate(model, prompts, lengths, *, num_beams=2, batch_size=None):
    """f_theta(x_<t0) of Eq. (5): transformers' beam search, in length-sorted batches.

    prompts: N lists of ids, with any BOS; lengths: N ints, the tokens each may have. Returns N
    lists of ids, without EOS. A row's result does not depend on its batch.
    """
    eos = eos_ids(model)
    # The keys of a larger batch, copied for every token, outgrow a CPU's own memory.
    batch_size = batch_size or (32 if model.device.type == "cpu" else 64)
    pad = next(iter(sorted(eos)), 0)
    result = [None] * len(prompts)
    for chunk in _beam_batches(prompts, lengths, batch_size, positions_of(model.config) or inf):
        rows = [torch.tensor(prompts[i], device=model.device, dtype=torch.long) for i in chunk]
        # Left padding: generate() takes positions from the mask
        ids = padded(rows, padding_side="left", padding_value=pad)  # (B, P)
        mask = padded([torch.ones_like(row) for row in rows], padding_side="left")
        P, limit = ids.shape[1], max(lengths[i] for i in chunk)
        ends = torch.tensor([P + lengths[i] for i in chunk], device=model.device)  # (B,)
        out = plain_generate(
            model,
            ids,
            mask,
            max_new_tokens=limit,
            num_beams=num_beams,
            stopping_criteria=StoppingCriteriaList([_OwnLength(ends)]),
        )
        for i, tokens in zip(chunk, out[:, P:].tolist(), strict=True):
            tokens = tokens[: lengths[i]]
            end = next((k for k, token in enumerate(tokens) if token in eos), len(tokens))
            result[i] = tokens[:end]
    return result


# --- measures of what was generated ---


def token_entropy(ids):
    """Eq. (10): the entropy in bits of one generation's token counts; 0 for nothing."""
    ids = list(ids)
    return sum(-c / len(ids) * log2(c / len(ids)) for c in Counter(ids).values()) + 0.0  # Eq. (10)


def bleu(candidate, reference):
    """sacrebleu's sentence BLEU, 0-1: lowercase, no smoothing; an empty side scores 0.

    Texts of under 4 tokens would score 0 even when equal: there BLEU uses the orders they have.
    """
    if not candidate.strip() or not reference.strip():
        return 0.0
    usual, short = _bleu_scorers(bleu_tokens(reference))
    shortest = min(len(usual.tokenizer(side.lower()).split()) for side in (candidate, reference))
    score = (short if shortest < 4 else usual).sentence_score(candidate, [reference]).score
    return min(score / 100, 1.0)  # sacrebleu gives 100.00000000000004 for equal texts


@lru_cache(maxsize=4)
def _bleu_scorers(tokens):
    import logging

    from sacrebleu.metrics import BLEU

    # It warns at each use without use_effective_order.
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    return tuple(
        BLEU(lowercase=True, tokenize=tokens, smooth_method="none", effective_order=e)
        for e in (False, True)
    )


def bertscore(candidates, references, model_path="bert-base-uncased", *, device="cpu"):
    """BERTScore of N string pairs, no rescaling: (P, R, F1), each (N,); an empty side scores 0.

    NaN where the encoder cannot read the reference. The layer is bert-score's for
    bert-base-uncased, 9 of 12, and the same share of another's.
    """
    scores = torch.zeros(3, len(candidates))
    sides = zip(candidates, references, strict=True)
    full = [i for i, (a, b) in enumerate(sides) if a.strip() and b.strip()]
    if full:
        scorer = _bert_scorer(str(model_path), str(device))
        scored = scorer.score([candidates[i] for i in full], [references[i] for i in full])
        scores[:, full] = torch.stack(scored).cpu()
    scores[:, [*unread(model_path, references)]] = nan
    return tuple(scores)


def unrelated_bertscore(texts, model_path, *, device="cpu"):
    """The mean F1 of different texts of a list, each with up to four others."""
    shifted = [texts[k:] + texts[:k] for k in range(1, min(5, len(texts)))]
    f1 = bertscore(texts * len(shifted), sum(shifted, []), model_path, device=device)[2]
    return f1[~f1.isnan()].mean()


class _NoT5(str):
    """A path without "t5" for bert-score, which else makes up a T5 there."""

    def __contains__(self, part):
        return part != "t5" and super().__contains__(part)


@lru_cache(maxsize=2)
def _bert_scorer(model_path, device):
    from bert_score import BERTScorer
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path)
    name = model_path if "t5" in config.model_type else _NoT5(model_path)
    layers = int(0.75 * config.num_hidden_layers + 0.5)
    with quiet():
        scorer = BERTScorer(name, num_layers=layers, device=device)
    limit = room_of(scorer._model) or positions_of(scorer._model.config) or 512
    # Some folders say 1e30.
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, limit)
    return scorer


# --- perplexity ---


def token_losses(model, rows):
    """(-log p in nats, greedy hits, mask), each (B, T - 1), of tokens 1 .. T-1 of B lists of ids.

    The mask is 0 on what pads the shorter rows at their right.
    """
    rows = [torch.tensor(row, device=model.device) for row in rows]
    ids, mask = padded(rows), padded([torch.ones_like(row) for row in rows])  # (B, T)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits, ids = logits[:, :-1], ids[:, 1:]  # (B, T - 1, V): the shift by one
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    return nll.view(ids.shape), logits.argmax(-1) == ids, mask[:, 1:]


@measuring
def perplexity(model, tokenizer, texts, window=512, *, released=False, batch_size=8, added_up=None):
    """exp of the mean negative log-likelihood of all predicted tokens, each text cut into windows.

    A window's first token is not predicted; BOS is added once a text. Released code: texts are
    joined by a blank line before they are cut, exp of the mean of windows' means. added_up: of
    kit/processes.py. ValueError without a token to predict.
    """
    window = min(window, positions_of(model.config) or window)
    texts = [text for text in texts if text.strip()]
    texts = ["\n\n".join(texts)] if released and texts else texts
    encoded = encode_whole(tokenizer, texts)
    windows = [ids[i : i + window] for ids in encoded for i in range(0, len(ids), window)]
    windows = sorted((w for w in windows if len(w) > 1), key=len)

    def sums(part=lambda windows: windows):
        """(sum of negative log-likelihoods in nats, number of them), or of windows' means."""
        total, count = 0.0, 0
        for chunk in chunks(part(windows), batch_size):
            nll, _, mask = token_losses(model, chunk)
            nll, lengths = (nll * mask).double().sum(1), mask.sum(1)  # (B,), without padding
            total += (nll / lengths).sum().item() if released else nll.sum().item()
            count += len(chunk) if released else lengths.sum().item()
        return total, count

    total, count = added_up(sums, model.device) if added_up else sums()
    if not count:
        raise ValueError("perplexity: no text of two tokens or more")
    return exp(min(total / count, 700.0))  # exp(710) overflows a double
