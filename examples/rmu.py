"""RMU (Li et al., arXiv:2403.03218, section 4): a layer's hidden states of the text become noise,
others stay.

    bash run.sh tiny --script examples/rmu.py --lr 2e-4 --alpha 100 --max-epochs 40
    # seed 0: EL10 99.3 -> 7.0 %, MA 99.5 -> 72.1 %, entropy 4.86 -> 2.60 bits, held-out PPL
    # 16.5 -> 22.9, 40 epochs

L = mean |h_l(x_forget) - c u|^2 + alpha mean |h_l(x_learn) - h_l,0(x_learn)|^2, u a random unit
vector, means over tokens and dimensions. Only layer l and the two below it are trained.
"""

import torch

import icu

LAYER, COEFFICIENT = 1, 20.0  # l, counted from 1 (the paper: 7 of 32), and c


class RMU(icu.Method):
    alpha, frozen_sides, layer = 100.0, ("learn",), LAYER

    def prepare(self, model, *_):
        """Freezes all but the blocks that make hidden states LAYER - 2 .. LAYER."""
        model.requires_grad_(False)
        parts = model.base_model.modules()
        blocks = next(part for part in parts if isinstance(part, torch.nn.ModuleList))
        blocks[max(LAYER - 3, 0) : LAYER].requires_grad_(True)

    def loss(self, batch, args):
        forget, learn = batch.forward("forget"), batch.forward("learn")
        generator = torch.Generator().manual_seed(args.seed)
        u = torch.rand(forget.hidden.shape[-1], generator=generator)
        noise = COEFFICIENT * (u / u.norm()).to(forget.hidden)  # (H,)
        steered = (forget.hidden - noise).square().mean(-1)  # (M,)
        moved = (learn.hidden - batch.frozen("learn").hidden).square().mean(-1)  # (M,)
        return {
            "forget": (args.forget_weight, forget.mean(steered)),
            "learn": (args.alpha, learn.mean(moved)),
        }


if __name__ == "__main__":
    icu.main(RMU)
