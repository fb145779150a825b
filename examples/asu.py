"""ASU, attention smoothing (arXiv:2603.01285): towards what the model says with blurred attention.

    bash run.sh tiny --script examples/asu.py --lr 1e-3 --max-epochs 40
    # seed 0: its teacher still recites 96 % of the tokens (81 % at 8, 74 % at 100)

L = KL[p_tau || p] on the text + beta L_kl (Eq. 4; its ASU_KL), means over targets. p_tau is the
frozen copy with attention softmax(Q K^T / (tau sqrt d)) everywhere: here its queries over tau.
"""

import copy

import icu

TEMPERATURE = 2.3  # tau; the paper: 2 to 2.8


class ASU(icu.Method):
    lr, beta, frozen_sides = 5e-4, 4.0, ("learn",)

    def prepare(self, model, *_):
        """Makes the teacher. ValueError: a model whose queries are not a layer of their own."""
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        layers = [part.q_proj for part in self.teacher.modules() if hasattr(part, "q_proj")]
        if not layers:
            raise ValueError(f"asu needs layers q_proj: {type(model).__name__} has none")
        for weights in (weights for layer in layers for weights in layer.parameters()):
            weights.data /= TEMPERATURE

    def loss(self, batch, args):
        forget, learn = batch.forward("forget"), batch.forward("learn")
        smooth = batch.forward("forget", self.teacher)
        return {
            "forget": (args.forget_weight, icu.kl_loss(forget, smooth)),
            "kl": (args.beta, icu.kl_term(learn, batch.frozen("learn"), args)),
        }


if __name__ == "__main__":
    icu.main(ASU)
