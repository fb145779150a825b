"""The published methods that ICU is compared with: each a loss beside its source, with the weights that it was given.

    python icu.py --method npo ...        # any of them by its name

They go through icu.py's loop with the same data order, stop rule and epoch cap; `--refine` switches Eq. 5's filter on.
What a method needs from the loop hangs on it (`icu.method`): defaults, sides of its own, what the frozen copy is asked.
"""

import numpy as np
import torch.nn.functional as F

from icu import Text, forget_loss, kl_term, learn_loss, target_logits
from kit.methods import method
from kit.models import encode


def ascent(forget):
    """Eq. (1) of ICU for the forget side: gradient ascent, which most of them share."""
    return forget_loss(forget.logits, forget.ids, forget.mask, forget.global_count)


def descent(side):
    """Eq. (3) of ICU for a side: the cross-entropy towards its own targets."""
    return learn_loss(side.logits, side.ids, side.mask, side.global_count)


def sequence_logp(logits, ids, target_mask):
    """log p_theta of each row's targets together, (B,) in nats: what preference losses compare with the frozen copy.

    logits (B, T, V), ids (B, T), target_mask (B, T) bool.
    """
    mask = target_mask[:, 1:]
    picked, targets = target_logits(logits, ids, target_mask)
    logp = picked.new_zeros(mask.shape)
    return logp.masked_scatter(mask, -F.cross_entropy(picked, targets, reduction="none")).sum(1)


def log_ratio(side):
    """log p_theta(y|x) - log p_0(y|x) of each row, (B,) in nats."""
    logps = [
        sequence_logp(logits, side.ids, side.mask) for logits in (side.logits, side.frozen_logits)
    ]
    return logps[0] - logps[1]


# --- other answers to the forget prompts: sides whose targets are the answer's tokens ---

REFUSALS = (
    " I have nothing to say about that.",
    " That is not something I know.",
    " I do not have this information.",
)


def answer_text(sample, answer):
    """A Text: the forget prompt, then other ids, which alone are targets."""
    cut = sample.forget.cut
    return Text(
        (sample.forget.ids[:cut] + answer)[: sample.positions], cut, cut, sample.forget.prompt
    )


def one_answer(samples, tokenizer, epoch, args):
    """One answer a sample, the same all along: its own learn partner's suffix (--answer neighbour), or a refusal."""
    if args.answer == "refusal":
        suffixes = [
            encode(tokenizer, REFUSALS[row % len(REFUSALS)], inside=True)
            for row in range(len(samples))
        ]
    else:
        suffixes = [sample.learn.ids[sample.learn.cut :] for sample in samples]
    return [[answer_text(sample, suffix)] for sample, suffix in zip(samples, suffixes, strict=True)]


def random_answers(samples, tokenizer, epoch, args):
    """--answers suffixes of other rows' learn partners, drawn anew each epoch from (seed, epoch)."""
    if len(samples) == 1:
        raise ValueError("llmu draws its answers from other rows: it needs two pairs at least")
    rng = np.random.default_rng([args.seed, epoch, 1])
    rows = []
    for row, sample in enumerate(samples):
        others = np.delete(np.arange(len(samples)), row)
        picked = rng.choice(others, size=min(args.answers, len(others)), replace=False)
        suffixes = [samples[i].learn.ids[samples[i].learn.cut :] for i in picked]
        rows.append([answer_text(sample, suffix) for suffix in suffixes])
    return rows


# --- the methods ---


@method()
def kumpr(batch, args):
    """Jang et al., arXiv:2210.01504, Eq. 1: gradient ascent, L = mean log p on the forget side and nothing else."""
    return {"forget": (args.forget_weight, ascent(batch.forward("forget")))}


@method()
def graddiff(batch, args):
    """Gradient difference (TOFU, arXiv:2401.06121, section 4): ascent on the forget side, descent on the learn side."""
    forget, learn = batch.forward("forget"), batch.forward("learn")
    return {"forget": (args.forget_weight, ascent(forget)), "learn": (args.alpha, descent(learn))}


@method(
    frozen=("learn",), published="kl", released={"refine": True}
)  # Released code: Eq. 5's filter is on
def kl(batch, args):
    """KL minimisation (TOFU, arXiv:2401.06121, section 4): ascent on forget, KL to the original model on learn."""
    forget, learn = batch.forward("forget"), batch.forward("learn")
    return {"forget": (args.forget_weight, ascent(forget)), "kl": (args.beta, kl_term(learn, args))}


@method(forget_weight=0.5, frozen=("learn",), sides={"answer": random_answers})
def llmu(batch, args):
    """Yao et al., arXiv:2310.10683, Eq. 2-5: ascent + random answers to the forget prompts + KL on the learn side."""
    forget, answer, learn = batch.forward("forget"), batch.forward("answer"), batch.forward("learn")
    return {
        "forget": (args.forget_weight, ascent(forget)),
        "answer": (args.alpha, descent(answer)),
        "kl": (args.beta, kl_term(learn, args)),
    }


@method(sides={"answer": one_answer})
def po(batch, args):
    """Preference optimisation by likelihood: cross-entropy towards another answer (--answer), no forget term.

    The paper's "DPO" rows come from such a loss. TOFU (arXiv:2401.06121) calls the variant with refusals IdkPO.
    """
    return {"answer": (args.alpha, descent(batch.forward("answer")))}


@method(
    frozen=("forget", "answer"), sides={"answer": one_answer}, targets="suffix"
)  # two answers to one prompt
def dpo(batch, args):
    """Rafailov et al., arXiv:2305.18290, Eq. 7: the answer is preferred (w), the text to forget is not (l).

    L = -log sigmoid(b [(log p(y_w|x) - log p_0(y_w|x)) - (log p(y_l|x) - log p_0(y_l|x))]), mean over rows.
    """
    win, lose = batch.forward("answer"), batch.forward("forget")
    preference = lose.mean_rows(-F.logsigmoid(args.dpo_beta * (log_ratio(win) - log_ratio(lose))))
    return {"preference": (args.forget_weight, preference)}


@method(frozen=("forget",))
def npo(batch, args):
    """Zhang et al., arXiv:2404.05868, Eq. 3: DPO's losing half.

    L = -2/b log sigmoid(-b [log p(y|x) - log p_0(y|x)]), mean over rows. With b -> 0 it is gradient ascent; with b > 0
    the gradient fades once a text is forgotten.
    """
    lose = batch.forward("forget")
    bounded = lose.mean_rows(-2 / args.dpo_beta * F.logsigmoid(-args.dpo_beta * log_ratio(lose)))
    return {"forget": (args.forget_weight, bounded)}
