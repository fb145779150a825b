"""An analogous context: unlearn a text towards what the model says in its neighbour's place, so that there is a floor.

    bash run.sh tiny --script examples/analogous.py

L = mean over targets of KL[q_t || p_theta(. | x_<t)] + beta L_kl (Eq. 4), q_t what the frozen copy says behind the
neighbour's prompt and only the last K tokens x_(t-K) .. x_(t-1): what follows in such a text if it is not recognised.
Near: generic predictions (2310.02238), context distillation, DUET (2601.21283: a refusing prompt steers the teacher).
"""

import icu
from kit import models

K = 4


def contexts(samples, tokenizer, epoch, args):
    """For each target x_t a text of its own: the neighbour's prompt, x_(t-K) .. x_(t-1), and x_t, its only target."""
    first = len(models.bos_of(tokenizer))  # the prompt has it

    def read(prompt, ids, t):
        ids = prompt + ids[max(t - K, first) : t + 1]
        return icu.Text(ids, len(ids) - 1, len(prompt), prompt)

    return [
        [read(row.learn.prompt, row.forget.ids, t) for t in row.forget.targets] for row in samples
    ]


def kl(logq, logp):
    return (logq.exp() * (logq - logp)).sum(-1)  # (M, V), (M, V) -> (M,)


@icu.method(
    beta=4.0, lr=5e-4, frozen=("learn",), taught=("analogous",), sides={"analogous": contexts}
)
def analogous(batch, args):
    forget, learn = batch.forward("forget"), batch.forward("learn")
    logp = icu.target_logits(forget.logits, forget.ids, forget.mask)[0].log_softmax(-1)  # (M, V)
    logq = batch.taught("analogous").to(logp).log_softmax(-1)  # (M, V)
    return {
        "forget": (args.forget_weight, forget.mean(kl(logq, logp))),
        "kl": (args.beta, icu.kl_term(learn, args)),
    }


if __name__ == "__main__":
    icu.main(analogous)
