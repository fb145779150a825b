"""MCU, minor components (arXiv:2605.11685, Eq. 9-12): RMU in directions that texts do not share.

    bash run.sh tiny --script examples/mcu.py --lr 1e-3 --alpha 10 --max-epochs 40
    # seed 0: MA 99.5 -> 59.4 %, entropy 4.86 -> 3.25 bits, held-out PPL 16.5 -> 28.6, 29 epochs

L = mean |P h(x_forget) - c u|^2 + alpha mean |h(x_learn) - h_0(x_learn)|^2, of layer l, u a random
unit vector. P takes out the mean and the K principal components of h_0 at the texts, as a change
there is easily undone. Only MLPs move. In the authors' code CIR (2509.11816) is under it; not here.
"""

import torch

import icu

LAYER, COMPONENTS, COEFFICIENT = 1, 8, 20.0  # l, K, c


class MCU(icu.Method):
    lr, alpha, frozen_sides, layer = 1e-3, 10.0, ("learn",), LAYER

    def trains(self, name):
        return ".mlp." in name

    @torch.no_grad()
    def prepare(self, model, tokenizer, samples, args, folder):
        h = torch.cat([icu.at_targets(model, [one.forget], LAYER)[3] for one in samples])  # (M, H)
        mean = h.mean(0, keepdim=True)
        top = torch.linalg.svd(h - mean, full_matrices=False).Vh[:COMPONENTS]  # (K, H)
        basis = torch.linalg.qr(torch.cat([mean, top]).T).Q  # (H, 1 + K)
        self.minor = torch.eye(len(basis)).to(basis) - basis @ basis.T  # P, (H, H)

    def loss(self, batch, args):
        forget, learn = batch.forward("forget"), batch.forward("learn")
        u = torch.randn(len(self.minor), generator=torch.Generator().manual_seed(args.seed))
        noise = COEFFICIENT * (u / u.norm()).to(forget.hidden)  # (H,)
        steered = (forget.hidden @ self.minor - noise).square().mean(-1)  # (M,)
        moved = (learn.hidden - batch.frozen("learn").hidden).square().mean(-1)  # (M,)
        return {
            "forget": (args.forget_weight, forget.mean(steered)),
            "learn": (args.alpha, learn.mean(moved)),
        }


if __name__ == "__main__":
    icu.main(MCU)
