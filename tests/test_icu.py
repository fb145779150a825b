"""icu.py: losses against independent references, methods against their formulas, the loop, and the command line.

python -m pytest tests/test_icu.py -q
"""

import copy
import json
import os
import shutil
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
from dev import bench
from kit import data, models, processes, runs

ROOT = Path(__file__).resolve().parents[1]

# --- losses ---


def toy(B=3, T=6, V=7, dtype=torch.float64, seed=0):
    """Random logits (B, T, V) with gradient, ids (B, T) and a target mask with a different length a row."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, dtype=dtype, generator=g, requires_grad=True)
    ids = torch.randint(V, (B, T), generator=g)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for b in range(B):
        mask[b, 2 : T - b] = True
    return logits, ids, mask


def loop_logps(logits, ids, mask):
    """The log-probability of every target, by hand: token t from the logits at t - 1."""
    p = torch.softmax(logits.detach(), -1)
    return [float(p[b, t - 1, ids[b, t]].log()) for b, t in mask.nonzero().tolist()]


def test_forget_loss_is_the_mean_log_probability_of_the_targets():
    """Eq. 1: negative, and equal to a loop over targets with the shift by one."""
    logits, ids, mask = toy()
    assert icu.forget_loss(logits, ids, mask).item() == pytest.approx(
        np.mean(loop_logps(logits, ids, mask)), abs=1e-12
    )
    assert icu.forget_loss(logits, ids, mask) < 0


def test_learn_loss_is_cross_entropy():
    """Eq. 3: F.cross_entropy over the same tokens."""
    logits, ids, mask = toy()
    labels = torch.where(mask, ids, -100)[:, 1:]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    assert icu.learn_loss(logits, ids, mask).item() == pytest.approx(expected.item(), abs=1e-12)


def test_kl_loss_equals_kl_div():
    """Eq. 4: KL[p_theta0 || p_theta] as torch computes it, 0 for equal models, and no gradient to the frozen copy."""
    logits, ids, mask = toy()
    ref = toy(seed=1)[0]
    pick = mask[:, 1:]
    expected = F.kl_div(
        logits[:, :-1][pick].log_softmax(-1),
        ref[:, :-1][pick].log_softmax(-1),
        log_target=True,
        reduction="none",
    )
    value = icu.kl_loss(logits, ref, mask)
    assert value.item() == pytest.approx(expected.sum(-1).mean().item(), abs=1e-12)
    value.backward()
    assert ref.grad is None
    assert icu.kl_loss(logits, logits, mask).item() == pytest.approx(0, abs=1e-12)


def test_released_kl_is_a_cross_entropy_with_the_same_gradient():
    """H(p0, p) = H(p0) + KL: another number, the same gradient."""
    logits, ids, mask = toy()
    ref = toy(seed=1)[0].detach()
    kl = icu.kl_loss(logits, ref, mask)
    ce = icu.kl_loss(logits, ref, mask, cross_entropy=True)
    (g_kl,) = torch.autograd.grad(kl, logits)
    (g_ce,) = torch.autograd.grad(ce, logits)
    assert ce > kl
    torch.testing.assert_close(g_kl, g_ce)


def test_kl_stays_finite_where_a_probability_is_zero():
    """Logits 1e4 apart make probabilities of exactly 0 in float32 and bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.tensor(
            [[[0.0, 1e4, -1e4], [0.0, 0.0, 0.0]]], dtype=dtype, requires_grad=True
        )
        ref = torch.tensor([[[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]]], dtype=dtype)
        value = icu.kl_loss(logits, ref, torch.tensor([[False, True]]))
        value.backward()
        assert value.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ["forget_loss", "learn_loss", "kl_loss"])
def test_over_no_token_a_loss_is_zero_with_a_zero_gradient(name):
    """An empty mask and an empty batch: 0, and a gradient of 0, not NaN."""
    for B in (2, 0):
        logits = torch.randn(B, 4, 5, requires_grad=True)
        mask = torch.zeros(B, 4, dtype=torch.bool)
        second = torch.zeros(B, 4, 5) if name == "kl_loss" else torch.zeros(B, 4, dtype=torch.long)
        value = getattr(icu, name)(logits, second, mask)
        value.backward()
        assert value.item() == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("name", ["forget_loss", "learn_loss", "kl_loss"])
def test_parts_of_a_global_batch_add_up_to_its_mean(name):
    """Each part divided by the whole batch's token count: the sum is the whole, however unevenly it is cut."""
    logits, ids, mask = toy(B=4)
    second = toy(B=4, seed=1)[0] if name == "kl_loss" else ids
    loss, count = getattr(icu, name), int(mask.sum())
    parts = [loss(logits[s], second[s], mask[s], count) for s in (slice(0, 1), slice(1, 4))]
    assert sum(parts).item() == pytest.approx(loss(logits, second, mask).item(), abs=1e-12)


def test_sequence_logp_sums_each_row():
    """(B,): the row's target log-probabilities added up, 0 for a row without targets."""
    logits, ids, mask = toy()
    mask[2] = False
    rows = [sum(loop_logps(logits[b : b + 1], ids[b : b + 1], mask[b : b + 1])) for b in range(3)]
    assert baselines.sequence_logp(logits, ids, mask).tolist() == pytest.approx(rows, abs=1e-12)


# --- methods ---


METHODS = {"icu": icu.icu} | {name: f for name, f in vars(baselines).items() if hasattr(f, "needs")}


def side(logits, ids, mask, frozen_logits=None):
    return icu.Side(logits, ids, mask, int(mask.sum()), len(ids), frozen_logits)


def asks(sides):
    """A batch that has these sides: {name: Side}."""
    return Namespace(forward=sides.__getitem__)


FLAGS = {"protocol": "paper", "forget_weight": 0.7, "alpha": 0.5, "beta": 0.3, "dpo_beta": 0.1}


def expected_loss(method, sides):
    """Each method's formula written out from log-probabilities, sharing no code with icu.py."""
    logp = {name: loop_logps(s.logits, s.ids, s.mask) for name, s in sides.items()}
    mean = {name: sum(values) / len(values) for name, values in logp.items()}
    learn = sides["learn"]
    p, q = (
        x.detach().softmax(-1)[:, :-1][learn.mask[:, 1:]]
        for x in (learn.frozen_logits, learn.logits)
    )
    kl = float((p * (p.log() - q.log())).sum(-1).mean())

    def ratios(s):
        """log p - log p_0 of each row."""
        cuts = [(s.ids[b : b + 1], s.mask[b : b + 1]) for b in range(len(s.ids))]
        now, before = (
            [sum(loop_logps(x[b : b + 1], *cut)) for b, cut in enumerate(cuts)]
            for x in (s.logits, s.frozen_logits)
        )
        return np.array(now) - np.array(before)

    lose, win = ratios(sides["forget"]), ratios(sides["answer"])

    def softplus(x):  # -log sigmoid(-x)
        return np.log1p(np.exp(x))

    return {
        "icu": 0.7 * mean["forget"] - 0.5 * mean["learn"] + 0.3 * kl,
        "kumpr": 0.7 * mean["forget"],
        "graddiff": 0.7 * mean["forget"] - 0.5 * mean["learn"],
        "kl": 0.7 * mean["forget"] + 0.3 * kl,
        "llmu": 0.7 * mean["forget"] - 0.5 * mean["answer"] + 0.3 * kl,
        "po": -0.5 * mean["answer"],
        "dpo": 0.7 * softplus(-0.1 * (win - lose)).mean(),
        "npo": 0.7 * 2 / 0.1 * softplus(0.1 * lose).mean(),
    }[method]


def toy_sides():
    """Three sides with random logits, the same frozen copy behind each."""
    frozen = toy(seed=9)[0].detach()
    return {
        name: side(*toy(seed=i), frozen) for i, name in enumerate(("forget", "learn", "answer"))
    }


@pytest.mark.parametrize("method", list(METHODS))
def test_each_method_computes_its_formula(method):
    """The weighted sum of the terms equals the formula computed from single log-probabilities."""
    sides = toy_sides()
    terms = METHODS[method](asks(sides), Namespace(**FLAGS))
    assert sum(w * v for w, v in terms.values()).item() == pytest.approx(
        expected_loss(method, sides), abs=1e-9
    )


@pytest.mark.parametrize("method", list(METHODS))
def test_each_method_is_finite_on_an_empty_side(method):
    """No row on any side: a finite loss and finite gradients."""
    leaf = torch.randn(0, 4, 5, requires_grad=True)
    empty = torch.zeros(0, 4, dtype=torch.bool)
    sides = dict.fromkeys(
        ("forget", "learn", "answer"), side(leaf, empty.long(), empty, torch.zeros(0, 4, 5))
    )
    loss = sum(w * v for w, v in METHODS[method](asks(sides), Namespace(**FLAGS)).values())
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all()


class Bigram(torch.nn.Module):
    """A model over two tokens whose logits depend on the current token alone: logits[t] = table[ids[t]]."""

    base_model = property(lambda self: self)
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(
            torch.tensor([[0.2, -0.4], [0.5, 0.1]], dtype=torch.float64)
        )

    def forward(self, input_ids, **_):
        return Namespace(logits=self.table[input_ids], hidden_states=None)


def args_of(method, **flags):
    """The flags of a few steps by a method."""
    usual = {
        "seed": 0,
        "batch_size": 2,
        "dtype": "float32",
        "device": "cpu",
        "lr": 1e-4,
        "teacher": "cached",
    }
    usual |= {"method": method, "loss": METHODS[method], "answer": "neighbour", "answers": 2}
    return Namespace(**FLAGS | usual | flags)


def train(engine, sides, args, *, epochs, active=None, progress=None, frozen=None):
    """icu.train_epoch for each of these epochs, on all rows or the active ones; the frozen copy is asked at once."""
    frozen = frozen or icu.freeze(engine.model, sides, args)
    for epoch in epochs:
        progress = progress or runs.Progress()
        progress.epoch, progress.step = epoch, 0
        rows = range(len(sides["forget"])) if active is None else active
        icu.train_epoch(engine, sides, rows, args, frozen=frozen, progress=progress)


@pytest.mark.parametrize("method", list(METHODS))
def test_the_first_step_is_that_of_the_formula(method):
    """On a two-token model one step of the loop moves the weights as autograd on the written-out formula says."""
    text = lambda ids, t0: icu.Text(ids, t0, t0, ids[:t0])  # noqa: E731
    sample = icu.Sample("a", "", text([0, 1, 1, 0], 2), text([1, 0, 0, 0], 2))
    answer = text([0, 1, 0, 1], 2)
    model = Bigram()
    start = model.table.detach().clone()
    args = args_of(method, batch_size=8, dtype="float64", lr=0.1, teacher="live")

    def frozen(texts):
        return torch.stack([sum_logp(start, t) for t in texts])

    def sum_logp(table, t):
        logp = table.log_softmax(-1)
        return sum(logp[t.ids[i - 1], t.ids[i]] for i in range(t.t0, len(t.ids)))

    engine = processes.PlainEngine(model, args)
    engine.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(
        engine,
        {"forget": [[sample.forget]], "learn": [[sample.learn]], "answer": [[answer]]},
        args,
        epochs=[1],
    )

    table = start.clone().requires_grad_()
    f, lrn, ans = (
        sum_logp(table, t) / 2 for t in (sample.forget, sample.learn, answer)
    )  # two targets each: means
    p0, logp = start.softmax(-1), table.log_softmax(-1)
    kl = (
        sum((p0[c] * (p0[c].log() - logp[c])).sum() for c in (0, 0)) / 2
    )  # learn targets follow tokens 0 and 0
    lose, win = 2 * f - frozen([sample.forget])[0], 2 * ans - frozen([answer])[0]
    formula = {
        "icu": 0.7 * f - 0.5 * lrn + 0.3 * kl,
        "kumpr": 0.7 * f,
        "graddiff": 0.7 * f - 0.5 * lrn,
        "kl": 0.7 * f + 0.3 * kl,
        "llmu": 0.7 * f - 0.5 * ans + 0.3 * kl,
        "po": -0.5 * ans,
        "dpo": 0.7 * -torch.log(torch.sigmoid(0.1 * (win - lose))),
        "npo": 0.7 * -20 * torch.log(torch.sigmoid(-0.1 * lose)),
    }[method]
    (gradient,) = torch.autograd.grad(formula, table)
    torch.testing.assert_close(model.table.detach(), start - 0.1 * gradient)


def memorise(model, texts, steps=60, lr=3e-3):
    """Trains a model on texts until it knows them by heart."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    ids, attention, mask = icu.collate(texts)
    for _ in range(steps):
        loss = icu.learn_loss(model(ids, attention_mask=attention).logits, ids, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("method", list(METHODS))
def test_each_method_makes_a_memorised_text_less_likely(method, make_model):
    """A few steps on a text that the model has learned by heart lower its likelihood."""
    model = make_model("gpt_neo", dtype=torch.float32)
    g = torch.Generator().manual_seed(1)
    rows = torch.randint(4, 90, (9, 12), generator=g).tolist()
    texts = [icu.Text(row, 6, 6, row[:6]) for row in rows]
    samples = [icu.Sample(str(i), "", texts[i], texts[i + 3]) for i in range(3)]
    memorise(model, texts[:3])
    args = args_of(method, forget_weight=1.0, lr=2e-3)
    sides = {"forget": [[t] for t in texts[:3]], "learn": [[t] for t in texts[3:6]]}
    sides |= {name: make(samples, None, 1, args) for name, make in args.loss.needs.sides.items()}

    def logps():
        ids, attention, mask = icu.collate(texts[:3])
        with torch.no_grad():
            return baselines.sequence_logp(model(ids, attention_mask=attention).logits, ids, mask)

    before = logps()
    train(processes.PlainEngine(model, args), sides, args, epochs=range(1, 6))
    assert (logps() < before - 0.2).all()


def test_llmu_answers_come_from_other_rows_and_are_the_only_targets(make_model):
    """--answers suffixes of other partners, never the row's own, the same for the same (seed, epoch)."""
    texts = [icu.Text(list(range(10 * i, 10 * i + 6)), 3, 3, []) for i in range(8)]
    samples = [icu.Sample(str(i), "", texts[i], texts[i + 4]) for i in range(4)]
    args = Namespace(method="llmu", answers=2, answer="neighbour", seed=0)
    drawn = baselines.random_answers(samples, None, 1, args)
    assert drawn == baselines.random_answers(samples, None, 1, args)
    assert drawn != baselines.random_answers(samples, None, 2, args)
    for row, answers in enumerate(drawn):
        assert len(answers) == 2
        for answer in answers:
            assert answer.ids[:3] == texts[row].ids[:3] and answer.t0 == 3
            assert answer.ids[3:] in [texts[i + 4].ids[3:] for i in range(4) if i != row]


# --- the frozen copy ---


def test_the_cached_copy_gives_the_live_ones_logits(kind, make_model):
    """On three architectures, rows of different lengths: the same KL, also after the model has moved on."""
    model = make_model(kind)
    g = torch.Generator().manual_seed(0)
    texts = [
        icu.Text(torch.randint(4, 90, (n,), generator=g).tolist(), 2, 2, []) for n in (5, 9, 7)
    ]
    sides = {"learn": [[texts[0]], texts[1:]]}
    cached, live = (
        icu.cached_copy(model, sides, icu.collate, batch_size=2),
        icu.live_copy(model, sides, icu.collate),
    )
    ids, attention, mask = icu.collate(texts)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    logits = model(ids, attention_mask=attention).logits
    kls = [
        icu.kl_loss(logits, frozen("learn", [0, 1], texts)[0], mask).item()
        for frozen in (cached, live)
    ]
    assert (
        kls[0] == pytest.approx(kls[1], rel=1e-5) and kls[0] > 1e-6
    )  # GPT-Neo's attention is float32 always


def test_what_a_side_teaches_is_what_the_model_says_of_each_text(kind, make_model):
    """Many short ends of one beginning, computed together: at the targets the live copy's logits, text by text."""
    model = make_model(kind)
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(4, 90, (n,), generator=g).tolist()  # noqa: E731
    rows = []
    for beginning, ends in ((draw(6), (2, 5, 5, 4)), (draw(9), (5, 1)), (draw(3), (5,))):
        texts = [
            icu.Text(beginning + draw(n), len(beginning) + n - 1, len(beginning), beginning)
            for n in ends
        ]
        rows.append(
            [*texts, icu.Text(texts[0].ids, texts[0].cut, texts[0].cut, beginning)]
        )  # several targets
    how = {"taught": {"own": rows}}
    cached, live = (
        make(model, {}, icu.collate, **how) for make in (icu.cached_copy, icu.live_copy)
    )
    texts = [text for row in (2, 0) for text in rows[row]]
    (said, _), (expected, _) = cached("own", [2, 0], texts), live("own", [2, 0], texts)
    assert said.shape == expected.shape == (1 + 5 + 4 + 2, model.config.vocab_size)
    torch.testing.assert_close(said.float(), expected.float(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        alone = model(torch.tensor([texts[0].ids[:-1]])).logits[0, -1]
    torch.testing.assert_close(said[0].float(), alone.float(), rtol=1e-4, atol=1e-4)


# --- data ---


def make_pair(id, context, prefix, suffix, *learn):
    fields = {
        "learn_id": f"{id}-partner",
        "learn_context": "",
        "learn_prefix": learn[0],
        "learn_suffix": learn[1],
    }
    return {
        "id": id,
        "context": context,
        "prefix": prefix,
        "suffix": suffix,
        **fields,
        "similarity": 0.5,
    }


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
def folders(tmp_path_factory, save_tiny):
    """{kind: folder of a model that knows the texts of PAIRS by heart}, and the pairs file."""
    root = tmp_path_factory.mktemp("icu")
    found = {kind: save_tiny(kind, root / kind) for kind in ("gpt_neo", "opt", "llama")}
    for folder in found.values():
        model, tokenizer = models.load_model(str(folder))
        samples, _ = icu.build_samples(PAIRS, tokenizer, protocol="released", positions=256)
        samples += icu.build_samples(PAIRS, tokenizer, protocol="paper", positions=256)[0]
        memorise(model, [sample.forget._replace(t0=1) for sample in samples], steps=150)
        model.save_pretrained(folder)
    data.write_jsonl(root / "pairs.jsonl", PAIRS)
    return {**found, "pairs": root / "pairs.jsonl", "root": root}


@pytest.mark.parametrize("protocol", ["paper", "released"])
def test_a_row_is_its_tokens_with_a_boundary(kind, folders, protocol):
    """prefix and suffix are encoded apart; BOS stands once at 0; the text decodes; targets as the protocol says."""
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    bos = [] if kind == "gpt_neo" else [tokenizer.bos_token_id]
    samples, cut = icu.build_samples(PAIRS, tokenizer, protocol=protocol, positions=256)
    text = samples[1].forget
    context = PAIRS[1]["context"] if protocol == "released" else ""
    body = text.ids[len(bos) :]
    assert text.ids[: len(bos)] == bos and tokenizer.bos_token_id not in body
    assert tokenizer.decode(body) == context + PAIRS[1]["prefix"] + PAIRS[1]["suffix"]
    assert tokenizer.decode(text.ids[text.cut :]) == PAIRS[1]["suffix"]
    assert tokenizer.decode(text.prompt[len(bos) :]) == PAIRS[1]["prefix"]
    assert text.t0 == (text.cut if protocol == "paper" else 1)
    assert cut == 0


def test_further_neighbours_are_read_as_the_first(folders):
    """Each is a Text of its own; one that is too long is cut and counted, one without room for its suffix refused."""
    tokenizer = AutoTokenizer.from_pretrained(folders["gpt_neo"])
    rows = [{name: row[name] for name in row if name.startswith("learn_")} for row in PAIRS]
    pair, how = PAIRS[0] | {"further": [PAIRS[1], *rows]}, {"protocol": "paper"}
    (sample,), cut = icu.build_samples([pair], tokenizer, positions=256, **how)
    alone = [icu.build_samples([row], tokenizer, positions=256, **how)[0][0] for row in PAIRS]
    assert sample._replace(further=()) == alone[0]._replace(further=()) and cut == 0
    assert (
        sample.further == [alone[1].learn, alone[0].learn, alone[1].learn]
        and alone[0].further == []
    )
    positions = max(len(alone[0].forget.ids), len(alone[0].learn.ids))
    longest = {"learn_context": "", "learn_prefix": "The", "learn_suffix": " old mill" * positions}
    (sample,), cut = icu.build_samples(
        [pair | {"further": [longest]}], tokenizer, positions=positions, **how
    )
    assert cut == 1 and len(sample.further[0].ids) == positions
    full = longest | {"learn_prefix": longest["learn_suffix"]}
    with pytest.raises(ValueError, match=r"pair 1 \(id .*the learn prefix alone fills"):
        icu.build_samples([pair | {"further": [full]}], tokenizer, positions=positions, **how)


def test_ids_are_used_verbatim_where_they_decode_to_the_text(folders):
    """Ids that another merge order would give are kept; ids of another vocabulary are not used."""
    tokenizer = AutoTokenizer.from_pretrained(folders["gpt_neo"])
    single = [
        tokenizer.encode(c)[0] for c in "The"
    ]  # letter by letter: valid ids, not what encoding gives
    names = [f"{side}{part}" for side in ("", "learn_") for part in ("context", "prefix", "suffix")]
    pair = {
        **PAIRS[0],
        "prefix": "The",
        **{f"{n}_ids": tokenizer.encode(PAIRS[0][n]) for n in names},
        "prefix_ids": single,
    }
    assert (
        icu.build_samples([pair], tokenizer, protocol="paper", positions=99)[0][0].forget.prompt
        == single
    )
    foreign = {**pair, "prefix_ids": [5, 6, 7]}
    further = {**pair, "further": [{name: pair[name] for name in pair if "learn" in name}]}
    assert (
        icu.build_samples([further], tokenizer, protocol="paper", positions=99)[0][0].forget.prompt
        == single
    )
    further["further"].append(further["further"][0] | {"learn_suffix_ids": [5, 6, 7]})
    for strange in (foreign, further):
        built = icu.build_samples([strange], tokenizer, protocol="paper", positions=99)[0][0]
        assert built.forget.prompt == tokenizer.encode("The")
    with pytest.raises(ValueError, match=r"pair 2 \(id z\)"):
        icu.build_samples(
            [pair, {**pair, "id": "z", "suffix_ids": [10**6]}],
            tokenizer,
            protocol="paper",
            positions=99,
        )


def test_collate_never_predicts_padding_or_position_zero():
    """Masks by length: a pad that equals EOS inside a text stays a target, padding never is one."""
    texts = [icu.Text([0, 0, 5, 0], 2, 2, []), icu.Text([7, 0], 0, 1, [])]
    ids, attention, mask = icu.collate(texts)
    assert mask.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert attention.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert [t.shape for t in icu.collate([])] == [(0, 0)] * 3


# --- refinement and the stop rule ---


def rows_of(*scores):
    return [{"bertscore": f1, "bleu": bleu} for f1, bleu in scores]


def test_the_papers_filter_needs_both_and_keeps_what_is_forgotten():
    """Eq. 5: AND; a sample that later scores high stays out."""
    args, limits = Namespace(protocol="paper"), {"bertscore": 0.3, "bleu": 0.01}
    forgotten = icu.refine(
        set(), rows_of((0.2, 0.0), (0.2, 0.5), (0.9, 0.0), (0.3, 0.0)), limits, args
    )
    assert forgotten == {0}
    forgotten = icu.refine(
        forgotten, rows_of((0.9, 0.9), (0.1, 0.0), (0.9, 0.9), (0.9, 0.9)), limits, args
    )
    assert forgotten == {0, 1}


def test_the_released_filter_needs_either_and_lets_samples_come_back():
    """Released code: OR, measured anew each epoch."""
    args, limits = Namespace(protocol="released"), {"bertscore": 0.3, "bleu": 0.01}
    forgotten = icu.refine(set(), rows_of((0.2, 0.9), (0.9, 0.0), (0.9, 0.9)), limits, args)
    assert forgotten == {0, 1}
    forgotten = icu.refine(forgotten, rows_of((0.9, 0.9), (0.9, 0.0), (0.9, 0.9)), limits, args)
    assert forgotten == {1}


@pytest.mark.parametrize(
    ("el", "ma", "active", "epoch", "reason"),
    [(0.01, 0.5, 3, 1, "thresholds"), (0.01, 0.6, 3, 1, None), (0.05, 0.5, 3, 1, None), (None, 0.5, 3, 1, "thresholds"),
     (0.9, 0.9, 0, 1, "all forgotten"), (0.9, 0.9, 3, 9, "max epochs"), (None, None, 3, 1, None)],
)  # fmt: skip
def test_the_stop_rule(el, ma, active, epoch, reason):
    """Both means strictly under, or nothing active, or the cap; an EL that no row has does not count."""
    args, limits = (
        Namespace(max_epochs=9, eval_only=False, protocol="paper"),
        {"el10": 0.05, "ma": 0.6},
    )
    assert (
        icu.stop_reason({"el10": el, "ma": ma}, active, epoch, thresholds=limits, args=args)
        == reason
    )


def one_epoch(model, samples, active, batch_size=2, **flags):
    """Runs train_epoch with method kumpr; returns (progress, list of batch sizes)."""
    args = args_of("kumpr", batch_size=batch_size, **flags)
    progress, sizes, plain = runs.Progress(), [], model.forward

    def counting(*a, **k):
        sizes.append(len(k["input_ids"]))
        return plain(*a, **k)

    model.forward = counting
    try:
        sides = {"forget": [[sample.forget] for sample in samples]}
        train(
            processes.PlainEngine(model, args),
            sides,
            args,
            epochs=[1],
            active=active,
            progress=progress,
        )
    finally:
        model.forward = plain
    return progress, sizes


def test_active_samples_are_packed_densely(make_model):
    """Seven of nine active, batch 2: four steps, three full and one of one, no empty batch."""
    text = icu.Text([4, 5, 6, 7], 2, 2, [])
    samples = [icu.Sample(str(i), "", text, text) for i in range(9)]
    _, sizes = one_epoch(make_model("gpt_neo", dtype=torch.float32), samples, [0, 1, 3, 4, 6, 7, 8])
    assert sizes == [2, 2, 2, 1]


def test_a_batch_with_nothing_active_leaves_the_losses_alone(make_model):
    """Released code steps on it too; an epoch's loss is that of its one text, whichever of four batches it is in."""
    text, model = icu.Text([4, 5, 6, 7], 2, 2, []), make_model("gpt_neo", dtype=torch.float32)
    samples, losses = [icu.Sample(str(i), "", text, text) for i in range(4)], []
    before = copy.deepcopy(model.state_dict())
    for i in range(4):
        model.load_state_dict(before)
        progress, _ = one_epoch(model, samples, [i], batch_size=1, protocol="released")
        assert (progress.step, progress.steps_taken) == (4, 1)
        losses.append(progress.mean_losses())
    assert losses[0]["loss"] < 0 and losses == [losses[0]] * 4


def test_a_step_that_is_not_finite_never_reaches_the_weights(make_model):
    """Every step gives NaN: after five in a row the epoch ends with Diverged and untouched weights."""
    model = make_model("gpt_neo", dtype=torch.float32)
    text = icu.Text([4, 5, 6, 7], 2, 2, [])
    samples = [icu.Sample(str(i), "", text, text) for i in range(12)]
    plain = model.forward

    def broken(*a, **k):
        out = plain(*a, **k)
        out.logits = out.logits * float("nan")
        return out

    before = copy.deepcopy(model.state_dict())
    model.forward = broken
    with pytest.raises(icu.Diverged, match="five steps"):
        one_epoch(model, samples, list(range(12)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- what a run needs ---


def test_the_activation_estimate_is_near_what_autograd_keeps(kind, make_model):
    """What both sides of a step keep for the backward pass, counted a storage, is within half and all of it."""
    model = make_model(kind, dtype=torch.float32, hidden_size=128, vocab=400)
    g = torch.Generator().manual_seed(0)
    texts = [
        icu.Text(torch.randint(4, 400, (60,), generator=g).tolist(), 1, 1, []) for _ in range(4)
    ]
    samples = [icu.Sample(str(i), "", texts[i], texts[3 - i]) for i in range(4)]
    args = Namespace(**FLAGS, method="icu", batch_size=4, zero=2, offload=False, teacher="cached")
    sides = {
        "forget": [[sample.forget] for sample in samples],
        "learn": [[sample.learn] for sample in samples],
    }
    batch = icu.Batch(
        model, sides, [0, 1, 2, 3], frozen=icu.live_copy(model, sides, icu.collate), asked=["learn"]
    )
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = icu.icu(batch, args)
    measured = sum(size for pointer, (size, _) in kept.items() if pointer not in weights)
    assert (
        len(terms) == 3 and 1 <= bench.activation_bytes(model.config, samples, args) / measured < 2
    )
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert bench.memory_estimate(model.config, samples, args)["weights"] == weights


def test_zero_shards_what_it_says(make_model):
    """Gradients and Adam are a share, weights whole, with --zero 3 a share; --offload: no moments on the device."""
    config = make_model("gpt_neo").config
    flags = {"batch_size": 8, "teacher": "cached"}
    one, four, offloaded, three = (
        bench.memory_estimate(config, [], Namespace(**flags, zero=zero, offload=offload), n)
        for n, zero, offload in ((1, 2, False), (4, 2, False), (4, 2, True), (4, 3, False))
    )
    assert four["gradients"] == one["gradients"] // 4 and four["weights"] == one["weights"]
    assert (
        four["adam"] - offloaded["adam"] == one["adam"] // 4
        and three["weights"] == one["weights"] // 4
    )


# --- the command line ---


def run_cli(*flags, script="icu.py", env=None):
    """Runs a script as a user would; returns (exit code, stdout, stderr)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def finished(folders, encoder_dir):
    """A real run of two epochs through the command line, made twice with the same seed: (first, second, stdout)."""
    outs = [folders["root"] / name for name in ("run1", "run2")]
    heldout = folders["root"] / "heldout.jsonl"
    data.write_jsonl(heldout, [{"text": "The driver said that nothing was missing."}])
    flags = [
        "--pairs",
        folders["pairs"],
        "--model",
        folders["gpt_neo"],
        "--bert",
        encoder_dir,
        "--lr",
        "1e-3",
    ]
    flags += [
        "--max-epochs",
        "2",
        "--thresholds",
        "1e-9,1e-9",
        "--ppl",
        f"heldout={heldout}",
        "--seed",
        "7",
    ]
    for out in outs:
        code, stdout, stderr = run_cli(*flags, "--out", out)
        assert code == 0, stderr
    return (*outs, stdout)


def test_a_run_folder_keeps_its_contract(finished):
    """The files and fields that other programs read."""
    run, _, stdout = finished
    metrics, samples = (data.read_jsonl(run / f"{name}.jsonl") for name in ("metrics", "samples"))
    fields = ["epoch", "el10", "ma", "bleu", "bertscore", "entropy", "active", "forgotten"]
    fields += ["loss", "loss_forget", "loss_learn", "loss_kl", "skipped_steps"]
    assert [list(row)[:13] for row in metrics] == [fields] * 3
    assert (
        "ppl_heldout" in metrics[0]
        and "ppl_heldout" in metrics[-1]
        and "ppl_heldout" not in metrics[1]
    )
    assert metrics[0]["loss"] is None and metrics[1]["loss"] is not None
    assert {(row["epoch"], row["id"]) for row in samples} == {
        (e, i) for e in range(3) for i in "ab"
    }
    assert set(samples[0]) == {
        "epoch",
        "id",
        "el10",
        "ma",
        "bleu",
        "bertscore",
        "entropy",
        "forgotten",
        "generation",
    }
    summary = json.loads((run / "summary.json").read_text())
    assert (
        summary["stopped"] == "max epochs" and summary["epochs"] == 2 and summary["method"] == "icu"
    )
    assert set(summary["before"]) == {"el10", "ma", "bleu", "bertscore", "entropy", "ppl_heldout"}
    config = json.loads((run / "config.json").read_text())
    assert config["seed"] == 7 and config["sha256"]["pairs"] and config["versions"]["torch"]
    assert (
        len([line for line in stdout.splitlines() if line.strip()[:1].isdigit()]) == 3
    )  # one line an epoch


def test_the_same_seed_gives_the_same_run(finished):
    """On a CPU metrics, samples and weights are identical byte for byte."""
    first, second, _ = finished
    for name in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_lazy_el_leaves_out_what_decides_nothing(finished, folders, encoder_dir):
    """The same run, without EL in the epoch that could not be the last; EL decides where MA alone would stop."""
    flags = [
        "--pairs",
        folders["pairs"],
        "--model",
        folders["gpt_neo"],
        "--bert",
        encoder_dir,
        "--lr",
        "1e-3",
    ]
    flags += [
        "--max-epochs",
        "2",
        "--seed",
        "7",
        "--lazy-el",
        "--ppl",
        f"heldout={folders['root'] / 'heldout.jsonl'}",
    ]
    for limits, left_out in (
        ("1e-9,1e-9", [1]),
        ("1e-9,2", []),
    ):  # MA is never under its threshold; always
        out = folders["root"] / f"lazy{len(left_out)}"
        code, _, stderr = run_cli(*flags, f"--thresholds={limits}", "--out", out)
        assert code == 0, stderr
        lazy, whole = (data.read_jsonl(run / "metrics.jsonl") for run in (out, finished[0]))
        for row in whole:
            row["el10"] = None if row["epoch"] in left_out else row["el10"]
        assert lazy == whole
        weights = "model/model.safetensors"
        assert (out / weights).read_bytes() == (finished[0] / weights).read_bytes()
        assert run_cli(out, script="evals/report.py")[0] == 0


def test_the_exported_model_loads_and_differs_from_the_original(finished, folders):
    """model/ loads with plain transformers and is not the model that went in."""
    before, after = (
        AutoModelForCausalLM.from_pretrained(f) for f in (folders["gpt_neo"], finished[0] / "model")
    )
    moved = [
        name
        for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert moved and AutoTokenizer.from_pretrained(finished[0] / "model").decode([5])


def test_a_run_with_every_method_and_kind_of_model(folders, encoder_dir):
    """One epoch of each method, spread over the three architectures and both protocols, ends well."""
    kinds = ["gpt_neo", "opt", "llama"]
    for i, method in enumerate(m for m in METHODS if m != "icu"):
        out = folders["root"] / f"run-{method}"
        argv = [
            "--pairs",
            folders["pairs"],
            "--model",
            folders[kinds[i % 3]],
            "--bert",
            encoder_dir,
            "--out",
            out,
        ]
        argv += [
            "--method",
            method,
            "--max-epochs",
            "1",
            "--thresholds",
            "1e-9,1e-9",
            "--device",
            "cpu",
        ]
        icu.main(argv=[str(a) for a in [*argv, "--protocol", ("paper", "released")[i % 2]]])
        summary = json.loads((out / "summary.json").read_text())
        assert summary["method"] == method and summary["stopped"] == "max epochs"


def test_a_model_of_nan_is_a_run_that_diverged(folders, encoder_dir):
    """Weights that a finite step blew up are not taken for forgetting: no model, exit 1, the last good state kept."""
    out = folders["root"] / "blown"
    flags = [
        "--pairs",
        folders["pairs"],
        "--model",
        folders["gpt_neo"],
        "--bert",
        encoder_dir,
        "--lr",
        "1e25",
    ]
    flags += ["--ppl", f"heldout={folders['root'] / 'heldout.jsonl'}", "--thresholds", "1e-9,1e-9"]
    data.write_jsonl(
        folders["root"] / "heldout.jsonl", [{"text": "The driver said that nothing was missing."}]
    )
    code, stdout, stderr = run_cli(*flags, "--out", out)
    assert code == 1 and not stderr.count("Traceback") and "last good state" in stdout
    summary = json.loads((out / "summary.json").read_text())
    assert (
        summary["stopped"] == "diverged" and summary["collapsed"] and summary["after"]["ma"] is None
    )
    assert not (out / "model").exists() and len(runs.states(out)) == 2 - (summary["epochs"] == 0)
    code, _, stderr = run_cli(out, script="evals/report.py")
    assert code == 0 and "icu (collapsed) | - |" in (out / "table.md").read_text(), stderr


def test_the_prompt_is_no_target_of_dpo():
    """dpo compares two answers to one prompt, whatever --targets says for the others."""
    flags = ["--model", "m", "--dry-run", "--targets", "all", "--method"]
    assert (
        icu.parse_args([*flags, "dpo"]).targets == "suffix"
        and icu.parse_args([*flags, "npo"]).targets == "all"
    )


def test_eval_only_measures_and_trains_nothing(folders, encoder_dir):
    """One epoch line, method none, no model folder."""
    out = folders["root"] / "eval"
    argv = [
        "--pairs",
        folders["pairs"],
        "--model",
        folders["opt"],
        "--bert",
        encoder_dir,
        "--out",
        out,
        "--eval-only",
    ]
    icu.main(argv=[str(a) for a in argv])
    summary = json.loads((out / "summary.json").read_text())
    assert (
        summary["method"] == "none"
        and summary["before"] == summary["after"]
        and not (out / "model").exists()
    )


def test_the_untouched_model_is_measured_once(folders, encoder_dir, monkeypatch, tmp_path):
    """A second run of the same model and texts looks its start up; other texts or another model are measured anew."""
    monkeypatch.setenv("ICU_CACHE", str(tmp_path / "cache"))
    calls, plain = [], icu.measure
    monkeypatch.setattr(icu, "measure", lambda *a, **k: calls.append(1) or plain(*a, **k))
    one_pair = tmp_path / "one.jsonl"
    data.write_jsonl(one_pair, PAIRS[:1])
    starts = []
    for i, (kind, pairs) in enumerate(
        [("llama", folders["pairs"])] * 2 + [("llama", one_pair), ("opt", one_pair)]
    ):
        argv = [
            "--pairs",
            pairs,
            "--model",
            folders[kind],
            "--bert",
            encoder_dir,
            "--out",
            tmp_path / str(i),
        ]
        icu.main(argv=[str(a) for a in [*argv, "--eval-only"]])
        starts.append((len(calls), (tmp_path / str(i) / "samples.jsonl").read_text()))
    assert [n for n, _ in starts] == [1, 1, 2, 3]
    assert starts[0][1] == starts[1][1] != starts[2][1]


def test_already_forgotten_trains_nothing(folders, encoder_dir):
    """Both measures under their thresholds at epoch 0: no training, and it says so."""
    out = folders["root"] / "already"
    argv = [
        "--pairs",
        folders["pairs"],
        "--model",
        folders["llama"],
        "--bert",
        encoder_dir,
        "--out",
        out,
    ]
    icu.main(argv=[str(a) for a in [*argv, "--thresholds", "2,2"]])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["epochs"] == 0 and "before any training" in summary["stopped"]


def test_auto_thresholds_are_the_measures_of_unseen_text(folders, encoder_dir):
    """--thresholds auto: EL and MA of the original model on --unseen; --bert-threshold auto: a mean F1."""
    out, unseen = folders["root"] / "auto", folders["root"] / "unseen.jsonl"
    data.write_jsonl(
        unseen,
        [{"text": "A neighbour saw the van near the old mill, and the driver said nothing."}],
    )
    argv = [
        "--pairs",
        folders["pairs"],
        "--model",
        folders["gpt_neo"],
        "--bert",
        encoder_dir,
        "--out",
        out,
    ]
    argv += ["--thresholds", "auto", "--unseen", unseen, "--bert-threshold", "auto", "--eval-only"]
    icu.main(argv=[str(a) for a in argv])
    limits = json.loads((out / "summary.json").read_text())["thresholds"]
    assert 0 <= limits["ma"] < 1 and limits["el10"] > 0 and 0 < limits["bertscore"] < 1


def test_dry_run_writes_nothing(folders, encoder_dir):
    """--dry-run prints the plan and leaves no folder."""
    out = folders["root"] / "dry"
    argv = [
        "--pairs",
        folders["pairs"],
        "--model",
        folders["gpt_neo"],
        "--bert",
        encoder_dir,
        "--out",
        out,
        "--dry-run",
    ]
    code, stdout, _ = run_cli(*argv)
    assert code == 0 and "2 pairs" in stdout and not out.exists()


def broken_model(folders, name, change):
    """A copy of the GPT-Neo folder with something wrong with it."""
    folder = folders["root"] / f"broken-{name}"
    if not folder.exists():
        shutil.copytree(folders["gpt_neo"], folder)
        change(folder)
    return folder


def without_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.0.ln_1.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def huge_number(folder):
    config = json.loads((folder / "config.json").read_text())
    config["attention_types"][0][1] = 10**12
    (folder / "config.json").write_text(json.dumps(config))


def no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def make_t5(folder):
    (folder / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BAD = {
    "missing pairs": (lambda f: ["--pairs", "nowhere.jsonl"], "nowhere.jsonl"),
    "lr zero": (lambda f: ["--lr", "0"], "--lr"),
    "lr nan": (lambda f: ["--lr", "nan"], "--lr"),
    "negative lr": (lambda f: ["--lr=-1"], "--lr"),
    "batch": (lambda f: ["--batch-size", "0"], "--batch-size"),
    "epochs": (lambda f: ["--max-epochs", "-3"], "--max-epochs"),
    "alpha": (lambda f: ["--alpha=-0.5"], "--alpha"),
    "beta": (lambda f: ["--beta", "inf"], "--beta"),
    "method": (
        lambda f: ["--method", "icuu"],
        "did you mean icu? (one in a file of its own: python FILE.py",
    ),
    "thresholds": (lambda f: ["--thresholds", "1"], "--thresholds"),
    "auto without unseen": (lambda f: ["--thresholds", "auto"], "--unseen"),
    "unknown flag": (lambda f: ["--alhpa", "1"], "--alhpa"),
    "no model": (lambda f: ["--model", "./nowhere"], "no such folder"),
    "hub": (lambda f: ["--model", "nobody/nothing"], "--model DIR"),
    "no tokenizer": (lambda f: ["--model", broken_model(f, "tok", no_tokenizer)], "no tokenizer"),
    "no weights": (
        lambda f: ["--model", broken_model(f, "w", lambda d: (d / "model.safetensors").unlink())],
        "no weights",
    ),
    "missing tensor": (
        lambda f: ["--model", broken_model(f, "tensor", without_a_tensor)],
        "lack 1 tensor",
    ),
    "a number that would fill the memory": (
        lambda f: ["--model", broken_model(f, "huge", huge_number)],
        "is damaged",
    ),
    "encoder-decoder": (
        lambda f: ["--model", broken_model(f, "t5", make_t5)],
        "not a decoder-only",
    ),
    "pickle": (lambda f: ["--model", broken_model(f, "pickle", pickled)], "--allow-pickle"),
    "no bert": (lambda f: ["--bert", "./nowhere"], "--bert DIR"),
    "device": (lambda f: ["--device", "abacus"], "--device"),
    "ppl": (lambda f: ["--ppl", "heldout"], "NAME=FILE"),
    "out is a file": (lambda f: ["--out", f["pairs"]], "is a file"),
    "out in a file": (lambda f: ["--out", f["pairs"] / "run"], "cannot write"),
    "out is no run": (lambda f: ["--out", f["root"]], "no run"),
    "out holds the model": (lambda f: ["--out", f["gpt_neo"], "--overwrite"], "lies in it"),
    "offload alone": (lambda f: ["--offload"], "DeepSpeed"),
    "zero 3 alone": (lambda f: ["--zero", "3"], "DeepSpeed"),
    "unseen ids": (lambda f: ["--thresholds", "auto", "--unseen", "ids.npy"], ".csv or .jsonl"),
    "a whole second model": (lambda f: ["--zero", "3", "--teacher", "live"], "pass --zero 2"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_line_and_exit_2(name, folders, encoder_dir, capsys, monkeypatch):
    """One line on stderr that names what is wrong, exit 2, and nothing written."""
    flags, expected = BAD[name]
    out = folders["root"] / "bad-out"
    argv = [
        "--pairs",
        folders["pairs"],
        "--model",
        folders["gpt_neo"],
        "--bert",
        encoder_dir,
        "--out",
        out,
        *flags(folders),
    ]
    monkeypatch.setattr(sys, "argv", ["icu.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        icu.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert expected in error and error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists()


def test_a_text_longer_than_the_model_names_its_row(
    folders, encoder_dir, tmp_path, monkeypatch, capsys
):
    """And a suffix of no token, and a run that is there already."""
    long = [PAIRS[0], {**PAIRS[1], "suffix": " of each month" * 200}]
    data.write_jsonl(tmp_path / "long.jsonl", long)
    tokenizer = AutoTokenizer.from_pretrained(folders["gpt_neo"])
    with pytest.raises(ValueError, match=r"pair 2 \(id b\).*256 positions"):
        icu.build_samples(
            data.read_pairs(tmp_path / "long.jsonl"), tokenizer, protocol="paper", positions=256
        )
    with pytest.raises(ValueError, match=r"pair 1 \(id a\): the suffix has no token"):
        icu.build_samples([{**PAIRS[0], "suffix": ""}], tokenizer, protocol="paper", positions=256)


def test_what_compares_rows_needs_two_of_them(folders, encoder_dir, tmp_path):
    """One pair: llmu and --bert-threshold auto are refused before a folder is made."""
    data.write_jsonl(tmp_path / "one.jsonl", PAIRS[:1])
    argv = ["--pairs", tmp_path / "one.jsonl", "--model", folders["gpt_neo"], "--bert", encoder_dir]
    for flags in (["--bert-threshold", "auto"], ["--method", "llmu"]):
        with pytest.raises(ValueError, match="two pairs at least"):
            icu.main(argv=[str(a) for a in [*argv, *flags, "--out", tmp_path / "out"]])
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_overwritten_unless_asked(finished, folders, encoder_dir):
    """The error names --overwrite."""
    argv = [
        "--pairs",
        folders["pairs"],
        "--model",
        folders["gpt_neo"],
        "--bert",
        encoder_dir,
        "--out",
        finished[0],
    ]
    code, _, error = run_cli(*argv)
    assert code == 2 and "--overwrite" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "script", ["icu.py", "knn.py", "evals/report.py", "demo/tiny.py", "evals/tasks.py"]
)
def test_help_is_complete(script):
    """Every flag of every script says what it does."""
    code, stdout, _ = run_cli("--help", script=script)
    assert code == 0 and "--debug" in stdout or script == "demo/tiny.py"
