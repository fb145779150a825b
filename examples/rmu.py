"""RMU (Li et al., arXiv:2403.03218, section 4): a layer's hidden states of the text become noise, others stay.

    bash run.sh tiny --script examples/rmu.py --lr 2e-4 --alpha 100 --max-epochs 40
    # seed 0: EL10 99.3 -> 7.0 %, MA 99.5 -> 72.1 %, entropy 4.86 -> 2.60 bits, held-out PPL 16.5 -> 22.9, 40 epochs

L = mean |h_l(x_forget) - c u|^2 + alpha mean |h_l(x_learn) - h_l,0(x_learn)|^2, u a random unit vector, means over
tokens and dimensions; only layer l and the two below it are trained.
"""

import torch

import icu

LAYER, COEFFICIENT = 1, 20.0  # l, counted from 1 (the paper: 7 of 32), and c


def only_some_layers(model, args):
    """Freezes all but the blocks that make hidden states LAYER - 2 .. LAYER."""
    model.requires_grad_(False)
    blocks = next(
        module for module in model.base_model.modules() if isinstance(module, torch.nn.ModuleList)
    )
    blocks[max(LAYER - 3, 0) : LAYER].requires_grad_(True)


@icu.method(alpha=100.0, frozen=("learn",), layer=LAYER, prepare=only_some_layers)
def rmu(batch, args):
    forget, learn = batch.forward("forget"), batch.forward("learn")
    u = torch.rand(forget.hidden.shape[-1], generator=torch.Generator().manual_seed(args.seed))
    noise = COEFFICIENT * (u / u.norm()).to(forget.hidden)  # (H,)
    steered = forget.mean((forget.hidden - noise).square().mean(-1))
    kept = learn.mean((learn.hidden - learn.frozen_hidden).square().mean(-1))
    return {"forget": (args.forget_weight, steered), "learn": (args.alpha, kept)}


if __name__ == "__main__":
    icu.main(rmu)
