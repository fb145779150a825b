"""Every measure of section 5.2 that needs no human and no GPT: EL, MA, BLEU, BERTScore, entropy, perplexity.

    el, ma = metrics.el_and_ma(model, ids, attention_mask)     # what an epoch of icu.py asks
    metrics.bleu("a cat sat", "the cat sat")                   # 0-1

Pure functions of a model and token ids, or of strings. Equations are those of "Learn while Unlearn" (ICU,
arXiv:2407.20271). How this departs from a literal reading of the paper:
  1. EL is exact but never calls `generate`: one teacher-forced pass answers every position where the model's greedy
     token is the text's own, and only the other positions are decoded, from that same pass's key/value cache.
  2. Eq. 7 divides by T - n; with start = 1 there are exactly T - n prefixes, with any other start T - n - start + 1.
  3. An output of nothing scores 0 everywhere, where the libraries raise.
The literal loops are in tests/test_metrics.py and agree to 1e-6 on GPT-Neo, OPT and Llama.
"""

from collections import Counter
from functools import lru_cache, wraps
from math import exp, log2

import torch
import torch.nn.functional as F
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer


def measuring(function):
    """A model is measured without gradient and without dropout; the mode it was in is put back."""

    @wraps(function)
    def measured(model, *args, **kwargs):
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.inference_mode():
                return function(model, *args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training

    return measured


# --- memorisation: EL (Eq. 7, 8) and MA (Eq. 9) ---


def memorization_accuracy(model, ids, attention_mask=None, start=1):
    """Eq. (9): the share of tokens at positions start .. T-1 (0-based) that the model's greedy guess gets right.

    ids (N, T) int64 and attention_mask (N, T), right-padded -> FloatTensor (N,), 0-1, higher = more memorised.
    One teacher-forced pass, no decoding. With a BOS at position 0 pass start=2, so that the same tokens count with
    and without it. A row with no token to predict is NaN.
    """
    return el_and_ma(model, ids, attention_mask, n=None, start=start)[1]


def extraction_likelihood(model, ids, n=10, attention_mask=None, start=1, *, share_of="generation"):
    """Eq. (7), (8): how much of a text the model's greedy continuations of its own prefixes give away.

    The literal algorithm, which this equals, for one row x of T tokens:
        for t in range(start, T - n + 1):
            a, b = ngrams(greedy(x[:t], T - t tokens, or up to and including EOS)), set(ngrams(x[t:]))
            overlap.append(sum(c in b for c in a) / len(a) if a else 0)        # EL = the mean of these
    ids (N, T) int64, right-padded -> FloatTensor (N,), 0-1, higher = more memorised; NaN where T < start + n.
    share_of="reference" (the released code) asks how many of the text's n-grams the continuation contains instead.
    """
    return el_and_ma(model, ids, attention_mask, n=n, start=start, share_of=share_of)[0]


@measuring
def el_and_ma(
    model,
    ids,
    attention_mask=None,
    *,
    n=10,
    start=1,
    ma_start=None,
    share_of="generation",
    row_batch=64,
    decode_batch=None,
):
    """Both measures from the same teacher-forced pass: (el (N,), ma (N,)), each as its own function describes.

    `start` is one int or one a row; `ma_start` (default: start) lets the released protocol begin the two at different
    positions. n=None measures MA alone. `row_batch` rows share a pass and a cache; `decode_batch` continuations are
    decoded at a time (default: 256, or what 2 GiB of keys and values hold). FloatingPointError for a model whose logits
    are not finite.
    """
    starts = [start] * len(ids) if isinstance(start, int) else list(start)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    lengths = mask.sum(1).tolist()
    el, ma = torch.full((len(ids),), float("nan")), torch.full((len(ids),), float("nan"))
    order = sorted(range(len(ids)), key=lambda i: lengths[i])  # rows of like length share a batch, so little is padding
    for chunk in (order[i : i + row_batch] for i in range(0, len(order), row_batch)):
        T = max(lengths[i] for i in chunk)
        x, m = ids[chunk, :T].to(model.device), mask[chunk, :T].to(model.device)
        # A plain cache keeps every key, also under sliding windows, which a decoding from the middle needs.
        out = model(input_ids=x, attention_mask=m, past_key_values=DynamicCache() if n else None, use_cache=bool(n))
        # The shift: logits at position t-1 guess token t. guess[:, 0] is never used.
        guess = out.logits[:, :-1].argmax(-1)  # (B, T - 1)
        best = out.logits[:, :-1].gather(-1, guess[..., None])[..., 0]
        if not best[m[:, 1:].bool()].isfinite().all():  # or the argmax of NaN would pass for a miss
            raise FloatingPointError("the model's logits are not finite")
        guess = torch.cat([x[:, :1], guess], dim=1)  # (B, T)
        rows = [(x[b, : lengths[i]].tolist(), guess[b, : lengths[i]].tolist(), starts[i]) for b, i in enumerate(chunk)]
        for i, (text, said, row_start) in zip(chunk, rows, strict=True):
            hits = [a == b for a, b in zip(text, said, strict=True)][row_start if ma_start is None else ma_start :]
            if hits:
                ma[i] = sum(hits) / len(hits)  # Eq. (9)
        if n:
            fitting = decode_batch or max(1, min(256, (2 << 30) // _row_bytes(out.past_key_values, len(chunk))))
            continuations = _continuations(model, out.past_key_values, rows, n, fitting)
            for i, (text, _, _), said in zip(chunk, rows, continuations, strict=True):
                if said:
                    # Eq. (7): the mean of OVERLAP_n over the prefixes x_<t
                    el[i] = sum(_overlap(said[t], text, t, n, share_of) for t in said) / len(said)
    return el, ma


def _row_bytes(cache, rows):
    """The keys and values that a continuation needs, at most."""
    return 2 * sum(layer.keys.nbytes for layer in cache.layers) // rows


def _overlap(said, text, t, n, share_of):
    """OVERLAP_n of Eq. (8) between a continuation of text[:t] and text[t:], 0-1; nothing generated scores 0."""
    a, b = _ngrams(said, n), _ngrams(text[t:], n)
    if share_of == "reference":  # Released code: the share of the reference's n-grams; Eq. (8): of the generation's.
        a, b = b, a
    known = set(b)
    return sum(gram in known for gram in a) / len(a) if a else 0.0  # Eq. (8): a as a multiset


def _ngrams(tokens, n):
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


class _Continuation:
    """A greedy continuation of text[:t], decoded as far as it can matter to EL.

    It is the end of every continuation from `base` to t, since the tokens between are hits. `runs` are the stretches
    of text[base:] that it is in the middle of repeating: {position in the text: tokens repeated so far}.
    """

    def __init__(self, row, text, t, *, base, n, where):
        self.row, self.t, self.base, self.n, self.where = row, t, base, n, where
        self.left, self.said, self.runs, self.repeats = len(text) - t, [], {}, False
        for token in text[base:t]:
            self._follow(token)

    def _follow(self, token):
        places = (p for p in self.where.get(token, ()) if p >= self.base)
        self.runs = {p: self.runs.get(p - 1, 0) + 1 for p in places}
        self.repeats = self.repeats or max(self.runs.values(), default=0) >= self.n

    def say(self, token):
        self.said.append(token)
        self.left -= 1
        self._follow(token)

    def goes_on(self, eos):
        """Whether another token matters: it may come, and an n-gram of the text was or can still be repeated."""
        if self.left == 0 or self.said[-1] in eos:
            return False
        return self.repeats or max(self.runs.values(), default=0) + self.left >= self.n


def _continuations(model, cache, rows, n, decode_batch):
    """The greedy continuation of every prefix that EL asks for: per row {t: tokens} for t = start .. T-n.

    rows: (the text, the model's greedy guess for each of its positions, start), in the order of the cache's rows. Where
    the model's guess for position t is x_t itself, the continuation of x_<t is x_t followed by the continuation of
    x_<t+1 (x_t alone if it is EOS). So only the positions it misses are decoded; the others follow from them, read from
    the end of the text to its start. A continuation ends early where its overlap is certain to be 0.
    """
    eos = eos_ids(model)
    misses = []
    for r, (text, said, start) in enumerate(rows):
        where = {}
        for p, token in enumerate(text):
            where.setdefault(token, []).append(p)
        base = start  # the first t of the run of hits that a miss ends
        for t in range(start, len(text)):
            # Past T-n no prefix is asked for; a position there is needed only to end the run of hits through T-n.
            if said[t] != text[t] and base <= len(text) - n:
                miss = _Continuation(r, text, t, base=base, n=n, where=where)
                miss.say(said[t])
                misses.append(miss)
            if said[t] != text[t] or text[t] in eos:
                base = t + 1
    _decode(model, cache, misses, eos, decode_batch)
    decoded = {(miss.row, miss.t): miss.said for miss in misses}

    result = []
    for r, (text, said, start) in enumerate(rows):
        following, found = [], {}  # `following` is the continuation of x_<t+1
        for t in range(len(text) - 1, start - 1, -1):
            if said[t] != text[t]:
                following = decoded.get((r, t), [])
            elif text[t] in eos:
                following = [text[t]]
            else:
                following = [text[t], *following]
            if t <= len(text) - n:
                found[t] = following
        result.append(found)
    return result


def _decode(model, cache, misses, eos, decode_batch):
    """Greedy decoding, in place, of continuations that start in the middle of texts whose keys are in `cache`.

    Those with as much left to say are decoded together, so that a batch ends together. What has ended leaves the batch,
    and the padding it was the reason for with it, once it is a quarter of the batch or the batch is as wide as the
    model has positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    misses = sorted((miss for miss in misses if miss.goes_on(eos)), key=lambda miss: -miss.left)
    for batch in (misses[i : i + decode_batch] for i in range(0, len(misses), decode_batch)):
        past, mask, position = _gather_prefixes(cache, batch, batch[0].left, model.device)
        while any(alive := [miss.goes_on(eos) for miss in batch]):
            if sum(alive) <= 0.75 * len(batch) or mask.shape[1] == positions:
                batch = [miss for miss, is_alive in zip(batch, alive, strict=True) if is_alive]
                keep = torch.tensor(alive, device=model.device)
                mask, position = mask[keep], position[keep]
                padding = mask.shape[1] - int(position.max())  # a row fills as many slots as its next position says
                mask = mask[:, padding:]
                for layer in past.layers:
                    layer.keep(keep, padding)
            token = torch.tensor([[miss.said[-1]] for miss in batch], device=model.device)  # (A, 1)
            mask = F.pad(mask, (0, 1), value=1)
            step = {"attention_mask": mask, "position_ids": position[:, None], "past_key_values": past}
            guesses = model(input_ids=token, use_cache=True, **step).logits[:, -1].argmax(-1).tolist()
            position = position + 1
            for miss, guess in zip(batch, guesses, strict=True):
                if miss.goes_on(eos):
                    miss.say(guess)


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer with room for `room` more tokens, so that a step writes one slot and copies none."""

    def __init__(self, keys, values, room):
        super().__init__()
        self.lazy_initialization(keys, values)
        self._keys, self._values = keys, values  # (A, heads, S + room, D)
        self._use(keys.shape[-2] - room)

    def _use(self, end):
        self.keys, self.values = self._keys[..., :end, :], self._values[..., :end, :]

    def update(self, keys, values, *args, **kwargs):
        begin = self.keys.shape[-2]
        self._keys[..., begin : begin + keys.shape[-2], :] = keys
        self._values[..., begin : begin + keys.shape[-2], :] = values
        self._use(begin + keys.shape[-2])
        return self.keys, self.values

    def keep(self, rows, padding):
        """Goes on with these rows (A,) bool, without the first `padding` slots."""
        end = self.keys.shape[-2] - padding
        self._keys, self._values = self._keys[rows][..., padding:, :], self._values[rows][..., padding:, :]
        self._use(end)


def _gather_prefixes(cache, batch, room, device):
    """Keys and values of x_<t for each continuation of the batch, moved to the right so that no row has a hole.

    Padding is on the left and masked. GPT-Neo's local attention counts cache slots, not positions: a row whose
    slots were not side by side would see the wrong window. Positions are already inside the keys (or the embeddings),
    so moving a key changes nothing else. Returns (cache, mask (A, S), the next position (A,)), S = the longest prefix.
    """
    t = torch.tensor([miss.t for miss in batch], device=device)
    S = int(t.max())

    def move(kv):  # (B, heads, T, D) -> (A, heads, S + room, D)
        moved = kv.new_empty(len(batch), kv.shape[1], S + room, kv.shape[3])  # the room is written before it is read
        for keys, miss in zip(moved, batch, strict=True):
            keys[:, : S - miss.t] = 0  # masked, but NaN would pass a mask
            keys[:, S - miss.t : S] = kv[miss.row, :, : miss.t]
        return moved

    moved = DynamicCache()
    moved.layers = [_RoomyLayer(move(layer.keys), move(layer.values), room) for layer in cache.layers]
    return moved, (torch.arange(S, device=device)[None] >= (S - t)[:, None]).long(), t


def eos_ids(model):
    """The ids that end a generation, as a set (may be empty): generation_config's, else config's."""
    eos = getattr(model, "generation_config", None) and model.generation_config.eos_token_id
    eos = model.config.eos_token_id if eos is None else eos
    return set() if eos is None else set(eos) if isinstance(eos, (list, tuple)) else {eos}


# --- generation (what Eq. 5 looks at) ---


class _OwnLength(StoppingCriteria):
    """Ends each row of a batch at its own number of tokens, exactly as if it had been generated alone."""

    def __init__(self, ends):
        self.ends = ends  # (B,) the length of the whole sequence, padding included, at which a row is full

    def __call__(self, input_ids, scores, **kwargs):
        candidates = len(input_ids) // len(self.ends)  # beams (or beam candidates) a row, side by side
        return input_ids.shape[1] >= self.ends.repeat_interleave(candidates)


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
    order = sorted(range(len(prompts)), key=lambda i: (lengths[i], len(prompts[i])))
    result = [None] * len(prompts)
    for chunk in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
        P, limit = max(len(prompts[i]) for i in chunk), max(lengths[i] for i in chunk)
        # Left padding: generate() takes the position ids from the mask, so a row reads its own positions 0, 1, ...
        x = torch.tensor([[pad] * (P - len(prompts[i])) + list(prompts[i]) for i in chunk], device=model.device)
        m = torch.tensor([[0] * (P - len(prompts[i])) + [1] * len(prompts[i]) for i in chunk], device=model.device)
        ends = torch.tensor([P + lengths[i] for i in chunk], device=model.device)
        out = model.generate(
            input_ids=x, attention_mask=m, max_new_tokens=limit, num_beams=num_beams, do_sample=False, pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([_OwnLength(ends)]),
        )  # fmt: skip
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
    """sacrebleu's sentence BLEU of two strings, 0-1: 13a tokens, lowercase, no smoothing; an empty side scores 0.

    Texts of under 4 tokens have no 4-gram and would score 0 even when equal, so there, and only there, BLEU uses the
    orders they have (`use_effective_order`).
    """
    if not candidate.strip() or not reference.strip():
        return 0.0
    whole, short = _bleu_scorers()
    shortest = min(len(whole.tokenizer(side.lower()).split()) for side in (candidate, reference))
    score = (short if shortest < 4 else whole).sentence_score(candidate, [reference]).score
    return min(score / 100, 1.0)  # sacrebleu gives 100.00000000000004 for equal texts


@lru_cache(maxsize=1)
def _bleu_scorers():
    import logging

    from sacrebleu.metrics import BLEU

    logging.getLogger("sacrebleu").setLevel(logging.ERROR)  # it warns at each use without use_effective_order
    return tuple(BLEU(lowercase=True, tokenize="13a", smooth_method="none", effective_order=e) for e in (False, True))


def bertscore(candidates, references, model_path="bert-base-uncased", *, device="cpu", batch_size=64):
    """BERTScore of N string pairs, no rescaling: (P, R, F1), each a FloatTensor (N,); an empty side scores 0.

    The layer is bert-score's default for bert-base-uncased, 9 of 12, and the same share of any other encoder's.
    """
    scores = torch.zeros(3, len(candidates))
    full = [i for i, (c, r) in enumerate(zip(candidates, references, strict=True)) if c.strip() and r.strip()]
    if full:
        scorer = _bert_scorer(str(model_path), str(device), batch_size)
        scores[:, full] = torch.stack(scorer.score([candidates[i] for i in full], [references[i] for i in full])).cpu()
    return tuple(scores)


@lru_cache(maxsize=2)
def _bert_scorer(model_path, device, batch_size):
    from bert_score import BERTScorer
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(model_path).num_hidden_layers
    scorer = BERTScorer(model_path, num_layers=int(0.75 * layers + 0.5), device=device, batch_size=batch_size)
    limit = scorer._model.config.max_position_embeddings
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, limit)  # some folders say 1e30
    return scorer


# --- perplexity ---


def perplexity(model, tokenizer, texts, window=512, *, released=False, batch_size=8):
    """Perplexity of texts: each in windows of `window` tokens, exp of the mean over all predicted tokens.

    A window's first token is not predicted; a tokenizer that adds BOS adds it once a text. Released code: the texts
    joined by a blank line before they are cut, exp of the mean of the windows' means. ValueError without any token.
    """
    return perplexity_of(*perplexity_sums(model, tokenizer, texts, window, released=released, batch_size=batch_size))


def perplexity_of(total, count):
    """exp of the mean; ValueError where nothing was counted."""
    if not count:
        raise ValueError("perplexity: no text of two tokens or more")
    return exp(min(total / count, 700.0))  # exp(710) overflows a double


@measuring
def perplexity_sums(model, tokenizer, texts, window=512, *, released=False, batch_size=8, part=lambda windows: windows):
    """(sum of negative log-likelihoods in nats, number of them), which `perplexity_of` turns into a perplexity.

    Arguments as `perplexity`; `part` picks the windows to take, so that several processes can add up their sums.
    Released code: a window counts once, with its mean.
    """
    window = min(window, getattr(model.config, "max_position_embeddings", window))
    texts = [text for text in texts if text.strip()]
    texts = ["\n\n".join(texts)] if released and texts else texts
    encoded = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    windows = [ids[i : i + window] for ids in encoded for i in range(0, len(ids), window)]
    windows = part(sorted((w for w in windows if len(w) > 1), key=len))
    total, count = 0.0, 0
    for chunk in (windows[i : i + batch_size] for i in range(0, len(windows), batch_size)):
        x = torch.nn.utils.rnn.pad_sequence([torch.tensor(w) for w in chunk], batch_first=True).to(model.device)
        lengths = torch.tensor([len(w) for w in chunk], device=model.device)
        mask = torch.arange(x.shape[1], device=model.device)[None] < lengths[:, None]  # (B, T)
        logits = model(input_ids=x, attention_mask=mask.long(), use_cache=False).logits
        logits = logits[:, :-1].float()  # the shift by one
        nll = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none").view(len(chunk), -1)
        nll = (nll * mask[:, 1:]).double().sum(1)  # (B,): a sum a window, padding left out
        total += (nll / (lengths - 1)).sum().item() if released else nll.sum().item()
        count += len(chunk) if released else int((lengths - 1).sum())
    return total, count
