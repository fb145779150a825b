"""How likely texts are after others, many at once: the choices of a row share one pass over their context.

The scores are those of the plain loop, a row at a time (tests/test_tasks.py).
"""

from collections import defaultdict
from itertools import chain, islice
from os.path import commonprefix

import torch
from tqdm import tqdm
from transformers import DynamicCache

from kit import models


def encode_pairs(tokenizer, requests):
    """(context, continuation) texts -> (context ids, continuation ids), as lm-evaluation-harness splits them.

    The two are encoded together and split at the number of tokens of the context alone. Spaces at the context's end
    go to the continuation, since a BPE's word begins with its space. BOS is added where the tokenizer adds one (OPT,
    Llama); an empty context is BOS, or EOS.
    """
    stripped = [context.rstrip() for context, _ in requests]
    contexts = list(dict.fromkeys(stripped))
    ids = dict(zip(contexts, models.encode_whole(tokenizer, contexts), strict=True))
    wholes = models.encode_whole(
        tokenizer, [context + continuation for context, continuation in requests]
    )
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [
        (ids[key] or [start], whole[len(ids[key]) :])
        for key, whole in zip(stripped, wholes, strict=True)
    ]


@torch.inference_mode()
def loglikelihoods(model, pairs, *, batch_tokens=2048, desc=None):
    """How likely each continuation is after its context: a list of (sum of log p in nats, greedy ids), as `pairs`.

    pairs: (context ids, continuation ids), neither empty, the continuation no longer than the model's positions. The
    greedy ids are the model's guess for each token of the continuation, the ones before it given. A context that is
    too long loses its beginning. A batch holds up to `batch_tokens` tokens; desc: the name on a progress bar.
    """
    answers, (body, head) = [None] * len(pairs), split_model(model)
    with tqdm(total=len(pairs), desc=desc, unit=" requests", disable=desc is None) as bar:
        for batch, states in target_states(model, body, head, pairs, batch_tokens=batch_tokens):
            for i, answer in zip(
                batch, score_tokens(head, states, [pairs[i][1] for i in batch]), strict=True
            ):
                answers[i] = answer
            bar.update(len(batch))
    return answers


def target_states(model, body, head, pairs, *, batch_tokens=2048):
    """Yields (requests, states): indices in `pairs`; (K, H), from which `head` predicts their K continuation tokens.

    pairs, batch_tokens: as `loglikelihoods`; a context that several have is computed once.
    """
    # The last token of all is only predicted, so a row may have one more than the model has positions.
    rows = [(context + continuation)[-positions_of(model) - 1 :] for context, continuation in pairs]
    asked = [(row, continuation) for row, (_, continuation) in zip(rows, pairs, strict=True)]
    lines, long = plan_lines(model, body, head, asked)
    work = [(line_states, batch) for batch in batches(lines, batch_tokens)]
    for states_of, batch in work + [(cached_states, [requests]) for requests in long]:
        yield (
            list(chain.from_iterable(batch)),
            states_of(model, body, [[asked[i] for i in r] for r in batch]),
        )


def plan_lines(model, body, head, asked):
    """(lines, long): (tokens on the line, requests) a line, and requests that share a cache, not a line.

    asked: (row, the continuation it ends in). Rows of one context share a line, or a cache where the line would be too
    long. The longest of each kind shows whether the model allows it; if not, each row of that kind has its own line.
    """
    same_context, shared, long = defaultdict(list), [], []
    for i, (row, continuation) in enumerate(asked):
        same_context[tuple(row[: -len(continuation)])].append(i)
    for requests in same_context.values():
        trunk, *tails = split_trunk([asked[i][0][:-1] for i in requests])
        length = len(trunk) + sum(map(len, tails))
        (long if length > window_of(model) and any(tails) else shared).append((length, requests))
    for groups, states_of in ((shared, line_states), (long, cached_states)):
        several = [group for group in groups if len(group[1]) > 1]
        if several and not agrees(
            states_of, model, body, head, group=[asked[i] for i in max(several)[1]]
        ):
            groups[:] = [group for group in groups if len(group[1]) == 1]
            shared += [(len(asked[i][0]) - 1, [i]) for _, requests in several for i in requests]
    return shared, [requests for _, requests in long]


def agrees(states_of, model, body, head, *, group):
    """Whether rows together score what each does on a line of its own, within the rounding of float32.

    No list of architectures knows: ALiBi takes a distance from slots, chunks of attention end at slots, a recurrent
    state runs through a whole line, and a model may not take such a mask or cache at all.
    """
    continuations = [continuation for _, continuation in group]
    with torch.autocast(model.device.type, enabled=False):
        alone = score_tokens(
            head, line_states(model, body, [[row] for row in group]), continuations
        )
        try:
            together = score_tokens(head, states_of(model, body, [group]), continuations)
        except Exception:  # a dozen types for one thing: this model is not to be asked so
            return False
    return all(
        abs(a - b) <= 1e-3 + 1e-4 * abs(a) for (a, _), (b, _) in zip(alone, together, strict=True)
    )


def split_trunk(inputs):
    """[what all inputs begin with, what is left of each]."""
    trunk = commonprefix(inputs)
    return [trunk, *(row[len(trunk) :] for row in inputs)]


def line_states(model, body, groups):
    """Groups of (row, the continuation it ends in) -> states (K, H) that predict all continuations' K tokens in order.

    A group is one line: the trunk of its rows once, then each row's tail, which has the positions after the trunk and
    sees the trunk and itself. The trunk of a group of one is its whole row.
    """
    lines, positions, owners, predict = [], [], [], []
    for group in groups:
        # The shift by one: position i predicts token i + 1, so the last token of a row is no input.
        trunk, *tails = split_trunk([row[:-1] for row, _ in group])
        C, line, position, owner, slots = (
            len(trunk),
            [*trunk],
            [*range(len(trunk))],
            [0] * len(trunk),
            [],
        )
        for n, (tail, (_, continuation)) in enumerate(zip(tails, group, strict=True), start=1):
            row = [
                *range(C),
                *range(len(line), len(line) + len(tail)),
            ]  # where on the line its tokens are
            slots += row[-len(continuation) :]
            line, position = line + tail, position + [*range(C, C + len(tail))]
            owner += [n] * len(tail)
        lines, positions, owners = [*lines, line], [*positions, position], [*owners, owner]
        predict.append(slots)
    x, owner, more = (
        pad(lines, model.device),
        pad(owners, model.device),
        {},
    )  # (G, T); padding on the right is unseen
    if owner.any():
        sees = (owner[:, None] == 0) | (owner[:, None] == owner[:, :, None])  # (G, T, T)
        mask = torch.zeros(sees.shape, dtype=model.dtype, device=model.device)
        mask.masked_fill_(~sees.tril(), torch.finfo(model.dtype).min)
        more = {"attention_mask": mask[:, None], "position_ids": pad(positions, model.device)}
    where = [g * x.shape[1] + slot for g, slots in enumerate(predict) for slot in slots]
    states = body(input_ids=x, use_cache=False, **more)  # (G, T, H)
    return states.flatten(0, 1)[torch.tensor(where, device=model.device)]  # (K, H)


def cached_states(model, body, groups):
    """As line_states, of one group that is too long for a line: its tails behind copies of its trunk's cache."""
    (group,) = groups
    trunk, *tails = split_trunk([row[:-1] for row, _ in group])
    cache = DynamicCache()
    how = {models.cache_word(model): cache, "use_cache": True}
    first = body(input_ids=pad([trunk], model.device), **how)[0]  # (C, H)
    cache.batch_repeat_interleave(len(tails))
    rest = body(input_ids=pad(tails, model.device), **how)  # (R, L, H)
    rows = [
        torch.cat([first, states[: len(tail)]]) for tail, states in zip(tails, rest, strict=True)
    ]
    return torch.cat(
        [row[-len(continuation) :] for row, (_, continuation) in zip(rows, group, strict=True)]
    )


def score_tokens(head, states, continuations):
    """[(sum of log p, greedy ids)] of continuations; states (K, H) predict their K tokens one after the other."""
    logps, said = [], []
    targets = torch.tensor(
        [token for continuation in continuations for token in continuation], device=states.device
    )
    for state, target in zip(
        states.split(256), targets.split(256), strict=True
    ):  # (K, V) at once may be gigabytes
        logits = head(state)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logps += logits.log_softmax(1).gather(1, target[:, None])[:, 0].tolist()
        said += logits.argmax(1).tolist()
    logps, said = iter(logps), iter(said)
    return [(sum(islice(logps, len(c))), list(islice(said, len(c)))) for c in continuations]


def split_model(model):
    """(body, head) such that head(body(inputs)) are the model's logits, so that the head may see fewer positions.

    The head is a third of the work of a small model. Where a model does more to its logits than one layer (scaling,
    caps), which eight tokens tell, the body is the whole model.
    """
    head, probe = (
        model.get_output_embeddings(),
        torch.arange(min(8, positions_of(model)), device=model.device)[None],
    )
    if head is not None and model.base_model is not model:
        logits = model(input_ids=probe).logits
        if torch.allclose(
            head(model.base_model(input_ids=probe).last_hidden_state), logits, rtol=1e-4, atol=1e-5
        ):
            return lambda **inputs: model.base_model(**inputs).last_hidden_state, head
    return lambda **inputs: model(**inputs).logits, lambda logits: logits


def positions_of(model):
    return models.positions_of(model.config) or 1 << 20


def window_of(model):
    """How long a line may be. A local attention's window counts slots of a line, where a tail lies behind others."""
    config = model.config.get_text_config()
    # qwen's max_window_layers counts layers
    names = [
        name
        for name in config.to_dict()
        if ("window" in name or "chunk" in name) and "layers" not in name
    ]
    windows = [
        value
        for value in (getattr(config, name, None) for name in names)
        if type(value) is int and value > 0
    ]
    return min([positions_of(model), *windows])


def pad(rows, device):
    """Lists of ids -> (B, T) int64, padded with 0 on the right."""
    T = max(map(len, rows))
    return torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)


def batches(lines, budget):
    """(length, requests) -> lists of requests of like length, of `budget` tokens with padding; the longest first."""
    batch, T = [], 0
    for length, requests in sorted(lines, key=lambda line: line[0], reverse=True):
        if batch and (len(batch) + 1) * T > budget:
            yield batch
            batch = []
        T = T if batch else length
        batch.append(requests)
    if batch:
        yield batch
