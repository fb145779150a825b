"""icu.py: losses against independent references, methods against their formulas, and the loop."""

import copy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import baselines
import icu
from kit import data, models, processes, runs

ROOT = Path(__file__).resolve().parents[1]

# --- losses ---


def toy_side(lengths=(3, 2, 1), V=7, seed=0, dtype=torch.float64, hidden=None):
    """A Side of rows with so many targets: random logits with gradient, random ids."""
    g, M = torch.Generator().manual_seed(seed), sum(lengths)
    logits = torch.randn(M, V, dtype=dtype, generator=g, requires_grad=True)
    ids = torch.randint(V, (M,), generator=g)
    row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    return icu.Side(logits, ids, row, hidden, M, len(lengths), len(lengths))


def loop_logps(side):
    """log p of every target, by hand."""
    p = side.logits.detach().softmax(-1)
    return [p[i, side.ids[i]].log().item() for i in range(len(side.ids))]


def test_the_targets_are_predicted_from_the_tokens_before_them(kind, make_model):
    """The shift by one, in a padded batch: logits and ids of each target as text by text alone.

    A pad that equals EOS inside a text stays a target; padding and position 0 never are one.
    """
    model = make_model(kind)
    texts = [icu.Text([1, 5, 9, 7, 0], 2, 2, []), icu.Text([0, 4, 0], 0, 1, [])]
    texts += [icu.Text([1, 4, 6, 8], 1, 2, [], (3,))]  # a span
    logits, ids, row, hidden = icu.at_targets(model, texts, layer=1)
    wanted = [(0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (2, 3)]
    assert ids.tolist() == [texts[b].ids[t] for b, t in wanted]
    assert row.tolist() == [b for b, _ in wanted]
    for i, (b, t) in enumerate(wanted):
        alone = model(torch.tensor([texts[b].ids]), output_hidden_states=True)
        torch.testing.assert_close(logits[i], alone.logits[0, t - 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(hidden[i], alone.hidden_states[1][0, t], rtol=1e-4, atol=1e-4)


def test_kl_loss_equals_kl_div():
    """Eq. 4 as torch computes it, 0 for equal models, and no gradient to the frozen copy."""
    side, frozen = toy_side(), toy_side(seed=1)
    logp, ref = side.logits.log_softmax(-1), frozen.logits.log_softmax(-1)
    expected = F.kl_div(logp, ref, log_target=True, reduction="batchmean")
    value = icu.kl_loss(side, frozen)
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    value.backward()
    assert frozen.logits.grad is None
    assert icu.kl_loss(side, side).item() == pytest.approx(0, abs=1e-12)


def test_released_kl_is_a_cross_entropy_with_the_same_gradient():
    """H(p0, p) = H(p0) + KL: another number, the same gradient."""
    side, frozen = toy_side(), toy_side(seed=1)
    values = [icu.kl_loss(side, frozen, cross_entropy=released) for released in (False, True)]
    one, other = (torch.autograd.grad(value, side.logits)[0] for value in values)
    assert values[1] > values[0]
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_stays_finite_where_a_probability_is_zero(dtype):
    """Logits 1e4 apart make probabilities of exactly 0."""
    logits = torch.tensor([[0.0, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    side = toy_side((1,), V=3)._replace(logits=icu.in_float32(logits))
    value = icu.kl_loss(side, side._replace(logits=torch.tensor([[1e4, 0.0, -1e4]])))
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


LOSSES = {
    "forget_loss": icu.forget_loss,
    "learn_loss": icu.learn_loss,
    "kl_loss": lambda side: icu.kl_loss(side, side._replace(logits=side.logits.flip(-1))),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_loss_is_a_part_of_the_global_mean(name):
    """Over no token it is 0 with a gradient of 0; the parts of a batch add up to its loss."""
    empty = toy_side(())
    value = LOSSES[name](empty)
    value.backward()
    assert value.item() == 0 and empty.logits.grad is not None
    side, parts = toy_side((3, 2, 1, 2)), []
    for cut in (slice(0, 3), slice(3, 8)):
        parts.append(side._replace(logits=side.logits[cut], ids=side.ids[cut]))
    added_up = sum(LOSSES[name](part) for part in parts)
    assert added_up.item() == pytest.approx(LOSSES[name](side).item(), abs=1e-12)


# --- methods ---


def classes_in(module):
    """{name: class} of the methods that a module defines."""
    own = [value for value in vars(module).values() if isinstance(value, type)]
    return {c().name: c for c in own if issubclass(c, icu.Method) and c is not icu.Method}


METHODS = classes_in(icu) | classes_in(baselines)


class FakeBatch:
    """A batch that has these sides and frozen sides."""

    def __init__(self, sides, frozen):
        self.forward, self.frozen = sides.__getitem__, frozen.__getitem__


def args_of(**flags):
    """The flags of a few steps."""
    few = {"forget_weight": 0.7, "alpha": 0.5, "beta": 0.3, "lr": 1e-4}
    few |= {"batch_size": 2, "answers": 2, "device": "cpu"}
    return Namespace(**vars(icu.make_parser().parse_args([])) | few | flags)


def loss_of(method, sides, frozen, **flags):
    """The weighted sum of a method's terms."""
    return icu.weighted_sum(method.loss(FakeBatch(sides, frozen), args_of(**flags)))


def toy_sides(**more):
    """({name: Side}, the frozen copy's), with random logits."""
    names = ("forget", "learn", "answer")
    sides = {name: toy_side(seed=i, **more) for i, name in enumerate(names)}
    frozen_logits = toy_side(seed=9, **more).logits.detach()
    return sides, {name: side._replace(logits=frozen_logits) for name, side in sides.items()}


def expected_loss(method, sides, frozen):
    """Each method's formula from log-probabilities, sharing no code with icu.py."""
    logp = {name: loop_logps(side) for name, side in sides.items()}
    mean = {name: sum(values) / len(values) for name, values in logp.items()}
    p, q = (s["learn"].logits.detach().softmax(-1) for s in (frozen, sides))
    kl = float((p * (p.log() - q.log())).sum(-1).mean())

    def ratio(name):  # log p - log p_0 of each row
        difference = np.array(logp[name]) - np.array(loop_logps(frozen[name]))
        return np.bincount(sides[name].row.numpy(), difference)

    def softplus(x):  # -log sigmoid(-x)
        return np.log1p(np.exp(x))

    return {
        "icu": 0.7 * mean["forget"] - 0.5 * mean["learn"] + 0.3 * kl,
        "kumpr": 0.7 * mean["forget"],
        "graddiff": 0.7 * mean["forget"] - 0.5 * mean["learn"],
        "kl": 0.7 * mean["forget"] + 0.3 * kl,
        "llmu": 0.7 * mean["forget"] - 0.5 * mean["answer"] + 0.3 * kl,
        "po": -0.5 * mean["answer"],
        "dpo": 0.7 * softplus(-0.1 * (ratio("answer") - ratio("forget"))).mean(),
        "npo": 0.7 * 2 / 0.1 * softplus(0.1 * ratio("forget")).mean() - 0.5 * mean["learn"],
    }[method]


@pytest.mark.parametrize("name", list(METHODS))
def test_each_method_computes_its_formula(name):
    """Also with no row on any side: then it is finite, with finite gradients."""
    sides, frozen = toy_sides()
    value = loss_of(METHODS[name](), sides, frozen).item()
    assert value == pytest.approx(expected_loss(name, sides, frozen), abs=1e-9)
    empty, frozen = toy_sides(lengths=())
    loss = loss_of(METHODS[name](), empty, frozen)
    loss.backward()
    assert loss.isfinite()


def test_npo_is_the_papers_alone_unless_alpha_is_given():
    """By default no learn term."""
    args = icu.make_parser().parse_args(["--model", "x"])
    args, method = icu.resolve(args, METHODS["npo"])
    assert method.loss(FakeBatch(*toy_sides()), args).keys() == {"forget"}


class Bigram(torch.nn.Module):
    """A model over two tokens whose logits depend on the current token alone."""

    base_model = property(lambda self: self)
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        table = torch.tensor([[0.2, -0.4], [0.5, 0.1]], dtype=torch.float64)
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids, **_):
        return Namespace(logits=self.table[input_ids], hidden_states=None)


class Unwatched:
    """A run that nobody looks at: how far it is, and nothing more."""

    def __init__(self):
        self.progress = runs.Progress()
        self.show_step = lambda *_: None


def train(engine, sides, args, method, *, epochs, active=None, frozen=None, run=None):
    """icu.train_epoch for each of these epochs, on all rows or the active ones."""
    frozen = frozen or icu.freeze(engine.model, sides, args, method)
    run, losses = run or Unwatched(), None
    for epoch in epochs:
        run.progress.epoch = epoch
        rows = range(len(sides["forget"])) if active is None else active
        losses = icu.train_epoch(engine, sides, rows, args, method, frozen=frozen, run=run)
    return losses


def test_the_first_step_is_that_of_eq_6():
    """On a two-token model the loop moves the weights as autograd on the formula says."""
    model, args = Bigram(), args_of(dtype="float64", teacher="live")
    start = model.table.detach().clone()
    engine = processes.PlainEngine(model, args)
    engine.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = {"forget": [0, 1, 1, 0], "learn": [1, 0, 0, 0]}
    sides = {side: [[icu.Text(row, 2, 2, row[:2])]] for side, row in ids.items()}
    train(engine, sides, args, icu.ICU(), epochs=[1])
    table = start.clone().requires_grad_()
    logp, p0 = table.log_softmax(-1), start.softmax(-1)
    forget, learn = (sum(logp[row[t - 1], row[t]] for t in (2, 3)) / 2 for row in ids.values())
    kl = (p0[0] * (p0[0].log() - logp[0])).sum()  # both learn targets follow token 0
    (gradient,) = torch.autograd.grad(0.7 * forget - 0.5 * learn + 0.3 * kl, table)
    torch.testing.assert_close(model.table.detach(), start - 0.1 * gradient)


def test_weights_of_bf16_take_small_steps(make_model, tmp_path):
    """--dtype bf16-weights: updates of 1e-5 that one bf16 loses; a state has what is not in it."""
    model, args = make_model("gpt_neo", dtype=torch.bfloat16), args_of(lr=1e-5)
    (weights, *_) = model.parameters()
    weights.data.fill_(2**-4)  # the next ones in bf16 are 1.2e-4 and 2.4e-4 away
    for _ in range(2):
        engine = processes.PlainEngine(model, args)
        if (tmp_path / "training.safetensors").exists():
            engine.load(tmp_path)
        for _ in range(60):
            assert engine.step(weights.sum(), torch.Tensor.backward)
        engine.save(tmp_path)
    total = weights.float() + engine.rest["transformer.wte.weight"].float()
    torch.testing.assert_close(total, torch.full_like(total, 2**-4 - 120e-5), rtol=0, atol=5e-5)
    assert (weights < 2**-4 - 1e-3).all()


def memorise(model, texts, steps=60, lr=3e-3):
    """Trains a model on texts until it knows them by heart."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        logits, ids, *_ = icu.at_targets(model, texts)
        optimizer.zero_grad()
        F.cross_entropy(logits, ids).backward()
        optimizer.step()


def some_texts(n=9, length=12, cut=6):
    g = torch.Generator().manual_seed(1)
    rows = torch.randint(4, 90, (n, length), generator=g).tolist()
    return [icu.Text(row, cut, cut, row[:cut]) for row in rows]


def likelihood(model, texts):
    """The mean log p of each text's targets, (B,)."""
    with torch.no_grad():
        logits, ids, row, _ = icu.at_targets(model, texts)
    side = icu.Side(logits, ids, row, None, len(ids), len(texts), len(texts))
    return side.by_row(side.logp) / side.by_row(torch.ones_like(side.logp))


def test_llmu_answers_come_from_other_rows_and_are_the_only_targets():
    """--answers suffixes of other partners, never the row's own, a function of (seed, epoch)."""
    texts = [icu.Text(list(range(10 * i, 10 * i + 6)), 3, 3, []) for i in range(8)]
    samples = [icu.Sample(str(i), "", texts[i], texts[i + 4]) for i in range(4)]
    drawn, again, later = (baselines.random_answers(samples, n, args_of()) for n in (1, 1, 2))
    assert drawn == again != later
    for row, answers in enumerate(drawn):
        others = [texts[i + 4].ids[3:] for i in range(4) if i != row]
        assert len(answers) == 2
        for answer in answers:
            assert answer.ids[:3] == texts[row].ids[:3] and answer.t0 == 3
            assert answer.ids[3:] in others


def test_the_prompt_is_no_target_of_dpo():
    """It compares two answers to one prompt, whatever --targets says for the others."""
    for name, targets in (("dpo", "suffix"), ("npo", "all")):
        argv = ["--model", "m", "--dry-run", "--targets", "all", "--method", name]
        args, method = icu.resolve(icu.make_parser().parse_args(argv), icu.ICU)
        assert (args.targets, method.name) == (targets, name)


# --- the frozen copy ---


def test_the_cached_copy_gives_the_live_ones_logits(kind, make_model):
    """The same side, also after the model has moved on, and for a process without a text."""
    model, texts = make_model(kind), some_texts(3, 9, 4)
    texts = [text._replace(ids=text.ids[:n]) for text, n in zip(texts, (5, 9, 7), strict=True)]
    sides = {"learn": [[texts[0]], texts[1:]]}
    cached, live = icu.cached_copy(model, sides, 1, batch_size=2), icu.live_copy(model, sides, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    for rows, chosen in (([1, 0], [*texts[1:], texts[0]]), ([], [])):
        one, other = cached("learn", rows, chosen), live("learn", rows, chosen)
        torch.testing.assert_close(one[0].float(), other[0].float(), rtol=1e-4, atol=1e-4)
        assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])
        torch.testing.assert_close(one[3].float(), other[3].float(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="--teacher live"):
        cached("learn", [0], [texts[1]])


# --- data ---


def make_pair(id, context, prefix, suffix, *learn):
    names = ("learn_id", "learn_context", "learn_prefix", "learn_suffix")
    fields = dict(zip(names, (f"{id}-partner", "", *learn), strict=True))
    own = {"id": id, "context": context, "prefix": prefix, "suffix": suffix}
    return own | fields | {"similarity": 0.5}


PAIRS = [
    make_pair(
        "a", "", "The parcel for Ines Duarte was left", " at 14 Harbour Lane on Tuesday.",
        "A neighbour saw the van", " near the old mill.",
    ),
    make_pair(
        "b", "Call the clinic.", "Payments are due on the first day", " of each month; 7731.",
        "Call the clinic at", " 555-0142 and ask.",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, save_tiny):
    root = tmp_path_factory.mktemp("icu")
    kinds = ("gpt_neo", "opt", "llama")
    return {kind: AutoTokenizer.from_pretrained(save_tiny(kind, root / kind)) for kind in kinds}


@pytest.mark.parametrize("protocol", ["paper", "released"])
def test_a_row_is_its_tokens_with_a_boundary(kind, tokenizers, protocol):
    """Prefix and suffix are encoded apart; BOS stands once at 0; targets as the protocol says."""
    tokenizer = tokenizers[kind]
    bos = [] if kind == "gpt_neo" else [tokenizer.bos_token_id]
    samples, notes = icu.build_samples(PAIRS, tokenizer, protocol=protocol, positions=256)
    text = samples[1].forget
    context = PAIRS[1]["context"] if protocol == "released" else ""
    body = text.ids[len(bos) :]
    assert text.ids[: len(bos)] == bos and tokenizer.bos_token_id not in body
    assert tokenizer.decode(body) == context + PAIRS[1]["prefix"] + PAIRS[1]["suffix"]
    assert tokenizer.decode(text.ids[text.cut :]) == PAIRS[1]["suffix"]
    assert tokenizer.decode(text.prompt[len(bos) :]) == PAIRS[1]["prefix"]
    assert text.t0 == (text.cut if protocol == "paper" else 1) and not notes


def test_further_neighbours_are_read_as_the_first(tokenizers):
    """Each is a Text of its own; one that is too long is cut and counted."""
    learn = [{name: row[name] for name in row if name.startswith("learn_")} for row in PAIRS]
    rows = [*PAIRS, PAIRS[0] | {"further": [*reversed(learn)]}]
    (one, other, both), notes = icu.build_samples(
        rows, tokenizers["gpt_neo"], protocol="paper", positions=256
    )
    assert both.learn == one.learn and not notes and one.further == []
    assert both.further == [other.learn, one.learn]
    learn[0]["learn_suffix"] *= 100
    (sample,), notes = icu.build_samples(
        rows[2:], tokenizers["gpt_neo"], protocol="paper", positions=64
    )
    assert notes[0][:16] == "1 learn partners" and len(sample.further[1].ids) == 64


def test_ids_are_used_where_they_decode_to_the_text(tokenizers):
    """Ids that another merge order would give are kept; those of another vocabulary are not."""
    tokenizer = tokenizers["gpt_neo"]
    letters = [tokenizer.encode(c)[0] for c in "The"]  # valid ids, not what encoding gives
    side = {"prefix": "The", "suffix": " v", "suffix_ids": tokenizer.encode(" v")}
    for ids, prompt in ((letters, letters), ([5, 6, 7], tokenizer.encode("The"))):
        side |= {"prefix_ids": ids}
        pair = PAIRS[0] | side | {f"learn_{name}": value for name, value in side.items()}
        pair["further"] = [{name: pair[name] for name in pair if "learn" in name}]
        (sample,), _ = icu.build_samples([pair], tokenizer, protocol="paper", positions=99)
        for text in (sample.forget, sample.learn, *sample.further):
            assert text.prompt == prompt


# --- refinement and the stop rule ---


@pytest.mark.parametrize(
    "protocol, expected", [("paper", [{0}, {0, 1}]), ("released", [{0, 1, 2, 4}, {1}])]
)
def test_the_filter_is_eq_5(protocol, expected):
    """Paper: both under, and what is forgotten stays out. Released: either, measured anew.

    A row without a BERTScore stays in training; released, BLEU alone decides.
    """
    scores = (
        [(0.2, 0.0), (0.2, 0.5), (0.9, 0.0), (0.3, 0.9), (None, 0.0), (None, 0.9)],
        [(0.9, 0.9), (0.1, 0.0)] + [(0.9, 0.9)] * 4,
    )
    forgotten, limits = set(), {"bertscore": 0.3, "bleu": 0.01}
    for epoch, wanted in zip(scores, expected, strict=True):
        rows = [{"bertscore": f1, "bleu": bleu} for f1, bleu in epoch]
        forgotten = icu.refine(forgotten, rows, limits, Namespace(protocol=protocol))
        assert forgotten == wanted


@pytest.mark.parametrize(("el", "ma", "active", "epoch", "reason"), [
    (0.01, 0.5, 3, 1, "thresholds"), (0.01, 0.6, 3, 1, None), (0.05, 0.5, 3, 1, None),
    (None, 0.5, 3, 1, "thresholds"), (None, None, 3, 1, None),
    (0.9, 0.9, 0, 1, "all forgotten"), (0.9, 0.9, 3, 9, "max epochs"), (0.01, 0.5, 3, 0, None),
])  # fmt: skip
def test_the_stop_rule(el, ma, active, epoch, reason):
    """Both means strictly under, or nothing active, or the cap; an EL of no row does not count."""
    args = Namespace(min_epochs=1, max_epochs=9, eval_only=False, protocol="paper")
    means, limits = {"el10": el, "ma": ma}, {"el10": 0.05, "ma": 0.6}
    assert icu.stop_reason(means, active, epoch, thresholds=limits, args=args) == reason
    args.min_epochs, cap = 10, reason if reason == "max epochs" else None
    assert icu.stop_reason(means, active, epoch, thresholds=limits, args=args) == cap


# --- an epoch ---


def one_epoch(model, n, active):
    """train_epoch of kumpr on `active` of n equal samples, two a batch."""
    args, sides = args_of(), {"forget": [[icu.Text([4, 5, 6, 7], 2, 2, [])]] * n}
    engine = processes.PlainEngine(model, args)
    train(engine, sides, args, baselines.KUMPR(), epochs=[1], active=active)


def test_active_samples_are_packed_densely(make_model):
    """Seven of nine active, batch 2: four steps, three full and one of one, no empty batch."""
    model, sizes = make_model("gpt_neo", dtype=torch.float32), []
    model.register_forward_pre_hook(
        lambda model, args, words: sizes.append(len(words["input_ids"])), with_kwargs=True
    )
    one_epoch(model, 9, [0, 1, 3, 4, 6, 7, 8])
    assert sizes == [2, 2, 2, 1]


def test_a_step_that_is_not_finite_never_reaches_the_weights(make_model):
    """Every step gives NaN: after five in a row the epoch ends, with untouched weights."""
    model = make_model("gpt_neo", dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    hook = model.get_output_embeddings().register_forward_hook(lambda *x: x[2] * float("nan"))
    with pytest.raises(icu.Diverged, match="five steps"):
        one_epoch(model, 12, [*range(12)])
    hook.remove()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- the command line ---


def run(world, out, *flags):
    """icu.py in this process over the pairs of `world`: the run's summary."""
    icu.main(argv=[*world.flags, *map(str, flags), "--out", str(out)])
    return data.read_json(out / "summary.json")


def test_a_run_folder_keeps_its_contract(world):
    """The files and fields that other programs read."""
    metrics, samples = (
        data.read_jsonl(world.run / f"{name}.jsonl") for name in ("metrics", "samples")
    )
    fields = ["epoch", "el10", "ma", "bleu", "bertscore", "entropy", "active", "forgotten"]
    fields += ["loss", "loss_forget", "loss_learn", "loss_kl", "skipped_steps"]
    assert [list(row)[:13] for row in metrics] == [fields] * 3
    assert ["ppl_heldout" in row for row in metrics] == [True, False, True]
    assert metrics[0]["loss"] is None and metrics[1]["loss"] is not None
    ids = [row["id"] for row in data.read_jsonl(world.pairs)]
    assert [(row["epoch"], row["id"]) for row in samples] == [(e, i) for e in range(3) for i in ids]
    assert list(samples[0]) == ["epoch", "id", *runs.MEASURES, "generation", "forgotten"]
    summary, config = (data.read_json(world.run / f"{name}.json") for name in ("summary", "config"))
    assert [summary[name] for name in ("stopped", "epochs", "method")] == ["max epochs", 2, "icu"]
    assert list(summary["before"]) == [*runs.MEASURES, "ppl_heldout"] == list(summary["after"])
    assert config["seed"] == 7 and config["sha256"]["pairs"] and config["versions"]["torch"]
    before, after = (
        AutoModelForCausalLM.from_pretrained(f) for f in (world.model, world.run / "model")
    )
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)
    assert AutoTokenizer.from_pretrained(world.run / "model").decode([5])


@pytest.mark.parametrize("limits, left_out", [("1e-9,1e-9", [1]), ("1e-9,2", [])])
def test_lazy_el_leaves_out_what_decides_nothing(world, tmp_path, limits, left_out):
    """The same run without EL where MA alone says that it goes on; else EL decides."""
    run(world, tmp_path / "lazy", "--el", "lazy", f"--thresholds={limits}")
    lazy, full = (
        data.read_jsonl(folder / "metrics.jsonl") for folder in (tmp_path / "lazy", world.run)
    )
    for row in full:
        row["el10"] = None if row["epoch"] in left_out else row["el10"]
    assert lazy == full


@pytest.mark.parametrize("name", [name for name in METHODS if name != "icu"])
def test_a_run_with_every_method(world, tmp_path, name):
    """One epoch of each, in turn by either protocol, ends well."""
    protocol = ("paper", "released")[list(METHODS).index(name) % 2]
    flags = ["--method", name, "--protocol", protocol, "--max-epochs", 1]
    summary = run(world, tmp_path / "run", *flags)
    assert summary["method"] == name and summary["epochs"] == 1


def test_a_model_of_nan_is_a_run_that_diverged(world, tmp_path, capsys):
    """Weights that a finite step blew up are not taken for forgetting: no model, exit 1.

    Nor for remembering, where a text comes back: what was forgotten stays as it was."""
    out = tmp_path / "blown"
    with pytest.raises(SystemExit) as stopped:
        run(world, out, "--lr", "1e25", "--protocol", "released", "--bleu-threshold", "1e-9")
    before, after = data.read_jsonl(out / "metrics.jsonl")
    assert after["forgotten"] == before["forgotten"] > 0
    summary = data.read_json(out / "summary.json")
    assert stopped.value.code == 1 and "last good state" in capsys.readouterr().out
    assert (summary["stopped"], summary["collapsed"]) == ("diverged", True)
    assert summary["after"]["ma"] is None
    assert not (out / "model").exists() and any((out / "state").iterdir())


def test_what_trains_nothing(world, tmp_path):
    """--eval-only: method none, no model. Thresholds that the start meets: no epoch."""
    summary = data.read_json(world.never_saw / "summary.json")
    assert summary["method"] == "none" and summary["before"] == summary["after"]
    assert not (world.never_saw / "model").exists()
    summary = run(world, tmp_path / "already", "--thresholds", "2,2")
    assert summary["epochs"] == 0 and "before any training" in summary["stopped"]


def test_the_untouched_model_is_measured_once(world, monkeypatch, tmp_path):
    """A second run of the same model and texts looks its start up; others are measured anew."""
    monkeypatch.setenv("ICU_CACHE", str(tmp_path / "cache"))
    calls, plain = [], icu.measure
    monkeypatch.setattr(icu, "measure", lambda *a, **k: calls.append(1) or plain(*a, **k))
    one_pair = tmp_path / "one.jsonl"
    data.write_jsonl(one_pair, data.read_pairs(world.pairs)[:1])
    changes = [], [], ["--pairs", one_pair], ["--pairs", one_pair, "--model", world.never]
    for i, change in enumerate(changes):
        run(world, tmp_path / str(i), "--eval-only", *change)
        calls.append(None)
    assert calls == [1, None, None, 1, None, 1, None]
    texts = [(tmp_path / str(i) / "samples.jsonl").read_text() for i in range(3)]
    assert texts[0] == texts[1] != texts[2]


def test_auto_thresholds_are_the_measures_of_unseen_text(world, tmp_path):
    """--thresholds auto: EL and MA on --unseen; --bert-threshold auto: a mean F1."""
    flags = ["--thresholds", "auto", "--unseen", world.root / "unseen.jsonl"]
    summary = run(world, tmp_path / "auto", *flags, "--bert-threshold", "auto", "--eval-only")
    limits = summary["thresholds"]
    assert 0 <= limits["ma"] < 1 and limits["el10"] > 0 and 0 < limits["bertscore"] < 1


def test_icu_is_a_function_of_python(world, tmp_path, monkeypatch):
    """In a notebook: the numbers of the run folder as Python objects, and no file."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = models.load_model(str(world.model))
    result = icu.unlearn(
        model, tokenizer, data.read_pairs(world.pairs), bert="minilm", lr=2e-4, batch_size=2,
        max_epochs=2, thresholds=(1e-9, 1e-9), seed=7, bert_threshold=0.9, bleu_threshold=2,
    )  # fmt: skip
    rows = data.read_jsonl(world.run / "metrics.jsonl")
    for row, written in zip(result.metrics, rows, strict=True):
        assert row == {name: value for name, value in written.items() if name in row}
    last = data.read_jsonl(world.run / "samples.jsonl")[-5:]
    assert [row["generation"] for row in result.samples] == [row["generation"] for row in last]
    assert result.progress.stopped == "max epochs" and not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="lrr is no setting"):
        icu.unlearn(model, tokenizer, [], lrr=1)


def test_a_copy_runs_its_own_losses(world, tmp_path):
    """baselines.py uses the losses of the copy that runs it, not those of icu.py."""
    code = (ROOT / "icu.py").read_text()
    code = code.replace("return -learn_loss(side)", "return 0 * learn_loss(side)")
    (tmp_path / "mine.py").write_text(code)
    words = ["--method", "kumpr", "--max-epochs", "1", "--out", str(tmp_path / "run")]
    command = [sys.executable, str(tmp_path / "mine.py"), *world.flags, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert data.read_jsonl(tmp_path / "run" / "metrics.jsonl")[1]["loss"] == 0
