"""ICU in low-rank adapters (LoRA, Hu et al., arXiv:2106.09685, Eq. 3): W x + s B A x, only A and B are trained.

bash run.sh tiny --script examples/lora.py --lr 2e-3 --max-epochs 40
# seed 0: EL10 99.3 -> 2.9 %, MA 99.5 -> 46.9 %, entropy 4.86 -> 3.29 bits, held-out PPL 16.5 -> 32.4, 13 epochs
"""

from torch.nn import Linear, Parameter, init

import icu

RANK, SCALE = 8, 2.0  # r, and s = alpha / r


def adapt(model, args):  # beside each linear layer under the head; with B = 0 nothing changes yet
    model.requires_grad_(False)
    for layer in [module for module in model.base_model.modules() if isinstance(module, Linear)]:
        layer.a = Parameter(init.kaiming_uniform_(layer.weight.new_empty(RANK, layer.in_features)))
        layer.b = Parameter(layer.weight.new_zeros(layer.out_features, RANK))
        layer.register_forward_hook(
            lambda f, x, y: y + SCALE * x[0] @ f.a.T @ f.b.T if hasattr(f, "a") else y
        )


def merged(model):  # W + s B A in the weights, and nowhere else: what is measured and exported
    adapted = [
        (layer, layer.weight.data, layer.a, layer.b)
        for layer in model.modules()
        if hasattr(layer, "a")
    ]
    for layer, weight, a, b in adapted:
        layer.weight.data = weight + SCALE * b.data @ a.data
        del layer.a, layer.b
    yield
    for layer, weight, a, b in adapted:
        layer.weight.data, layer.a, layer.b = weight, a, b


@icu.method(alpha=0.5, refine=True, frozen=("learn",), lr=1e-3, prepare=adapt, measured=merged)
def lora(batch, args):
    return icu.icu(batch, args)


if __name__ == "__main__":
    icu.main(lora)
