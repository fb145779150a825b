"""Task-vector negation (Ilharco et al., arXiv:2212.04089, section 3): learn the texts, then go the other way.

    bash run.sh tiny --script examples/task_vector.py --lr 4e-4 --max-epochs 40
    # seed 0: EL10 99.3 -> 3.9 %, MA 99.5 -> 55.0 %, entropy 4.86 -> 2.90 bits, held-out PPL 16.5 -> 27.2, 10 epochs

What is trained is a model that knows the texts better: theta. What is measured is theta_0 - s (theta - theta_0).
"""

import icu
from baselines import descent
from kit.methods import keep_start, measured_at

SCALE = 1.0  # the paper's lambda


@icu.method(prepare=keep_start, measured=measured_at(-SCALE))
def task_vector(batch, args):
    return {"forget": (args.forget_weight, descent(batch.forward("forget")))}


if __name__ == "__main__":
    icu.main(task_vector)
