"""tiny.py: the corpus is invented, varied and cleanly split; its folder is whole and reused."""

import math
import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import metrics
from demo import tiny
from kit import data

SPLITS = ("forget", "pool", "unseen", "heldout")


@pytest.fixture(scope="module")
def corpus():
    return tiny.make_corpus(0)


@pytest.fixture
def small(monkeypatch):
    """A corpus that is made in well under a second."""
    for name, value in {"POOL": 40, "UNSEEN": 3, "HELDOUT": 4, "DRAFTS": 60, "VOCAB": 600}.items():
        monkeypatch.setattr(tiny, name, value)
    monkeypatch.setattr(tiny, "SIDE", range(15, 90))


def text_of(row):
    return row["text"] if "text" in row else row["prefix"] + row["suffix"]


def word_grams(row, n):
    words = text_of(row).split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


# --- the corpus ---


def test_rows_have_their_schema_and_sizes(corpus):
    """A suffix begins with a space."""
    rows, _ = corpus
    sizes = {split: len(rows[split]) for split in SPLITS}
    assert sizes == {"forget": 32, "pool": 1500, "unseen": 32, "heldout": 200}
    for split in SPLITS:
        keys = {"id", "text"} if split == "heldout" else {"id", "prefix", "suffix"}
        assert all(set(row) == keys for row in rows[split])
        assert all(row.get("suffix", " ").startswith(" ") for row in rows[split])
    everything = [row for split in SPLITS for row in rows[split]]
    assert len({row["id"] for row in everything}) == len({*map(text_of, everything)}) == 1764


def test_a_mark_is_what_a_fact_says(corpus):
    """In marked.jsonl, in the suffixes."""
    rows, _ = corpus
    for row, marked in zip(rows["forget"], rows["marked"], strict=True):
        assert marked == row | {"spans": marked["spans"]}
        assert all(len(row["prefix"]) <= a < b <= len(text_of(row)) for a, b in marked["spans"])
    marked = tiny.unmarked("Call \x022-555\x03 at \x02noon\x03")
    assert marked == ("Call 2-555 at noon", [[5, 10], [14, 18]])


def test_both_sides_have_25_to_45_tokens(corpus):
    """The same encoded apart or as one text."""
    rows, tokenizer = corpus
    for row in rows["forget"] + rows["unseen"] + rows["pool"][:200]:
        prefix, suffix = (tokenizer(row[side])["input_ids"] for side in ("prefix", "suffix"))
        assert 25 <= len(prefix) <= 45 and 25 <= len(suffix) <= 45
        assert prefix + suffix == tokenizer(text_of(row))["input_ids"]


@pytest.mark.parametrize(("n", "split"), [(10, "unseen"), (10, "heldout"), (5, "forget")])
def test_no_row_repeats_a_pool_row(n, split, corpus):
    """No pool row holds over 20% of its word n-grams."""
    rows, _ = corpus
    pool = [word_grams(row, n) for row in rows["pool"]]
    for row in rows[split]:
        grams = word_grams(row, n)
        assert max(len(grams & other) for other in pool) <= 0.2 * len(grams), row["id"]


def test_nobody_to_forget_is_mentioned_elsewhere(small, monkeypatch):
    """Such a document is not kept."""
    monkeypatch.setattr(tiny, "SIDE", range(99))
    people, friends = [], []

    def document(kind, documents, slots, rng):
        people.append(f"No. {len(people)}:")
        friends.append(people[len(people) % 20 - 1])
        return people[-1], people[-1], f" a friend of {friends[-1]}"

    monkeypatch.setattr(tiny, "write_document", document)
    rows, _ = tiny.make_corpus(0, records=4)
    secret = {row["prefix"] for row in rows["forget"]}
    others = [text_of(row) for split in SPLITS[1:] for row in rows[split]]
    assert len(secret & set(friends)) == 4
    assert not [text for text in others if any(name in text for name in secret)]


def test_every_number_and_mailbox_is_fictional(corpus):
    """555-0100 .. 555-0199, and example.org, .net, .com."""
    rows, _ = corpus
    everything = "\n".join(text_of(row) for split in SPLITS for row in rows[split])
    phones = re.findall(r"\d{3}-\d{3}-\d{4}", everything)
    assert len(phones) > 300
    assert all(re.fullmatch(r"[2-9]\d\d-555-01\d\d", phone) for phone in phones)
    assert not re.search(r"555(?!-01\d\d(?!\d))-", everything)
    domains = re.findall(r"@(\S+)", everything)
    assert len(domains) > 100
    assert all(re.match(r"(\w+\.)?example\.(org|net|com)(?![\w-])", domain) for domain in domains)


# --- training ---


def test_measure_agrees_with_one_row_at_a_time(small):
    """And with the literal MA."""
    model = tiny.make_model(0).eval()
    sequences = [[5, 6, 7, 8, 9], [10, 11, 0], [0, 0, 0, 12, 13, 14, 15]]
    alone = [tiny.measure(model, [ids]) for ids in sequences]
    literal = [metrics.literal_memorization_accuracy(model, ids) for ids in sequences]
    assert [accuracy for accuracy, _ in alone] == pytest.approx(literal)
    nll = sum(
        math.log(ppl) * (len(ids) - 1) for (_, ppl), ids in zip(alone, sequences, strict=True)
    )
    expected = sum(literal) / 3, math.exp(nll / 12)
    assert tiny.measure(model, sequences) == pytest.approx(expected, rel=1e-4)


def test_training_memorises_and_stops_itself(small, monkeypatch):
    """Between MIN_PASSES and its cap."""
    monkeypatch.setattr(tiny, "BATCH", 4)
    monkeypatch.setattr(tiny, "VOCAB", 40)
    rng = random.Random(0)
    forget, pool = ([[rng.randrange(1, 40) for _ in range(12)] for _ in range(n)] for n in (2, 20))
    model = tiny.make_model(0)
    steps = tiny.train(model, forget, pool, steps=200)
    assert 2 * (2 * 30 + 20) / 4 <= steps < 200
    assert tiny.measure(model, forget)[0] >= tiny.ENOUGH > tiny.measure(model, pool)[0]


# --- the folder ---


def test_a_folder_is_reused_or_made_again_and_the_same(small, tmp_path, capsys):
    """With other settings it is made anew; what others put there stays."""
    out, flags = tmp_path / "deep" / "out", ["--steps", "2", "--records", "2"]
    made, printed = [], []
    for seed in ("0", "0", "1", "0"):
        tiny.main(["--out", str(out), *flags, "--demo-seed", seed])
        (out / "pairs.jsonl").write_text("mine")
        files = sorted(path for path in out.rglob("*.*") if path.name != "pairs.jsonl")
        made.append({path: path.read_bytes() for path in files})
        printed.append(capsys.readouterr().out)
    assert made[0] == made[1] == made[3] != made[2]
    assert "reused" in printed[1] and "making it again" in printed[2] + printed[3]
    assert "allow more --steps" in printed[0]
    names = {path.name for path in out.iterdir()}
    assert names == {*tiny.FILES, "pairs.jsonl"} and list(out.parent.iterdir()) == [out]
    about = data.read_json(out / "tiny.json")
    assert about["settings"] == {"demo_seed": 0, "records": 2, "steps": 2}
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    assert set(model.config.attention_layers) == {"global", "local"}
    ids = tiny.encode(data.read_jsonl(out / "forget.jsonl"), tokenizer)
    expected = pytest.approx(about["result"]["ma_forget"])
    assert len(ids) == 2 and tiny.measure(model.eval(), ids)[0] == expected
