"""GradDiff, NPO and SimNPO give the numbers that open-unlearning's losses give.

PYTHONPATH=. python tests/test_peer.py     # makes golden_losses.json anew; needs accelerate

They come of three steps of HF's Trainer, by losses written here from the papers and from what
open-unlearning means and weighs: gamma (1) x forget + alpha (1) x retain.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import _make_model
from test_icu import Unwatched, args_of, some_texts, train
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

import baselines
from examples import simnpo
from kit import processes

GOLDEN = Path(__file__).with_name("golden_losses.json")
METHODS = {"graddiff": baselines.GradDiff, "npo": baselines.NPO, "simnpo": simnpo.SimNPO}
ROWS, BATCH, LR, CUT = 6, 2, 1e-3, 6  # CUT as of some_texts
TEXTS = [text._replace(ids=text.ids[: 9 + i % 3]) for i, text in enumerate(some_texts(2 * ROWS))]
SIDES = {"forget": TEXTS[:ROWS], "learn": TEXTS[ROWS:]}


def moved(model):
    """How far the weights are from where they began. Float64: no gradient of 0 is noise."""
    pairs = zip(model.parameters(), _make_model("llama").parameters(), strict=True)
    return float(sum((a - b).detach().square().sum() for a, b in pairs) ** 0.5)


FORGET = {  # of each text the negative log p, that of the model before, and how many tokens
    "graddiff": lambda nll, before, n: -nll.sum() / n.sum(),  # 2401.06121
    "npo": lambda nll, before, n: (
        -2 / 0.1 * F.logsigmoid(0.1 * (nll - before)).mean()
    ),  # 2404.05868
    "simnpo": lambda nll, before, n: -2 / 2.5 * F.logsigmoid(2.5 * nll / n).mean(),  # 2410.07163
}


def nll_of(model, ids):
    """(B,) the negative log p of each text's targets, (B,) how many they are. -100 is padding."""
    logits, labels = model(ids.clamp(min=0)).logits[:, CUT - 1 : -1], ids[:, CUT:]
    losses = F.cross_entropy(logits.mT, labels, ignore_index=-100, reduction="none")
    return losses.sum(1), (labels != -100).sum(1)


def padded(batch):
    """{side: ids (B, T)} of a batch of pairs of lists of ids."""
    rows = [map(torch.tensor, side) for side in zip(*batch, strict=True)]
    ids = [pad_sequence([*each], batch_first=True, padding_value=-100) for each in rows]
    return dict(zip(SIDES, ids, strict=True))


class Peer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        (nll, n), (retain, tokens) = (nll_of(model, inputs[side]) for side in SIDES)
        with torch.no_grad():
            before, _ = nll_of(_make_model("llama"), inputs["forget"])
        forget = FORGET[self.name](nll, before, n)
        loss = forget + retain.sum() / tokens.sum()
        self.losses.append(loss.item())
        return loss

    def _get_train_sampler(self, *_):
        return np.random.default_rng([0, 1]).permutation(ROWS).tolist()  # as our first epoch


def theirs(name, folder="/tmp/peer"):
    """The losses of three steps, and how far the weights have moved."""
    settings = TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=LR,
        lr_scheduler_type="constant", adam_beta2=0.98, max_grad_norm=0, optim="adamw_torch",
        use_cpu=True, remove_unused_columns=False, save_strategy="no", report_to=[],
    )  # fmt: skip
    pairs = [[text.ids for text in pair] for pair in zip(*SIDES.values(), strict=True)]
    peer = Peer(_make_model("llama"), settings, data_collator=padded, train_dataset=pairs)
    peer.name, peer.losses = name, []
    peer.train()
    return [*peer.losses, moved(peer.model)]


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_weights_are_the_peers(name, tmp_path):
    """Three steps of icu.py's loop; where Trainer can run, the stored numbers are made anew."""
    args = args_of(alpha=1, forget_weight=1, lr=LR, batch_size=BATCH, dtype="float64")
    engine, run, losses = processes.PlainEngine(_make_model("llama"), args), Unwatched(), []
    run.show_step = lambda loss, *_: losses.append(loss)
    sides = {side: [[text] for text in texts] for side, texts in SIDES.items()}
    train(engine, sides, args, METHODS[name](), epochs=[1], run=run)
    golden = json.loads(GOLDEN.read_text())[name]
    assert [*losses, moved(engine.model)] == pytest.approx(golden, rel=1e-4)
    pytest.importorskip("accelerate")
    assert theirs(name, tmp_path) == pytest.approx(golden, rel=1e-4)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: theirs(name) for name in METHODS}, indent=1) + "\n")
