"""tiny.py: the corpus is invented, varied and cleanly split, and the folder it makes is whole, loadable and reused.

python -m pytest tests/test_tiny.py -q
"""

import contextlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import tiny

SPLITS = ("forget", "pool", "unseen", "heldout")


@pytest.fixture(scope="module")
def corpus():
    return tiny.make_corpus(0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder made by the real command line: two records, three steps."""
    out = tmp_path_factory.mktemp("tiny") / "made"
    command = [sys.executable, tiny.__file__, "--out", str(out), "--steps", "3", "--forget", "2"]
    return out, subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture
def small(monkeypatch):
    """A corpus that is made in well under a second."""
    for name, value in {"POOL": 40, "UNSEEN": 3, "HELDOUT": 4, "DRAFTS": 60, "VOCAB": 600}.items():
        monkeypatch.setattr(tiny, name, value)
    monkeypatch.setattr(tiny, "SIDE", range(15, 90))


def text_of(row):
    return row["text"] if "text" in row else row["prefix"] + row["suffix"]


def word_grams(text, n):
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


# --- the grammar ---


def test_every_slot_is_defined_and_used():
    """The slots that templates name are those that WORDS defines, the person's own aside."""
    documents, slots = tiny.read_grammar()
    templates = [t for part in documents.values() for group in part.values() for t in group] + list(
        slots.values()
    )
    named = set(re.findall(r"{(\w+)}", " ".join(templates)))
    assert named == set(slots) | {"NAME", "SHE", "HER", "HIM"}
    assert all(t.count("[") == t.count("]") and t.count("{") == t.count("}") for t in templates)


def test_expand_reaches_every_alternative_and_nothing_else():
    """Brackets, nested brackets, slots, fixed slots and digits mean what the comment above the grammar says."""
    rng = random.Random(0)
    texts = {
        tiny.expand("[a|b[c|{x}]] {ME} %#", {"x": "[d|e]"}, rng, {"ME": "me"}) for _ in range(2000)
    }
    assert {t[:-2] for t in texts} == {"a me ", "bc me ", "bd me ", "be me "}
    assert {t[-2] for t in texts} == set("123456789") and {t[-1] for t in texts} == set(
        "0123456789"
    )


def test_each_kind_has_its_templates():
    """A dozen kinds of document, each with openings, body sentences and facts of its own; hundreds of variants."""
    documents, _ = tiny.read_grammar()
    kinds = [kind for kind in documents if kind != "any"]
    assert len(kinds) >= 12
    assert all(
        len(documents[kind][part]) >= 2 for kind in kinds for part in ("open", "body", "fact")
    )
    variants = 0
    for part in documents.values():
        for template in [t for group in part.values() for t in group]:
            product = 1
            for choice in re.findall(r"\[([^\[\]]*)\]", template):
                product *= choice.count("|") + 1
            variants += product
    assert variants > 1000


# --- the corpus ---


def test_rows_have_their_schema_and_sizes(corpus):
    """Counts, keys and unique ids are as promised; the suffix begins with a space, so that the two sides join."""
    rows, _ = corpus
    assert {split: len(rows[split]) for split in SPLITS} == {
        "forget": 32,
        "pool": 1500,
        "unseen": 32,
        "heldout": 200,
    }
    for split in SPLITS:
        keys = {"id", "text"} if split == "heldout" else {"id", "prefix", "suffix"}
        assert all(
            set(row) == keys and all(isinstance(v, str) for v in row.values())
            for row in rows[split]
        )
        assert all(row["suffix"].startswith(" ") for row in rows[split] if "suffix" in row)
    ids = [row["id"] for split in SPLITS for row in rows[split]]
    assert len(set(ids)) == len(ids)


def test_both_sides_have_25_to_45_tokens_and_encode_apart_as_together(corpus):
    """A row's tokens are the same whether prefix and suffix are encoded apart or as one text, and nothing is added."""
    rows, tokenizer = corpus
    for row in rows["forget"] + rows["unseen"] + rows["pool"][:200]:
        prefix, suffix = (tokenizer(row[side])["input_ids"] for side in ("prefix", "suffix"))
        assert 25 <= len(prefix) <= 45 and 25 <= len(suffix) <= 45
        assert prefix + suffix == tokenizer(text_of(row))["input_ids"]
        assert tokenizer.decode(prefix + suffix) == text_of(row)
    assert tokenizer.eos_token_id == 0 and tokenizer.bos_token is None


@pytest.mark.parametrize(("n", "splits"), [(10, ("forget", "unseen", "heldout")), (5, ("forget",))])
def test_no_row_repeats_a_pool_row(n, splits, corpus):
    """No single pool row holds over 20% of the word n-grams of a row that must be forgotten, or that must be new."""
    rows, _ = corpus
    pool = [set(word_grams(text_of(row), n)) for row in rows["pool"]]
    for split in splits:
        for row in rows[split]:
            grams = set(word_grams(text_of(row), n))
            assert max(len(grams & other) for other in pool) <= 0.2 * len(grams), row["id"]


def test_texts_are_distinct_across_all_sets(corpus):
    """Not two texts of the corpus are equal, nor two prefixes of it."""
    rows, _ = corpus
    texts = [text_of(row) for split in SPLITS for row in rows[split]]
    prefixes = [row["prefix"] for split in SPLITS[:3] for row in rows[split]]
    assert len(set(texts)) == len(texts) and len(set(prefixes)) == len(prefixes)


def test_nobody_to_forget_is_mentioned_elsewhere(small, monkeypatch):
    """A document that mentions a person to forget is not kept, even where few names make it likely."""
    people = []
    write = tiny.write_document

    def note(*args):
        document = write(*args)
        people.append(document)
        return document

    monkeypatch.setattr(tiny, "write_document", note)
    monkeypatch.setattr(
        tiny, "WORDS", re.sub(r"(?m)^(woman|man|root|ending): .*\n", "", tiny.WORDS) + FEW_NAMES
    )
    monkeypatch.setattr(tiny.read_grammar, "__defaults__", (tiny.KINDS, tiny.WORDS))
    rows, _ = tiny.make_corpus(0, forget=4)
    names = {prefix + tiny.unmarked(suffix)[0]: name for name, prefix, suffix in people}
    secret = [names[text_of(row)] for row in rows["forget"]]
    others = [text_of(row) for split in SPLITS[1:] for row in rows[split]]
    mentions = [
        name
        for own, prefix, suffix in people
        for name in secret
        if name != own and name in prefix + suffix
    ]
    assert mentions  # so that the next line can fail
    assert not [text for text in others if any(name in text for name in secret)]


FEW_NAMES = """woman: Ada|Bea|Cleo|Dora|Eve|Flo
man: Al|Ben|Cy|Dan|Eli|Fitz
root: Ash|Bram|Cald|Dun|Elm|Fen|Glad
ending: by|dale
"""


def test_every_number_and_mailbox_is_fictional(corpus):
    """Telephone numbers lie in 555-0100 .. 555-0199 and mailboxes under example.org, .net or .com."""
    rows, _ = corpus
    everything = "\n".join(text_of(row) for split in SPLITS for row in rows[split])
    phones = re.findall(r"\d{3}-\d{3}-\d{4}", everything)
    assert len(phones) > 300
    assert all(re.fullmatch(r"[2-9]\d\d-555-01\d\d", phone) for phone in phones)
    assert not re.search(r"555(?!-01\d\d(?!\d))-", everything)
    domains = re.findall(r"@(\S+)", everything)
    assert len(domains) > 100
    assert all(re.match(r"(\w+\.)?example\.(org|net|com)(?![\w-])", domain) for domain in domains)


def test_suffixes_hold_personal_facts(corpus):
    """Every suffix to forget names a number, a person, a place, an illness or a medicine: something to forget."""
    rows, _ = corpus
    assert sum(any(c.isdigit() for c in row["suffix"]) for row in rows["forget"]) >= 0.8 * len(
        rows["forget"]
    )
    assert all(re.search(r"\d|[a-z;,] [A-Z]|[a-z]+itis", row["suffix"]) for row in rows["forget"])


def test_the_corpus_is_varied(corpus):
    """Most word 5-grams of the pool stand in it once, no opening word leads, and all kinds are equally frequent."""
    rows, _ = corpus
    grams = [gram for row in rows["pool"] for gram in word_grams(text_of(row), 5)]
    assert len(set(grams)) / len(grams) > 0.9
    openings = Counter(text_of(row).split()[0] for row in rows["pool"])
    assert max(openings.values()) < 0.1 * len(rows["pool"])
    kinds = {row["id"].split("(")[1] for row in rows["pool"]}
    for kind in kinds:
        assert len(rows["pool"]) / len(kinds) / 3 < sum(
            row["id"].endswith(kind) for row in rows["pool"]
        )


def test_held_out_texts_are_mostly_new(corpus):
    """Under a tenth of the word 5-grams of the held-out texts stand anywhere in the pool."""
    rows, _ = corpus
    pool = {gram for row in rows["pool"] for gram in word_grams(text_of(row), 5)}
    grams = [gram for row in rows["heldout"] for gram in word_grams(text_of(row), 5)]
    assert sum(gram in pool for gram in grams) < 0.1 * len(grams)


def test_a_seed_fixes_the_corpus_and_another_changes_it(small):
    """The same seed gives the same rows and vocabulary; another seed shares no text with it."""
    rows, tokenizer = tiny.make_corpus(3, forget=5)
    again, same = tiny.make_corpus(3, forget=5)
    other, _ = tiny.make_corpus(4, forget=5)
    assert rows == again and tokenizer.get_vocab() == same.get_vocab()
    assert not {text_of(r) for s in SPLITS for r in rows[s]} & {
        text_of(r) for s in SPLITS for r in other[s]
    }
    assert len(rows["forget"]) == 5


# --- training ---


def test_measure_agrees_with_one_row_at_a_time(small):
    """Memorisation accuracy and perplexity of a padded batch are those of its rows alone, position by position."""
    model = tiny.make_model(0).eval()
    sequences = [[5, 6, 7, 8, 9], [10, 11, 0], [0, 0, 0, 12, 13, 14, 15]]
    hits, nll = [], []
    with torch.no_grad():
        for ids in sequences:
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            hits.append(
                sum(int(logp[t - 1].argmax()) == ids[t] for t in range(1, len(ids)))
                / (len(ids) - 1)
            )
            nll += [-logp[t - 1, ids[t]].item() for t in range(1, len(ids))]
    accuracy, perplexity = tiny.measure(model, sequences)
    assert accuracy == pytest.approx(sum(hits) / 3)
    assert perplexity == pytest.approx(torch.tensor(nll).mean().exp().item(), rel=1e-4)


def test_training_memorises_and_stops_itself(small, monkeypatch):
    """Training ends by ENOUGH before its cap and not before MIN_PASSES, and the records are then known by heart."""
    monkeypatch.setattr(tiny, "BATCH", 4)
    monkeypatch.setattr(tiny, "VOCAB", 40)
    rng = random.Random(0)
    forget, pool = ([[rng.randrange(1, 40) for _ in range(12)] for _ in range(n)] for n in (2, 20))
    model = tiny.make_model(0)
    steps = tiny.train(model, forget, pool, steps=200)
    assert 2 * (2 * 30 + 20) / 4 <= steps < 200
    assert tiny.measure(model, forget)[0] >= tiny.ENOUGH > tiny.measure(model, pool)[0]
    assert not model.training


def test_training_is_deterministic():
    """Two trainings from one seed end in identical weights."""
    models = [tiny.make_model(1), tiny.make_model(1)]
    rng = random.Random(0)
    pool = [[rng.randrange(1, 2000) for _ in range(rng.randrange(20, 40))] for _ in range(30)]
    for model in models:
        tiny.train(model, pool[:2], pool, steps=3, seed=1)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(
        first["transformer.wte.weight"], tiny.make_model(1).state_dict()["transformer.wte.weight"]
    )


# --- the folder and the command line ---


def test_the_command_writes_a_whole_and_loadable_folder(made):
    """All files are there, nothing temporary is left, the model and the tokenizer load, and tiny.json says how."""
    out, done = made
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == set(tiny.FILES) and list(
        out.parent.iterdir()
    ) == [out]
    about = json.loads((out / "tiny.json").read_text())
    assert (
        about["settings"] == {"seed": 0, "forget": 2, "steps": 3} and about["result"]["steps"] == 3
    )
    assert (
        "3 steps" in done.stdout and "perplexity" in done.stdout and "not memorised" in done.stdout
    )

    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model, info = AutoModelForCausalLM.from_pretrained(
        out / "model", dtype="float32", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.model_type == "gpt_neo" and set(model.config.attention_layers) == {
        "global",
        "local",
    }
    assert model.config.max_position_embeddings == 256 and model.config.vocab_size == len(tokenizer)
    assert 2e6 < model.num_parameters() == about["result"]["parameters"] < 4e6
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (
        tokenizer.eos_token == "<|endoftext|>" and tokenizer("Call 555-0123.")["input_ids"][0] != 0
    )

    rows = [
        json.loads(line) for line in (out / "forget.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    ids = tiny.encode(rows, tokenizer)
    assert len(rows) == 2 and tiny.measure(model.eval(), ids)[0] == pytest.approx(
        about["result"]["ma_forget"]
    )


def test_a_second_call_reuses_the_folder(made, capsys):
    """With the same settings nothing is written again, and one line says so."""
    out, _ = made
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    tiny.main(["--out", str(out), "--steps", "3", "--forget", "2"])
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and "reused" in printed.out and not printed.err
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_other_settings_or_a_damaged_folder_are_made_again(small, tmp_path, capsys):
    """A folder of other settings, or one that lacks a file, is made anew; what others put into it stays."""
    out = tmp_path / "deep" / "out"
    tiny.main(["--out", str(out), "--steps", "1", "--forget", "2"])
    first = (out / "pool.jsonl").read_bytes()
    (out / "pairs.jsonl").write_text("mine")
    tiny.main(["--out", str(out), "--steps", "1", "--forget", "2", "--seed", "1"])
    assert (
        "making it again" in capsys.readouterr().out and (out / "pool.jsonl").read_bytes() != first
    )
    (out / "model" / "model.safetensors").unlink()
    tiny.main(["--out", str(out), "--steps", "1", "--forget", "2", "--seed", "1"])
    assert (
        "reused" not in capsys.readouterr().out and (out / "model" / "model.safetensors").exists()
    )
    assert (out / "pairs.jsonl").read_text() == "mine" and list(out.parent.iterdir()) == [out]


def test_an_interrupted_run_leaves_nothing(small, tmp_path, monkeypatch):
    """Stopped in the middle of training, it leaves no folder at all, so that the next call starts afresh."""

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "train", stop)
    with contextlib.suppress(KeyboardInterrupt):
        tiny.main(["--out", str(tmp_path / "out"), "--forget", "2"])
    assert list(tmp_path.iterdir()) == []


def test_help_is_complete(capsys):
    """--help exits 0 and names every flag and every file."""
    with pytest.raises(SystemExit) as exit:
        tiny.main(["--help"])
    printed = capsys.readouterr().out
    assert exit.value.code == 0
    assert all(
        word in printed
        for word in ("--out", "--seed", "--forget", "--steps", "--debug", *tiny.FILES)
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--out"),
        (["--out", "x", "--steps", "0"], "--steps 0"),
        (["--out", "x", "--steps", "-3"], "--steps -3"),
        (["--out", "x", "--steps", "nan"], "nan"),
        (["--out", "x", "--forget", "0"], "--forget 0"),
        (["--out", "x", "--forget", "5000"], "--forget 5000"),
        (["--out", "x", "--seed", "-1"], "'-1'"),
        (["--out", "x", "--sed", "1"], "--sed"),
        (["--out", "a-file"], "is a file"),
        (["--out", "a-file/x"], "a-file"),
        (["--out", "someone's"], "forget.jsonl but no tiny.json"),
    ],
)
def test_bad_flags_and_folders_are_refused_before_any_work(flags, said, tmp_path, monkeypatch):
    """A ValueError or OSError names the value, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("")
    Path("someone's").mkdir()
    Path("someone's", "forget.jsonl").write_text("{}")
    monkeypatch.setattr(tiny, "make_corpus", lambda *args: pytest.fail("work began"))
    with pytest.raises((ValueError, OSError)) as error:
        tiny.main(flags)
    assert said in str(error.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "a-file",
        "forget.jsonl",
        "someone's",
    ]


def test_an_error_is_one_line_and_exit_2(tmp_path):
    """On the command line the error is one line on stderr and the exit status is 2."""
    command = [sys.executable, tiny.__file__, "--out", str(tmp_path / "x"), "--steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: --steps 0") and done.stderr.count("\n") == 1
