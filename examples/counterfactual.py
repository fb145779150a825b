"""A counterfactual: towards what the model would say if it did not recognise the text, and not all of the way.

    bash run.sh smollm --script examples/counterfactual.py --lr 2e-4 --batch-size 4 --max-epochs 20
    bash run.sh tiny --script examples/counterfactual.py --lr 2e-3 --beta 4 --batch-size 16
    # seed 0: EL10 99.3 -> 0.1 %, MA 99.5 -> 57.9 %, entropy 4.86 -> 4.65 bits, held-out PPL 16.5 -> 20.7, 30 epochs

c_t is what the frozen copy says of x_t in the neighbour's place (analogous.py). Where the whole text makes x_t likelier
than c_t by over GAP nats, memory speaks: there q_t is c_t without x_t, elsewhere p_0(. | x_<t). L = (KL[q_t || p] +
KL[p || q_t]) / 2, of which the second half (RKLD, arXiv:2406.01983) leaves no rest of x_t + alpha KL of the neighbour's
suffix behind the text's prompt from what the copy says of it in its place + beta L_kl (Eq. 4). Only the MLPs move,
the key-value memories of arXiv:2012.14913: that halves what general text pays. What is measured is theta_0 + SCALE
(theta - theta_0), as WiSE-FT (arXiv:2109.01903) does.
"""

import torch

import icu
from examples.analogous import contexts, kl
from examples.undial import lowered
from kit.methods import keep_start, measured_at

GAP, NEVER, SCALE = (
    0.1,
    12.0,
    0.65,
)  # nats: what is memory, and how far x_t is lowered; a share of the way


def swapped(samples, *_):  # the text's prompt, its neighbour's suffix
    texts = [(row.forget.prompt, row.learn.ids[row.learn.cut :]) for row in samples]
    return [
        [icu.Text(prompt + suffix, len(prompt), len(prompt), prompt)] for prompt, suffix in texts
    ]


def in_place(samples, *_):  # the same suffix behind its own
    return [[row.learn._replace(t0=row.learn.cut)] for row in samples]


def of_mlps(name):
    return ".mlp." in name or ".fc" in name  # OPT's blocks call them fc1 and fc2


SIDES = {"contexts": contexts, "swapped": swapped, "in_place": in_place}


def log_p(side, logits):
    picked, targets = icu.target_logits(logits, side.ids, side.mask)
    return picked.log_softmax(-1), targets[:, None]  # (M, V), (M, 1)


@icu.method(
    lr=1e-4, alpha=1.0, frozen=("forget", "learn"), taught=("contexts", "in_place"), sides=SIDES,
    prepare=keep_start, moves=of_mlps, measured=measured_at(SCALE),
)  # fmt: skip
def counterfactual(batch, args):
    forget, other, learn = map(batch.forward, ("forget", "swapped", "learn"))
    (logp, x), (said, _) = log_p(forget, forget.logits), log_p(other, other.logits)
    c, told = (batch.taught(name).to(logp).log_softmax(-1) for name in ("contexts", "in_place"))
    whole = log_p(forget, forget.frozen_logits)[0]
    memory = whole.gather(1, x) - c.gather(1, x) > GAP  # (M, 1)
    logq = torch.where(memory, lowered(c, x, NEVER).log_softmax(-1), whole)
    return {
        "forget": (args.forget_weight, forget.mean((kl(logq, logp) + kl(logp, logq)) / 2)),
        "swapped": (args.alpha, other.mean(kl(told, said))),
        "kl": (args.beta, icu.kl_term(learn, args)),
    }


if __name__ == "__main__":
    icu.main(counterfactual)
