"""Every measure of section 5.2 that needs no human and no GPT: EL, MA, BLEU, BERTScore, entropy, perplexity.

    el, ma = metrics.el_and_ma(model, ids, attention_mask)     # both from one pass
    metrics.bleu("a cat sat", "the cat sat")                   # 0-1

Pure functions of a model and token ids, or of strings. Equations are those of "Learn while Unlearn" (ICU,
arXiv:2407.20271). EL and MA stand here first as their formulas say, a `generate` a prefix, then as they are used: the
same values from the continuations that kit/fast_el.py finds without a `generate`. Departures from a literal reading:
  1. Eq. 7 divides by T - n; with start = 1 there are exactly T - n prefixes, with any other start T - n - start + 1.
  2. An output of nothing scores 0 everywhere, where the libraries raise.
"""

from collections import Counter
from functools import lru_cache
from math import exp, inf, log2, nan

import torch
import torch.nn.functional as F
from transformers import StoppingCriteria, StoppingCriteriaList

from kit import fast_el
from kit.models import encode_whole, eos_ids, measuring, plain_generate, positions_of, quiet
from kit.readable import bleu_tokens, can_read, encoder_tokenizer

# --- memorisation as the paper writes it: EL (Eq. 7, 8) and MA (Eq. 9) ---


def overlap(said, text, n, share_of="generation", *, part=None):
    """OVERLAP_n of Eq. (8) between two lists of ids: the share of the n-grams of `said` that `text` has, 0-1.

    n-grams of what was said count as often as they were said (a multiset); nothing said scores 0. With `part`, a set of
    positions in `text`, only n-grams of `text` that hold one of them count.
    """
    a, b = ngrams(said, n), ngrams(text, n)
    if part is not None:
        b = [gram for i, gram in enumerate(b) if not part.isdisjoint(range(i, i + n))]
    if (
        share_of == "reference"
    ):  # Released code: the share of the reference's n-grams; Eq. (8): of the generation's.
        a, b = b, a
    known = set(b)
    return sum(gram in known for gram in a) / len(a) if a else 0.0  # Eq. (8)


def ngrams(tokens, n):
    """All runs of n tokens, in order."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


@measuring
def literal_extraction_likelihood(model, text, n=10, *, start=1):
    """Eq. (7) of one text, a list of T ids, by one greedy `generate` a prefix: 0-1, NaN where T < start + n."""
    overlaps = []
    for t in range(start, len(text) - n + 1):
        x = torch.tensor([text[:t]], device=model.device)  # (1, t)
        # f_theta(x_<t): up to T - t tokens, or to EOS, which is said too
        out = plain_generate(model, x, torch.ones_like(x), max_new_tokens=len(text) - t)
        overlaps.append(overlap(out[0, t:].tolist(), text[t:], n))
    return sum(overlaps) / len(overlaps) if overlaps else nan  # Eq. (7)


@measuring
def literal_memorization_accuracy(model, text, *, start=1):
    """Eq. (9) of one text, a list of T ids, a pass a position: 0-1, NaN without a token to predict."""
    hits = []
    for t in range(start, len(text)):
        logits = model(input_ids=torch.tensor([text[:t]], device=model.device)).logits[
            0, -1
        ]  # (V,)
        hits.append(int(logits.argmax()) == text[t])
    return sum(hits) / len(hits) if hits else nan  # Eq. (9)


# --- the same, fast ---


def el_and_ma(model, ids, attention_mask=None, **how):
    """Both measures from the same teacher-forced pass: (el (N,), ma (N,)), each as its own function describes.

    `how`: n, start, ma_start, share_of, row_batch and decode_batch of `el_ma_and_spans`.
    """
    return el_ma_and_spans(model, ids, attention_mask, [None] * len(ids), **how)[:2]


@measuring
def el_ma_and_spans(
    model, ids, attention_mask, parts, *,
    n=10, start=1, ma_start=None, share_of="generation", row_batch=64, decode_batch=None,
):  # fmt: skip
    """(el (N,), ma (N,), what is left of a part of each text and of its rest: a dict a row, {} without parts).

    parts: for each row None, or (the positions of the part, those of the rest) -> {"el10_spans": EL of n-grams that
    hold a token of the part; "ma_spans", "ma_rest": MA over each}, 0-1, NaN where there is nothing to count.
    `start` is one int or one a row; `ma_start` (default: start) lets the released protocol begin the two at different
    positions. n=None measures MA alone. `row_batch` and `decode_batch` bound memory, as kit/fast_el.py says.
    FloatingPointError for a model whose logits are not finite.
    """
    starts = [start] * len(ids) if isinstance(start, int) else list(start)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    el, ma, of_spans = (
        torch.full((len(ids),), nan),
        torch.full((len(ids),), nan),
        [{} for _ in parts],
    )
    how = {"n": n, "row_batch": row_batch, "decode_batch": decode_batch}
    for i, text, guess, said in fast_el.guesses_and_continuations(model, ids, mask, starts, **how):
        hits = {
            t: text[t] == guess[t]
            for t in range(starts[i] if ma_start is None else ma_start, len(text))
        }
        el[i], ma[i] = _extraction(said, text, n, share_of), _mean([*hits.values()])  # Eq. (9)
        if parts[i]:
            of_part, of_rest = (_mean([hits[t] for t in side if t in hits]) for side in parts[i])
            el_of_part = _extraction(said, text, n, share_of, part=parts[i][0])
            of_spans[i] = {"el10_spans": el_of_part, "ma_spans": of_part, "ma_rest": of_rest}
    return el, ma, of_spans


def _extraction(said, text, n, share_of, part=None):
    """Eq. (7): the mean of OVERLAP_n over the prefixes x_<t, from `said`, {t: the greedy continuation of x_<t}."""
    return _mean(
        [overlap(said[t], text[t:], n, share_of, part=part and {p - t for p in part}) for t in said]
    )


def _mean(values):
    return sum(values) / len(values) if values else nan


def memorization_accuracy(model, ids, attention_mask=None, start=1):
    """Eq. (9): the share of tokens at positions start .. T-1 (0-based) that the model's greedy guess gets right.

    ids (N, T) int64 and attention_mask (N, T), right-padded -> FloatTensor (N,), 0-1, higher = more memorised.
    One teacher-forced pass, no decoding. With a BOS at position 0 pass start=2, so that the same tokens count with
    and without it. A row with no token to predict is NaN.
    """
    return el_and_ma(model, ids, attention_mask, n=None, start=start)[1]


def extraction_likelihood(model, ids, n=10, attention_mask=None, start=1, *, share_of="generation"):
    """Eq. (7), (8): how much of a text the model's greedy continuations of its own prefixes give away.

    What `literal_extraction_likelihood` computes, for every row at once and without `generate`.
    ids (N, T) int64, right-padded -> FloatTensor (N,), 0-1, higher = more memorised; NaN where T < start + n.
    share_of="reference" (the released code) asks how many of the text's n-grams the continuation contains instead.
    """
    return el_and_ma(model, ids, attention_mask, n=n, start=start, share_of=share_of)[0]


# --- generation (what Eq. 5 looks at) ---


class _OwnLength(StoppingCriteria):
    """Ends each row of a batch at its own number of tokens, exactly as if it had been generated alone."""

    def __init__(self, ends):
        self.ends = (
            ends  # (B,) the length of the whole sequence, padding included, at which a row is full
        )

    def __call__(self, input_ids, scores, **kwargs):
        candidates = len(input_ids) // len(
            self.ends
        )  # beams (or beam candidates) a row, side by side
        return input_ids.shape[1] >= self.ends.repeat_interleave(candidates)


def _beam_batches(prompts, lengths, batch_size, positions):
    """Indices of rows of like length; a row that is done, fed on until all are, stays within the model's positions."""
    batch, longest = [], 0
    for i in sorted(range(len(prompts)), key=lambda i: (lengths[i], len(prompts[i]))):
        longest = max(longest, len(prompts[i]))
        # The last token said is not fed, and row i may say the most of those so far.
        if batch and (len(batch) == batch_size or longest + lengths[i] - 1 > positions):
            yield batch
            batch, longest = [], len(prompts[i])
        batch.append(i)
    if batch:
        yield batch


@measuring
def beam_generate(model, prompts, lengths, *, num_beams=2, batch_size=None):
    """f_theta(x_<t0) of Eq. (5): beam search from each prompt, transformers' own, in length-sorted batches.

    prompts: N lists of ids (BOS, if any, put there by the caller); lengths: N ints, the tokens each may have.
    Returns N lists of ids, without EOS. A row's result does not depend on its batch. `batch_size` is 64 on a GPU and 32
    on a CPU, where a larger batch is slower: its keys, copied for every token, outgrow the processor's own memory.
    """
    eos = eos_ids(model)
    batch_size = batch_size or (32 if model.device.type == "cpu" else 64)
    pad = next(iter(sorted(eos)), 0)
    result = [None] * len(prompts)
    for chunk in _beam_batches(prompts, lengths, batch_size, positions_of(model.config) or inf):
        P, limit = max(len(prompts[i]) for i in chunk), max(lengths[i] for i in chunk)
        # Left padding: generate() takes the position ids from the mask, so a row reads its own positions 0, 1, ...
        x = torch.tensor(
            [[pad] * (P - len(prompts[i])) + list(prompts[i]) for i in chunk], device=model.device
        )
        m = torch.tensor(
            [[0] * (P - len(prompts[i])) + [1] * len(prompts[i]) for i in chunk],
            device=model.device,
        )
        ends = torch.tensor([P + lengths[i] for i in chunk], device=model.device)
        how = {"stopping_criteria": StoppingCriteriaList([_OwnLength(ends)])}
        out = plain_generate(model, x, m, max_new_tokens=limit, num_beams=num_beams, **how)
        for i, tokens in zip(chunk, out[:, P:].tolist(), strict=True):
            tokens = tokens[: lengths[i]]
            end = next((k for k, token in enumerate(tokens) if token in eos), len(tokens))
            result[i] = tokens[:end]
    return result


# --- measures of what was generated ---


def token_entropy(ids):
    """Eq. (10): the entropy in bits of one generation's token counts; 0 for one repeated token or for nothing."""
    ids = list(ids)
    return sum(-c / len(ids) * log2(c / len(ids)) for c in Counter(ids).values()) + 0.0  # Eq. (10)


def bleu(candidate, reference):
    """sacrebleu's sentence BLEU of two strings, 0-1: lowercase, no smoothing; an empty side scores 0.

    Tokens are 13a's, or those that the reference's script asks for where words have no spaces (kit/readable.py).
    Texts of under 4 tokens have no 4-gram and would score 0 even when equal, so there, and only there, BLEU uses the
    orders they have (`use_effective_order`).
    """
    if not candidate.strip() or not reference.strip():
        return 0.0
    whole, short = _bleu_scorers(bleu_tokens(reference))
    shortest = min(len(whole.tokenizer(side.lower()).split()) for side in (candidate, reference))
    score = (short if shortest < 4 else whole).sentence_score(candidate, [reference]).score
    return min(score / 100, 1.0)  # sacrebleu gives 100.00000000000004 for equal texts


@lru_cache(maxsize=4)
def _bleu_scorers(tokens):
    import logging

    from sacrebleu.metrics import BLEU

    logging.getLogger("sacrebleu").setLevel(
        logging.ERROR
    )  # it warns at each use without use_effective_order
    return tuple(
        BLEU(lowercase=True, tokenize=tokens, smooth_method="none", effective_order=e)
        for e in (False, True)
    )


def bertscore(
    candidates, references, model_path="bert-base-uncased", *, device="cpu", batch_size=64
):
    """BERTScore of N string pairs, no rescaling: (P, R, F1), each a FloatTensor (N,); an empty side scores 0.

    NaN where the encoder cannot read the reference: over 20% of its pieces are unknown, which all are equal.
    The layer is bert-score's default for bert-base-uncased, 9 of 12, and the same share of any other encoder's.
    """
    scores = torch.zeros(3, len(candidates))
    full = [
        i
        for i, (c, r) in enumerate(zip(candidates, references, strict=True))
        if c.strip() and r.strip()
    ]
    if full:
        scorer = _bert_scorer(str(model_path), str(device), batch_size)
        scores[:, full] = torch.stack(
            scorer.score([candidates[i] for i in full], [references[i] for i in full])
        ).cpu()
    tokenizer = encoder_tokenizer(str(model_path))
    scores[:, [not can_read(tokenizer, reference) for reference in references]] = nan
    return tuple(scores)


def unrelated_bertscore(texts, model_path, *, device="cpu"):
    """The mean F1 between different texts of a list, each with up to four others: what no likeness scores."""
    shifted = [texts[k:] + texts[:k] for k in range(1, min(5, len(texts)))]
    f1 = bertscore(texts * len(shifted), sum(shifted, []), model_path, device=device)[2]
    return f1[~f1.isnan()].mean()


@lru_cache(maxsize=2)
def _bert_scorer(model_path, device, batch_size):
    from bert_score import BERTScorer
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(model_path).num_hidden_layers
    with quiet():
        scorer = BERTScorer(
            model_path, num_layers=int(0.75 * layers + 0.5), device=device, batch_size=batch_size
        )
    limit = scorer._model.config.max_position_embeddings
    scorer._tokenizer.model_max_length = min(
        scorer._tokenizer.model_max_length, limit
    )  # some folders say 1e30
    return scorer


# --- perplexity ---


def perplexity(model, tokenizer, texts, window=512, *, released=False, batch_size=8, added_up=None):
    """Perplexity of texts: each in windows of `window` tokens, exp of the mean over all predicted tokens.

    A window's first token is not predicted; a tokenizer that adds BOS adds it once a text. Released code: the texts
    joined by a blank line before they are cut, exp of the mean of the windows' means. ValueError without any token.
    `added_up(sums, device)` shares the windows out over several processes (kit/processes.py).
    """

    def sums(part=lambda windows: windows):
        how = {"released": released, "batch_size": batch_size, "part": part}
        return perplexity_sums(model, tokenizer, texts, window, **how)

    return perplexity_of(*(added_up(sums, model.device) if added_up else sums()))


def perplexity_of(total, count):
    """exp of the mean; ValueError where nothing was counted."""
    if not count:
        raise ValueError("perplexity: no text of two tokens or more")
    return exp(min(total / count, 700.0))  # exp(710) overflows a double


@measuring
def perplexity_sums(
    model,
    tokenizer,
    texts,
    window=512,
    *,
    released=False,
    batch_size=8,
    part=lambda windows: windows,
):
    """(sum of negative log-likelihoods in nats, number of them), which `perplexity_of` turns into a perplexity.

    Arguments as `perplexity`; `part` picks the windows to take, so that several processes can add up their sums.
    Released code: a window counts once, with its mean.
    """
    window = min(window, positions_of(model.config) or window)
    texts = [text for text in texts if text.strip()]
    texts = ["\n\n".join(texts)] if released and texts else texts
    encoded = encode_whole(tokenizer, texts)
    windows = [ids[i : i + window] for ids in encoded for i in range(0, len(ids), window)]
    windows = part(sorted((w for w in windows if len(w) > 1), key=len))
    total, count = 0.0, 0
    for chunk in (windows[i : i + batch_size] for i in range(0, len(windows), batch_size)):
        x = torch.nn.utils.rnn.pad_sequence([torch.tensor(w) for w in chunk], batch_first=True).to(
            model.device
        )
        lengths = torch.tensor([len(w) for w in chunk], device=model.device)
        mask = torch.arange(x.shape[1], device=model.device)[None] < lengths[:, None]  # (B, T)
        logits = model(input_ids=x, attention_mask=mask.long(), use_cache=False).logits
        logits = logits[:, :-1].float()  # the shift by one
        nll = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none").view(
            len(chunk), -1
        )
        nll = (nll * mask[:, 1:]).double().sum(1)  # (B,): a sum a window, padding left out
        total += (nll / (lengths - 1)).sum().item() if released else nll.sum().item()
        count += len(chunk) if released else int((lengths - 1).sum())
    return total, count
