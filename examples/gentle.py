"""UNDIAL, gently: towards the model's own words without x_t, held by the neighbours, by MLPs alone.

    bash run.sh smollm      # beside ICU; smollm-pile without the reverse, twelve neighbours a text
    bash run.sh tiny --script examples/gentle.py --lr 2e-3 --alpha 0 --batch-size 16 \
        --neighbours 1 --max-epochs 25
    # seed 0: EL10 99.3 -> 0.1 %, MA 99.5 -> 59.9 %, entropy 4.86 -> 4.29 bits, held-out PPL
    # 16.5 -> 23.8, 25 epochs

L = KL[q_t || p] + w KL[p || q_t] + alpha L_learn (Eq. 3) + beta L_kl (Eq. 4), means over targets.
p = p_theta, and q_t = p_0 with the log-probability of x_t lowered by LESS (UNDIAL,
arXiv:2402.10052: the first term alone). The reverse (RKLD, arXiv:2406.01983; w is --forget-weight)
is fast, leaves no rest of x_t, and costs variety. Eq. 3 and 4 read another neighbour each epoch
(--neighbours): fresh text undoes learning by heart. Only the MLPs move (memories: 2012.14913).
"""

import torch.nn.functional as F

import icu

LESS = 10.0  # nats


class Gentle(icu.Method):
    lr, alpha, beta, frozen_sides = 2e-4, 0.0, 8.0, ("forget", "near")

    def sides(self, samples, tokenizer, epoch, args):
        """Of each text's neighbours one an epoch."""
        neighbours = [[sample.learn, *sample.further] for sample in samples]
        return {"near": [[texts[epoch % len(texts)]] for texts in neighbours]}

    def trains(self, name):
        return ".mlp." in name or ".fc" in name  # OPT's blocks call them fc1 and fc2

    def loss(self, batch, args):
        forget, near = batch.forward("forget"), batch.forward("near")
        logp = forget.logits.log_softmax(-1)  # (M, V)
        own = batch.frozen("forget").logits.log_softmax(-1)
        logq = (own - LESS * F.one_hot(forget.ids, own.shape[-1])).log_softmax(-1)
        return {
            "forget": (1.0, forget.mean(icu.kl(logq, logp))),
            "reverse": (args.forget_weight, forget.mean(icu.kl(logp, logq))),
            "learn": (args.alpha, icu.learn_loss(near)),
            "kl": (args.beta, icu.kl_term(near, batch.frozen("near"), args)),
        }


if __name__ == "__main__":
    icu.main(Gentle)
