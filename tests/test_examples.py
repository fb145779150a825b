"""examples/: each loss is its formula, moves the right way and runs through the whole loop."""

import copy
import importlib
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_icu import (
    FakeBatch,
    args_of,
    classes_in,
    likelihood,
    loop_logps,
    loss_of,
    memorise,
    some_texts,
    toy_side,
    toy_sides,
    train,
)
from test_readme import PAGES, blocks
from transformers import AutoModelForCausalLM

import baselines
import icu
from evals import report
from examples import counterfactual, repselect, shred
from examples.regrow import redraw
from kit import data, models, processes

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(file.stem for file in (ROOT / "examples").glob("*.py"))


def method_of(name):
    """The method of a file in examples/."""
    return classes_in(importlib.import_module(f"examples.{name}"))[name]()


# --- each loss is its formula ---


def mean(values):
    values = list(values)
    return float(sum(values)) / len(values)


def lowered(frozen, by=10):
    """The frozen copy's logits of each target with that of the token itself lowered."""
    for z, x in zip(frozen.logits.detach().clone(), frozen.ids, strict=True):
        z[x] -= by
        yield z


def test_undial_is_its_formula():
    """0.7 x the mean cross-entropy towards softmax(z_0 - 10 onehot), token by token."""
    sides, frozen = toy_sides()
    frozen["forget"] = frozen["forget"]._replace(ids=sides["forget"].ids)
    targets = zip(lowered(frozen["forget"]), sides["forget"].logits.detach(), strict=True)
    expected = 0.7 * mean(-(z.softmax(0) * own.log_softmax(0)).sum().item() for z, own in targets)
    loss = loss_of(method_of("undial"), sides, frozen).item()
    assert loss == pytest.approx(expected, abs=1e-9)


def test_gentle_is_both_kl_to_undials_target_and_eq_3_and_4_of_a_neighbour():
    """KL[q_t || p] and KL[p || q_t], token by token; both losses of the neighbour."""
    sides, frozen = toy_sides()
    sides["near"], frozen["near"] = sides["learn"], frozen["learn"]
    kls, reverses = [], []
    for z, own in zip(lowered(frozen["forget"]), sides["forget"].logits.detach(), strict=True):
        logq, logp = z.log_softmax(0), own.log_softmax(0)
        kls.append(kl_of(logq, logp))
        reverses.append(kl_of(logp, logq))
    args = args_of(forget_weight=0.3, alpha=2.0, beta=3.0)
    terms = [*method_of("gentle").loss(FakeBatch(sides, frozen), args).values()]
    assert [weight for weight, _ in terms] == [1.0, 0.3, 2.0, 3.0]
    kl = icu.kl_loss(sides["near"], frozen["near"]).item()
    expected = [mean(kls), mean(reverses), -mean(loop_logps(sides["near"])), kl]
    assert [value.item() for _, value in terms] == pytest.approx(expected, abs=1e-9)


def test_gentle_reads_a_neighbour_an_epoch():
    """The first, the second, ..., the first again."""
    text = [icu.Text([n, n], 1, 1, [n]) for n in range(4)]
    samples = [icu.Sample("a", "", text[0], text[1], further=text[2:])]
    read = [method_of("gentle").sides(samples, None, epoch, None)["near"] for epoch in range(4)]
    assert read == [[[text[n]]] for n in (1, 2, 3, 1)]


def test_rmu_is_its_formula():
    """0.7 x |h - c u|^2 on the forget side + 0.5 x |h - h_0|^2 on the learn side."""
    g = torch.Generator().manual_seed(3)
    h, h0 = (torch.randn(6, 5, dtype=torch.float64, generator=g) for _ in range(2))
    sides, frozen = ({"forget": toy_side(hidden=x), "learn": toy_side(hidden=x)} for x in (h, h0))
    u = torch.rand(5, generator=torch.Generator().manual_seed(0))
    steered, moved = ((h - 20 * u / u.norm()) ** 2).mean(), ((h - h0) ** 2).mean()
    loss = loss_of(method_of("rmu"), sides, frozen).item()
    assert loss == pytest.approx(float(0.7 * steered + 0.5 * moved), rel=1e-6)


def test_the_task_vector_descends():
    """What is trained is the likelihood of the text itself."""
    sides, frozen = toy_sides()
    descent = loss_of(method_of("task_vector"), sides, frozen).item()
    assert descent == pytest.approx(-0.7 * mean(loop_logps(sides["forget"])), abs=1e-9)


@pytest.fixture
def two_rows(make_model):
    """(model, samples, its log p of the token after some ids): 1 is BOS, one text is known."""
    model = make_model("llama", dtype=torch.float32)
    rows = torch.randint(4, 90, (4, 9), generator=torch.Generator().manual_seed(1)).tolist()
    texts = [icu.Text([1, *row], 3, 5, [1, *row[:4]]) for row in rows]
    memorise(model, texts[:2], steps=3)  # some tokens are remembered, others not
    samples = [icu.Sample(str(i), "", texts[i], texts[i + 2]) for i in range(2)]

    def log_p(model, ids):
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(0)

    with mock.patch.object(models, "front_of", lambda tokenizer: [1]):
        yield model, samples, log_p


def terms_after(model, samples, method, args):
    """(the terms of a method after the model has moved on, the model before)."""
    sides = icu.sides_of(samples, None, 0, args, method)
    frozen, before = icu.freeze(model, sides, args, method), copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
        batch = icu.Batch(model, sides, [0, 1], frozen=frozen)
        return method.loss(batch, args), before


def kl_of(logq, logp):
    return (logq.exp() * (logq - logp)).sum().item()


@pytest.mark.parametrize("teacher", ["cached", "live"])
@torch.no_grad()
def test_analogous_is_its_formula(teacher, two_rows):
    """KL to what the model says after the neighbour's prompt and the last four tokens, by loops."""
    model, samples, log_p = two_rows
    args = args_of(beta=2.0, teacher=teacher)
    terms, before = terms_after(model, samples, method_of("analogous"), args)
    kls, kept = [], []
    for sample in samples:
        for t in range(3, 10):
            text, learn = sample.forget.ids, sample.learn.ids
            place = sample.learn.prompt + text[max(t - 4, 1) : t]
            kls.append(kl_of(log_p(before, place), log_p(model, text[:t])))
            kept.append(kl_of(log_p(before, learn[:t]), log_p(model, learn[:t])))
    assert [weight for weight, _ in terms.values()] == [0.7, 2.0]
    values = [value.item() for _, value in terms.values()]
    assert values == pytest.approx([mean(kls), mean(kept)], rel=1e-4)


@torch.no_grad()
def test_counterfactual_is_its_formula(two_rows):
    """Jeffreys' divergence from q_t, and the neighbour's suffix in the text's place, by loops."""
    model, samples, log_p = two_rows
    args = args_of(alpha=0.3, beta=2.0)
    terms, before = terms_after(model, samples, method_of("counterfactual"), args)
    both, remembered, swapped = [], [], []
    for sample in samples:
        text, other = sample.forget, sample.learn
        for t in range(3, 10):
            x, logq = text.ids[t], log_p(before, text.ids[:t])
            c = log_p(before, other.prompt + text.ids[max(t - 4, 1) : t])
            remembered.append((logq[x] - c[x]).item() > counterfactual.GAP)
            c[x] -= counterfactual.NEVER
            logq, logp = c.log_softmax(0) if remembered[-1] else logq, log_p(model, text.ids[:t])
            both.append((kl_of(logq, logp) + kl_of(logp, logq)) / 2)
        for t in range(5, 10):
            here = log_p(model, text.prompt + other.ids[5:t])
            swapped.append(kl_of(log_p(before, other.ids[:t]), here))
    assert 0 < sum(remembered) < len(remembered)
    assert [weight for weight, _ in terms.values()] == [0.7, 0.3, 2.0]
    values = [value.item() for _, value in terms.values()]
    assert values[:2] == pytest.approx([mean(both), mean(swapped)], rel=1e-4) and values[2] > 0


@pytest.mark.parametrize("name", sorted({*classes_in(baselines), *EXAMPLES}))
def test_parts_of_a_batch_make_its_step(name, make_model):
    """--micro-batch and --checkpointing: of each method the same terms and gradients, to 1e-6."""
    texts, model = some_texts(10), make_model("gpt_neo")
    method = method_of(name) if name in EXAMPLES else classes_in(baselines)[name]()
    samples = [icu.Sample(str(i), "", texts[i], texts[i + 5], 90) for i in range(5)]
    icu.prepare_model(method, model, None, samples, args := args_of(), None)
    with mock.patch.object(models, "front_of", lambda tokenizer: []):
        sides = icu.sides_of(samples, None, 1, args, method)
    frozen, results = icu.freeze(model, sides, args, method), []
    for parts in ({}, {"micro_batch": 2}, {"micro_batch": 1, "checkpointing": True}):
        args = args_of(**parts)
        engine = processes.make_engine(copy.deepcopy(model), args)
        batch = icu.Batch(engine.model, sides, [3, 0, 4, 1, 2], frozen=frozen, layer=method.layer)
        terms = icu.terms_of(method, batch, args)
        icu.weighted_sum(terms).backward()
        gradients = [p.grad for p in engine.model.parameters() if p.grad is not None]
        results.append([*(value.detach() for _, value in terms.values()), *gradients])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


def one_batch(model, method, args):
    """Three samples, as the method prepares them."""
    texts = some_texts(6)
    samples = [icu.Sample(str(i), "", texts[i], texts[i + 3]) for i in range(3)]
    icu.prepare_model(method, model, None, samples, args, None)
    sides = icu.sides_of(samples, None, 1, args, method)
    return icu.Batch(model, sides, [0, 1, 2], frozen=icu.freeze(model, sides, args, method))


@pytest.mark.parametrize("temperature", [1.0, 2.3])
def test_asu_blurs_the_attention_of_its_teacher(temperature, make_model):
    """At temperature 1 the teacher is the model itself, at a higher one it is not."""
    method, args = method_of("asu"), args_of()
    with mock.patch("examples.asu.TEMPERATURE", temperature):
        loss = method.loss(one_batch(make_model("llama"), method, args), args)
    assert (loss["forget"][1].item() < 1e-12) == (temperature == 1)


def test_shred_demotes_the_surprising_tokens():
    """Each text's own least likely targets."""
    logp = -torch.tensor([1.0, 5, 2, 3, 4, 9, 8, 7, 6, 1])
    chosen = shred.surprising(logp, torch.tensor([0] * 5 + [1] * 5)).nonzero()[:, 0]
    assert chosen.tolist() == [1, 3, 4, 5, 6, 7]


def test_what_texts_share_collapses(make_model):
    """RepSelect's first singular values, the mean and first components of MCU."""
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(2)) + 1
    s = torch.linalg.svdvals(x)
    expected = torch.cat([s[1] ** 2 / s[:2], s[2:]]).sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(repselect.collapse(x)), expected)
    model, method = make_model("llama"), method_of("mcu")
    one_batch(model, method, args_of())
    h = icu.at_targets(model, some_texts(3), method.layer)[3]
    shared = torch.stack([h.mean(0), *torch.linalg.svd(h - h.mean(0)).Vh[:8]])
    assert (shared @ method.minor).abs().max() < 1e-12


def test_mudman_ascends_where_the_signs_agree(make_model):
    """Elsewhere its first step is the neighbours' descent alone."""
    model, method, args = make_model("llama"), method_of("mudman"), args_of(lr=0.1)
    batch = one_batch(model, method, args)
    weights = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in weights]
    loss, forget = icu.weighted_sum(method.loss(batch, args)), batch.forward("forget")
    retain = torch.autograd.grad(loss, weights, retain_graph=True)
    descent = torch.autograd.grad(icu.learn_loss(forget), weights)
    method.backward(loss, batch, args)
    length, norm = map(torch.nn.utils.get_total_norm, (start, descent))
    for i, p in enumerate(weights):
        ascent = descent[i] / norm * (retain[i] * descent[i] < 0)
        step = 0.1 * length * (ascent - 0.1 * retain[i])
        torch.testing.assert_close(p.detach(), start[i] + step)


# --- each moves the right way ---


def same_weights(model, weights):
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_memorised_text_becomes_less_likely(name, make_model):
    """A few steps, then the weights that are measured; those of before come back for training."""
    model, texts, method = make_model("llama", dtype=torch.float32), some_texts(6), method_of(name)
    memorise(model, texts[:3])
    start, args = (
        copy.deepcopy(model),
        args_of(lr=5e-3, forget_weight=1.0),
    )
    samples = [icu.Sample(str(i), "", texts[i], texts[i + 3]) for i in range(3)]
    with mock.patch.object(models, "front_of", lambda tokenizer: []):
        sides = icu.sides_of(samples, None, 0, args, method)
    icu.prepare_model(method, model, None, samples, args, None)
    with icu.weights_to_measure(method, model, args):
        before = likelihood(model, texts[:3])
        same_weights(model, start.state_dict())
        frozen = icu.freeze(model, sides, args, method)
    engine = processes.PlainEngine(model, args)
    train(engine, sides, args, method, epochs=range(1, 9), frozen=frozen)
    trained = copy.deepcopy(model.state_dict())
    with icu.weights_to_measure(method, model, args):
        assert likelihood(model, texts[:3]).mean() < before.mean() - 0.02
        assert list(model.state_dict()) == list(start.state_dict())  # the architecture's own
    same_weights(model, trained)


def test_what_the_neighbours_use_stays(make_model):
    """Weights stay along their inputs' first directions (SVD) alone."""
    model, texts, read = make_model("llama"), some_texts(3), []
    start, random = copy.deepcopy(model.state_dict()), torch.Generator().manual_seed(0)
    module = model.model.layers[-1].mlp.down_proj
    module.register_forward_hook(lambda _, x, out: read.append(x[0][0].detach()))
    redraw(model, texts, 1.0, random)
    torch.testing.assert_close(model.state_dict(), start, rtol=1e-3, atol=1e-5)
    directions, before = torch.linalg.svd(torch.cat(read)).Vh.T, module.weight.clone()
    redraw(model, texts, 0.25, random)
    change, n = (module.weight - before) @ directions, len(directions) // 4
    assert change[:, :n].abs().max() < 1e-3 < 0.01 < change[:, n:].abs().max()
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]) == ("_proj" not in name)


def test_regrow_redraws_in_rounds_and_cools():
    """The shares by epoch; the rate falls, and stays."""
    method, group, rates = method_of("regrow"), {}, []
    method.texts, method.args = [], args_of(lr=24.0, min_epochs=24)
    with mock.patch("examples.regrow.redraw") as drawn:
        for epoch in range(1, 26):
            method.begin_epoch(None, mock.Mock(param_groups=[group]), epoch)
            rates.append(round(group["lr"], 9))
    assert [call.args[2] for call in drawn.mock_calls] == [0.4, 0.2, 0.1, 0.05]
    assert rates == [9.6, *range(23, 0, -1), 1]


# --- the whole loop ---


@pytest.fixture
def run(monkeypatch, capsys):
    """run(script, flags, out) -> (exit code, stdout, stderr) of a script as a user runs it."""

    def start(script, flags, out):
        capsys.readouterr()
        monkeypatch.syspath_prepend(script.parent)
        monkeypatch.delitem(sys.modules, "helper", raising=False)
        monkeypatch.setattr(sys, "argv", list(map(str, [script, *flags, "--out", out])))
        code = 0
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return start


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_a_script(name, run, world, tmp_path):
    """It runs to its end, under its name; its model loads; it is short."""
    script = ROOT / "examples" / f"{name}.py"
    code, _, error = run(script, [*world.flags, "--max-epochs", 1], tmp_path / "run")
    assert code == 0, error
    assert data.read_json(tmp_path / "run" / "summary.json")["method"] == name
    folder = tmp_path / "run" / "model"
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    text = script.read_text()
    assert text.count("\n") < 90 and f"bash run.sh tiny --script examples/{name}.py" in text


def test_icu_under_another_name_is_icu(run, world, tmp_path):
    """A file whose method is ICU called Mine: the same bytes."""
    script, out = tmp_path / "mine.py", tmp_path / "run"
    script.write_text("import icu\n\n\nclass Mine(icu.ICU):\n    pass\n\n\nicu.main(Mine)\n")
    assert run(script, world.flags, out)[0] == 0
    config = data.read_json(out / "config.json")
    assert (config["method"], config["alpha"], config["refine"]) == ("mine", 0.5, True)
    for file in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
        assert (out / file).read_bytes() == (world.run / file).read_bytes()


# --- what a method of one's own may be ---


@pytest.mark.parametrize("parts", [{}, {"micro_batch": 1, "checkpointing": True}])
def test_a_method_may_make_its_own_gradients(parts, make_model):
    """One step by the SAM of docs/library.md goes down the gradient uphill from there, by hand."""
    (code,) = [code for code in blocks(PAGES["library.md"], "python") if "class SAM" in code]
    exec(code, names := {"icu": icu, "__name__": __name__})
    texts, args, method = some_texts(4), args_of(batch_size=4, **parts), names["SAM"]()
    samples = [icu.Sample(str(i), "", texts[i], texts[i + 2]) for i in range(2)]
    model = make_model("gpt_neo", dtype=torch.float64)
    sides = icu.sides_of(samples, None, 1, args, method)
    frozen = icu.freeze(model, sides, args, method)

    def gradient(model):
        loss = method.loss(icu.Batch(model, sides, [0, 1], frozen=frozen), args)
        return torch.autograd.grad(icu.weighted_sum(loss), list(model.parameters()))

    uphill, first = copy.deepcopy(model), gradient(model)
    norm = torch.cat([g.flatten() for g in first]).norm()
    for p, g in zip(uphill.parameters(), first, strict=True):
        p.data += 0.05 * g / norm
    steps = zip(model.parameters(), gradient(uphill), strict=True)
    expected = [p.detach() - 0.1 * g for p, g in steps]
    engine = processes.make_engine(model, args)
    engine.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(engine, sides, args, method, epochs=[1], frozen=frozen)
    torch.testing.assert_close([p.data for p in model.parameters()], expected)
    with pytest.raises(ValueError, match="gradients"):
        processes.check_flags(args_of(zero=2, offload=True, dry_run=True), method)


class Own(icu.ICU):
    """A helper model that is trained before the loop, a moving average, and a measure."""

    trained, epochs = 0, 0

    def begin_epoch(self, model, optimizer, epoch):
        self.epochs = epoch

    def prepare(self, model, tokenizer, samples, args, folder):
        self.average = torch.zeros(())
        if not folder.is_dir():
            Own.trained += 1
            folder.mkdir()

    def loss(self, batch, args):
        terms = super().loss(batch, args)
        self.average = 0.5 * self.average + 0.5 * terms["forget"][1].detach()
        return terms

    def own_measures(self, model, tokenizer, samples, args):
        return {"average": float(self.average), "epochs": self.epochs}

    def state(self):
        return {"average": self.average}

    def load_state(self, tensors):
        self.average = tensors["average"]


def test_a_methods_own_state_and_measures(world, tmp_path, monkeypatch):
    """A killed run goes on with its moving average and its helper; a measure is a column."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    icu.main(Own, argv=[*world.flags, "--out", str(straight)])
    rows = data.read_jsonl(straight / "metrics.jsonl")
    assert [row["own_epochs"] for row in rows] == [row["epoch"] for row in rows]
    assert rows[0]["own_average"] == 0 and rows[1]["own_average"] != rows[2]["own_average"] != 0
    assert "own_average" in data.read_json(straight / "summary.json")["after"]
    train_epoch = icu.train_epoch

    def killed_in_epoch_2(*args, run, **rest):
        if run.progress.epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(*args, run=run, **rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(icu, "train_epoch", killed_in_epoch_2)
        icu.main(Own, argv=[*world.flags, "--out", str(killed)])
    icu.main(Own, argv=[*world.flags, "--out", str(killed), "--resume"])
    with pytest.raises(ValueError, match="--micro-batch"):  # its loss would run twice a step
        icu.main(Own, argv=[*world.flags, "--out", str(killed), "--micro-batch", "1"])
    assert data.read_jsonl(killed / "metrics.jsonl") == rows and Own.trained == 2


def test_a_slip_shows_before_the_measuring(run, world, tmp_path, capsys):
    """The loss runs on one batch first: a traceback into the user's file."""
    script = tmp_path / "mine.py"
    code = "import icu\nclass Mine(icu.Method):\n    def loss(self, batch, args):\n"
    code += "        return {'forget': (1.0, batch.forward('forget').logits.sum(9))}\n"
    script.write_text(code + "icu.main(Mine)")
    with pytest.raises(IndexError) as slip:
        run(script, world.flags, tmp_path / "run")
    assert (str(script), 3) in [(str(entry.path), entry.lineno) for entry in slip.traceback]
    assert "epoch active" not in capsys.readouterr().out


def test_a_changed_helper_is_another_method(run, world, tmp_path, capsys):
    """What a method's file imports counts: --resume refuses it; two rows."""
    script, flags, outs = tmp_path / "mine.py", [*world.flags, "--max-epochs", 1], []
    code = "import icu\nimport helper\nclass Mine(icu.Method):\n    def loss(self, batch, args):\n"
    script.write_text(code + "        return helper.terms(batch)\nicu.main(Mine)\n")
    for weight in (1.0, 2.0):
        terms = "def terms(batch):\n    forget = batch.forward('forget')\n"
        terms += f"    return {{'forget': ({weight}, forget.mean(forget.logits.logsumexp(-1)))}}\n"
        (tmp_path / "helper.py").write_text(terms)
        outs.append(str(tmp_path / f"run-{weight}"))
        done = run(script, flags, outs[-1])
        assert done[0] == 0 and "WARNING" not in "".join(done[1:])
    code, _, error = run(script, [*flags, "--resume"], outs[0])
    assert code == 2 and "method" in error
    report.main([*outs, "--out", str(tmp_path / "report")])
    table = capsys.readouterr().out
    assert table.count("| mine method_file=") == 2 and "±" not in table


def test_what_a_method_cannot_be(world, tmp_path):
    """Nothing to train; weights that are swapped under ZeRO-3; a slip in its terms."""
    method, model = method_of("counterfactual"), torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="trains no weight of this model"):
        icu.prepare_model(method, model, None, [], args_of(), None)
    argv = [*world.flags, "--out", str(tmp_path / "run")]
    for name in ("lora", "task_vector"):
        with pytest.raises(ValueError, match="--zero 2"):
            icu.main(type(method_of(name)), argv=[*argv, "--zero", "3", "--dry-run"])
    slips = {  # no single number; a side not in frozen_sides
        "term 'forget'": lambda _, batch, args: {"forget": (1.0, batch.forward("forget").logp)},
        "frozen..learn": lambda _, batch, args: {"kl": (1.0, batch.frozen("learn").logits.sum())},
    }
    for message, loss in slips.items():
        with pytest.raises(ValueError, match=message):
            icu.main(type("Slip", (icu.Method,), {"loss": loss}), argv=argv)
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_a_method_does_to_the_model_is_not_remembered_for_others(world, tmp_path):
    """One that empties the weights measures another model than ICU."""

    class Empty(icu.ICU):
        def prepare(self, model, *_):
            for parameter in model.parameters():
                parameter.data.mul_(1e-3)

    icu.main(Empty, argv=[*world.flags, "--max-epochs", "1", "--out", str(tmp_path / "run")])
    runs = tmp_path / "run", world.run
    emptied, start = (data.read_json(run / "summary.json")["before"]["ma"] for run in runs)
    assert emptied < start - 0.2
