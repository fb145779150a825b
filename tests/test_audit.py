"""evals/audit.py: every measure beside its formula, and on models with known contents."""

import argparse
import itertools
import json
import math
import re
import zlib

import architectures
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from world import memorise, samples_of

import icu
import metrics
from evals import audit
from kit import data, figures, models, processes


def some_texts(tokenizer, n=6):
    """n samples of invented words, as icu.py reads them, and their pairs."""
    words = "the nurse van mill parcel driver clinic report Tuesday account".split()
    rng, pairs = np.random.default_rng(3), []
    rest = {"context": "", "learn_context": "", "learn_id": "p", "similarity": 0.5}
    for i in range(n):
        texts = [" ".join(rng.choice(words, 6)) for _ in range(4)]
        names = "prefix", "suffix", "learn_prefix", "learn_suffix"
        pair = {"id": str(i), **rest, **dict(zip(names, texts, strict=True))}
        pairs.append(pair | {"suffix": " " + pair["suffix"]})
    return samples_of(pairs, tokenizer), pairs


@pytest.fixture(scope="module")
def tiny(kind, tmp_path_factory, save_tiny):
    """(model in float64, tokenizer, samples, pairs) of each kind."""
    folder = save_tiny(kind, tmp_path_factory.mktemp("audit") / kind)
    model, tokenizer = models.load_model(str(folder))
    return model.double(), tokenizer, *some_texts(tokenizer)


# --- each measure beside its formula, token by token ---


def test_a_reading_is_the_model_asked_a_token_at_a_time(tiny):
    """log p, greedy hits, Min-K%++'s z and mean states, from one padded batch."""
    model, _, samples, _ = tiny
    texts = [sample.forget for sample in samples]
    for reading, text in zip(audit.read(model, texts), texts, strict=True):
        ids = text.ids
        assert reading.start == text.cut - 1 and len(reading.logp) == len(ids) - 1
        for t in range(1, len(ids)):
            with torch.no_grad():
                logp = model(torch.tensor([ids[:t]])).logits[0, -1].log_softmax(-1).tolist()
            own = logp[ids[t]]
            mean = sum(math.exp(x) * x for x in logp)
            deviation = math.sqrt(sum(math.exp(x) * (x - mean) ** 2 for x in logp))
            expected = pytest.approx((own, (own - mean) / deviation), abs=2e-4)
            assert (reading.logp[t - 1], reading.z[t - 1]) == expected
            assert reading.hit[t - 1] == (max(range(len(logp)), key=logp.__getitem__) == ids[t])
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        states = torch.cat(hidden)[:, text.cut :].mean(1)
        assert reading.states == pytest.approx(states.numpy(), abs=1e-4)
        assert len(reading.lens) == len(hidden) - 1


def test_a_text_is_extractable_where_enough_samples_hold_it():
    """One sample does by heart; p_z of 0.001 takes 693 for a half, and e^-300 is out of reach."""
    assert audit.extractable(0.0, 1, 0.9) == 1 and audit.extractable(-300, 10**6, 0.5) == 0
    assert [audit.extractable(math.log(0.001), n, 0.5) for n in (692, 693)] == [0, 1]


def test_leaks_and_the_worst_are_the_means_over_all_choices():
    """The estimators equal the mean over every choice of k of the n samples."""
    scores = [0.1, 0.7, 0.3, 0.3, 0.9, 0.0]
    leaks = [score >= 0.5 for score in scores]
    for k in range(1, 7):
        leaking = np.mean([any(chosen) for chosen in itertools.combinations(leaks, k)])
        assert audit.leak_at(k, sum(leaks), 6) == pytest.approx(leaking)
        worst = np.mean([max(chosen) for chosen in itertools.combinations(scores, k)])
        assert audit.worst_of(k, scores) == pytest.approx(worst)


def test_what_counts_as_a_leak():
    """A run of ten tokens; a share in order, whatever stands between."""
    suffix = [*range(20)]
    assert audit.repeats([99, *range(5, 15), 98], suffix)
    assert not audit.repeats([*range(9), 99, *range(9, 18)], suffix)
    assert audit.repeats([7, 1, 2, 3], [1, 2, 3]) and not audit.repeats([3, 2, 1], [1, 2, 3])
    assert audit.in_order([0, 50, 1, 51, 2, 60, 3], suffix) == 4 / 20


def test_strength_is_the_fewest_tokens_after_which_the_rest_comes(tiny):
    """Beside a `generate` from every place; 1 - k/T."""
    model, tokenizer, samples, _ = tiny
    texts = [sample.forget for sample in samples]
    for reading, (ids, cut, *_) in zip(audit.read(model, texts), texts, strict=True):
        T = len(ids) - cut
        places = range(cut, len(ids))
        prompts, lengths = [ids[:t] for t in places], [len(ids) - t for t in places]
        rests = metrics.beam_generate(model, prompts, lengths, num_beams=1)
        said = [rest == ids[t:] for rest, t in zip(rests, places, strict=True)]
        assert audit.strength(reading) == pytest.approx(1 - [*said, True].index(True) / T)
    hits = np.array([False, True, False, True, True])
    assert audit.strength(reading._replace(hit=hits, start=1)) == pytest.approx(0.5)


def test_membership_scores_and_areas(tiny):
    """Each score from the definitions; ranks are scikit-learn's AUC; the tail lets 1 % through."""
    model, tokenizer, samples, _ = tiny
    reading, other = audit.read(model, [s.forget for s in samples[:2]])
    scores = audit.membership(reading, "some text", other)
    least = sorted(reading.logp.tolist())[: max(1, int(0.2 * len(reading.logp)))]
    assert scores["min-20%"] == pytest.approx(sum(least) / len(least))
    assert scores["zlib"] == pytest.approx(sum(reading.logp) / len(zlib.compress(b"some text")))
    assert scores["loss"] == pytest.approx(np.mean(reading.logp))
    assert scores["reference"] == pytest.approx(np.mean(reading.logp) - np.mean(other.logp))
    rng = np.random.default_rng(0)
    high, low = rng.normal(1, 1, 40).round(1), rng.normal(0, 1, 200).round(1)
    area = roc_auc_score([1] * 40 + [0] * 200, np.concatenate([high, low]))
    assert np.mean(audit.ranks(high, low)) == pytest.approx(area)
    threshold = sorted(low)[-3]  # two of 200 are above it
    assert audit.above_tail(high, low) == [float(x > threshold) for x in high]


def test_samples_are_those_that_each_would_say_alone(tiny):
    """The same numbers drawn, a pass for every token of every sample; EOS ends a sample."""
    model, _, samples, _ = tiny
    prompt, n, length, eos = samples[0].forget.prompt, 60, 6, models.eos_ids(model)
    draw, rows = torch.Generator().manual_seed(5), [list(prompt) for _ in range(n)]
    for _ in range(length):
        with torch.no_grad():
            below = model(input_ids=torch.tensor(rows)).logits[:, -1].softmax(-1).cumsum(-1)
        numbers = torch.rand(n, 1, dtype=torch.float64, generator=draw)
        for row, p, number in zip(rows, below, numbers, strict=True):
            row.append(int((p <= number * p[-1]).sum()))
    rows = [row[len(prompt) :] for row in rows]
    rows = [row[: next((i for i, token in enumerate(row) if token in eos), length)] for row in rows]
    assert audit.sample(model, prompt, length, n=n, seed=5) == rows
    assert n / 4 < len(set(map(tuple, rows)))


EXPERTS = [("mixtral", "-"), ("gpt_oss", "experts"), ("llama4_text", "experts")]


@pytest.mark.parametrize("name, transposed", [("gpt_neo", "-"), ("gpt2", "."), *EXPERTS])
def test_quantised_matrices_are_rounded_to_the_nearest(name, transposed):
    """Whatever class holds them: group by group of inputs beside a loop; the rest stays."""
    model, same = architectures.small(name), architectures.small(name)
    (small, share), rounded, size = audit.quantised(model, 4, group=7), 0, 0
    assert all(map(torch.equal, model.parameters(), same.parameters()))
    for (key, weight), after in zip(same.named_parameters(), small.parameters(), strict=True):
        layers = not re.search("wte|wpe|emb|head", key)
        size += layers * weight.numel()
        if not layers or weight.dim() < 2 or key.endswith("bias"):
            assert torch.equal(weight, after)
            continue
        rounded += weight.numel()
        if re.search(transposed, key):
            weight, after = weight.mT, after.mT
        weight, after = (matrix.flatten(0, -2)[-1].tolist() for matrix in (weight, after))
        for start in range(0, len(weight), 7):
            group = weight[start : start + 7]
            scale = max(map(abs, group)) / 7
            expected = [round(x / scale) * scale for x in group]
            assert after[start : start + 7] == pytest.approx(expected, abs=1e-6)
    assert share == rounded / size > 0.95


def test_the_attacker_that_brings_most_back_counts(make_model, save_tiny, tmp_path):
    """--relearn worst: three attackers at three rates, and the best of them."""
    model, tokenizer = models.load_model(str(save_tiny("llama", tmp_path / "m")))
    samples, pairs = some_texts(tokenizer, 6)
    args = argparse.Namespace(seed=0, relearn="worst", relearn_steps=2, relearn_lr=1e-2)
    inputs = audit.Inputs(args, tokenizer, 2, pairs[:4], samples[:4], samples[4:])
    worst = audit.comes_back(model, inputs)
    highest = "MA of the other half, at its highest"
    means = [np.mean(values) for name, values in worst.items() if " at rate " in name]
    assert len(means) == 9 and np.mean(worst[highest]) == max(means)
    for attacker in ("half", "neighbours", "unseen"):
        args.relearn = attacker
        alone = audit.comes_back(model, inputs)[highest]
        assert alone == worst[f"MA of the other half, {attacker} at rate 0.01"]


def test_the_probe_tells_what_can_be_told_and_nothing_else():
    """States that lie apart: 1, beside shuffled labels near 0.5; random states: like those."""
    rng = np.random.default_rng(0)
    here, there = rng.normal(0, 1, (20, 3, 8)), rng.normal(0, 1, (24, 3, 8))
    noise, chance = audit.probe(here, there)
    assert abs(np.mean(noise) - chance) < 0.2
    here[:, 1] += 3
    apart, chance = audit.probe(here, there)
    assert np.mean(apart) > 0.95 and 0.4 < chance < 0.7


@pytest.mark.parametrize("name", architectures.USUAL)
def test_the_last_layers_states_say_what_their_model_says(name):
    """Of any architecture: Delta of the last layer is the difference of two forward passes."""
    before, source = architectures.small(name), architectures.small(name)
    layers = audit.layers_of(source)
    assert len(layers) == source.config.num_hidden_layers
    torch.nn.init.normal_(next(p for p in layers.parameters() if p.dim() > 1))
    texts = [icu.Text(ids, 5, 5, ids[:5]) for ids in architectures.rows()]
    gaps = audit.depth_gaps(before, source, texts, batch_size=2)
    readings = [audit.read(model, texts) for model in (before, source)]
    for gap, *pair in zip(gaps, *readings, strict=True):
        own, other = (reading.logp[reading.start :].mean() for reading in pair)
        assert gap[-1] == pytest.approx(own - other, abs=1e-4)
    assert np.allclose(audit.depth_gaps(before, before, texts), 0, atol=1e-6)


def test_the_depth_of_a_text_weighs_its_layers_by_what_never_saw_lacks():
    """Each layer's share is clipped to 0 and 1; layers that lack no more than 0.05 do not count."""
    depth = audit.unlearning_depth([0.3, -1, 9, 5, 1], [0.6, 0.5, 2.0, 0.05, -1])
    assert depth == pytest.approx((0.3 + 2) / 3.1)
    assert audit.unlearning_depth([1.0], [0.01]) is None


@pytest.mark.parametrize(
    "after, never, words",
    [
        ([0.5], [0.2, 0.1], "says 50.0%, a model that never saw them 15.0%: still more (n = 20, "),
        ([0.33], [0.3, 0.32], "31.0%: as a model that never saw them, within 0.05"),
        ([0, 1], [1, 0], "50.0%: cannot be told with n = 20 (n = 20, difference +0.000, 95%"),
        ([1] + [0] * 199, [0], "+0.015, of one text up to +1.000)"),
        ([math.nan, None, 0.5], [0.1], "them 10.0%: cannot be told with n = 6"),
    ],
)
def test_a_verdict_is_a_sentence_with_both_figures(after, never, words):
    """By the interval of the paired difference: within the margin, apart, or too wide to tell."""
    n = max(20, len(after))
    after, never = ((values * n)[:n] for values in (after, never))
    assert words in figures.verdict(after, never, "says {:.1%}")


def test_an_interval_of_any_statistic_draws_groups_with_replacement():
    """Beside the loop: one draw after the other from the same seed, and their quantiles."""
    groups = [[x, x + 1] for x in range(9)]

    def statistic(drawn):
        return sum(map(sum, drawn)) / 18

    rng = np.random.default_rng(3)
    draws = [[groups[i] for i in rng.integers(9, size=9)] for _ in range(200)]
    expected = np.quantile([statistic(drawn) for drawn in draws], (0.025, 0.975))
    interval = figures.bootstrap_interval(statistic, groups, resamples=200, seed=3)
    assert interval == pytest.approx(expected.tolist())
    assert figures.bootstrap_interval(statistic, groups[:1]) is None
    assert figures.bootstrap_interval(lambda drawn: None, groups) is None


def test_what_follows_of_two_models():
    """privleak as MUSE's, of AUCs the other way round; R = rise of never saw / of after, <= 1."""

    def derived(*values):
        auc, auc_never, rise, rise_never = ({"value": value} for value in values)
        none = {"after": {"value": 0.0}, "never saw": {"value": 0.0}}
        highest = {"after": rise, "never saw": rise_never}
        membership = {"AUC loss": {"after": auc, "never saw": auc_never}}
        relearning = {"MA, 0 steps": none, "MA, at its highest": highest}
        return tuple(audit.derive({"membership": membership, "relearning": relearning}).values())

    assert derived(1.0, 0.5, 0.4, 0.1) == (-100, 0.25)  # known: MUSE publishes -99.8
    assert derived(0.2, 0.5, 0.1, 0.4) == (60, 1)


# --- models of which it is known what they hold ---


@pytest.fixture(scope="module")
def known(tmp_path_factory, save_tiny, encoder_dir):
    """Folders of a model that knows its texts by heart and of a random one; pairs, unseen texts."""
    root = tmp_path_factory.mktemp("known")
    for name in ("never", "heart"):
        save_tiny("llama", root / name)
    _, pairs = some_texts(models.load_model(str(root / "heart"))[1], n=32)
    data.write_jsonl(root / "pairs.jsonl", pairs[:18])
    unseen = [{"id": p["id"], "prefix": p["prefix"], "suffix": p["suffix"]} for p in pairs[18:]]
    data.write_jsonl(root / "unseen.jsonl", unseen)
    memorise(root / "heart", pairs[:18], steps=200)
    return root


def audit_of(known, out, model, *words):
    """audit.json of a model of `known`, beside the one that never saw the texts."""
    files = "--pairs", known / "pairs.jsonl", "--unseen", known / "unseen.jsonl", "--out", out
    argv = ["--model", known / model, "--never-saw", known / "never", *files, "--samples", "8"]
    argv += ["--relearn-lr", "1e-3", "--device", "cpu", *words]
    audit.main([str(word) for word in argv])
    return json.loads((out / "audit.json").read_text())


@pytest.fixture(scope="module")
def heart(known, tmp_path_factory):
    """audit.json of the model that knows them by heart, beside the other."""
    return audit_of(known, tmp_path_factory.mktemp("heart"), "heart")


def test_by_heart_and_never_saw(known, heart, tmp_path):
    """Each question tells the two apart, and says of a model beside itself that it is alike."""
    assert set(heart["sentences"]) == set(audit.QUESTIONS)
    after, never = (heart["headline"][model] for model in ("after", "never saw"))
    for question in ("likelihood", "sampling", "strength", "quantised", "relearning"):
        assert after[f"audit_{question}"] > never[f"audit_{question}"], question
        assert figures.MORE in heart["sentences"][question]
    assert after["audit_strength"] == 1 and after["audit_membership"] > 0.75
    same = audit_of(known, tmp_path / "b", "never")
    assert "needs the model before" in same["sentences"].pop("depth")
    assert all(figures.AS_NEVER in sentence for sentence in same["sentences"].values())
    assert (
        same["derived"]["R of relearning"] == 1
        and same["derived"]["privleak (as MUSE, %), loss"] == 0
    )
    assert (tmp_path / "b" / "audit.png").read_bytes().startswith(b"\x89PNG")


def depth_by_hand(before, never, after, text):
    """UDS of a text: the layers of a Llama called one after the other."""
    ids, cut, T = torch.tensor([text.ids]), text.cut, len(text.ids)

    def run(model, patched=None, states=None):
        """What each layer gives where the suffix is predicted, and the suffix's mean log p."""
        h, outputs = model.model.embed_tokens(ids), []
        rotary = model.model.rotary_emb(h, torch.arange(T)[None])
        for number, layer in enumerate(model.model.layers):
            h = layer(h, position_embeddings=rotary)
            if number == patched:
                h = torch.cat([h[:, : cut - 1], states, h[:, -1:]], 1)
            outputs.append(h[:, cut - 1 : -1])
        logp = model.lm_head(model.model.norm(h))[0].log_softmax(-1)
        return outputs, np.mean([float(logp[t - 1, text.ids[t]]) for t in range(cut, T)])

    known, gone = run(before)[1], []
    for source in (never, after):
        states = enumerate(run(source)[0])
        gone.append([known - run(before, *layer)[1] for layer in states])
    gaps = [(w, delta) for w, delta in zip(*gone, strict=True) if w > 0.05]
    return sum(min(max(delta, 0), w) for w, delta in gaps) / sum(w for w, _ in gaps)


def test_depth_is_0_of_the_model_before_and_1_of_never_saw(known, tmp_path):
    """And between them of one between them, as a loop over texts and layers has it."""
    before, never, after = (
        models.load_model(str(known / name))[0] for name in ("heart", "never", "never")
    )
    _, tokenizer = models.load_model(str(known / "never"))
    with torch.inference_mode():
        for weights, others in zip(after.parameters(), before.parameters(), strict=True):
            weights.lerp_(others, 0.4)
        models.save_model(after, tokenizer, tmp_path / "mid")
        samples = samples_of(data.read_pairs(known / "pairs.jsonl"), tokenizer)
        uds = np.mean([depth_by_hand(before, never, after, one.forget) for one in samples])
    words = "--before", known / "heart", "--only", "depth"
    report = audit_of(known, tmp_path, tmp_path / "mid", *words)
    cells = report["figures"]["depth"]["UDS"]
    assert [cells[name]["value"] for name in audit.MODELS] == pytest.approx([uds, 0, 1])
    assert report["headline"]["after"]["audit_depth"] == pytest.approx(1 - uds) and 0.1 < uds < 0.9


def test_two_processes_give_the_audit_of_one(known, heart, tmp_path, monkeypatch):
    """Texts are shared out, samples come from seeds of their own: every figure and interval."""

    def over_two(function, items):
        parts = [function(items[rank::2]) for rank in range(2)]
        return [parts[i % 2][i // 2] for i in range(len(items))]

    monkeypatch.setattr(processes, "over_processes", over_two)
    questions = ["sampling", "prompts", "membership", "quantised"]
    two = audit_of(known, tmp_path, "heart", "--only", *questions)
    for question in questions:
        assert two["sentences"][question] == heart["sentences"][question]
        for measure, cells in two["figures"][question].items():
            for model, figure in cells.items():
                expected = heart["figures"][question][measure][model]
                assert figure == pytest.approx(expected, abs=1e-4), (question, measure)


def test_a_text_is_asked_after_its_neighbours_prefix_too(tiny):
    """The worst prompt counts; a rest without ten tokens has no EL10."""
    model, tokenizer, samples, pairs = tiny
    for i, (s, pair) in enumerate(zip(samples, pairs, strict=True)):
        *_, (prompt, rest) = audit.other_prompts(s, pair, tokenizer, i)
        front = len(models.front_of(tokenizer))
        assert prompt == s.learn.prompt + s.forget.ids[front : s.forget.cut]
        assert rest == s.forget.ids[s.forget.cut :]
    (said,) = metrics.beam_generate(model, [[1, 5]], [12], num_beams=1)
    prompts = [[([1], [2] * 9)], [([1, 5], said), ([1], [2] * 12)]]
    (short, _), (worst, exact) = audit.worst_prompt(model, prompts)
    assert short is None and (worst, exact) == (len(said) > 9, 1)


# --- the command ---


def test_a_run_brings_its_pairs_its_models_and_its_folder(own_world, save_tiny):
    """RUN alone will do; --never-saw is a model's folder or its --eval-only run."""
    argv = [str(own_world.run), "--only", "strength", "likelihood", "--device", "cpu"]
    reports = []
    for never in (own_world.never_saw, own_world.never):
        audit.main([*argv, "--never-saw", str(never), "--overwrite"])
        reports.append(json.loads((own_world.run / "audit.json").read_text()))
    assert reports[0] == reports[1] and list(reports[0]["figures"]) == ["strength", "likelihood"]
    folders = own_world.model, own_world.run / "model", own_world.never
    assert set(reports[0]["models"].values()) == set(map(str, folders))
    data.write_jsonl(own_world.root / "unseen.jsonl", data.read_pairs(own_world.pairs)[:1])
    with pytest.raises(ValueError, match="holds 1 of the texts to forget"):
        audit.main([*argv, "--unseen", str(own_world.root / "unseen.jsonl"), "--overwrite"])
    save_tiny("llama", own_world.root / "other")
    with pytest.raises(ValueError, match="never saw has another tokenizer"):
        audit.main([*argv, "--never-saw", str(own_world.root / "other"), "--overwrite"])
    with pytest.raises(ValueError, match="a run that has trained"):
        audit.main([*argv, "--never-saw", str(own_world.run)])


def test_any_texts_are_asked_without_pairs(known, heart, tmp_path, capsys):
    """--texts: the same figures where no neighbour is needed; ids too; without --out, no file."""
    texts, table = tmp_path / "texts.jsonl", tmp_path / "ids.npy"
    rows = data.read_jsonl(known / "pairs.jsonl")
    data.write_jsonl(texts, [{name: row[name] for name in ("prefix", "suffix")} for row in rows])
    tokenizer = models.load_model(str(known / "heart"))[1]
    np.save(table, np.array([models.encode(tokenizer, data.text_of(row))[:12] for row in rows]))
    argv = ["--model", known / "heart", "--only", "strength", "relearning", "--texts"]
    argv = [*map(str, argv), str(texts), "--relearn-lr", "1e-3", "--device", "cpu"]
    audit.main([*argv, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "audit.json").read_text())
    for name, value in report["headline"]["after"].items():
        assert value == pytest.approx(heart["headline"]["after"][name], abs=1e-6)
    capsys.readouterr()
    audit.main([*argv, "--texts", str(table), "--relearn", "neighbours"])
    page = capsys.readouterr().out
    assert "n = 18" in page and "| extraction strength |" in page
    assert "Not asked: needs two texts, and what --relearn neighbours reads" in page


def test_a_marked_run_is_measured_on_entire_texts(known, tmp_path):
    """A sentence tells what the figures are of."""
    pairs = data.read_jsonl(known / "pairs.jsonl")
    data.write_jsonl(tmp_path / "pairs.jsonl", [pairs[0] | {"spans": [[0, 5]]}, *pairs[1:]])
    out = tmp_path / "out"
    words = ["--model", known / "never", "--pairs", tmp_path / "pairs.jsonl", "--out", out]
    audit.main([*map(str, words), "--only", "strength", "--device", "cpu"])
    sentence = json.loads((out / "audit.json").read_text())["sentences"]["marked"]
    assert sentence.startswith("Parts of 1 texts") and sentence in (out / "audit.md").read_text()
