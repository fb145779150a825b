"""UNDIAL, gently: towards the model's own words without x_t, by the MLPs alone, and not all of the way.

    bash run.sh smollm-pile --script examples/gentle.py --lr 2e-4 --batch-size 4 --max-epochs 20
    # seed 0: EL10 78.0 -> 0.1 %, MA 95.2 -> 49.0 %, entropy 4.78 -> 3.97 bits, held-out PPL 14.7 -> 17.6, 7 epochs

L = mean over targets of KL[q_t || p_theta(. | x_<t)] + beta L_kl (Eq. 4), q_t = p_0(. | x_<t) with the log-probability
of x_t lowered by LESS (UNDIAL, arXiv:2402.10052, undial.py), which holds nothing else fast. Here Eq. 4 does; only the
MLPs move, the key-value memories of arXiv:2012.14913; what is measured is theta_0 + SCALE (theta - theta_0), as WiSE-FT
(arXiv:2109.01903) does. For a model that speaks: on `tiny` the weights spring back at SCALE (LOG.md).
"""

import icu
from examples.analogous import kl
from examples.counterfactual import log_p, only_mlps
from examples.undial import lowered
from kit.methods import measured_at

LESS, SCALE = 10.0, 0.8  # nats; a share of the way


@icu.method(lr=1e-4, beta=5.0, frozen=("forget", "learn"), prepare=only_mlps, measured=measured_at(SCALE))
def gentle(batch, args):
    forget, learn = batch.forward("forget"), batch.forward("learn")
    (logp, x), (own, _) = log_p(forget, forget.logits), log_p(forget, forget.frozen_logits)
    return {
        "forget": (args.forget_weight, forget.mean(kl(lowered(own, x, LESS).log_softmax(-1), logp))),
        "kl": (args.beta, icu.kl_term(learn, args)),
    }


if __name__ == "__main__":
    icu.main(gentle)
