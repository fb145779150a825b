"""UNDIAL, gently: towards the model's own words without x_t, held fast by Eq. 4, by the MLPs alone.

    bash run.sh smollm                                      # beside ICU; smollm-pile by smaller steps and alpha 0
    bash run.sh tiny --script examples/gentle.py --lr 2e-3 --batch-size 16 --max-epochs 25
    # seed 0: EL10 99.3 -> 0.1 %, MA 99.5 -> 59.9 %, entropy 4.86 -> 4.30 bits, held-out PPL 16.5 -> 23.8, 25 epochs

L = KL[q_t || p_theta(. | x_<t)] + alpha KL[p_theta(. | x_<t) || q_t], means over targets, + beta L_kl (Eq. 4); q_t =
p_0(. | x_<t) with the log-probability of x_t lowered by LESS (UNDIAL, arXiv:2402.10052, undial.py: the first term,
alone). The second (RKLD, arXiv:2406.01983) leaves no rest of x_t, which some of the entropy pays. Only the MLPs move,
the key-value memories of arXiv:2012.14913: general text pays less. Three seeds on two sets: LOG.md.
"""

import icu
from examples.analogous import kl
from examples.counterfactual import log_p, of_mlps
from examples.undial import lowered

LESS = 10.0  # nats


@icu.method(lr=2e-4, alpha=1.0, beta=8.0, frozen=("forget", "learn"), moves=of_mlps)
def gentle(batch, args):
    forget, learn = batch.forward("forget"), batch.forward("learn")
    (logp, x), (own, _) = log_p(forget, forget.logits), log_p(forget, forget.frozen_logits)
    logq = lowered(own, x, LESS).log_softmax(-1)
    return {
        "forget": (args.forget_weight, forget.mean(kl(logq, logp))),
        "reverse": (args.alpha, forget.mean(kl(logp, logq))),
        "kl": (args.beta, icu.kl_term(learn, args)),
    }


if __name__ == "__main__":
    icu.main(gentle)
