"""CIR, collapse of irrelevant representations (arXiv:2509.11816): only what is a text's own moves.

    bash run.sh tiny --script examples/cir.py --lr 1.5e-2 --beta 0.1 --max-epochs 40
    # seed 0: MA 99.5 -> 55.5 %, entropy 4.86 -> 3.79 bits, held-out PPL 16.5 -> 42.3, 25 epochs

The loss breaks MLPs: mean of max(0, o . o_0) / |o_0|^2, o their outputs at the texts, o_0 those
before. A matrix's gradient is made of inputs and output gradients without their mean and first
principal components; a step is lr times the weights' length. Here these are the batch's own (the
paper: of the last epoch), all layers move, and Eq. 4, not hidden states, holds the neighbours.
"""

import copy
import functools

import torch

import icu

INPUTS, OUTPUTS = 24, 36  # components, of at most an eighth of the dimensions


def collapse(x, components):
    """(N, D) without its mean's direction and those of its first principal components."""
    mean, components = x.mean(0, keepdim=True), min(components, x.shape[-1] // 8)
    top = torch.linalg.eigh((x - mean).T @ (x - mean)).eigenvectors[:, -components:]
    basis = torch.linalg.qr(torch.cat([mean.T, top], 1)).Q  # (D, 1 + components)
    return x - x @ basis @ basis.T


def watch(batch, model):
    """{name: (inputs, outputs)}, (B, T, D) each, of the MLPs and their layers at the texts."""
    kept, hooks = {}, []
    for name, part in model.named_modules():
        if name.endswith(".mlp") or hasattr(part, "weight") and ".mlp." in name:
            keep = functools.partial(lambda name, _, x, y: kept.update({name: (x[0], y)}), name)
            hooks.append(part.register_forward_hook(keep))
    batch.forward("forget", model)
    for hook in hooks:
        hook.remove()
    return kept


class CIR(icu.Method):
    lr, beta, frozen_sides = 1.5e-2, 0.1, ("learn",)

    def trains(self, name):
        return ".mlp." in name and name.endswith("weight")

    def prepare(self, model, tokenizer, samples, args, folder):
        if args.micro_batch:
            raise ValueError("cir takes a batch apart itself: no --micro-batch")
        self.before = copy.deepcopy(model).requires_grad_(False)

    def loss(self, batch, args):
        self.mask = icu.collate(batch.texts("forget", batch.rows), args.device)[1].bool()
        self.mask[:, 0] = False
        self.kept, terms = watch(batch, batch.model), []
        for name, (_, before) in watch(batch, self.before).items():
            if name.endswith(".mlp"):
                o, o_0 = self.kept.pop(name)[1][self.mask], before[self.mask]  # (N, H)
                terms.append((o * o_0).sum(-1).clamp(min=0).mean() / o_0.norm(dim=-1).mean() ** 2)
        self.breaking, learn = torch.stack(terms).mean(), batch.forward("learn")
        kl = icu.kl_term(learn, batch.frozen("learn"), args)
        return {"forget": (args.forget_weight, self.breaking), "kl": (args.beta, kl)}

    def backward(self, loss, batch, args):
        outputs = [y for _, y in self.kept.values()]
        slopes = torch.autograd.grad(self.breaking, outputs, retain_graph=True)
        (loss - args.forget_weight * self.breaking).backward()  # of Eq. 4 alone
        own = [
            collapse(slope[self.mask], OUTPUTS).T @ collapse(x[self.mask], INPUTS)
            for (x, _), slope in zip(self.kept.values(), slopes, strict=True)
        ]
        weights = [batch.model.get_parameter(f"{name}.weight") for name in self.kept]
        norm = torch.nn.utils.get_total_norm
        length = args.lr * norm([p.detach() for p in weights])
        for p, gradient in zip(weights, own, strict=True):
            p.data -= length * (gradient / norm(own).clamp(min=1e-12) + p.grad)
            p.grad = None  # the step is made: nothing is left for Adam


if __name__ == "__main__":
    icu.main(CIR)
