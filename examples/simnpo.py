"""SimNPO (Fan et al., arXiv:2410.07163, Eq. 4): NPO by the length-normalised likelihood, without
a reference model.

    bash run.sh tiny --script examples/simnpo.py --lr 2e-4 --max-epochs 40
    # seed 0: EL10 99.3 -> 0.4 %, MA 99.5 -> 59.6 %, entropy 4.86 -> 4.53 bits, held-out PPL
    # 16.5 -> 32.5, 24 epochs

L = mean over rows of -2/b log sigmoid(-b/|y| log p(y|x) - gamma), plus the retain loss: descent on
the learn side.
"""

import torch
import torch.nn.functional as F

import icu

BETA, GAMMA = 2.5, 0.0  # as in the paper's TOFU runs


class SimNPO(icu.Method):
    def loss(self, batch, args):
        forget, learn = batch.forward("forget"), batch.forward("learn")
        length = forget.by_row(torch.ones_like(forget.logp)).clamp(min=1)  # (B,)
        score = BETA / length * forget.by_row(forget.logp)  # (B,)
        bounded = forget.mean_rows(-2 / BETA * F.logsigmoid(-score - GAMMA))  # Eq. (4)
        return {
            "forget": (args.forget_weight, bounded),
            "learn": (args.alpha, icu.learn_loss(learn)),
        }


if __name__ == "__main__":
    icu.main(SimNPO)
