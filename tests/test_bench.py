"""dev/bench.py: its plain sides compute what the project computes, and its table says so.

Nothing here depends on how long anything takes.
"""

import copy
import itertools
import re
import sys

import numpy as np
import pytest
import torch

from dev import bench


@pytest.fixture
def run(world, tmp_path):
    """run(name): the lines of a row, as cells, of the table that main() writes."""

    def lines_of(name):
        out = tmp_path / f"{name}.md"
        flags = ["--quick", "--model", str(world.model), "--pairs", str(world.pairs)]
        bench.main([*flags, "--repeats", "1", "--rows", name, "--out", str(out)])
        lines = out.read_text(encoding="utf-8").splitlines()
        cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
        assert all(line[0].startswith(bench.ROWS[name][0]) for line in cells)
        return cells

    return lines_of


@pytest.fixture
def setup(world):
    """A Bench of the world's model, in float64, so that two ways to a value agree closely."""
    flags = ["--quick", "--model", str(world.model), "--pairs", str(world.pairs)]
    made = bench.prepare(bench.parse_args(flags))
    return made._replace(model=made.model.double())


# --- the plain sides ---


def test_the_plain_epoch_trains_the_same_weights(setup):
    """Packing and the cached frozen copy change no gradient: one step of Eq. 6 is one step."""
    samples, active = setup.samples(), [0, 2]
    args = bench.settings("cpu", "--batch-size", "8", "--lr", "1e-3")
    ours, theirs = copy.deepcopy(setup.model), copy.deepcopy(setup.model)
    bench.trainer(ours, samples, args)(active, 1)
    bench.plain_epoch(theirs, samples, set(active), args)
    models = (setup.model, ours, theirs)
    for before, mine, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(mine, other, atol=1e-6) and not torch.equal(mine, before)


def test_literal_el_and_ma_are_the_projects(setup):
    """Equal on every text of the pairs."""
    texts = [sample.forget for sample in setup.samples()]
    literal = bench.literal_el_and_ma(setup.model, texts, 1)
    np.testing.assert_allclose(bench.our_el_and_ma(setup.model, texts, 1), literal, atol=1e-6)


# --- the rows ---


def test_the_rows_are_measured(run):
    """el, epoch and step on a tiny model: a ratio each, and equal values."""
    rows = {name: run(name) for name in ("el", "epoch", "step")}
    assert [len(lines) for lines in rows.values()] == [2, 1, 1]
    assert all("x (" in line[2] for lines in rows.values() for line in lines)
    mine, theirs = rows["epoch"][0][5].split("MA ")[1].split(";")[0].split(" / ")
    assert float(mine) == pytest.approx(float(theirs), abs=0.1)


def test_what_cannot_be_measured_says_why(run, monkeypatch):
    """Without faiss."""
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert "not measured: import of faiss" in run("knn")[0][2]


def test_larger_models_need_no_fewer_cards_and_larger_cards_no_more(setup):
    """The estimate rises with the model, and falls with the card, --offload, --micro-batch with
    --checkpointing, and weights of bf16: then 1.3B is for one card of 24 GB."""
    cells = [line[1].replace("over 8", "9") for line in bench.what_fits(setup)]
    table = [[int(n) for n in re.findall(r": (\d)", row)] for row in cells]
    sizes = [table[i : i + len(bench.WAYS)] for i in range(0, len(table), len(bench.WAYS))]
    assert sizes[0][0] == sizes[3][0] == [1] * 6 and sizes[2][0][0] > 1 == sizes[1][-1][0]
    assert all(row == sorted(row, reverse=True) for row in table)
    for one, other in itertools.pairwise(sizes[:3]):
        assert np.all(np.array(one) <= np.array(other))
    for plain, *_, small, smallest in map(np.array, sizes):
        assert np.all(plain >= small) and np.all(small >= smallest)


def test_parts_and_checkpointing_lower_the_peak(run):
    """What a step holds beside weights and Adam is measured, and at most what is estimated."""
    works = [re.findall(r"(\d+) MB, estimated (\d+)", line[5]) for line in run("memory")]
    (plain, *_, small, smallest), estimates = np.array(works, dtype=int)[:, 0].T
    assert plain > 5 * small > 5 * smallest
    assert np.all([plain, small, smallest] <= estimates[[0, -2, -1]])
