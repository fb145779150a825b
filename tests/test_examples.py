"""examples/: each loss is its formula, moves the right way and runs through the whole loop; a name decides nothing.

python -m pytest tests/test_examples.py -q
"""

import argparse
import copy
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import survive
import torch
from test_icu import args_of, loop_logps, memorise, toy, train
from transformers import AutoModelForCausalLM

import icu
from examples import counterfactual, gentle
from kit import data, methods, models, processes

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ["simnpo", "undial", "rmu", "lora", "task_vector", "gentle"]
SCRIPTS = [*EXAMPLES, "analogous", "counterfactual"]


def method_of(name):
    """The method of a file in examples/."""
    return getattr(importlib.import_module(f"examples.{name}"), name)


def sides_of(V=7, **more):
    """Two sides with random logits and a frozen copy's; `more` goes to both."""
    frozen, found = toy(seed=9, V=V)[0].detach(), {}
    for seed, name in enumerate(("forget", "learn")):
        logits, ids, mask = toy(seed=seed, V=V)
        found[name] = icu.Side(logits, ids, mask, int(mask.sum()), len(ids), frozen, **more)
    return found


class Batch:
    def __init__(self, sides):
        self.forward = sides.__getitem__


def loss_of(name, sides):
    terms = method_of(name)(Batch(sides), args_of("icu", loss=None))
    return sum(weight * value for weight, value in terms.values()).item()


# --- each loss is its formula ---


def test_simnpo_is_its_formula():
    """0.7 x -2/b mean log sigmoid(-b/|y| log p) - 0.5 x mean log p of the learn side, from single log-probabilities."""
    sides = sides_of()
    f = sides["forget"]
    rows = [loop_logps(f.logits[b : b + 1], f.ids[b : b + 1], f.mask[b : b + 1]) for b in range(3)]
    means = torch.tensor([sum(row) / len(row) for row in rows], dtype=torch.float64)
    learn = loop_logps(*sides["learn"][:3])
    expected = 0.7 * (-2 / 2.5 * torch.log(torch.sigmoid(-2.5 * means))).mean() - 0.5 * sum(
        learn
    ) / len(learn)
    assert loss_of("simnpo", sides) == pytest.approx(float(expected), abs=1e-9)


def test_undial_is_its_formula():
    """0.7 x the mean cross-entropy towards softmax(z_0 - 10 onehot), token by token; other positions do not count."""
    sides = sides_of()
    f, values = sides["forget"], []
    for b, t in f.mask.nonzero().tolist():
        z = f.frozen_logits[b, t - 1].clone()
        z[f.ids[b, t]] -= 10
        values.append(-(z.softmax(0) * f.logits[b, t - 1].log_softmax(0)).sum().item())
    expected = 0.7 * sum(values) / len(values)
    assert loss_of("undial", sides) == pytest.approx(expected, abs=1e-9)


def test_gentle_is_undial_less_what_no_weight_changes_its_reverse_eq_3_and_eq_4():
    """KL[q_t || p] = H(q_t, p) - H(q_t), q_t as UNDIAL's; KL[p || q_t], token by token; both losses of a neighbour."""
    sides = sides_of()
    sides["near"] = sides.pop("learn")
    f, entropies, reverses = sides["forget"], [], []
    for b, t in f.mask.nonzero().tolist():
        z, p = f.frozen_logits[b, t - 1].clone(), f.logits[b, t - 1].softmax(0)
        z[f.ids[b, t]] -= 10
        entropies.append(-(z.softmax(0) * z.log_softmax(0)).sum().item())
        reverses.append((p * (p.log() - z.log_softmax(0))).sum().item())
    args = args_of("icu", loss=None, forget_weight=0.3, alpha=2.0, beta=3.0)
    (one, value), (weight, reverse), (alpha, loss), (beta, kl) = method_of("gentle")(
        Batch(sides), args
    ).values()
    undial = loss_of("undial", sides) / 0.7  # its weight
    assert one == 1.0 and value.item() == pytest.approx(
        undial - sum(entropies) / len(entropies), abs=1e-9
    )
    assert weight == 0.3 and reverse.item() == pytest.approx(
        sum(reverses) / len(reverses), abs=1e-9
    )
    near, learn = sides["near"], loop_logps(*sides["near"][:3])
    assert alpha == 2.0 and loss.item() == pytest.approx(-sum(learn) / len(learn), abs=1e-9)
    assert beta == 3.0 and kl.item() == pytest.approx(
        icu.kl_loss(near.logits, near.frozen_logits, near.mask).item()
    )


def test_gentle_reads_a_neighbour_an_epoch():
    """The first, the second, ..., the first again; with one neighbour that one, so that a cached teacher will do."""
    text = [icu.Text([n, n], 1, 1, [n]) for n in range(5)]
    samples = [
        icu.Sample("a", "", text[0], text[1], further=text[2:4]),
        icu.Sample("b", "", text[0], text[4]),
    ]
    found = [gentle.in_turn(samples, None, epoch, None) for epoch in range(4)]
    assert [first for ((first,), _) in found] == [text[1], text[2], text[3], text[1]]
    assert all(second == text[4] for (_, (second,)) in found)


def test_rmu_is_its_formula():
    """0.7 x |h - c u|^2 on the forget side + 0.5 x |h - h_0|^2 on the learn side, means over tokens and dimensions."""
    g = torch.Generator().manual_seed(3)
    hidden, frozen = (torch.randn(3, 6, 5, dtype=torch.float64, generator=g) for _ in range(2))
    sides = sides_of(hidden=hidden, frozen_hidden=frozen)
    u = torch.rand(5, generator=torch.Generator().manual_seed(0))
    far = [
        ((hidden[b, t] - 20 * u / u.norm()) ** 2).mean()
        for b, t in sides["forget"].mask.nonzero().tolist()
    ]
    near = [
        ((hidden[b, t] - frozen[b, t]) ** 2).mean()
        for b, t in sides["learn"].mask.nonzero().tolist()
    ]
    expected = 0.7 * float(sum(far)) / len(far) + 0.5 * float(sum(near)) / len(near)
    assert loss_of("rmu", sides) == pytest.approx(expected, rel=1e-6)


def test_the_task_vector_descends_and_lora_is_icu():
    """What task_vector trains is the likelihood loss of the text itself; lora's loss is Eq. 6."""
    sides = sides_of()
    logps = loop_logps(*sides["forget"][:3])
    assert loss_of("task_vector", sides) == pytest.approx(-0.7 * sum(logps) / len(logps), abs=1e-9)
    terms = icu.icu(Batch(sides), args_of("icu", loss=None)).values()
    assert loss_of("lora", sides) == pytest.approx(sum(w * v for w, v in terms).item(), abs=1e-9)


@pytest.mark.parametrize("teacher", ["cached", "live"])
def test_analogous_is_its_formula(teacher, make_model):
    """KL to what the model says behind the neighbour's prompt and the last four tokens, target by target, by loops."""
    model = make_model("llama", dtype=torch.float32)
    rows = torch.randint(4, 90, (4, 9), generator=torch.Generator().manual_seed(1)).tolist()
    texts = [icu.Text([1, *row], 3, 5, [1, *row[:4]]) for row in rows]  # 1 is BOS
    samples = [icu.Sample(str(i), "", texts[i], texts[i + 2]) for i in range(2)]
    method, tokenizer = method_of("analogous"), argparse.Namespace(bos_token_id=1)
    args = args_of("icu", loss=method, beta=2.0, forget_weight=0.7, teacher=teacher)
    with mock.patch.object(models, "bos_of", lambda tokenizer: [1]):
        sides = icu.sides_of(samples, tokenizer, 0, args)
    frozen, before = icu.freeze(model, sides, args), copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
        batch = icu.Batch(model, sides, [0, 1], frozen=frozen, asked=["learn"])
        terms = method(batch, args)
        kls = []
        for sample in samples:
            for t in range(3, 10):
                seen = sample.learn.prompt + sample.forget.ids[max(t - 4, 1) : t]
                logq = before(torch.tensor([seen])).logits[0, -1].log_softmax(0)
                logp = model(torch.tensor([sample.forget.ids[:t]])).logits[0, -1].log_softmax(0)
                kls.append((logq.exp() * (logq - logp)).sum().item())
        learn = icu.forward(model, [sample.learn for sample in samples])
        kl = icu.kl_loss(
            learn[2], icu.forward(before, [sample.learn for sample in samples])[2], learn[1]
        ).item()
    assert terms["forget"][0] == 0.7 and terms["forget"][1].item() == pytest.approx(
        sum(kls) / len(kls), rel=1e-4
    )
    assert terms["kl"][0] == 2.0 and terms["kl"][1].item() == pytest.approx(kl, rel=1e-4)


def test_counterfactual_is_its_formula(make_model):
    """Jeffreys' divergence from q_t, target by target, and the neighbour's suffix in the text's place, by loops."""
    model, floor = make_model("llama", dtype=torch.float32), counterfactual.NEVER
    rows = torch.randint(4, 90, (4, 9), generator=torch.Generator().manual_seed(1)).tolist()
    texts = [icu.Text([1, *row], 3, 5, [1, *row[:4]]) for row in rows]  # 1 is BOS
    memorise(model, texts[:2], steps=3)  # some tokens are remembered, others not
    samples = [icu.Sample(str(i), "", texts[i], texts[i + 2]) for i in range(2)]
    method = counterfactual.counterfactual
    args = args_of("icu", loss=method, alpha=0.3, beta=2.0, forget_weight=0.7)
    with mock.patch.object(models, "bos_of", lambda tokenizer: [1]):
        sides = icu.sides_of(samples, None, 0, args)
    frozen, before = icu.freeze(model, sides, args), copy.deepcopy(model)

    def log_p(model, ids):
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(0)

    def kl(logq, logp):
        return (logq.exp() * (logq - logp)).sum().item()

    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
        terms = method(
            icu.Batch(model, sides, [0, 1], frozen=frozen, asked=["forget", "learn"]), args
        )
        found, remembered, told = [], [], []
        for sample in samples:
            text, other = sample.forget, sample.learn
            for t in range(3, 10):
                x, whole = text.ids[t], log_p(before, text.ids[:t])
                loose = log_p(before, other.prompt + text.ids[max(t - 4, 1) : t])
                remembered.append((whole[x] - loose[x]).item() > counterfactual.GAP)
                loose[x] -= floor
                logq, logp = (
                    loose.log_softmax(0) if remembered[-1] else whole,
                    log_p(model, text.ids[:t]),
                )
                found.append((kl(logq, logp) + kl(logp, logq)) / 2)
            for t in range(5, 10):
                said = log_p(model, text.prompt + other.ids[5:t])
                told.append(kl(log_p(before, other.ids[:t]), said))
    assert 0 < sum(remembered) < len(remembered)
    assert terms["forget"][0] == 0.7 and terms["forget"][1].item() == pytest.approx(
        sum(found) / len(found), rel=1e-4
    )
    assert terms["swapped"][0] == 0.3 and terms["swapped"][1].item() == pytest.approx(
        sum(told) / len(told), rel=1e-4
    )
    assert terms["kl"][0] == 2.0 and terms["kl"][1].item() > 0


@pytest.mark.parametrize(("kind", "in_a_block"), [("gpt_neo", 4), ("opt", 4), ("llama", 3)])
def test_counterfactual_stays_near_its_start(make_model, kind, in_a_block):
    """Only the MLPs move; what is measured has gone a share of the way of what is trained."""
    model = make_model(kind, dtype=torch.float32)
    start = copy.deepcopy(model)
    needs = counterfactual.counterfactual.needs
    needs.begin(model, None)
    moving = [name for name, weights in model.named_parameters() if weights.requires_grad]
    assert len(moving) == in_a_block * model.config.num_hidden_layers
    assert not any(
        word in name for name in moving for word in ("embed", "wte", "attn", "norm", "ln_")
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    with needs.measuring(model):
        for p, original in zip(model.parameters(), start.parameters(), strict=True):
            torch.testing.assert_close(p.data, original.data + counterfactual.SCALE)
    for p, original in zip(model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p.data, original.data + 1)


def test_nothing_left_to_train_is_said():
    """Instead of the optimizer's word on an empty list; what `prepare` has frozen stays so."""
    needs, model = counterfactual.counterfactual.needs, torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="mine trains no weight of this model"):
        needs.begin(model, argparse.Namespace(method="mine"))
    needs = mine(prepare=lambda model, args: model[0].bias.requires_grad_(False)).needs
    needs.begin(model.requires_grad_(True), None)
    assert [weights.requires_grad for weights in model.parameters()] == [True, False]


def test_another_share_of_the_way_is_another_method():
    """What `measured_at` was given counts in the method's code, by which a run is gone on with or refused."""
    half, same, whole = (mine(measured=methods.measured_at(scale)) for scale in (0.5, 0.5, 1.0))
    assert methods.code_of(half) == methods.code_of(same) != methods.code_of(whole)


def test_analogous_forgets_and_has_a_floor(make_model):
    """A memorised text becomes less likely; there is a floor: ascent goes on falling."""
    model = make_model("gpt_neo", dtype=torch.float32)
    rows = torch.randint(4, 90, (6, 12), generator=torch.Generator().manual_seed(1)).tolist()
    texts = [icu.Text(row, 6, 6, row[:6]) for row in rows]
    memorise(model, texts[:3])
    method = method_of("analogous")
    args = args_of("icu", loss=method, lr=5e-3, forget_weight=1.0, beta=1.0)
    samples = [icu.Sample(str(i), "", texts[i], texts[i + 3]) for i in range(3)]
    with mock.patch.object(models, "bos_of", lambda tokenizer: []):
        sides = icu.sides_of(samples, None, 0, args)
    ids, attention, mask = icu.collate(texts[:3])
    likelihood = lambda: icu.forget_loss(  # noqa: E731
        model(ids, attention_mask=attention).logits, ids, mask
    ).item()  # noqa: E731
    with torch.no_grad():
        before = likelihood()
    train(processes.PlainEngine(model, args), sides, args, epochs=range(1, 60))
    with torch.no_grad():
        after = likelihood()
    assert before > -1 and -12 < after < before - 1


# --- each moves the right way ---


def same_weights(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("kind", ["gpt_neo", "llama"])
def test_a_memorised_text_becomes_less_likely(name, kind, make_model):
    """A few steps, then the weights that are measured: less likely; those of before come back for training."""
    model = make_model(kind, dtype=torch.float32)
    rows = torch.randint(4, 90, (6, 12), generator=torch.Generator().manual_seed(1)).tolist()
    texts = [icu.Text(row, 6, 6, row[:6]) for row in rows]
    memorise(model, texts[:3])
    start, method = copy.deepcopy(model), method_of(name)
    args = args_of("icu", loss=method, lr=5e-3, forget_weight=1.0)
    samples = [icu.Sample(str(i), "", texts[i], texts[i + 3]) for i in range(3)]
    sides = icu.sides_of(samples, None, 0, args)

    def likelihood():
        ids, attention, mask = icu.collate(texts[:3])
        with torch.no_grad():
            return -icu.learn_loss(model(ids, attention_mask=attention).logits, ids, mask).item()

    method.needs.begin(model, args)
    with method.needs.measuring(model):
        before = likelihood()
        assert same_weights(model.state_dict(), start.state_dict())
        frozen = icu.freeze(model, sides, args)
    train(processes.PlainEngine(model, args), sides, args, epochs=range(1, 9), frozen=frozen)
    trained = copy.deepcopy(model.state_dict())
    with method.needs.measuring(model):
        assert likelihood() < before - 0.1
        assert list(model.state_dict()) == list(
            start.state_dict()
        )  # what is exported is the architecture's own
    assert same_weights(model.state_dict(), trained)


# --- the whole loop ---


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The flags of a run of three epochs on five records."""
    return survive.make_inputs(tmp_path_factory.mktemp("examples"))


def run(script, flags, out):
    """A script as a user runs it, from another folder: (exit code, stdout, stderr)."""
    command = [sys.executable, script, *flags, "--out", out]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_a_script(name, flags, tmp_path):
    """It runs to its end, calls its run by its own name, and its model loads with plain transformers."""
    code, _, stderr = run(
        ROOT / "examples" / f"{name}.py", [*flags, "--max-epochs", "1"], tmp_path / "run"
    )
    assert code == 0, stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["method"] == name
    _, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_icu_under_another_name_is_icu(flags, tmp_path):
    """A copy of icu.py, and a file whose method is ICU called mine: the same bytes, defaults and filter included."""
    shutil.copy(ROOT / "icu.py", tmp_path / "mycopy.py")
    own = "@icu.method(**icu.icu.needs._asdict())\ndef mine(batch, args):\n    return icu.icu(batch, args)\n"
    (tmp_path / "mine.py").write_text(f"import icu\n\n\n{own}\n\nicu.main(mine)\n")
    for script in (ROOT / "icu.py", tmp_path / "mycopy.py", tmp_path / "mine.py"):
        code, _, stderr = run(script, flags, tmp_path / script.stem)
        assert code == 0, stderr
    rows = data.read_jsonl(tmp_path / "icu" / "metrics.jsonl")
    assert 0 < rows[-1]["forgotten"]  # the filter was on
    for name in ("mycopy", "mine"):
        config = data.read_json(tmp_path / name / "config.json")
        assert (config["method"], config["alpha"], config["refine"]) == (name, 0.5, True)
        for file in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "icu" / file).read_bytes()


@pytest.mark.parametrize("name", ["task_vector", "lora"])
def test_an_example_goes_on_where_it_was_stopped(name, flags, tmp_path):
    """Stopped while the weights are those to measure, not those that are trained, and resumed: the same bytes."""
    straight, out = tmp_path / "straight", tmp_path / "stopped"
    icu.main(method_of(name), argv=[*flags, "--out", str(straight)])
    measurings = []

    def stop(now):
        if now.what == "beam_generate":
            measurings.append(now)
            if len(measurings) == 3:  # of epoch 2
                raise survive.Killed

    with pytest.raises(survive.Killed), survive.watched(out, stop):
        icu.main(method_of(name), argv=[*flags, "--out", str(out)])
    icu.main(method_of(name), argv=[*flags, "--out", str(out), "--resume"])
    assert survive.difference(out, straight) == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short(name):
    """Under 40 lines, with its paper and a command in its docstring."""
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert (
        text.count("\n") < 40
        and "arXiv:" in text
        and f"bash run.sh tiny --script examples/{name}.py" in text
    )


# --- what a method of one's own may get wrong, and what must hold all the same ---


def test_a_mean_takes_every_shape_at_its_place():
    """(B, T) at the targets, (B, T - 1) at what predicts them, (M,) as they are; any other shape is refused."""
    side = sides_of()["forget"]
    values = torch.rand(side.mask.shape)
    expected = pytest.approx(values[side.mask].mean().item())
    means = [side.mean(x).item() for x in (values, values[:, 1:], values[side.mask])]
    assert means == [expected] * 3
    with pytest.raises(AssertionError):
        side.mean(values[:, 2:])
    with pytest.raises(AssertionError):
        side.mean_rows(values)


def mine(**needs):
    """ICU's loss with other needs."""

    @icu.method(**icu.icu.needs._asdict() | needs)
    def mine(batch, args):
        return icu.icu(batch, args)

    return mine


def redrawn(samples, tokenizer, epoch, args):
    return [[sample.learn if epoch else sample.forget] for sample in samples]


WRONG = {
    "a side misspelt": ({"frozen": ("lern",)}, "must be a tuple of forget, learn"),
    "no tuple": ({"frozen": "learn"}, "must be a tuple"),
    "a layer too far": ({"layer": 9}, "the model has 3 layers"),
    "texts that are no lists": (
        {"sides": {"answer": lambda s, *_: [x.learn for x in s]}},
        "a list of Text for each",
    ),
    "an unknown default": ({"released": {"refin": True}}, "refin.*must be a dict of some of"),
    "other texts each epoch": (
        {"sides": {"answer": redrawn}, "frozen": ("answer",)},
        "--teacher live",
    ),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_needs_that_cannot_be_are_said_before_work(name, flags, tmp_path):
    """A ValueError that names them, with --dry-run too."""
    needs, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        icu.main(mine(**needs), argv=[*flags, "--out", str(tmp_path / "run"), "--dry-run"])


def test_whole_weights_and_zero_3_do_not_go_together(flags, tmp_path):
    """Weights swapped to measure are whole; ZeRO-3 takes them apart."""
    for name in ("lora", "task_vector"):
        with pytest.raises(ValueError, match="--zero 2"):
            icu.main(
                method_of(name), argv=[*flags, "--out", str(tmp_path), "--zero", "3", "--dry-run"]
            )


def test_what_a_method_does_to_the_model_is_not_remembered_for_others(flags, tmp_path, monkeypatch):
    """A method that empties the weights before training measures another model: ICU's start is not its start."""
    monkeypatch.setenv("ICU_CACHE", str(tmp_path / "cache"))

    def empty(model, args):
        for parameter in model.parameters():
            parameter.data.zero_()

    argv = [*flags, "--eval-only", "--out"]
    icu.main(mine(prepare=empty), argv=[*argv, str(tmp_path / "emptied")])
    icu.main(argv=[*argv, str(tmp_path / "icu")])
    ma = [
        data.read_json(tmp_path / name / "summary.json")["before"]["ma"]
        for name in ("emptied", "icu")
    ]
    assert ma[0] < ma[1] - 0.2

    monkeypatch.setattr(icu, "measure", lambda *_, **__: pytest.fail("measured again"))
    icu.main(
        mine(moves=counterfactual.of_mlps), argv=[*argv, str(tmp_path / "mlps")]
    )  # the same weights, fewer move
    assert data.read_json(tmp_path / "mlps" / "summary.json")["before"]["ma"] == ma[1]


def test_a_signal_while_weights_are_swapped_saves_those_that_are_trained(flags, tmp_path):
    """Killed in the middle of the swap: the state holds no mix, and the resumed run ends like the straight one."""
    method, calls = method_of("task_vector"), []
    straight, out = tmp_path / "straight", tmp_path / "stopped"

    def swapping(model):
        swap = method.needs.measured(model)
        next(swap)
        calls.append(1)
        if len(calls) == 3:  # asked of the frozen copy, of epoch 0, of epoch 1
            raise survive.Killed
        yield
        next(swap, None)

    slow = icu.method(**method.needs._asdict() | {"measured": swapping})(lambda *x: method(*x))
    slow.__name__ = "slow"
    calls[:] = [1] * 9
    icu.main(slow, argv=[*flags, "--out", str(straight)])
    calls.clear()
    with pytest.raises(survive.Killed):
        icu.main(slow, argv=[*flags, "--out", str(out)])
    icu.main(slow, argv=[*flags, "--out", str(out), "--resume"])
    assert survive.difference(out, straight) == []


def test_methods_of_one_name_in_two_files_are_two_rows(flags, tmp_path):
    """evals/report.py tells them apart by file and code, and averages nothing but sets and seeds."""
    outs = []
    for name, weight in (("a", 1.0), ("b", 2.0)):
        code = f"import icu\n\nWEIGHT = {weight}\n\n\n@icu.method()\ndef mine(batch, args):\n"
        code += "    forget = batch.forward('forget')\n    values = forget.logits.float().logsumexp(-1)\n"
        code += "    return {'forget': (WEIGHT, forget.mean(values))}\n\n\nicu.main(mine)\n"
        (tmp_path / f"{name}.py").write_text(code)
        outs.append(tmp_path / f"run-{name}")
        code, stdout, stderr = run(tmp_path / f"{name}.py", [*flags, "--max-epochs", "1"], outs[-1])
        assert code == 0 and "WARNING" not in stdout + stderr, (
            stdout + stderr
        )  # no library's word between ours
    code, stdout, stderr = run(ROOT / "evals/report.py", list(map(str, outs)), tmp_path / "report")
    assert code == 0 and stdout.count("| mine method_file=") == 2 and "±" not in stdout, (
        stderr + stdout
    )
