"""MUDMAN (arXiv:2506.12484): ascent on an adversary that relearns, where it does not disrupt.

    bash run.sh tiny --script examples/mudman.py --lr 0.3 --alpha 0.1 --max-epochs 40

A copy of the model, forked every FORK epochs, descends on the texts (rate RELEARN). The ascent of
Eq. (1) on it, divided by its norm, moves the model by lr, only at weights where its gradient has
the sign of the neighbours' (Eq. 3, a moving average, which the model follows by lr alpha). Only
MLPs move (the paper: their gates), in fork and mask as there, by smaller models' rates.
"""

import torch

import icu

FORK, RELEARN, MOMENTUM = 8, 0.1, 0.9


class MUDMAN(icu.Method):
    lr, alpha = 0.3, 0.1
    kept, fork = (), ()  # the moving average, and the adversary's weights

    def trains(self, name):
        return ".mlp." in name and name.endswith("weight")

    def begin_epoch(self, model, optimizer, epoch):
        if epoch % FORK == 1:
            self.fork = ()

    def loss(self, batch, args):
        return {"learn": (args.alpha, icu.learn_loss(batch.forward("learn")))}

    def backward(self, loss, batch, args):
        weights = [p for p in batch.model.parameters() if p.requires_grad]
        model = [p.data for p in weights]
        gradients = torch.autograd.grad(loss, weights)
        self.kept = self.kept or [torch.zeros_like(p) for p in model]
        self.fork = self.fork or [p.clone() for p in model]
        for p, adversary in zip(weights, self.fork, strict=True):
            p.data = adversary
        forget = icu.learn_loss(batch.forward("forget"))
        descents = torch.autograd.grad(forget, weights)
        norm = torch.nn.utils.get_total_norm
        length = args.lr * norm(model)
        for i, p in enumerate(weights):
            self.kept[i].lerp_(gradients[i], 1 - MOMENTUM)
            self.fork[i] -= RELEARN * descents[i]
            agrees = self.kept[i].sign() == -descents[i].sign()
            p.data = model[i] + length * (descents[i] * agrees / norm(descents) - self.kept[i])

    def state(self):
        lists = {"kept": self.kept, "fork": self.fork}
        return {f"{name}{i:04}": p for name, all in lists.items() for i, p in enumerate(all)}

    def load_state(self, tensors):
        names = sorted(tensors)
        self.fork, self.kept = (
            [tensors[n] for n in names if n[:4] == kind] for kind in ("fork", "kept")
        )


if __name__ == "__main__":
    icu.main(MUDMAN)
