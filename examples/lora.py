"""ICU in low-rank adapters (LoRA, Hu et al., arXiv:2106.09685, Eq. 3): W x + s B A x, of which only
A and B are trained.

    bash run.sh tiny --script examples/lora.py --lr 2e-3 --max-epochs 40
    # seed 0: EL10 99.3 -> 2.9 %, MA 99.5 -> 46.9 %, entropy 4.86 -> 3.29 bits, held-out PPL
    # 16.5 -> 32.4, 13 epochs
"""

from torch.nn import Linear, Parameter, init

import icu

RANK, SCALE = 8, 2.0  # r, and s = alpha / r


def add_adapter(layer, x, y):
    """A forward hook: W x becomes W x + s B A x, where the layer has an adapter."""
    return y + SCALE * x[0] @ layer.a.T @ layer.b.T if hasattr(layer, "a") else y


class LoRA(icu.ICU):
    lr, published = 1e-3, None

    def prepare(self, model, *_):
        """An adapter beside each linear layer under the head; with B = 0 nothing changes yet."""
        model.requires_grad_(False)
        layers = [part for part in model.base_model.modules() if isinstance(part, Linear)]
        for layer in layers:
            layer.a = Parameter(
                init.kaiming_uniform_(layer.weight.new_empty(RANK, layer.in_features))
            )
            layer.b = Parameter(layer.weight.new_zeros(layer.out_features, RANK))
            layer.register_forward_hook(add_adapter)

    def swap_weights(self, model):
        """W + s B A in the weights, and nowhere else: what is measured and exported."""
        layers = [part for part in model.modules() if hasattr(part, "a")]
        adapted = [(layer, layer.weight.data, layer.a, layer.b) for layer in layers]
        for layer, weight, a, b in adapted:
            layer.weight.data = weight + SCALE * b.data @ a.data
            del layer.a, layer.b
        yield
        for layer, weight, a, b in adapted:
            layer.weight.data, layer.a, layer.b = weight, a, b


if __name__ == "__main__":
    icu.main(LoRA)
