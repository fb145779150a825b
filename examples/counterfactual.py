"""A counterfactual: most of the way to what the model would say if it did not know the text.

    bash run.sh smollm --script examples/counterfactual.py --lr 2e-4 --batch-size 4 --max-epochs 20
    bash run.sh tiny --script examples/counterfactual.py --lr 2e-3 --beta 4 --batch-size 16
    # seed 0: EL10 99.3 -> 0.1 %, MA 99.5 -> 57.9 %, entropy 4.86 -> 4.65 bits, held-out PPL
    # 16.5 -> 20.7, 30 epochs

c_t is what the frozen copy says of x_t after the neighbour's prompt and the last K tokens
(analogous.py). Where the text makes x_t likelier than c_t by over GAP nats, memory speaks: there
q_t is c_t without x_t, elsewhere p_0(. | x_<t).
L = (KL[q_t || p] + KL[p || q_t]) / 2 + alpha L_swapped + beta L_kl (Eq. 4). The second KL (RKLD,
arXiv:2406.01983) leaves no rest of x_t. L_swapped: KL of the neighbour's suffix after the text's
prompt from what the copy says of it in its place. Only the MLPs move (memories: 2012.14913), which
halves what general text pays. What is measured is theta_0 + SCALE (theta - theta_0), as in WiSE-FT
(2109.01903).
"""

import torch
import torch.nn.functional as F

import icu
from kit import models

K, GAP, NEVER = 4, 0.1, 12.0  # tokens; nats: what is memory, and how far x_t is lowered
SCALE = 0.65  # a share of the way


def in_its_place(sample, bos):
    """Each target of the text after the neighbour's prompt and the K tokens before it."""
    place, ids = sample.learn.prompt, sample.forget.ids
    ends = [ids[max(t - K, bos) : t + 1] for t in sample.forget.targets]
    return [icu.Text(place + end, len(place + end) - 1, len(place), place) for end in ends]


class Counterfactual(icu.Method):
    lr, frozen_sides = 1e-4, ("forget", "learn", "contexts", "in_place")

    def sides(self, samples, tokenizer, epoch, args):
        bos, swapped = len(models.front_of(tokenizer)), []
        for row in samples:  # the text's prompt, its neighbour's suffix
            prompt, suffix = row.forget.prompt, row.learn.ids[row.learn.cut :]
            swapped.append([icu.Text(prompt + suffix, len(prompt), len(prompt), prompt)])
        return {
            "contexts": [in_its_place(row, bos) for row in samples],
            "swapped": swapped,
            "in_place": [[row.learn._replace(t0=row.learn.cut)] for row in samples],
        }

    def prepare(self, model, *_):
        icu.keep_start(model)

    def trains(self, name):
        return ".mlp." in name or ".fc" in name  # OPT's blocks call them fc1 and fc2

    def swap_weights(self, model):
        return icu.scaled(model, SCALE)

    def loss(self, batch, args):
        forget, swapped, learn = map(batch.forward, ("forget", "swapped", "learn"))
        logp = forget.logits.log_softmax(-1)  # (M, V)
        text, c, neighbour = (
            batch.frozen(name).logits.to(logp).log_softmax(-1)
            for name in ("forget", "contexts", "in_place")
        )
        x = forget.ids[:, None]  # (M, 1)
        memory = text.gather(1, x) - c.gather(1, x) > GAP  # (M, 1)
        without_x = (c - NEVER * F.one_hot(forget.ids, c.shape[-1])).log_softmax(-1)
        logq = torch.where(memory, without_x, text)
        both_ways = (icu.kl(logq, logp) + icu.kl(logp, logq)) / 2  # (M,)
        kept = icu.kl(neighbour, swapped.logits.log_softmax(-1))
        return {
            "forget": (args.forget_weight, forget.mean(both_ways)),
            "swapped": (args.alpha, swapped.mean(kept)),
            "kl": (args.beta, icu.kl_term(learn, batch.frozen("learn"), args)),
        }


if __name__ == "__main__":
    icu.main(Counterfactual)
