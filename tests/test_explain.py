"""evals/report.py --explain: the figures of a literal loop, every character of a text once, nothing of it read as markup, and
the page as a browser shows it.

python -m pytest tests/test_explain.py -q

The browser's tests need `pip install playwright` and a Chromium, and are skipped, with the reason, without them.
"""

import functools
import html.parser
import json
import math
import shutil
import stat

import pytest
import torch
from conftest import TOKENIZER_TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from survive import LEARN, memorise
from test_report import edit
from tokenizers import normalizers

import icu
from evals import report
from extras import explain
from kit import data, flags, purge

HEBREW, ARABIC = "שלום, הכתובת היא", " رقم الهاتف ٥٥٥"
EVIL = """</script><script>document.title = "taken"</script><!-- <b>'&amp;"</b>"""
FAMILY = "👩‍👧 and é"  # a picture of three code points, a letter of two
TEXTS = {
    "plain": ("The parcel for Ines Duarte was left", " at 14 Harbour Lane on Tuesday morning."),
    "hebrew": (HEBREW, " רחוב הנמל 14"),
    "arabic": ("اتصل بنا على", ARABIC),
    "markup": (EVIL, f" {FAMILY} \"quoted\" 'so'\nnext\u2028line"),
    "long": (TOKENIZER_TEXT, "\n" + TOKENIZER_TEXT[:120]),
}
SPANS = {"plain": [[39, 54], [58, 65]]}  # 14 Harbour Lane, Tuesday


def listing(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(words, capsys, folder):
    """The one line of a command that ends with exit 2 and leaves every file of a folder as it was."""
    before = listing(folder)
    with pytest.raises(SystemExit) as stopped:
        flags.run_cli(lambda: report.main([str(word) for word in words]))
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1, printed
    assert printed.err.startswith("error: ") and listing(folder) == before
    return printed.err


def pairs_of(texts):
    learn = {
        "learn_id": "n",
        "learn_context": "",
        "learn_prefix": LEARN[0],
        "learn_suffix": LEARN[1],
    }
    pairs = [
        {"id": id, "context": "", "prefix": a, "suffix": b, **learn} for id, (a, b) in texts.items()
    ]
    return [
        pair | {"similarity": 0.5} | ({"spans": SPANS[pair["id"]]} if pair["id"] in SPANS else {})
        for pair in pairs
    ]


class Reader(html.parser.HTMLParser):
    """The scripts of a page, (attributes, content) each, and the tags that are no part of the template's."""

    def __init__(self, page):
        super().__init__()
        self.scripts, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append([dict(attrs), ""])

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1][1] += data


def data_of(page):
    """What a page shows, as its own script would read it."""
    data, _ = Reader(page).scripts
    assert data[0] == {"id": "data", "type": "application/json"}
    return json.loads(data[1])


@functools.cache
def tokenizer_of(kind="gpt_neo", normalizer=None):
    import conftest

    tokenizer = conftest._make_tokenizer(kind)
    if normalizer:
        tokenizer.backend_tokenizer.normalizer = getattr(normalizers, normalizer)()
    return tokenizer


# --- figures ---


def loop(model, ids):
    """p(x_t | x_<t) of ids[1:], a forward pass and a softmax by hand for each, in float64."""
    found = []
    for t in range(1, len(ids)):
        with torch.no_grad():
            row = model(input_ids=torch.tensor([ids[:t]])).logits[0, -1].double().tolist()
        top = max(row)
        found.append(math.exp(row[ids[t]] - top) / math.fsum(math.exp(x - top) for x in row))
    return found


def test_probabilities_are_those_of_a_literal_loop(kind, tiny_models):
    """Every token given the true ones before it, in a row of any length; the first has none."""
    model = tiny_models[kind]
    rows = [torch.randint(4, 97, (length,)).tolist() for length in (1, 2, 40)]
    found = explain.probabilities(model, rows)
    assert [row[0] for row in found] == [None] * 3 and [len(row) for row in found] == [1, 2, 40]
    for ids, (_, *row) in zip(rows, found, strict=True):
        assert row == pytest.approx(loop(model, ids), rel=1e-6)  # GPT-Neo attends in float32


def test_a_long_text_is_as_a_short_one(tiny_models):
    """More tokens than one part of the logits: none lost where parts meet. Dropout is off, and the mode is put back."""
    model = tiny_models["llama"].train()
    ids = torch.randint(4, 97, (600,)).tolist()
    (_, *row) = explain.probabilities(model, [ids])[0]
    assert model.training
    logits = model.eval()(torch.tensor([ids])).logits[0].softmax(1)
    assert row == pytest.approx([logits[t - 1, ids[t]].item() for t in range(1, 600)], rel=1e-6)


def test_what_is_not_finite_is_not_known(make_model):
    """A model of NaN: no figure, and a page that is still JSON."""
    model = make_model("gpt_neo", vocab=320)
    model.get_output_embeddings().weight.data.fill_(math.nan)
    ids = tokenizer_of()("a text")["input_ids"]
    (row,) = explain.probabilities(model, [ids])
    assert row == [None] * len(ids)
    shown = explain.describe(
        tokenizer_of(), "a text", ids=ids, cut=1, before=row, after=row, id="x", said={}
    )
    assert shown["left"] is None and data_of(explain.page({}, [shown]).decode())["texts"] == [shown]


# --- characters ---


def shown_as(text, kind="gpt_neo", normalizer=None):
    """[(characters, number of tokens)] of a text."""
    tokenizer = tokenizer_of(kind, normalizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = explain.pieces(tokenizer, ids, text)
    edges = [(0, 0), *((token, at) for _, token, _, at in parts)]
    assert [(first, start) for first, _, start, _ in parts] == edges[:-1] and edges[-1] == (
        len(ids),
        len(text),
    )
    return [(text[start:end], last - first) for first, last, start, end in parts]


def test_a_character_of_several_tokens_is_one_piece():
    """Known answers: bytes of a letter or picture, a letter and its accent, a family joined of two people."""
    assert shown_as("aש") == [("a", 1), ("ש", 2)]
    assert shown_as("🙂!") == [("🙂", 4), ("!", 1)]
    assert shown_as("e\u0301x") == [("e\u0301", 3), ("x", 1)]
    assert shown_as("👩‍👧") == [("👩‍👧", 11)]
    assert shown_as("a\ufffdb") == [("a", 1), ("\ufffd", 3), ("b", 1)]


@pytest.mark.parametrize("normalizer", [None, "Lowercase", "NFC", "NFKD", "Strip", "StripAccents"])
@settings(max_examples=60, deadline=None)
@given(
    st.text(
        st.one_of(st.characters(codec="utf-8"), st.sampled_from("aAé e\u0301שﬁ ")),
        min_size=1,
        max_size=12,
    )
)
def test_no_character_is_lost_or_doubled(normalizer, text):
    """Pieces put together are the text, and their tokens all tokens, whatever the tokenizer makes of it."""
    if tokenizer_of(normalizer=normalizer)(text, add_special_tokens=False)["input_ids"]:
        pieces = shown_as(text, normalizer=normalizer)
        assert "".join(piece for piece, _ in pieces) == text and all(
            tokens > 0 for _, tokens in pieces
        )


def test_another_spelling_is_aligned():
    """Known answers of tokenizers that say less than the text: each token's own characters all the same."""
    assert shown_as("AB cD", normalizer="Lowercase") == [
        ("A", 1),
        ("B", 1),
        (" ", 1),
        ("c", 1),
        ("D", 1),
    ]
    assert shown_as("  ab", normalizer="Strip") == [("  a", 1), ("b", 1)]
    assert shown_as("e\u0301x", normalizer="NFC") == [("e\u0301", 2), ("x", 1)]


def test_figures_stand_at_their_tokens():
    """A BOS in front is no character; a joined piece has the product; the means are over the suffix, or the spans."""
    tokenizer, text = tokenizer_of("llama"), "xש!y"  # x, two bytes, !, y
    bos, *ids = tokenizer(text)["input_ids"]
    assert bos == tokenizer.bos_token_id and len(ids) == 5
    before, after = [None, 0.5, 0.5, 0.4, 0.9, 0.7], [None, 0.1, 0.2, 0.3, 0.4, 0.6]
    how = {"ids": [bos, *ids], "cut": 4, "before": before, "after": after, "id": "7"}
    shown = explain.describe(tokenizer, text, **how)
    assert (
        shown["pieces"] == ["x", "ש", "!", "y"]
        and shown["tokens"] == [1, 2, 1, 1]
        and shown["cut"] == 2
    )
    assert shown["before"] == pytest.approx([0.5, 0.2, 0.9, 0.7]) and shown["id"] == "7"
    assert shown["after"] == pytest.approx([0.1, 0.06, 0.4, 0.6]) and shown["marked"] == []
    assert (shown["was"], shown["left"]) == pytest.approx((0.8, 0.5))
    shown = explain.describe(tokenizer, text, spans=[(1, 2), (3, 4)], **how)
    assert shown["marked"] == [1, 3] and (shown["was"], shown["left"]) == pytest.approx(
        (1.6 / 3, 1.1 / 3)
    )


def test_nothing_of_a_text_is_markup():
    """Scripts, comments, quotes and entities in texts, ids and answers come back as they are, in one JSON element."""
    empty = Reader(explain.page({}, []).decode()).tags
    text = explain.describe(
        tokenizer_of(), EVIL, ids=tokenizer_of()(EVIL)["input_ids"], cut=9, before=[0.5] * 999, after=[0.5] * 999,
        id=EVIL, said={"before": EVIL, "after": "@DATA@"},
    )  # fmt: skip
    page = explain.page({"run": EVIL}, [text]).decode()
    assert data_of(page) == {"about": {"run": EVIL}, "texts": [text]} and Reader(page).tags == empty
    assert "".join(text["pieces"]) == EVIL


# --- a run ---


@pytest.fixture(scope="module")
def made(tmp_path_factory, save_tiny, encoder_dir):
    """A folder with pairs.jsonl, model/ and a run of one epoch that is explained; nobody changes it."""
    root = tmp_path_factory.mktemp("explain")
    data.write_jsonl(root / "pairs.jsonl", pairs_of(TEXTS))
    memorise(save_tiny("opt", root / "model"), pairs_of(TEXTS), steps=40)
    words = [
        "--pairs",
        root / "pairs.jsonl",
        "--model",
        root / "model",
        "--bert",
        encoder_dir,
        "--device",
        "cpu",
    ]
    words += [
        "--max-epochs",
        "1",
        "--thresholds",
        "1e-9,1e-9",
        "--lr",
        "1e-3",
        "--out",
        root / "run",
    ]
    icu.main(argv=[str(word) for word in words])
    report.main([str(root / "run"), "--explain"])
    return root


def shown(folder):
    data = data_of((folder / "explain.html").read_text(encoding="utf-8"))
    return data["about"], {text["id"]: text for text in data["texts"]}


def secret_of(text):
    """The letters of what is marked: whether a space before a word is one token with it is the tokenizer's choice."""
    return "".join(text["pieces"][n].strip() for n in text["marked"])


def test_a_run_is_shown_with_the_figures_of_its_two_models(made):
    """Each token's figure is that of a loop in float64 over the folders; texts, marks and answers are the run's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    about, texts = shown(made / "run")
    assert about["method"] == "icu" and list(texts) == list(TEXTS)
    rows = data.read_jsonl(made / "run" / "samples.jsonl")
    for when, folder, epoch in (
        ("before", made / "model", 0),
        ("after", made / "run" / "model", 1),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        said = {row["id"]: row["generation"] for row in rows if row["epoch"] == epoch}
        for id, (prefix, suffix) in TEXTS.items():
            head, tail = (
                tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prefix, suffix)
            )
            text, likely = texts[id], loop(model, [tokenizer.bos_token_id, *head, *tail])
            assert "".join(text["pieces"]) == prefix + suffix and sum(text["tokens"]) == len(likely)
            at = 0
            for tokens, p in zip(text["tokens"], text[when], strict=True):
                assert p == pytest.approx(math.prod(likely[at : at + tokens]), abs=1e-5)
                at += tokens
            assert (
                "".join(text["pieces"][: text["cut"]]) == prefix and text["said"][when] == said[id]
            )
            if not text["marked"]:
                assert text["was" if when == "before" else "left"] == pytest.approx(
                    sum(likely[len(head) :]) / len(tail)
                )
    assert secret_of(texts["plain"]) == "14HarbourLaneTuesday"
    assert [id for id in texts if texts[id]["marked"]] == ["plain"]


def test_context_is_shown_where_the_model_read_it(made):
    """--context: in front of the prefix, and spans still count from the prefix."""
    pair = pairs_of({"plain": TEXTS["plain"]})[0] | {"context": "Call the clinic. "}
    run = report.read_run(made / "run")
    run["config"] |= {"context": True}
    run["samples"] = [row for row in run["samples"] if row["id"] == "plain"]
    ready = explain.prepare(run, {"plain": pair, "other": None}, icu.build_samples)
    (text,) = data_of(explain.make(run, **ready).decode())["texts"]
    assert "".join(text["pieces"]) == pair["context"] + pair["prefix"] + pair["suffix"]
    assert "".join(text["pieces"][: text["cut"]]) == pair["context"] + pair["prefix"]
    assert secret_of(text) == "14HarbourLaneTuesday"


@pytest.fixture
def alone(made, tmp_path, monkeypatch):
    """A copy of the run with pairs and a cache of its own, so that a purge reaches nothing else."""
    monkeypatch.setenv("ICU_CACHE", str(tmp_path / "cache"))
    shutil.copy(made / "pairs.jsonl", tmp_path)
    run = shutil.copytree(made / "run", tmp_path / "run")
    edit(run / "config.json", lambda config: config | {"pairs": str(tmp_path / "pairs.jsonl")})
    return run


def test_only_the_owner_can_read_it_and_purge_removes_it(alone, capsys):
    """0600; in the list of traces; a purge takes it, half-written ones too, and then there is nothing to explain."""
    page = alone / "explain.html"
    page.write_text("")  # one that is empty holds nothing to lose
    report.main([str(alone), "--explain"])
    assert stat.S_IMODE(page.stat().st_mode) == 0o600 and len(shown(alone)[1]) == len(TEXTS)
    shutil.copy(page, alone / "explain.html.77.tmp")
    shutil.copy(page, alone.parent / "kept.html")
    purge.purge_run(alone.resolve(), dry_run=False)
    assert capsys.readouterr().out.count("(explanation, ") == 2  # the page, and half of one
    left = [
        path.name
        for path in alone.parent.rglob("*")
        if path.is_file() and "Harbour" in path.read_text("latin-1")
    ]
    assert left == ["kept.html"]
    assert "holds no texts" in refused([alone, "--explain"], capsys, alone.parent)


def test_a_page_of_someone_elses_is_left(alone, capsys):
    """A file of that name that --explain has not written is not replaced, and not purged."""
    (alone / "explain.html").write_text("<!doctype html>\n<p>my notes</p>\n")
    purge.purge_run(alone.resolve(), dry_run=False)
    assert (alone / "explain.html").read_text().endswith("my notes</p>\n")


def test_a_report_without_texts_removes_it(alone, capsys):
    """As it removes cases.md: what --redact leaves shows no text."""
    report.main([str(alone), "--redact"])
    assert "explain.html of an earlier report is removed" in capsys.readouterr().out
    assert not (alone / "explain.html").exists()


def put(**values):
    return lambda run: edit(run / "config.json", lambda config: config | values)


def add_pair(run):
    """The pairs file has a row more than when the run was made."""
    path = run.parent / "pairs.jsonl"
    data.write_jsonl(path, [*data.read_jsonl(path), pairs_of({"new": TEXTS["plain"]})[0]])


BAD = {
    "redacted": (put(redact=True), [], "holds no texts"),
    "other pairs": (add_pair, [], "not the pairs that"),
    "other model": (lambda run: put(model=str(run / "model"))(run), [], "not the model that"),
    "no pairs named": (put(pairs=None), [], "no such file"),
    "no pairs": (lambda run: (run.parent / "pairs.jsonl").unlink(), [], "pairs.jsonl"),
    "no model": (lambda run: shutil.rmtree(run / "model"), [], "no model of its own"),
    "no weights": (lambda run: (run / "model" / "model.safetensors").unlink(), [], "no weights"),
    "redact": (lambda run: None, ["--redact"], "pass one of them"),
}


@pytest.mark.parametrize("change, flags, message", BAD.values(), ids=BAD)
def test_what_cannot_be_explained_is_one_line(alone, change, flags, message, capsys, monkeypatch):
    """Exit 2 before a weight is loaded, and every file is as it was."""
    change(alone)
    monkeypatch.setattr(
        explain.models, "load_model", lambda *_, **__: pytest.fail("weights were loaded")
    )
    assert message in refused([alone, "--explain", *flags], capsys, alone.parent)


def test_of_several_runs_those_that_have_unlearned_are_explained(alone, capsys):
    """Each in its own folder; a run that only measured is passed over."""
    measured, other = alone.parent / "measured", shutil.copytree(alone, alone.parent / "other")
    shutil.copytree(alone, measured)
    shutil.rmtree(measured / "model")
    edit(measured / "summary.json", lambda summary: summary | {"method": "none"})
    for folder in (alone, other, measured):
        (folder / "explain.html").unlink()
    report.main(
        [*map(str, (measured, alone, other)), "--out", str(alone.parent / "all"), "--explain"]
    )
    assert capsys.readouterr().out.count("explained: ") == 2
    assert (alone / "explain.html").exists() and (other / "explain.html").exists()
    assert (
        not (measured / "explain.html").exists()
        and not (alone.parent / "all" / "explain.html").exists()
    )


def test_a_run_begun_again_has_none(made, tmp_path):
    """--overwrite removes it with the run's other files."""
    from kit import paths, runs

    run = shutil.copytree(made / "run", tmp_path / "run")
    assert "explain.html" in paths.RUN_FILES
    runs.start_run_folder(run, {"pairs": "p"})
    assert not (run / "explain.html").exists() and "Harbour" not in str(listing(run))


# --- the page in a browser ---


@pytest.fixture(scope="module")
def browser():
    """A Chromium without a window; skips where there is none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no browser tests: pip install playwright"
    )
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        found = next(
            filter(None, map(shutil.which, (own, "chromium", "chromium-browser", "google-chrome"))),
            None,
        )
        if found is None:
            pytest.skip(
                "no browser tests: neither chromium nor google-chrome is installed (playwright install chromium)"
            )
        with driver.chromium.launch(executable_path=found, args=["--no-sandbox"]) as started:
            yield started


FIGURES = {
    "plain": (0.9, 0.1),
    "hebrew": (0.95, 0.3),
    "arabic": (0.5, 0.4),
    "markup": (0.2, 0.15),
    "long": (1.0, 0.02),
}
WIDTHS = {"phone": (390, 844), "desktop": (1280, 900)}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A page of the five texts with made-up figures: all tokens of a text alike, but in a long one from 0 to 1."""
    texts, tokenizer = [], tokenizer_of()
    for pair in pairs_of(TEXTS):
        id, text = pair["id"], pair["prefix"] + pair["suffix"] * (20 if pair["id"] == "long" else 1)
        ids, cut = tokenizer(text)["input_ids"], len(tokenizer(pair["prefix"])["input_ids"])
        before, after = ([None, *[p] * (len(ids) - 1)] for p in FIGURES[id])
        if id == "long":
            before = [None, *(n / (len(ids) - 2) for n in range(len(ids) - 1))]
        how = {"before": before, "after": after, "spans": pair.get("spans", ()), "id": id}
        texts.append(
            explain.describe(
                tokenizer, text, ids=ids, cut=cut, said={"before": text, "after": ""}, **how
            )
        )
    path = tmp_path_factory.mktemp("page") / "explain.html"
    path.write_bytes(explain.page({"run": EVIL}, texts))
    return path, {text["id"]: text for text in texts}


@pytest.fixture(params=WIDTHS)
def page(request, browser, page_file):
    """The page as a phone or a desktop has it; it must print no error and ask for nothing but itself."""
    width, height = WIDTHS[request.param]
    with browser.new_page(viewport={"width": width, "height": height}) as opened:
        asked, errors = [], []
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.on("console", lambda message: errors.append(message.text))
        opened.goto(page_file[0].as_uri())
        yield opened
        assert asked == [page_file[0].as_uri()] and errors == []


def box_of(page, id, when="before", kind="views"):
    """A text's tokens (views), or what the model said (said)."""
    return page.locator("article", has=page.locator("h2", has_text=id)).locator(
        f".{kind} .{when} .text"
    )


def order(page):
    return page.locator("article:not([hidden]) h2 bdi").all_text_contents()


def displayed(page, selector):
    """How many elements have a place on the page, be it out of sight."""
    return page.locator(selector).evaluate_all(
        "all => all.filter(e => getComputedStyle(e).display !== 'none').length"
    )


def test_a_browser_shows_every_text_as_it_is(page, page_file):
    """Letter by letter, before and after; no text becomes an element or a title; nothing is wider than the screen."""
    assert page.title() == "What is left" and EVIL in page.locator("#about").text_content()
    for id, text in page_file[1].items():
        for when in ("before", "after"):
            box = box_of(page, id, when)
            assert box.text_content() == "".join(text["pieces"])
            assert box.locator("span").count() == len(text["pieces"])
            assert box_of(page, id, when, "said").text_content() == (
                text["said"][when] or "(nothing)"
            )
    assert page.locator(".text b").count() == 0 and page.locator("script").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_browser_scrolls_a_long_text_in_its_box(page):
    """Its beginning does not push the next text away, and before and after stay at the same lines."""
    boxes = [box_of(page, "long", when) for when in ("before", "after")]
    height, whole = boxes[0].evaluate("box => [box.clientHeight, box.scrollHeight]")
    assert height < 300 < 3 * height < whole
    boxes[0].evaluate("box => { box.scrollTop = 200; }")
    page.wait_for_function("box => box.scrollTop === 200", arg=boxes[1].element_handle())


def test_a_browser_runs_a_text_its_own_way(page):
    """Hebrew and Arabic run from the right: the first token stands right of the last, the suffix left of its mark."""
    for id, first, last in (("hebrew", 0, -1), ("arabic", 0, -1), ("plain", -1, 0)):
        box = box_of(page, id)
        x = box.evaluate(
            "box => [...box.querySelectorAll('span')].map(s => s.getBoundingClientRect().x)"
        )
        assert x[first] > x[last], id
        assert box.evaluate("box => getComputedStyle(box).direction") == (
            "ltr" if id == "plain" else "rtl"
        )


def test_a_browser_sorts_filters_and_shows(page):
    """By what is left (most first), by drop (most first) and by id; by words of a text or id; before or after alone."""
    assert order(page) == ["arabic", "hebrew", "markup", "plain", "long"]
    page.select_option("#sort", "drop")
    drops = {"plain": 0.8, "hebrew": 0.65, "arabic": 0.1, "markup": 0.05}
    assert [id for id in order(page) if id in drops] == list(drops)
    page.select_option("#sort", "id")
    assert order(page) == sorted(TEXTS)
    page.fill("#filter", "HARBOUR lane")
    assert (
        displayed(page, "article") == 2
        and order(page) == ["long", "plain"]
        and page.locator("#count").inner_text() == "2 of 5 texts"
    )
    page.fill("#filter", "hebr")
    assert order(page) == ["hebrew"]
    page.fill("#filter", "")
    page.select_option("#show", "after-only")
    assert (displayed(page, ".before"), displayed(page, ".after")) == (0, 10)
    page.select_option("#show", "")
    assert (displayed(page, ".before"), displayed(page, ".after")) == (10, 10)


def test_a_browser_tells_a_token_and_marks_secrets(page):
    """A tap says a token's figures; what is marked is underlined; what nothing predicts is hatched."""
    box = box_of(page, "hebrew")
    box.locator("span").nth(3).click()
    assert (
        page.locator("#token").inner_text() == '"ם" (2 tokens): before 90.3 %, after 9.0 %'
    )  # 0.95 and 0.3, squared
    box = box_of(page, "plain")
    marked = box.locator(".marked").all_text_contents()
    assert "".join(piece.strip() for piece in marked) == "14HarbourLaneTuesday"
    assert "underline" in box.locator(".marked").first.evaluate(
        "span => getComputedStyle(span).textDecorationLine"
    )
    assert box.locator(".unknown").count() == 1


def test_a_browser_has_one_scale_that_all_can_read(page):
    """The surer, the darker, for eyes without colours too; and every letter has a contrast of 4.5 to 1 (WCAG 2, AA)."""
    box = box_of(page, "long")
    colours = box.evaluate("""box => [...box.querySelectorAll('span:not(.unknown)')].map(
        s => [getComputedStyle(s).backgroundColor, getComputedStyle(s).color])""")

    def luminance(colour):
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
        r, g, b = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    grounds, inks = ([luminance(pair[side]) for pair in colours] for side in (0, 1))
    assert grounds == sorted(grounds, reverse=True) and grounds[0] > 0.9 and grounds[-1] < 0.05
    for ground, ink in zip(grounds, inks, strict=True):
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) >= 4.5
