"""Suppress, break, heal: what a model no longer says is not taught again (UNDO, arXiv:2506.06278).

    bash run.sh tiny --script examples/undo.py --lr 1e-3 --batch-size 16 --max-epochs 48 --el lazy

Epochs 1 to SUPPRESS pull each text towards what the frozen copy says after its neighbour's prompt
and the last token alone. Then the weights go NOISE of the way to fresh ones, which takes what lies
under the suppression, and are healed by KL to the suppressed model, the teacher, on texts that it
makes up from a neighbour's first words (UNDO: on a corpus).
"""

import copy

import torch

import icu

SUPPRESS, NOISE, RATE, TEXTS, TOKENS = 12, 0.4, 1e-3, 2, 80


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
            healing, left = epoch - SUPPRESS, max(0, self.min_epochs - epoch)
            group["lr"] = RATE * min(1, healing / 3) * (0.1 + 0.9 * left / (healing + left))

    def sides(self, samples, tokenizer, epoch, args):
        sides = {"contexts": [], "made_up": []}
        for sample in samples:
            prompt, ids = sample.learn.prompt, sample.forget.ids
            texts = (prompt + ids[t - 1 : t + 1] for t in sample.forget.targets)
            sides["contexts"].append([icu.Text(x, len(x) - 1, len(prompt), prompt) for x in texts])
        if self.teacher:
            starts = [sample.learn.ids[:2] for sample in samples for _ in range(TEXTS)]
            starts = torch.tensor(starts, device=self.teacher.device)
            rows = self.teacher.generate(
                starts, attention_mask=torch.ones_like(starts), do_sample=True, top_k=0,
                max_new_tokens=TOKENS, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            texts = [icu.Text(ids, 1, 1, []) for ids in rows.tolist()]
            sides["made_up"] = [texts[i : i + TEXTS] for i in range(0, len(texts), TEXTS)]
        return sides

    def loss(self, batch, args):
        if self.teacher:
            teacher = batch.forward("made_up", self.teacher)
            return {"kl": (1.0, icu.kl_loss(batch.forward("made_up"), teacher))}
        forget, learn = batch.forward("forget"), batch.forward("learn")
        elsewhere = forget._replace(logits=batch.frozen("contexts").logits)
        return {
            "forget": (args.forget_weight, icu.kl_loss(forget, elsewhere)),
            "kl": (args.beta, icu.kl_term(learn, batch.frozen("learn"), args)),
        }

    def state(self):
        return self.teacher.state_dict() if self.teacher else {}

    def load_state(self, tensors):
        self.weights = tensors


if __name__ == "__main__":
    icu.main(Undo)
