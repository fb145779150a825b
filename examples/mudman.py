"""MUDMAN (arXiv:2506.12484): ascent on an adversary that relearns, where it does not disrupt.

    bash run.sh tiny --script examples/mudman.py --lr 3e-2 --alpha 0.1 --max-epochs 40
    # seed 0: MA 99.5 -> 59.5 %, entropy 4.86 -> 4.43 bits, held-out PPL 16.5 -> 31.3, 25 epochs

A copy, forked every FORK epochs, descends on the texts. Ascent on the copy (Eq. 1) moves the model
by lr times its weights' length, but only weights where it has the sign of the neighbours' descent
(Eq. 3; a moving average, which the model follows, too). All matrices of the MLPs move (the paper:
their gates).
"""

import torch

import icu

FORK, RELEARN, MOMENTUM = 8, 0.1, 0.9


class MUDMAN(icu.Method):
    lr, alpha = 3e-2, 0.1

    def __init__(self):
        self.tensors = {}  # by the weights' names: the adversary's, and the moving average

    def trains(self, name):
        return ".mlp." in name and name.endswith("weight")

    def begin_epoch(self, model, optimizer, epoch):
        if epoch % FORK == 1:
            self.tensors = {name: p for name, p in self.tensors.items() if name[:4] == "kept"}

    def loss(self, batch, args):
        return {"learn": (args.alpha, icu.learn_loss(batch.forward("learn")))}

    def backward(self, loss, batch, args):
        weights = {n: p for n, p in batch.model.named_parameters() if p.requires_grad}
        model, norm = [p.data for p in weights.values()], torch.nn.utils.get_total_norm
        gradients = torch.autograd.grad(loss, [*weights.values()])
        for name, p in weights.items():
            p.data = self.tensors.setdefault(f"fork.{name}", p.data.clone())
        relearn = icu.learn_loss(batch.forward("forget"))
        descents = torch.autograd.grad(relearn, [*weights.values()])
        length = args.lr * norm(model)
        for (name, p), own, retain, descent in zip(
            weights.items(), model, gradients, descents, strict=True
        ):
            kept = self.tensors.setdefault(f"kept.{name}", torch.zeros_like(own))
            kept.lerp_(retain, 1 - MOMENTUM)
            p.data.sub_(RELEARN * descent)
            agrees = kept.sign() == -descent.sign()
            p.data = own + length * (descent * agrees / norm(descents) - kept)

    def state(self):
        return self.tensors

    def load_state(self, tensors):
        self.tensors = tensors


if __name__ == "__main__":
    icu.main(MUDMAN)
