"""The published methods that ICU is compared with: each a loss beside its source.

    python icu.py --method npo ...        # any of them by its name

They go through icu.py's loop with the same data order, stop rule and epoch cap; `--refine` switches
Eq. 5's filter on. The weights of their terms are those of their sources.
"""

import numpy as np
import torch.nn.functional as F

from icu import Method, Text, forget_loss, kl_term, learn_loss
from kit.models import encode

# --- other answers to the forget prompts: sides whose targets are the answer's tokens ---

REFUSALS = (
    " I have nothing to say about that.",
    " That is not something I know.",
    " I do not have this information.",
)


def suffix_of(text):
    return text.ids[text.cut :]


def end_of_turn(text, tokenizer):
    """What closes an answer in a chat."""
    return [id for id in text.ids[-1:] if text.rendered and id in tokenizer.all_special_ids]


def answer_text(sample, answer):
    """A Text: the forget prompt, then other ids, which alone are targets."""
    cut = sample.forget.cut
    ids = (sample.forget.ids[:cut] + answer)[: sample.positions]
    return Text(ids, cut, cut, sample.forget.prompt)


def one_answer(samples, tokenizer, args):
    """One answer a sample: its learn partner's suffix (--answer neighbour), or a refusal."""
    answers = [suffix_of(sample.learn) for sample in samples]
    if args.answer == "refusal":
        refusals = [encode(tokenizer, refusal) for refusal in REFUSALS]
        answers = [
            refusals[row % len(refusals)] + end_of_turn(sample.forget, tokenizer)
            for row, sample in enumerate(samples)
        ]
    return [[answer_text(*pair)] for pair in zip(samples, answers, strict=True)]


def random_answers(samples, epoch, args):
    """--answers suffixes of other rows' learn partners, drawn anew each epoch."""
    if len(samples) == 1:
        raise ValueError("llmu draws its answers from other rows: it needs two pairs at least")
    rng = np.random.default_rng([args.seed, epoch, 1])
    rows = []
    for row, sample in enumerate(samples):
        others = np.delete(np.arange(len(samples)), row)
        picked = rng.choice(others, size=min(args.answers, len(others)), replace=False)
        rows.append([answer_text(sample, suffix_of(samples[i].learn)) for i in picked])
    return rows


def log_ratio(side, frozen):
    """log p_theta(y|x) - log p_0(y|x) of each text, (B,) in nats."""
    return side.by_row(side.logp) - side.by_row(frozen.logp)


# --- the methods ---


class KUMPR(Method):
    """Jang et al., arXiv:2210.01504, Eq. 1: gradient ascent, L = mean log p on the forget side."""

    def loss(self, batch, args):
        return {"forget": (args.forget_weight, forget_loss(batch.forward("forget")))}


class GradDiff(Method):
    """Gradient difference (TOFU, arXiv:2401.06121, section 4): ascent on the forget side, descent
    on the learn side."""

    def loss(self, batch, args):
        forget, learn = batch.forward("forget"), batch.forward("learn")
        return {
            "forget": (args.forget_weight, forget_loss(forget)),
            "learn": (args.alpha, learn_loss(learn)),
        }


class KL(Method):
    """KL minimisation (TOFU, arXiv:2401.06121, section 4): ascent on the forget side, KL to the
    original model on the learn side."""

    frozen_sides, published = ("learn",), "kl"
    released = {"refine": True}  # Released code: Eq. 5's filter is on

    def loss(self, batch, args):
        forget, learn = batch.forward("forget"), batch.forward("learn")
        return {
            "forget": (args.forget_weight, forget_loss(forget)),
            "kl": (args.beta, kl_term(learn, batch.frozen("learn"), args)),
        }


class LLMU(Method):
    """Yao et al., arXiv:2310.10683, Eq. 2-5: ascent, random answers to the forget prompts, and KL
    on the learn side."""

    forget_weight, frozen_sides = 0.5, ("learn",)

    def sides(self, samples, tokenizer, epoch, args):
        return {"answer": random_answers(samples, epoch, args)}

    def loss(self, batch, args):
        forget, answer, learn = map(batch.forward, ("forget", "answer", "learn"))
        return {
            "forget": (args.forget_weight, forget_loss(forget)),
            "answer": (args.alpha, learn_loss(answer)),
            "kl": (args.beta, kl_term(learn, batch.frozen("learn"), args)),
        }


class PO(Method):
    """Preference optimisation by likelihood: cross-entropy towards another answer (--answer), no
    forget term.

    The paper's "DPO" rows come from such a loss. TOFU (arXiv:2401.06121) calls the variant with
    refusals IdkPO.
    """

    def sides(self, samples, tokenizer, epoch, args):
        return {"answer": one_answer(samples, tokenizer, args)}

    def loss(self, batch, args):
        return {"answer": (args.alpha, learn_loss(batch.forward("answer")))}


class DPO(PO):
    """Rafailov et al., arXiv:2305.18290, Eq. 7: the answer is preferred (w), the text to forget is
    not (l).

    L = -log sigmoid(b [(log p(y_w|x) - log p_0(y_w|x)) - (log p(y_l|x) - log p_0(y_l|x))]), mean
    over rows.
    """

    frozen_sides = ("forget", "answer")
    targets = "suffix"  # two answers to one prompt

    def loss(self, batch, args):
        win, lose = batch.forward("answer"), batch.forward("forget")
        gain = log_ratio(win, batch.frozen("answer")) - log_ratio(lose, batch.frozen("forget"))
        preference = lose.mean_rows(-F.logsigmoid(args.dpo_beta * gain))
        return {"preference": (args.forget_weight, preference)}


class NPO(Method):
    """Zhang et al., arXiv:2404.05868, Eq. 3: DPO's losing half.

    L = -2/b log sigmoid(-b [log p(y|x) - log p_0(y|x)]), mean over rows. With b -> 0 it is gradient
    ascent; with b > 0 the gradient fades once a text is forgotten. --alpha 1: the variant with a
    retain loss (NPO+RT, called NPO in tables of TOFU and MUSE), Eq. (3) on the learn side.
    """

    alpha, frozen_sides = 0.0, ("forget",)

    def loss(self, batch, args):
        forget, b = batch.forward("forget"), args.dpo_beta
        ratio = log_ratio(forget, batch.frozen("forget"))
        npo = forget.mean_rows(-2 / b * F.logsigmoid(-b * ratio))
        terms = {"forget": (args.forget_weight, npo)}
        if args.alpha:
            terms["learn"] = args.alpha, learn_loss(batch.forward("learn"))
        return terms
