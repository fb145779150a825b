"""report.py --explain: the figures of a literal loop, every character of a text once, nothing of it read as markup, and
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
from test_report import edit, listing, refused
from tokenizers import normalizers

import icu
import report
from kit import explain, files, purge, traces

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


def pairs_of(texts):
    learn = {"learn_id": "n", "learn_context": "", "learn_prefix": LEARN[0], "learn_suffix": LEARN[1]}
    pairs = [{"id": id, "context": "", "prefix": a, "suffix": b, **learn} for id, (a, b) in texts.items()]
    return [
        pair | {"similarity": 0.5} | ({"spans": SPANS[pair["id"]]} if pair["id"] in SPANS else {}) for pair in pairs
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
    shown = explain.describe(tokenizer_of(), "a text", ids=ids, cut=1, before=row, after=row, id="x", said={})
    assert shown["left"] is None and data_of(explain.page({}, [shown]).decode())["texts"] == [shown]


# --- characters ---


def shown_as(text, kind="gpt_neo", normalizer=None):
    """[(characters, number of tokens)] of a text."""
    tokenizer = tokenizer_of(kind, normalizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = explain.pieces(tokenizer, ids, text)
    edges = [(0, 0), *((token, at) for _, token, _, at in parts)]
    assert [(first, start) for first, _, start, _ in parts] == edges[:-1] and edges[-1] == (len(ids), len(text))
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
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aAé e\u0301שﬁ ")), min_size=1, max_size=12))
def test_no_character_is_lost_or_doubled(normalizer, text):
    """Pieces put together are the text, and their tokens all tokens, whatever the tokenizer makes of it."""
    if tokenizer_of(normalizer=normalizer)(text, add_special_tokens=False)["input_ids"]:
        pieces = shown_as(text, normalizer=normalizer)
        assert "".join(piece for piece, _ in pieces) == text and all(tokens > 0 for _, tokens in pieces)


def test_another_spelling_is_aligned():
    """Known answers of tokenizers that say less than the text: each token's own characters all the same."""
    assert shown_as("AB cD", normalizer="Lowercase") == [("A", 1), ("B", 1), (" ", 1), ("c", 1), ("D", 1)]
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
    assert shown["pieces"] == ["x", "ש", "!", "y"] and shown["tokens"] == [1, 2, 1, 1] and shown["cut"] == 2
    assert shown["before"] == pytest.approx([0.5, 0.2, 0.9, 0.7]) and shown["id"] == "7"
    assert shown["after"] == pytest.approx([0.1, 0.06, 0.4, 0.6]) and shown["marked"] == []
    assert (shown["was"], shown["left"]) == pytest.approx((0.8, 0.5))
    shown = explain.describe(tokenizer, text, spans=[(1, 2), (3, 4)], **how)
    assert shown["marked"] == [1, 3] and (shown["was"], shown["left"]) == pytest.approx((1.6 / 3, 1.1 / 3))


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
    files.write_jsonl(root / "pairs.jsonl", pairs_of(TEXTS))
    memorise(save_tiny("opt", root / "model"), pairs_of(TEXTS), steps=40)
    words = ["--pairs", root / "pairs.jsonl", "--model", root / "model", "--bert", encoder_dir, "--device", "cpu"]
    words += ["--max-epochs", "1", "--thresholds", "1e-9,1e-9", "--lr", "1e-3", "--out", root / "run"]
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
    rows = files.read_jsonl(made / "run" / "samples.jsonl")
    for when, folder, epoch in (("before", made / "model", 0), ("after", made / "run" / "model", 1)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        said = {row["id"]: row["generation"] for row in rows if row["epoch"] == epoch}
        for id, (prefix, suffix) in TEXTS.items():
            head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prefix, suffix))
            text, likely = texts[id], loop(model, [tokenizer.bos_token_id, *head, *tail])
            assert "".join(text["pieces"]) == prefix + suffix and sum(text["tokens"]) == len(likely)
            at = 0
            for tokens, p in zip(text["tokens"], text[when], strict=True):
                assert p == pytest.approx(math.prod(likely[at : at + tokens]), abs=1e-5)
                at += tokens
            assert "".join(text["pieces"][: text["cut"]]) == prefix and text["said"][when] == said[id]
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
    ready = explain.prepare(run, [pair], icu.build_samples)
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
    assert (page.resolve(), "explanation") in traces.of(files.read_json(alone / "config.json")["sha256"]["pairs"])
    shutil.copy(page, alone / "explain.html.77.tmp")
    shutil.copy(page, alone.parent / "kept.html")
    purge.purge_run(alone.resolve(), dry_run=False)
    assert capsys.readouterr().out.count("(explanation, ") == 2  # the page, and half of one
    left = [path.name for path in alone.parent.rglob("*") if path.is_file() and "Harbour" in path.read_text("latin-1")]
    assert left == ["kept.html"]
    assert "holds no texts" in refused([alone, "--explain"], capsys, alone.parent)


def test_a_page_of_someone_elses_is_left(alone, capsys):
    """A file of that name that --explain has not written is not replaced, and not purged."""
    (alone / "explain.html").write_text("<!doctype html>\n<p>my notes</p>\n")
    assert "not what this command writes" in refused([alone, "--explain"], capsys, alone.parent)
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
    files.write_jsonl(path, [*files.read_jsonl(path), pairs_of({"new": TEXTS["plain"]})[0]])


BAD = {
    "redacted": (put(redact=True), [], "holds no texts"),
    "other pairs": (add_pair, [], "not the pairs that"),
    "other model": (lambda run: put(model=str(run / "model"))(run), [], "not the model that"),
    "no pairs": (lambda run: (run.parent / "pairs.jsonl").unlink(), [], "pairs.jsonl"),
    "no model": (lambda run: shutil.rmtree(run / "model"), [], "no model of its own"),
    "no weights": (lambda run: (run / "model" / "model.safetensors").unlink(), [], "no weights"),
    "redact": (lambda run: None, ["--redact"], "pass one of them"),
    "a folder": (lambda run: [(run / "explain.html").unlink(), (run / "explain.html").mkdir()], [], "is a folder"),
}


@pytest.mark.parametrize("change, flags, message", BAD.values(), ids=BAD)
def test_what_cannot_be_explained_is_one_line(alone, change, flags, message, capsys, monkeypatch):
    """Exit 2 before a weight is loaded, and every file is as it was."""
    change(alone)
    monkeypatch.setattr(explain.models, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    assert message in refused([alone, "--explain", *flags], capsys, alone.parent)


def test_of_several_runs_those_that_have_unlearned_are_explained(alone, capsys):
    """Each in its own folder; a run that only measured is passed over."""
    measured, other = alone.parent / "measured", shutil.copytree(alone, alone.parent / "other")
    shutil.copytree(alone, measured)
    shutil.rmtree(measured / "model")
    edit(measured / "summary.json", lambda summary: summary | {"method": "none"})
    for folder in (alone, other, measured):
        (folder / "explain.html").unlink()
    report.main([*map(str, (measured, alone, other)), "--out", str(alone.parent / "all"), "--explain"])
    assert capsys.readouterr().out.count("explained: ") == 2
    assert (alone / "explain.html").exists() and (other / "explain.html").exists()
    assert not (measured / "explain.html").exists() and not (alone.parent / "all" / "explain.html").exists()


def test_a_run_begun_again_has_none(made, tmp_path):
    """--overwrite removes it with the run's other files."""
    from kit import paths, runs

    run = shutil.copytree(made / "run", tmp_path / "run")
    assert "explain.html" in paths.RUN_FILES
    runs.start_run_folder(run, {"pairs": "p"})
    assert not (run / "explain.html").exists() and "Harbour" not in str(listing(run))
