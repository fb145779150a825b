"""The frozen copy of Eq. 4, theta_0: a second model, or what it says of texts that never change, computed once."""

import copy

import torch
import torch.nn.functional as F

from kit.data import chunks
from kit.processes import gathered


def live_copy(model, sides, collate, *, taught=(), layer=None):
    """A second model, which runs at every step: the readable reference for `cached_copy`, of the same arguments."""
    frozen = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def ask(name, rows, texts):
        ids, attention_mask, targets = collate(texts, model.device)
        how = {
            "attention_mask": attention_mask,
            "use_cache": False,
            "output_hidden_states": layer is not None,
        }
        out = frozen(input_ids=ids, **how)
        if name in taught:
            return out.logits[:, :-1][targets[:, 1:]], None  # the shift by one: (M, V)
        return out.logits, None if layer is None else out.hidden_states[layer]

    return ask


@torch.no_grad()
def cached_copy(model, sides, collate, *, taught=(), layer=None, batch_size=8):
    """What a live copy of the model would say of these sides later, from hidden states computed now.

    sides: {name: a list of Text for each row}; collate: texts, device -> ids, attention_mask, target_mask. Returns
    ask(side, rows, texts) -> logits (B, T, V) and the hidden states (B, T, H) of `layer` (or None) for the B texts of
    these rows; ValueError if they are not the texts they were. Of the sides in `taught` only the targets are kept:
    there ask returns logits (M, V) of the M targets of the rows, and None.
    theta_0 never changes and neither do the texts, so the last hidden states (N x T x H, megabytes) and a copy of the
    output head give the exact KL without a second model in memory or a second forward pass a step. ValueError for a
    model whose logits are not its head applied to its last hidden state (logit scaling or capping): use --teacher live.
    """
    head, states = frozen_head(model), {}
    targets = {name: taught_states(model, rows, collate, batch_size) for name, rows in dict(taught).items()}
    for name, rows in sides.items():
        found = []
        for chunk in chunks([text for row in rows for text in row], batch_size):
            ids, attention_mask, _ = collate(chunk, model.device)
            inputs = {"input_ids": ids, "attention_mask": attention_mask, "use_cache": False}
            out = model.base_model(**inputs, output_hidden_states=layer is not None)
            last = out.last_hidden_state  # (B, T, H)
            if not found and not torch.allclose(head(last), model(**inputs).logits, atol=1e-3):
                raise ValueError(
                    f"{type(model).__name__} changes its logits after the output head: use --teacher live"
                )
            kept = [last] if layer is None else [last, out.hidden_states[layer]]
            found += [[h[b, : len(text.ids)].clone() for h in kept] for b, text in enumerate(chunk)]
        found = iter(found)
        states[name] = [[(text.ids, next(found)) for text in row] for row in rows]

    @torch.no_grad()
    def ask(name, rows, texts):
        if name in targets:
            return head(torch.cat([targets[name][row] for row in rows])), None
        known = [pair for row in rows for pair in states[name][row]]
        if [ids for ids, _ in known] != [text.ids for text in texts]:
            raise ValueError(
                f"side {name!r} has other texts than before training: pass --teacher live"
            )
        kept = zip(*(state for _, state in known), strict=True)
        last, *more = (
            torch.nn.utils.rnn.pad_sequence(h, batch_first=True) for h in kept
        )  # (B, T, H)
        return head(last), *(more or [None])

    return ask


def taught_states(model, rows, collate, batch_size):
    """The states (M, H) that predict the M targets of each row's texts."""
    texts, states = [text for row in rows for text in row], []
    for chunk in chunks(texts, batch_size):
        ids, attention_mask, targets = collate(chunk, model.device)
        inputs = {"input_ids": ids, "attention_mask": attention_mask, "use_cache": False}
        last = model.base_model(**inputs).last_hidden_state[:, :-1]  # (B, T - 1, H)
        states += [h[target] for h, target in zip(last, targets[:, 1:], strict=True)]
    states = iter(states)
    return [torch.cat([next(states) for _ in row]) for row in rows]


def frozen_head(model):
    """states (B, T, H) -> logits (B, T, V), by a copy of the model's output head; ValueError if it is not linear."""
    output = model.get_output_embeddings()
    with gathered(output.parameters()):
        copied = {
            name: p.detach().clone() for name, p in output.named_parameters()
        }  # weight (V, H), perhaps bias (V,)
    if not set(copied) <= {"weight", "bias"}:
        raise ValueError(
            f"{type(model).__name__}: its output head is no linear layer: use --teacher live"
        )
    return lambda states: F.linear(states, **copied)
