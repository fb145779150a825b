"""The greedy continuation of every prefix of a text: what EL asks for, without `generate`.

One teacher-forced pass answers every position where the model's greedy token is the text's own;
only the others are decoded, together, from that pass's key/value cache. A reader of the method may
skip this file.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kit.data import chunks
from kit.models import cache_word, eos_ids, positions_of

ROW_BATCH = 64  # rows that share a pass and a cache
DECODE_BATCH = 256  # continuations that are decoded at a time, if 2 GiB hold their keys and values


def guesses_and_continuations(model, ids, mask, starts, n):
    """Yields (row, text, guess, continuations) for every row, those of like length together.

    ids, mask (N, T) int64, right-padded -> text: the row's ids; guess: the model's greedy token for
    each position (the first is the text's own); continuations: {t: the greedy continuation of
    text[:t]} for t from starts[i] to T-n, {} without `n`. FloatingPointError: NaN.
    """
    lengths = mask.sum(1).tolist()
    # Rows of like length share a batch, so little is padding.
    order = sorted(range(len(ids)), key=lambda i: lengths[i])
    for chunk in chunks(order, ROW_BATCH):
        T = max(lengths[i] for i in chunk)
        x, m = ids[chunk, :T].to(model.device), mask[chunk, :T].to(model.device)
        # A plain cache keeps every key, also under sliding windows, to decode from the middle.
        cache = DynamicCache() if n else None  # the model fills it
        out = model(input_ids=x, attention_mask=m, use_cache=bool(n), **{cache_word(model): cache})
        # The shift: logits at position t-1 guess token t. guess[:, 0] is never used.
        guess = out.logits[:, :-1].argmax(-1)  # (B, T - 1)
        best = out.logits[:, :-1].gather(-1, guess[..., None])[..., 0]
        if not best[m[:, 1:].bool()].isfinite().all():  # or the argmax of NaN would pass for a miss
            raise FloatingPointError("the model's logits are not finite")
        guess = torch.cat([x[:, :1], guess], dim=1)  # (B, T)
        rows = [
            (x[b, : lengths[i]].tolist(), guess[b, : lengths[i]].tolist(), starts[i])
            for b, i in enumerate(chunk)
        ]
        continuations = [{}] * len(rows)
        if n:
            row_bytes = 2 * sum(layer.keys.nbytes for layer in cache.layers) // len(chunk)
            fitting = max(1, min(DECODE_BATCH, (2 << 30) // row_bytes))
            continuations = _continuations(model, cache, rows, n, fitting)
        for i, (text, greedy, _), of_row in zip(chunk, rows, continuations, strict=True):
            yield i, text, greedy, of_row


class _Continuation(NamedTuple):
    """A greedy continuation of text[:t] that begins with a miss."""

    row: int
    t: int
    length: int  # at most: to the end of the text
    tokens: list

    def goes_on(self, eos):
        return len(self.tokens) < self.length and self.tokens[-1] not in eos


def _continuations(model, cache, rows, n, decode_batch):
    """The greedy continuation of every prefix EL asks for: a row {t: tokens}, t = start .. T-n.

    rows: (text, guess, start), in the order of the cache's rows. Where the guess for position t is
    x_t itself, the continuation of x_<t is x_t followed by that of x_<t+1 (x_t alone if it is EOS).
    So only misses are decoded; the others follow from them, from the end of the text on.
    """
    eos = eos_ids(model)
    misses = []
    for r, (text, guess, start) in enumerate(rows):
        base = start  # the first t of the run of hits that a miss ends
        for t in range(start, len(text)):
            # EL has no prefix past T-n; a position there only ends the run of hits through T-n.
            if guess[t] != text[t] and base <= len(text) - n:
                misses.append(_Continuation(r, t, len(text) - t, [guess[t]]))
            if guess[t] != text[t] or text[t] in eos:
                base = t + 1
    _decode(model, cache, misses, eos, decode_batch)
    decoded = {(miss.row, miss.t): miss.tokens for miss in misses}

    result = []
    for r, (text, guess, start) in enumerate(rows):
        following, of_row = [], {}  # `following` is the continuation of x_<t+1
        for t in range(len(text) - 1, start - 1, -1):
            if guess[t] != text[t]:
                following = decoded.get((r, t), [])
            elif text[t] in eos:
                following = [text[t]]
            else:
                following = [text[t], *following]
            if t <= len(text) - n:
                of_row[t] = following
        result.append(of_row)
    return result


def _decode(model, cache, misses, eos, decode_batch):
    """Greedy decoding, in place, of continuations from the middle of texts with keys in `cache`.

    What has ended leaves the batch, and its padding, once it is a quarter or no position is left.
    """
    positions = positions_of(model.config)
    misses = sorted((miss for miss in misses if miss.goes_on(eos)), key=lambda miss: -miss.length)
    for batch in chunks(misses, decode_batch):
        past, mask, position = _gather_prefixes(cache, batch, batch[0].length - 1, model.device)
        while any(alive := [miss.goes_on(eos) for miss in batch]):
            if sum(alive) <= 0.75 * len(batch) or mask.shape[1] == positions:
                batch = [miss for miss, is_alive in zip(batch, alive, strict=True) if is_alive]
                keep = torch.tensor(alive, device=model.device)
                mask, position = mask[keep], position[keep]
                # A row fills as many slots as its next position says.
                padding = mask.shape[1] - int(position.max())
                mask = mask[:, padding:]
                for layer in past.layers:
                    layer.keep(keep, padding)
            mask = F.pad(mask, (0, 1), value=1)
            last = [[miss.tokens[-1]] for miss in batch]
            logits = model(
                input_ids=torch.tensor(last, device=model.device),  # (A, 1)
                attention_mask=mask,
                position_ids=position[:, None],
                use_cache=True,
                **{cache_word(model): past},
            ).logits  # (A, 1, V)
            position = position + 1
            for miss, guess in zip(batch, logits[:, -1].argmax(-1).tolist(), strict=True):
                if miss.goes_on(eos):
                    miss.tokens.append(guess)


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer with `room` for more: a step writes one slot, copies none."""

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
        self._keys = self._keys[rows][..., padding:, :]
        self._values = self._values[rows][..., padding:, :]
        self._use(end)


def _gather_prefixes(cache, batch, room, device):
    """Keys and values of x_<t for each continuation, moved right without a hole: GPT-Neo's local
    attention counts cache slots, not positions, which are inside the keys already.

    Returns (cache, mask (A, S), the next position (A,)), S = the longest prefix.
    """
    t = torch.tensor([miss.t for miss in batch], device=device)
    S = int(t.max())

    def move(kv):  # (B, heads, T, D) -> (A, heads, S + room, D)
        # The room is written before it is read.
        moved = kv.new_empty(len(batch), kv.shape[1], S + room, kv.shape[3])
        for keys, miss in zip(moved, batch, strict=True):
            keys[:, : S - miss.t] = 0  # masked, but NaN would pass a mask
            keys[:, S - miss.t : S] = kv[miss.row, :, : miss.t]
        return moved

    moved = DynamicCache()
    moved.layers = [
        _RoomyLayer(move(layer.keys), move(layer.values), room) for layer in cache.layers
    ]
    return moved, (torch.arange(S, device=device)[None] >= (S - t)[:, None]).long(), t
