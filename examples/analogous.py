"""An analogous context: a text is unlearned towards what the model says in its neighbour's place.

    bash run.sh tiny --script examples/analogous.py --lr 5e-4 --beta 4 --batch-size 16

L = mean over targets of KL[q_t || p_theta(. | x_<t)] + beta L_kl (Eq. 4). q_t is what the frozen
copy says after the neighbour's prompt and only the last K tokens x_(t-K) .. x_(t-1): what follows
in such a text if it is not recognised. So the loss has a floor. Near: generic predictions
(2310.02238), context distillation, DUET (2601.21283: a refusing prompt steers the teacher).
"""

import icu
from kit import models

K = 4


def contexts(sample, bos):
    """For each target x_t a text of its own: the neighbour's prompt, x_(t-K) .. x_(t-1), and x_t,
    its only target."""
    prompt, ids, texts = sample.learn.prompt, sample.forget.ids, []
    for t in sample.forget.targets:
        own = prompt + ids[max(t - K, bos) : t + 1]  # the prompt has the BOS
        texts.append(icu.Text(own, len(own) - 1, len(prompt), prompt))
    return texts


class Analogous(icu.Method):
    beta, lr, frozen_sides = 4.0, 5e-4, ("learn", "contexts")

    def sides(self, samples, tokenizer, epoch, args):
        bos = len(models.front_of(tokenizer))
        return {"contexts": [contexts(sample, bos) for sample in samples]}

    def loss(self, batch, args):
        forget, learn = batch.forward("forget"), batch.forward("learn")
        logp = forget.logits.log_softmax(-1)  # (M, V)
        logq = batch.frozen("contexts").logits.to(logp).log_softmax(-1)  # (M, V)
        return {
            "forget": (args.forget_weight, forget.mean(icu.kl(logq, logp))),
            "kl": (args.beta, icu.kl_term(learn, batch.frozen("learn"), args)),
        }


if __name__ == "__main__":
    icu.main(Analogous)
