"""Task-vector negation (Ilharco et al., arXiv:2212.04089, section 3): learn the texts, then go the
other way.

    bash run.sh tiny --script examples/task_vector.py --lr 4e-4 --max-epochs 40
    # seed 0: EL10 99.3 -> 3.9 %, MA 99.5 -> 55.0 %, entropy 4.86 -> 2.90 bits, held-out PPL
    # 16.5 -> 27.2, 10 epochs

What is trained is a model that knows the texts better: theta. What is measured is
theta_0 - SCALE (theta - theta_0).
"""

import icu

SCALE = 1.0  # the paper's lambda


class TaskVector(icu.Method):
    name = "task_vector"

    def prepare(self, model, *_):
        icu.keep_start(model)

    def swap_weights(self, model):
        return icu.scaled(model, -SCALE)

    def loss(self, batch, args):
        return {"forget": (args.forget_weight, icu.learn_loss(batch.forward("forget")))}


if __name__ == "__main__":
    icu.main(TaskVector)
