"""Redraw and regrow: weights that neighbours do not use are drawn anew, and learn from neighbours.

    bash run.sh       # beside ICU
    bash run.sh tiny --script examples/regrow.py --lr 3e-3 --batch-size 8 --el lazy

Ours, for dense models and whole texts; needs --neighbours, tens a text. For each linear layer but
the head x x' is summed over its inputs x on at most READ neighbours. The first eigenvectors are
the directions that such text uses. Along KEPT of them the weights stay. Along the others, where
we expect what few texts alone need (2510.24256 looks for it so, with gradients as well), they are
drawn anew. Then the model learns from neighbours alone (Eq. 3), TEXTS of each text an epoch. No
loss on the texts hides them, and no teacher: the logits of the model before, on the same
neighbours, bring the memory back (dev/LOG.md). One process, no DeepSpeed.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import icu

KEPT = {1: 0.4, 4: 0.2, 7: 0.1, 10: 0.05}  # epoch: share of directions
READ, TEXTS = 32, 2


class Regrow(icu.Method):
    lr, min_epochs = 3e-3, 24

    def prepare(self, model, tokenizer, samples, args, folder):
        texts = {tuple(text.ids): text for near in map(neighbours, samples) for text in near}
        self.texts, self.args = [*texts.values()][:: -(-len(texts) // READ)], args

    def begin_epoch(self, model, optimizer, epoch):
        if epoch in KEPT:
            random = torch.Generator().manual_seed(self.args.seed + epoch)
            redraw(model, self.texts, KEPT[epoch], random)
        epochs = max(1, self.args.min_epochs)
        left = max(1, epochs + 1 - epoch) / epochs
        for group in optimizer.param_groups:  # Adam's first steps are large
            group["lr"] = self.args.lr * (left if epoch > 1 else 0.4)

    def sides(self, samples, tokenizer, epoch, args):
        """Of each text's neighbours the next TEXTS, from the first again after the last."""
        ranks = range(TEXTS * epoch, TEXTS * (epoch + 1))
        return {"near": [[near[i % len(near)] for i in ranks] for near in map(neighbours, samples)]}

    def loss(self, batch, args):
        return {"learn": (1.0, icu.learn_loss(batch.forward("near")))}


def neighbours(sample):
    return [sample.learn, *sample.further]


@torch.no_grad()
def redraw(model, texts, kept, random):
    """In place. W (out, in) of each linear layer but the head stays along the share `kept` of its
    inputs' directions, the most used by `texts`, and is normal noise along the others."""
    std = getattr(model.config, "initializer_range", 0.02)
    used, hooks = {}, []  # module: the sum of x x' (in, in)

    def read(module, inputs):
        x = icu.in_float32(inputs[0].flatten(0, -2))  # (tokens, in)
        used[module] = used.get(module, 0) + x.T @ x

    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings():
            hooks.append(module.register_forward_pre_hook(read))
    for text in texts:
        icu.at_targets(model, [text])
    for hook in hooks:
        hook.remove()
    for module, moment in used.items():
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        directions = torch.linalg.eigh(moment).eigenvectors  # columns, from the least used on
        along = icu.in_float32(weight) @ directions  # (out, in)
        least = along[:, : -max(1, round(kept * len(moment)))]
        least.copy_(torch.randn(least.shape, generator=random) * std)
        weight.copy_(along @ directions.T)


if __name__ == "__main__":
    icu.main(Regrow)
