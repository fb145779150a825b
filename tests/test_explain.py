"""--explain and --speech: figures of a literal loop, each character once, nothing read as markup."""

import csv
import functools
import math

import conftest
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import data_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import icu
from evals import report
from extras import explain
from kit import data
from kit.runs import read_run

EVIL = """</script><script>document.title = "taken"</script><!-- <b>'&amp;"</b>"""
tokenizer_of = functools.cache(conftest._make_tokenizer)


def texts_in(page):
    """{id: what a page shows of a text}."""
    return {text["id"]: text for text in data_of(page.decode())["texts"]}


# --- figures ---


def loop(model, ids):
    """p(x_t | x_<t) of ids[1:], a forward pass and a softmax for each."""
    probabilities = []
    for t in range(1, len(ids)):
        with torch.no_grad():
            row = model(input_ids=torch.tensor([ids[:t]])).logits[0, -1].double()  # (V,)
        probabilities.append(row.softmax(0)[ids[t]].item())
    return probabilities


def test_probabilities_and_surprise_are_those_of_a_literal_loop(kind, tiny_models):
    """Given the true tokens; of an answer the sum of -log p."""
    model = tiny_models[kind]
    for length in (1, 2, 40):
        ids = torch.randint(4, 97, (length,)).tolist()
        first, *others = explain.probabilities(model, ids)
        assert first is None and others == pytest.approx(loop(model, ids), rel=1e-6)
    for at in (1, 39):
        by_hand = -sum(math.log(p) for p in loop(model, ids)[at - 1 :])
        assert explain.surprise(model, ids[:at], ids[at:]) == pytest.approx(by_hand, rel=1e-5)
    assert explain.surprise(model, ids, []) == 0


# --- characters ---


def sample_of(id, *text):
    """A sample that has a text to forget alone."""
    return icu.Sample(id, "", icu.Text(*text), None)


def split(text):
    """[(characters, number of tokens)] of a text."""
    ids = tokenizer_of("gpt_neo")(text)["input_ids"]
    parts = explain.pieces(tokenizer_of("gpt_neo"), ids)
    assert [first for _, first, _ in parts] == [0, *(last for *_, last in parts)][:-1]
    assert "".join(characters for characters, *_ in parts) == text
    assert not ids or parts[-1][2] == len(ids)
    return [(characters, last - first) for characters, first, last in parts]


def test_a_character_of_several_tokens_is_one_piece():
    """Bytes of a letter, a letter and its accent, a family."""
    assert split("aש🙂!") == [("a", 1), ("ש", 2), ("🙂", 4), ("!", 1)]
    assert split("e\u0301x👩‍👧") == [("e\u0301", 3), ("x", 1), ("👩‍👧", 11)]
    assert split("a\ufffdb") == [("a", 1), ("\ufffd", 3), ("b", 1)]


@settings(max_examples=60, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aé e\u0301שﬁ\r\n"))))
def test_no_character_is_lost_or_doubled(text):
    """Nor a token."""
    split(text)


def test_figures_stand_at_their_tokens():
    """BOS is no character, a joined piece has the product."""
    tokenizer = tokenizer_of("llama")
    ids = tokenizer("xש!y")["input_ids"]  # BOS, x, two bytes, !, y
    texts = [sample_of("7", ids, 4, 4, ids[:4], marked) for marked in (None, (2, 3, 5))]
    likely = {"before": [None, 0.5, 0.5, 0.4, 0.9, 0.7], "after": [None, 0.1, 0.2, 0.3, 0.4, 0.6]}
    shown = explain.describe(tokenizer, texts[0], {}, likely)
    assert shown["pieces"] == ["x", "ש", "!", "y"] and shown["tokens"] == [1, 2, 1, 1]
    assert shown["cut"] == 2 and shown["id"] == "7" and shown["marked"] == []
    assert shown["before"] == pytest.approx([0.5, 0.2, 0.9, 0.7])
    assert (shown["was"], shown["left"]) == pytest.approx((0.8, 0.5))
    shown = explain.describe(tokenizer, texts[1], {}, likely | {"after": [None] * 6})
    assert shown["marked"] == [1, 3] and shown["was"] == pytest.approx(1.6 / 3)
    assert shown["left"] is None and shown["after"] == [None] * 4


def test_nothing_of_a_text_is_markup():
    """All comes back in one JSON element."""
    tokenizer = tokenizer_of("gpt_neo")
    ids, likely = tokenizer(EVIL)["input_ids"], dict.fromkeys(("before", "after"), [0.5] * 99)
    answers = {"before": EVIL, "after": "@DATA@"}
    sample = sample_of(EVIL, ids, 9, 9, ids[:9])
    shown = explain.describe(tokenizer, sample, answers, likely)
    page = explain.page({"run": EVIL}, [shown])
    assert texts_in(page) == {EVIL: shown} and "".join(shown["pieces"]) == EVIL
    assert all(page.count(sign) == explain.page({}, []).count(sign) for sign in (b"<", b"</script"))


# --- a run ---


def load(folder):
    """(model in float64, tokenizer) of a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def test_a_run_is_shown_with_the_figures_of_its_two_models(own_world):
    """Those of a loop in float64; context, marks and answers are the run's."""
    pairs = data.read_jsonl(own_world.pairs)
    for pair in pairs:
        pair["context"] = "Call the clinic. "
    pairs[0]["spans"] = [[39, 54], [58, 65]]  # 14 Harbour Lane, Tuesday
    data.write_jsonl(own_world.pairs, pairs)
    run = read_run(own_world.run)
    run["config"]["context"] = True
    shown = texts_in(explain.make(run))
    left = [text["left"] for text in shown.values()]
    assert set(shown) == {pair["id"] for pair in pairs} and left == sorted(left, reverse=True)
    sides = ("before", own_world.model, 0), ("after", own_world.run / "model", 2)
    for when, folder, epoch in sides:
        model, tokenizer = load(folder)
        answers = {row["id"]: row["generation"] for row in run["samples"] if row["epoch"] == epoch}
        for pair in pairs:
            text = shown[pair["id"]]
            parts = [tokenizer(pair[name])["input_ids"] for name in data.PARTS]
            likely = [math.nan, *loop(model, sum(parts, []))]
            assert "".join(text["pieces"]) == "".join(pair[name] for name in data.PARTS)
            assert "".join(text["pieces"][: text["cut"]]) == pair["context"] + pair["prefix"]
            assert text["tokens"] == [1] * len(likely)
            assert text["answers"][when] == answers[pair["id"]]
            assert text[when][1:] == pytest.approx(likely[1:], abs=1e-5) and text[when][0] is None
            if "spans" not in pair:
                mean = sum(likely[-len(parts[2]) :]) / len(parts[2])
                assert text["was" if when == "before" else "left"] == pytest.approx(mean, rel=1e-4)
    marked = "".join(shown["0"]["pieces"][n].strip() for n in shown["0"]["marked"])
    assert marked == "14HarbourLaneTuesday" and not shown["1"]["marked"]


# --- how a model speaks ---


@pytest.mark.parametrize(
    "answers, known, share",
    [
        ([("The van", " was HERE, 5 times.")], {"was", "here", "times"}, 0.0),
        ([("a licen", "se dependencieslegesfera dog")], {"dog"}, 0.5),  # begun by the prefix
        ([("", "שלום émigré _x_")], {"שלום"}, 2 / 3),
        ([("x", " 12 ...")], set(), None),
    ],
)
def test_new_words(answers, known, share):
    """The share of words that were said and are not known."""
    assert explain.new_words(answers, known) == share


def test_every_run_is_read_by_the_model_before(own_world, capsys):
    """Also one that measured another model; the page is of those that unlearned."""
    out, texts = own_world.root / "out", own_world.root / "heldout.jsonl"
    runs = [str(own_world.run), str(own_world.never_saw)]
    explain.main([*runs, "--speech", str(texts)])
    report.main([*runs, "--out", str(out)])
    rows = {row["model"]: row for row in csv.DictReader((out / "table.csv").open(encoding="utf-8"))}
    (model, tokenizer), pairs = load(own_world.model), data.read_pairs(own_world.pairs)
    known = explain.words_of(pairs) | explain.words_of(pairs, "learn_")
    known |= explain.words_of(data.read_records(texts))
    sides = ("model (before)", "run", 0), ("icu", "run", 2), ("never", "never-saw", 0)
    for label, folder, epoch in sides:
        samples = data.read_jsonl(own_world.root / folder / "samples.jsonl")
        generations = [row["generation"] for row in samples if row["epoch"] == epoch]
        answers = list(zip([pair["prefix"] for pair in pairs], generations, strict=True))
        total = count = 0
        for texts in answers:
            prompt, ids = (tokenizer(text)["input_ids"] for text in texts)
            total -= sum(map(math.log, loop(model, prompt + ids)[len(prompt) - 1 :]))
            count += len(ids)
        assert float(rows[label]["said_ppl"]) == pytest.approx(math.exp(total / count), rel=1e-4)
        share = explain.new_words(answers, known)
        assert float(rows[label]["new_words"]) == pytest.approx(share)
    printed = capsys.readouterr().out
    assert "Said (PPL)" in printed and f"explained: {own_world.run / 'explain.html'}" in printed
    assert [path.parent.name for path in own_world.root.rglob("explain.html")] == ["run"]
