"""Suppress, break, heal: what a model no longer says is not taught again (UNDO, arXiv:2506.06278).

    bash run.sh tiny --script examples/undo.py --neighbours 40 --max-epochs 48 --el lazy

Epochs 1 to SUPPRESS pull each text towards what the frozen copy says after its neighbour's prompt
and the last token alone. Then the model becomes the teacher, and its weights go NOISE of the way to
fresh ones, which takes what lies under the suppression. The other epochs heal: KL to the teacher on
neighbours. UNDO heals on a corpus, and far longer.
"""

import copy

import icu

SUPPRESS, NOISE, RATE, TEXTS = 12, 0.6, 2e-3, 2


class Undo(icu.Method):
    lr, beta, frozen_sides, min_epochs = 1e-3, 4.0, ("learn", "contexts"), 48
    teacher, weights = None, None

    def begin_epoch(self, model, optimizer, epoch):
        if epoch > SUPPRESS and self.teacher is None:
            self.teacher = copy.deepcopy(model).requires_grad_(False)
            if self.weights:
                self.teacher.load_state_dict(self.weights)  # resumed
            else:
                optimizer.state.clear()
                fresh = type(model)(model.config).to(model.device)
                for weights, other in zip(model.parameters(), fresh.parameters(), strict=True):
                    weights.data.lerp_(other.data, NOISE)
        for group in optimizer.param_groups if self.teacher else ():
            left = (self.min_epochs - epoch) / (self.min_epochs - SUPPRESS)
            group["lr"] = RATE * (0.1 + 0.9 * left)

    def sides(self, samples, tokenizer, epoch, args):
        sides = {"contexts": [], "neighbours": []}
        for sample in samples:
            prompt, ids = sample.learn.prompt, sample.forget.ids
            texts = (prompt + ids[t - 1 : t + 1] for t in sample.forget.targets)
            sides["contexts"].append([icu.Text(x, len(x) - 1, len(prompt), prompt) for x in texts])
            near = [sample.learn, *sample.further]
            near = [near[(epoch * TEXTS + i) % len(near)] for i in range(TEXTS)]
            sides["neighbours"].append([text._replace(t0=1) for text in near])
        return sides

    def loss(self, batch, args):
        if self.teacher:
            teacher = batch.forward("neighbours", self.teacher)
            return {"kl": (1.0, icu.kl_loss(batch.forward("neighbours"), teacher))}
        forget, learn = batch.forward("forget"), batch.forward("learn")
        logq, logp = batch.frozen("contexts").logits.log_softmax(-1), forget.logits.log_softmax(-1)
        return {
            "forget": (args.forget_weight, forget.mean(icu.kl(logq.to(logp), logp))),
            "kl": (args.beta, icu.kl_term(learn, batch.frozen("learn"), args)),
        }

    def state(self):
        return self.teacher.state_dict() if self.teacher else {}

    def load_state(self, tensors):
        self.weights = tensors


if __name__ == "__main__":
    icu.main(Undo)
