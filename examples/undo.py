"""Suppress, break, heal: what a model no longer says is not taught again (UNDO, arXiv:2506.06278).

    bash run.sh tiny --script examples/undo.py

Epochs 1 to SUPPRESS are those of examples/analogous.py. Then this model becomes the teacher, its
weights go NOISE of the way to fresh ones, which takes what lies under the suppression, and the rest
of the epochs are KL to the teacher on texts that the teacher makes up (UNDO: on a corpus).
"""

import copy

import torch

import icu
from kit import models

SUPPRESS, HEAL, NOISE, TEXTS, TOKENS, K = 15, 25, 0.4, 2, 80, 4


def contexts(sample, front):
    """For each target its neighbour's prompt, the last K tokens, and it: examples/analogous.py."""
    prompt, ids = sample.learn.prompt, sample.forget.ids
    texts = (prompt + ids[max(t - K, front) : t + 1] for t in sample.forget.targets)
    return [icu.Text(own, len(own) - 1, len(prompt), prompt) for own in texts]


class Undo(icu.Method):
    lr, beta, frozen_sides, min_epochs = 1e-3, 4.0, ("learn", "contexts"), SUPPRESS + HEAL
    teacher, weights, made_up = None, None, ()

    def begin_epoch(self, model, tokenizer, epoch):
        if epoch <= SUPPRESS:
            return
        if self.teacher is None:
            self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
            if self.weights:  # resumed
                self.teacher.load_state_dict(self.weights)
            else:
                fresh = type(model)(model.config).to(model.device)
                for weights, other in zip(model.parameters(), fresh.parameters(), strict=True):
                    weights.data.lerp_(other.data, NOISE)

    def sides(self, samples, tokenizer, epoch, args):
        sides = {"contexts": [contexts(s, len(models.front_of(tokenizer))) for s in samples]}
        if self.teacher is not None:
            starts = [sample.learn.ids[:2] for sample in samples for _ in range(TEXTS)]
            ids = self.teacher.generate(
                torch.tensor(starts, device=self.teacher.device), do_sample=True, top_k=0,
                max_new_tokens=TOKENS, pad_token_id=tokenizer.eos_token_id,
            ).tolist()  # fmt: skip
            made_up = [icu.Text(row, 1, 1, []) for row in ids]
            sides["made_up"] = [made_up[i :: len(samples)] for i in range(len(samples))]
        return sides

    def loss(self, batch, args):
        if self.teacher is not None:
            teacher = batch.forward("made_up", self.teacher)
            return {"kl": (1.0, icu.kl_loss(batch.forward("made_up"), teacher))}
        forget, learn = batch.forward("forget"), batch.forward("learn")
        logq, logp = batch.frozen("contexts").logits.log_softmax(-1), forget.logits.log_softmax(-1)
        return {
            "forget": (args.forget_weight, forget.mean(icu.kl(logq.to(logp), logp))),
            "kl": (args.beta, icu.kl_term(learn, batch.frozen("learn"), args)),
        }

    def state(self):
        return self.teacher.state_dict() if self.teacher is not None else {}

    def load_state(self, tensors):
        self.weights = tensors


if __name__ == "__main__":
    icu.main(Undo)
