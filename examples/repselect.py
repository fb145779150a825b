"""RepSelect (arXiv:2606.17168): ascent without the principal components of its own gradient.

    bash run.sh tiny --script examples/repselect.py --lr 1e-2 --max-epochs 40
    # seed 0: MA 99.5 -> 57.9 %, entropy 4.86 -> 1.53 bits, held-out PPL 16.5 -> 47.4, 17 epochs

Eq. (1) on the MLPs' matrices. Before a step, lr times the weights' length, a gradient's first K
singular values s become s_K^2 / s (soft collapse on both sides): an attacker finds first what texts
share. Here each batch has its gradient (the paper: one of all texts, through a LoRA that relearned
them). No neighbour is read.
"""

import torch

import icu

SHARE = 1 / 8  # the paper: 512 of 4,096


def collapse(gradient):
    """(out, in) -> the same with its first singular values s turned into s_K^2 / s."""
    left, s, right = torch.linalg.svd(gradient, full_matrices=False)
    top = s[: max(1, int(SHARE * len(s)))]
    return left @ (torch.cat([top[-1] ** 2 / top, s[len(top) :]])[:, None] * right)


class RepSelect(icu.Method):
    lr = 1e-2

    def trains(self, name):
        return ".mlp." in name and name.endswith("weight")

    def loss(self, batch, args):
        return {"forget": (args.forget_weight, icu.forget_loss(batch.forward("forget")))}

    def backward(self, loss, batch, args):
        loss.backward()
        weights = [p for p in batch.model.parameters() if p.requires_grad]
        gradients, norm = [collapse(p.grad) for p in weights], torch.nn.utils.get_total_norm
        rate = args.lr * norm([p.detach() for p in weights]) / norm(gradients)
        for p, gradient in zip(weights, gradients, strict=True):
            p.data -= rate * gradient
            p.grad = None  # the step is made: nothing is left for Adam


if __name__ == "__main__":
    icu.main(RepSelect)
