"""Suppress, break, regrow: what few texts alone need is drawn anew, and learnt from other texts.

    bash run.sh tiny --script examples/regrow.py --neighbours 45 --lr 1e-3 --batch-size 8

Epochs 1 to SUPPRESS lower each text's tokens in the model's own words (UNDIAL, arXiv:2402.10052),
held by Eq. 4. Then each weight matrix W (out, in) of the blocks is written in the eigenvectors of
the two factors of its curvature on neighbours (K-FAC, arXiv:1503.05671): A, the sum of a a' over
its inputs, and G, of g g' over the gradients at its outputs. In Ug' W Ua entry (i, j) has the
curvature g_i a_j, the product of the eigenvalues. What few texts need has little of it
(arXiv:2510.24256): all entries but the KEPT with the most are drawn anew. The rest of the epochs
learn from neighbours alone (Eq. 3), TEXTS of them for each text. No teacher: the original's logits
on those same neighbours bring the memory back (dev/LOG.md). One process, no DeepSpeed.
"""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import icu

SUPPRESS, LESS, KEPT, STATISTICS, RATE, TEXTS = 6, 10.0, 0.01, 32, 3e-3, 2


class Regrow(icu.Method):
    lr, beta, min_epochs, frozen_sides = 1e-3, 4.0, 24, ("forget", "learn")
    regrows, epochs = False, 24

    def prepare(self, model, tokenizer, samples, args, folder):
        texts = {tuple(text.ids): text for near in map(neighbours, samples) for text in near}
        self.texts, self.seed = [*texts.values()][:: -(-len(texts) // STATISTICS)], args.seed
        self.epochs = args.min_epochs

    def begin_epoch(self, model, optimizer, epoch):
        self.regrows = epoch > SUPPRESS
        if epoch == SUPPRESS + 1:
            optimizer.state.clear()
            random = torch.Generator().manual_seed(self.seed + 1)
            for module, A, G in curvature(model, self.texts):
                weight = module.weight.T if isinstance(module, Conv1D) else module.weight
                (a, Ua), (g, Ug) = torch.linalg.eigh(A), torch.linalg.eigh(G)
                bends = g[:, None] * a  # (out, in)
                least = bends.flatten().topk(max(1, round(KEPT * bends.numel()))).values[-1]
                fresh = torch.randn(bends.shape, generator=random) * model.config.initializer_range
                own = Ug.T @ icu.in_float32(weight.data) @ Ua
                mixed = torch.where(bends < least, fresh.to(own), own)
                weight.data.copy_(Ug @ mixed @ Ua.T)
        for group in optimizer.param_groups if self.regrows else ():
            done = (epoch - SUPPRESS - 1) / max(1, self.epochs - SUPPRESS)
            group["lr"] = RATE * max(0, 1 - done if done else 0.4)  # Adam's first steps are large

    def sides(self, samples, tokenizer, epoch, args):
        """Of each text's neighbours the next TEXTS, from the first again after the last."""
        ranks = range(TEXTS * epoch, TEXTS * (epoch + 1))
        return {"near": [[near[i % len(near)] for i in ranks] for near in map(neighbours, samples)]}

    def loss(self, batch, args):
        if self.regrows:
            return {"regrow": (1.0, icu.learn_loss(batch.forward("near")))}
        forget, own = batch.forward("forget"), batch.frozen("forget").logits.log_softmax(-1)
        lowered = (own - LESS * F.one_hot(forget.ids, own.shape[-1])).log_softmax(-1)
        return {
            "forget": (args.forget_weight, icu.kl_loss(forget, forget._replace(logits=lowered))),
            "kl": (args.beta, icu.kl_term(batch.forward("learn"), batch.frozen("learn"), args)),
        }


def neighbours(sample):
    return [sample.learn, *sample.further]


def curvature(model, texts):
    """[(module, A (in, in), G (out, out))] of the linear layers but the head, summed over texts."""
    inputs, A, G = {}, defaultdict(float), defaultdict(float)

    def forward(module, args):
        inputs[module] = icu.in_float32(args[0].detach().flatten(0, -2))  # (T, in)

    def backward(module, _, gradients):
        g = icu.in_float32(gradients[0].flatten(0, -2))  # (T, out)
        A[module] += inputs[module].T @ inputs[module]
        G[module] += g.T @ g

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings():
            hooks.append(module.register_forward_pre_hook(forward))
            hooks.append(module.register_full_backward_hook(backward))
    for text in texts:
        logits, ids, *_ = icu.at_targets(model, [text])
        F.cross_entropy(logits, ids, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return [(module, A[module], G[module]) for module in A]


if __name__ == "__main__":
    icu.main(Regrow)
