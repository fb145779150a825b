"""UNDIAL (Dong et al., arXiv:2402.10052): distil the model from itself, with the logit of each
token to forget lowered.

    bash run.sh tiny --script examples/undial.py --lr 2e-4 --max-epochs 40
    # seed 0: EL10 99.3 -> 1.2 %, MA 99.5 -> 75.3 %, entropy 4.86 -> 4.28 bits, held-out PPL
    # 16.5 -> 40.0, 40 epochs

L = mean over target tokens of H(q_t, p_theta), q_t = softmax(z_0 - strength * onehot(x_t)), z_0 the
frozen copy's logits.
"""

import torch.nn.functional as F

import icu

STRENGTH = 10.0  # the paper's beta


class UNDIAL(icu.Method):
    frozen_sides = ("forget",)

    def loss(self, batch, args):
        forget, z0 = batch.forward("forget"), batch.frozen("forget").logits  # (M, V)
        lowered = z0 - STRENGTH * F.one_hot(forget.ids, z0.shape[-1])
        cross_entropy = -(lowered.softmax(-1) * forget.logits.log_softmax(-1)).sum(-1)  # (M,)
        return {"forget": (args.forget_weight, forget.mean(cross_entropy))}


if __name__ == "__main__":
    icu.main(UNDIAL)
