"""--explain and --speech: the figures of a literal loop, every character of a text once, nothing of
it read as markup, and the page as a browser shows it.

python -m pytest tests/test_explain.py -q

The browser's tests need `pip install playwright` and a Chromium, and are skipped without them.
"""

import csv
import functools
import html.parser
import json
import math
import shutil

import conftest
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import icu
from evals import report
from extras import explain
from kit import data
from kit.runs import read_run

EVIL = """</script><script>document.title = "taken"</script><!-- <b>'&amp;"</b>"""
tokenizer_of = functools.cache(conftest._make_tokenizer)


class Reader(html.parser.HTMLParser):
    """The tags of a page, and the content of its scripts."""

    def __init__(self, page):
        super().__init__()
        self.scripts, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def texts_in(page):
    """{id: what a page shows of a text}, as its own script reads it."""
    content, _ = Reader(page.decode()).scripts
    return {text["id"]: text for text in json.loads(content)["texts"]}


# --- figures ---


def loop(model, ids):
    """p(x_t | x_<t) of ids[1:], a forward pass and a softmax by hand for each, in float64."""
    probabilities = []
    for t in range(1, len(ids)):
        with torch.no_grad():
            row = model(input_ids=torch.tensor([ids[:t]])).logits[0, -1].double().tolist()
        top = max(row)
        total = math.fsum(math.exp(x - top) for x in row)
        probabilities.append(math.exp(row[ids[t]] - top) / total)
    return probabilities


def test_probabilities_and_surprise_are_those_of_a_literal_loop(kind, tiny_models):
    """Every token given the true ones before it; of what was said after a prompt the sum of -log p."""
    model = tiny_models[kind]
    for length in (1, 2, 40):
        ids = torch.randint(4, 97, (length,)).tolist()
        first, *others = explain.probabilities(model, ids)
        assert first is None and others == pytest.approx(loop(model, ids), rel=1e-6)
    for at in (1, 39):
        by_hand = -sum(math.log(p) for p in loop(model, ids)[at - 1 :])
        assert explain.surprise(model, ids[:at], ids[at:]) == pytest.approx(by_hand, rel=1e-5)
    assert explain.surprise(model, ids, []) == 0


def test_a_long_text_is_as_a_short_one(tiny_models):
    """No token is lost where parts of the logits meet; dropout is off, and the mode is put back."""
    model = tiny_models["llama"].train()
    ids = torch.randint(4, 97, (600,)).tolist()
    _, *probabilities = explain.probabilities(model, ids)
    assert model.training
    logits = model.eval()(torch.tensor([ids])).logits[0].softmax(1)
    expected = [logits[t - 1, ids[t]].item() for t in range(1, 600)]
    assert probabilities == pytest.approx(expected, rel=1e-6)


# --- characters ---


def split(text):
    """[(characters, number of tokens)] of a text."""
    ids = tokenizer_of("gpt_neo")(text)["input_ids"]
    parts = explain.pieces(tokenizer_of("gpt_neo"), ids)
    assert [first for _, first, _ in parts] == [0, *(last for *_, last in parts)][:-1]
    assert "".join(characters for characters, *_ in parts) == text
    assert not ids or parts[-1][2] == len(ids)
    return [(characters, last - first) for characters, first, last in parts]


def test_a_character_of_several_tokens_is_one_piece():
    """Known answers: bytes of a letter, a letter and its accent, a family joined of two people."""
    assert split("aש🙂!") == [("a", 1), ("ש", 2), ("🙂", 4), ("!", 1)]
    assert split("e\u0301x👩‍👧") == [("e\u0301", 3), ("x", 1), ("👩‍👧", 11)]
    assert split("a\ufffdb") == [("a", 1), ("\ufffd", 3), ("b", 1)]


@settings(max_examples=60, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aé e\u0301שﬁ\r\n"))))
def test_no_character_is_lost_or_doubled(text):
    """Pieces put together are the text, and their tokens all tokens."""
    split(text)


def test_figures_stand_at_their_tokens():
    """A BOS in front is no character, a joined piece has the product, the means are over the suffix
    or the marked tokens; what is NaN is not known.
    """
    tokenizer = tokenizer_of("llama")
    ids = tokenizer("xש!y")["input_ids"]  # BOS, x, two bytes, !, y
    text = icu.Text(ids, t0=4, cut=4, prompt=ids[:4])
    before, after = [None, 0.5, 0.5, 0.4, 0.9, 0.7], [None, 0.1, 0.2, 0.3, 0.4, 0.6]
    shown = explain.describe(tokenizer, text, before, after, id="7")
    assert shown["pieces"] == ["x", "ש", "!", "y"] and shown["tokens"] == [1, 2, 1, 1]
    assert shown["cut"] == 2 and shown["id"] == "7" and shown["marked"] == []
    assert shown["before"] == pytest.approx([0.5, 0.2, 0.9, 0.7])
    assert (shown["was"], shown["left"]) == pytest.approx((0.8, 0.5))
    shown = explain.describe(tokenizer, text._replace(among=(2, 3, 5)), before, [None] * 6)
    assert shown["marked"] == [1, 3] and shown["was"] == pytest.approx(1.6 / 3)
    assert shown["left"] is None and shown["after"] == [None] * 4


def test_nothing_of_a_text_is_markup():
    """Scripts, comments, quotes and entities come back as they are, in one JSON element."""
    tokenizer = tokenizer_of("gpt_neo")
    ids, likely = tokenizer(EVIL)["input_ids"], [0.5] * 99
    text, said = icu.Text(ids, 9, 9, ids[:9]), {"before": EVIL, "after": "@DATA@"}
    shown = explain.describe(tokenizer, text, likely, likely, id=EVIL, said=said)
    page = explain.page({"run": EVIL}, [shown])
    assert texts_in(page) == {EVIL: shown} and "".join(shown["pieces"]) == EVIL
    assert Reader(page.decode()).tags == Reader(explain.page({}, []).decode()).tags


# --- a run ---


def test_a_run_is_shown_with_the_figures_of_its_two_models(own_world):
    """Each token's is that of a loop in float64 over the folders; texts, context, marks and answers
    are the run's.
    """
    pairs = data.read_jsonl(own_world.pairs)
    for pair in pairs:
        pair["context"] = "Call the clinic. "
    pairs[0]["spans"] = [[39, 54], [58, 65]]  # 14 Harbour Lane, Tuesday
    data.write_jsonl(own_world.pairs, pairs)
    run = read_run(own_world.run)
    run["config"]["context"] = True
    shown = texts_in(explain.make(run))
    assert list(shown) == [pair["id"] for pair in pairs]
    for when, folder, epoch in (("before", own_world.model, 0), ("after", own_world.run / "model", 2)):  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        said = {row["id"]: row["generation"] for row in run["samples"] if row["epoch"] == epoch}
        for pair in pairs:
            text = shown[pair["id"]]
            parts = [tokenizer(pair[name])["input_ids"] for name in data.PARTS]
            likely = [math.nan, *loop(model, sum(parts, []))]
            assert "".join(text["pieces"]) == "".join(pair[name] for name in data.PARTS)
            assert "".join(text["pieces"][: text["cut"]]) == pair["context"] + pair["prefix"]
            assert text["tokens"] == [1] * len(likely) and text["said"][when] == said[pair["id"]]
            assert text[when][1:] == pytest.approx(likely[1:], abs=1e-5) and text[when][0] is None
            if "spans" not in pair:
                mean = sum(likely[-len(parts[2]) :]) / len(parts[2])
                assert text["was" if when == "before" else "left"] == pytest.approx(mean, rel=1e-4)
    marked = "".join(shown["0"]["pieces"][n].strip() for n in shown["0"]["marked"])
    assert marked == "14HarbourLaneTuesday" and not shown["1"]["marked"]


def test_a_report_explains_the_runs_that_have_unlearned(own_world, capsys):
    """Each in its own folder; a run that only measured is passed over, one whose pairs have changed
    refused.
    """
    runs, out = [own_world.never_saw, own_world.run], own_world.root / "all"
    report.main([*map(str, runs), "--out", str(out), "--explain"])
    assert f"explained: {own_world.run / 'explain.html'}" in capsys.readouterr().out
    assert [path.parent.name for path in own_world.root.rglob("explain.html")] == ["run"]
    data.write_jsonl(own_world.pairs, data.read_jsonl(own_world.pairs)[:-1])
    with pytest.raises(ValueError, match="not the pairs that .*run was made with"):
        explain.main([str(own_world.run)])


# --- how a model speaks ---


SAID = {
    "all known": ([("The van", " was HERE, 5 times.")], {"was", "here", "times"}, 0.0),
    "half": ([("a", " dog dogs")], {"dog"}, 0.5),
    "a word that the prefix began": ([("a licen", "se dependencieslegesfera")], set(), 1.0),
    "over all texts": ([("", "one two"), ("", "one"), ("", "")], {"one"}, 1 / 3),
    "letters of any script": ([("", "שלום émigré _x_")], {"שלום"}, 2 / 3),
    "no word": ([("x", " 12 ...")], set(), None),
}


@pytest.mark.parametrize("said, known, share", SAID.values(), ids=SAID)
def test_new_words(said, known, share):
    """The share of words that were said and are not known."""
    assert explain.new_words(said, known) == share


def test_every_run_is_read_by_the_model_before(own_world, capsys):
    """Also one that measured another model: its own answers, as the model before finds them."""
    out, texts = own_world.root / "out", own_world.root / "heldout.jsonl"
    report.main(
        [str(own_world.run), str(own_world.never_saw), "--out", str(out), "--speech", str(texts)]
    )
    rows = {row["model"]: row for row in csv.DictReader((out / "table.csv").open(encoding="utf-8"))}
    model = AutoModelForCausalLM.from_pretrained(own_world.model, dtype=torch.float64).eval()
    tokenizer, pairs = AutoTokenizer.from_pretrained(own_world.model), data.read_pairs(own_world.pairs)  # fmt: skip
    known = explain.words_of(pairs) | explain.words_of(pairs, "learn_")
    known |= explain.words_of(data.read_records(texts))
    for label, folder, epoch in (
        ("model (before)", "run", 0),
        ("icu", "run", 2),
        ("never", "never-saw", 0),
    ):
        samples = data.read_jsonl(own_world.root / folder / "samples.jsonl")
        said = [row["generation"] for row in samples if row["epoch"] == epoch]
        total = count = 0
        for pair, text in zip(pairs, said, strict=True):
            prompt, ids = (tokenizer(part)["input_ids"] for part in (pair["prefix"], text))
            total -= sum(map(math.log, loop(model, prompt + ids)[len(prompt) - 1 :]))
            count += len(ids)
        assert float(rows[label]["said_ppl"]) == pytest.approx(math.exp(total / count), rel=1e-4)
        share = explain.new_words([(p["prefix"], t) for p, t in zip(pairs, said, strict=True)], known)  # fmt: skip
        assert float(rows[label]["new_words"]) == pytest.approx(share)
    assert "Said (PPL)" in capsys.readouterr().out


def test_one_model_reads_all(world):
    """Runs that began with different models are not put beside each other."""
    runs = [read_run(world.run), read_run(world.run)]
    runs[1]["config"]["model"] = "another"
    with pytest.raises(ValueError, match="one model reads all, .*another"):
        explain.add_speech(runs, [])


# --- the page in a browser ---


@pytest.fixture(scope="module")
def browser():
    """A Chromium without a window; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as driver:
        names = (driver.chromium.executable_path, "chromium", "google-chrome")
        path = next(filter(None, map(shutil.which, names)), None)
        if path is None:
            pytest.skip("no Chromium: playwright install chromium")
        with driver.chromium.launch(executable_path=path, args=["--no-sandbox"]) as started:
            yield started


TEXTS = {  # id: prefix, suffix, probability before and after
    "plain": ("The parcel for Ines Duarte was left", " at 14 Harbour Lane.", 0.9, 0.1),
    "hebrew": ("שלום, הכתובת היא", " רחוב הנמל 14", 0.95, 0.3),
    "markup": (EVIL, " \"quoted\" 'so'\nnext", 0.2, 0.15),
}


@pytest.fixture
def page(browser, tmp_path):
    """The page as a browser has it; it must print no error and ask for nothing but itself."""
    tokenizer, texts, path = tokenizer_of("gpt_neo"), [], tmp_path / "explain.html"
    for id, (prefix, suffix, *likely) in TEXTS.items():
        ids, cut = tokenizer(prefix + suffix)["input_ids"], len(tokenizer(prefix)["input_ids"])
        before, after = ([None, *[p] * (len(ids) - 1)] for p in likely)
        text, said = icu.Text(ids, cut, cut, ids[:cut], (cut,)), {"before": prefix, "after": ""}
        texts.append(explain.describe(tokenizer, text, before, after, id=id, said=said))
    path.write_bytes(explain.page({"run": EVIL}, texts))
    with browser.new_page(viewport={"width": 390, "height": 844}) as opened:
        requests, errors = [], []
        opened.on("request", lambda request: requests.append(request.url))
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.on("console", lambda message: errors.append(message.text))
        opened.goto(path.as_uri())
        yield opened
        assert requests == [path.as_uri()] and errors == []


def order(page):
    return page.locator("article:not([hidden]) h2 bdi").all_text_contents()


def test_a_browser_shows_every_text_as_it_is(page):
    """Letter by letter; no text becomes an element; nothing is wider than the screen; a tap tells a
    token's figures.
    """
    assert page.title() == "What is left" and EVIL in page.locator("#about").text_content()
    for id, (prefix, suffix, *_) in TEXTS.items():
        article = page.locator("article", has=page.locator("h2", has_text=id))
        for when in ("before", "after"):
            assert article.locator(f".views .{when} .text").text_content() == prefix + suffix
        assert article.locator(".views .before .marked").count() == 1
        assert article.locator(".views .before .unknown").count() == 1
    assert page.locator(".text b").count() == 0 and page.locator("script").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    hebrew = page.locator("article", has=page.locator("h2", has_text="hebrew"))
    assert hebrew.locator(".views .before .text").evaluate("e => getComputedStyle(e).direction") == "rtl"  # fmt: skip
    hebrew.locator(".views .before .text span").nth(3).click()
    told = page.locator("#token").inner_text()
    assert told == '"ם" (2 tokens): before 90.3 %, after 9.0 %'  # 0.95 and 0.3, squared


def test_a_browser_sorts_filters_and_shows(page):
    """By what is left, by drop and by id; by words of a text or id; before or after alone."""
    assert order(page) == ["hebrew", "markup", "plain"]
    page.select_option("#sort", "drop")
    assert order(page) == ["plain", "hebrew", "markup"]
    page.select_option("#sort", "id")
    assert order(page) == sorted(TEXTS)
    page.fill("#filter", "HARBOUR lane")
    assert order(page) == ["plain"] and page.locator("#count").inner_text() == "1 of 3 texts"
    page.fill("#filter", "")
    page.select_option("#show", "after-only")
    assert not page.locator(".before").first.is_visible()
