"""UNDIAL (Dong et al., arXiv:2402.10052): distil the model from itself, with the logit of each token to forget lowered.

    bash run.sh tiny --script examples/undial.py --lr 2e-4 --max-epochs 40
    # seed 0: EL10 99.3 -> 1.2 %, MA 99.5 -> 75.3 %, entropy 4.86 -> 4.28 bits, held-out PPL 16.5 -> 40.0, 40 epochs

L = mean over target tokens of H(q_t, p_theta), q_t = softmax(z_0 - strength * onehot(x_t)), z_0 the frozen copy's.
"""

import torch

import icu

STRENGTH = 10.0  # the paper's beta


def lowered(logits, x, by):
    """Logits (M, V), those of the tokens x (M, 1) lowered."""
    return logits.scatter_add(1, x, torch.full_like(logits[:, :1], -by))


@icu.method(frozen=("forget",))
def undial(batch, args):
    forget = batch.forward("forget")
    logits, targets = icu.target_logits(forget.logits, forget.ids, forget.mask)  # (M, V), (M,)
    z0, _ = icu.target_logits(forget.frozen_logits, forget.ids, forget.mask)  # (M, V)
    q = lowered(z0, targets[:, None], STRENGTH).softmax(-1)
    return {"forget": (args.forget_weight, forget.mean(-(q * logits.log_softmax(-1)).sum(-1)))}


if __name__ == "__main__":
    icu.main(undial)
