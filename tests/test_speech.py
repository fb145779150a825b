"""evals/report.py --speech: the figures of a loop by hand, one reader for all runs, and one line for what it cannot read.

python -m pytest tests/test_speech.py -q
"""

import csv
import math
import shutil

import pytest
import torch
from survive import memorise
from test_explain import loop, refused
from test_report import edit

import icu
from evals import report
from extras import speech
from kit import data

TEXTS = [
    ("a", "The parcel for Ines Duarte was left", " at 14 Harbour Lane on Tuesday."),
    ("b", "Payments are due on the first day", " of each month; 7731."),
]
LEARN = {
    "learn_id": "n",
    "learn_context": "",
    "learn_prefix": "A neighbour saw",
    "learn_suffix": " the old mill.",
}
PAIRS = [
    {"id": id, "context": "", "prefix": p, "suffix": s, **LEARN, "similarity": 0.5}
    for id, p, s in TEXTS
]


def test_surprise_is_a_literal_loop(kind, tiny_models):
    """Of what was said alone, behind a prompt of any length; nothing said is no surprise."""
    model, ids = tiny_models[kind], torch.randint(4, 97, (30,)).tolist()
    for at in (1, 12, 29):
        by_hand = -sum(math.log(p) for p in loop(model, ids)[at - 1 :])
        assert speech.surprise(model, ids[:at], ids[at:]) == pytest.approx(by_hand, rel=1e-5)
    assert speech.surprise(model, ids, []) == 0


SAID = {
    "all known": ([("The van", " was HERE, 5 times.")], {"was", "here", "times"}, 0.0),
    "half": ([("a", " dog dogs")], {"dog"}, 0.5),
    "a word that the prefix began": ([("a licen", "se dependencieslegesfera")], set(), 1.0),
    "that word alone": ([("a licen", "se")], set(), None),
    "over all texts": ([("", "one two"), ("", "one"), ("", "")], {"one"}, 1 / 3),
    "letters of any script": ([("", "שלום émigré _x_")], {"שלום"}, 2 / 3),
    "no word": ([("x", " 12 ...")], set(), None),
}


@pytest.mark.parametrize("said, known, share", SAID.values(), ids=SAID)
def test_new_words(said, known, share):
    assert speech.new_words(said, known) == share


def test_words_of_pairs_are_whole():
    """A word cut between prefix and suffix is one; a context is a text of its own."""
    pair = {
        "context": "One",
        "prefix": "two thr",
        "suffix": "ee",
        "learn_context": "",
        "learn_prefix": "F",
        "learn_suffix": "our",
    }
    assert speech.words_of([pair]) == {"one", "two", "three"} and speech.words_of(
        [pair], "learn_"
    ) == {"four"}


@pytest.fixture(scope="module")
def made(tmp_path_factory, save_tiny, encoder_dir):
    """A folder with two models, a run that unlearned, one that measured the other model, and texts."""
    root = tmp_path_factory.mktemp("speech")
    data.write_jsonl(root / "pairs.jsonl", PAIRS)
    data.write_jsonl(root / "texts.jsonl", [{"text": "The clinic said that nothing was missing."}])
    for name, steps in (("model", 60), ("other", 5)):
        memorise(save_tiny("opt", root / name), PAIRS, steps=steps)
    words = [
        "--pairs",
        root / "pairs.jsonl",
        "--bert",
        encoder_dir,
        "--device",
        "cpu",
        "--lr",
        "1e-3",
        "--max-epochs",
        "1",
    ]
    for model, out, more in (("model", "run", []), ("other", "never", ["--eval-only"])):
        run = [
            *words,
            "--thresholds",
            "1e-9,1e-9",
            "--model",
            root / model,
            "--out",
            root / out,
            *more,
        ]
        icu.main(argv=[str(word) for word in run])
    return root


def asked(root, out, *runs):
    report.main([*map(str, runs), "--out", str(out), "--speech", str(root / "texts.jsonl")])
    return {row["model"]: row for row in csv.DictReader((out / "table.csv").open(encoding="utf-8"))}


def test_every_run_is_read_by_the_model_before(made, tmp_path, capsys):
    """Also one that measured another model: its own answers, as the model before finds them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = asked(made, tmp_path / "out", made / "run", made / "never")
    model = AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    known = speech.words_of(PAIRS) | speech.words_of(PAIRS, "learn_")
    known |= set("the clinic said that nothing was missing".split())
    for label, folder, epoch in (
        ("model (before)", "run", 0),
        ("icu", "run", 1),
        ("other", "never", 0),
    ):
        total = count = 0
        samples = [
            row for row in data.read_jsonl(made / folder / "samples.jsonl") if row["epoch"] == epoch
        ]
        said = {row["id"]: row["generation"] for row in samples}
        for pair in PAIRS:
            prompt = [
                tokenizer.bos_token_id,
                *tokenizer(pair["prefix"], add_special_tokens=False)["input_ids"],
            ]
            ids = tokenizer(said[pair["id"]], add_special_tokens=False)["input_ids"]
            total -= sum(map(math.log, loop(model, prompt + ids)[len(prompt) - 1 :]))
            count += len(ids)
        assert float(rows[label]["said_ppl"]) == pytest.approx(math.exp(total / count), rel=1e-4)
        texts = [(pair["prefix"], said[pair["id"]]) for pair in PAIRS]
        assert float(rows[label]["new_words"]) == pytest.approx(speech.new_words(texts, known))
    assert "Said (PPL)" in capsys.readouterr().out


BAD = {
    "no texts": (
        lambda run: edit(run / "config.json", lambda c: c | {"redact": True}),
        "leave it or --speech out",
    ),
    "other pairs": (
        lambda run: data.write_jsonl(run.parent / "pairs.jsonl", PAIRS[:1]),
        "not the pairs that",
    ),
    "another model": (
        lambda run: shutil.copytree(run.parent / "other", run.parent / "model", dirs_exist_ok=True),
        "not the model",
    ),
    "no file of texts": (lambda run: (run.parent / "texts.jsonl").unlink(), "texts.jsonl"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_one_line(change, message, made, tmp_path, capsys, monkeypatch):
    """Exit 2 before a weight is loaded, and every file is as it was."""
    root = shutil.copytree(made, tmp_path / "made")
    paths = {"pairs": str(root / "pairs.jsonl"), "model": str(root / "model")}
    edit(root / "run" / "config.json", lambda config: config | paths)
    change(root / "run")
    monkeypatch.setattr(
        speech.models, "load_model", lambda *_, **__: pytest.fail("weights were loaded")
    )
    assert message in refused([root / "run", "--speech", root / "texts.jsonl"], capsys, root)


def test_one_model_reads_all(made, tmp_path, capsys):
    """Runs that began with different models are not put beside each other."""
    second = shutil.copytree(made / "never", tmp_path / "second")
    edit(second / "summary.json", lambda summary: summary | {"method": "icu"})
    error = refused(
        [made / "run", second, "--out", tmp_path / "out", "--speech", made / "texts.jsonl"],
        capsys,
        tmp_path,
    )
    assert "one model reads all" in error and "other" in error
