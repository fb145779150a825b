"""Inputs that nobody wants and somebody has: one line and exit 2, before weights are loaded and with nothing written.

    python -m pytest tests/test_hunt.py -q

Each case is a change of a folder with good inputs, the flags of a command and what it must say. What only looks wrong,
and has a right value, is further down.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_models import change_tensors, pair
from test_paths import listing
from transformers import AutoTokenizer

import experiment
import icu
import knn
import metrics
from demo import tiny
from evals import tasks
from kit import commands, data, flags, methods, models, runs

ROOT = Path(__file__).resolve().parents[1]
PAIRS = [pair("0", "The van near", " the old mill."), pair("1", "Call the clinic", " on Tuesday.")]
COPA = {
    "premise": "A vase fell.",
    "choice1": "It broke.",
    "choice2": "It sang.",
    "question": "effect",
    "label": 0,
}


def edit(path, **changes):
    """Changes fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def stopped_with(command, capsys):
    """The one line of a command that ends with exit 2."""
    with pytest.raises(SystemExit) as stopped:
        flags.run_cli(command)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.fixture(scope="module")
def good(tmp_path_factory, save_tiny, encoder_dir):
    """A folder of inputs that every command takes."""
    root = tmp_path_factory.mktemp("good")
    save_tiny("gpt_neo", root / "m")
    data.write_jsonl(root / "pairs.jsonl", PAIRS)
    data.write_jsonl(root / "forget.jsonl", [{"id": "a", "text": "Anna Smith lives near the mill"}])
    data.write_jsonl(
        root / "pool.jsonl", [{"text": "The market closed higher today"}, {"text": "It rained"}]
    )
    data.write_jsonl(root / "texts.jsonl", [{"text": "Some words."}])
    data.write_jsonl(root / "data" / "copa.jsonl", [COPA])
    (root / "encoder").mkdir()
    for path in encoder_dir.rglob("*"):
        place = root / "encoder" / path.relative_to(encoder_dir)
        place.mkdir() if path.is_dir() else os.link(path, place)
    return root


@pytest.fixture
def folder(good, tmp_path, monkeypatch):
    """A copy of it as the working folder; no weights are loaded and no command is run."""
    work = tmp_path / "work"
    shutil.copytree(good, work, copy_function=copy_small)
    models.encoder_tokenizer.cache_clear()  # its key is a path in the working folder
    monkeypatch.chdir(work)
    monkeypatch.setattr(os, "chdir", lambda path: None)
    for module, name in (
        (models, "load_model"),
        (knn, "encode"),
        (commands, "run"),
        (tiny, "make_corpus"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("work began"))
    return work


def copy_small(source, target):
    """The weights of the encoder by a link; what a case damages is written anew."""
    if os.path.getsize(source) > 10**6:
        return os.link(source, target)
    return shutil.copyfile(source, target)


# --- what a case changes ---


def put(path, content):
    """A file anew, whatever was there: text, bytes, a dict as JSON or a list of them as JSON lines."""

    def change():
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        rows = [content] if isinstance(content, dict) else content
        text = "".join(json.dumps(row) + "\n" for row in rows) if isinstance(rows, list) else rows
        place.write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def config(**changes):
    """Fields of the model's config.json."""
    return lambda: edit(Path("m/config.json"), **changes)


def pairs(**changes):
    """Fields of the second pair."""
    return put("pairs.jsonl", [PAIRS[0], PAIRS[1] | changes])


def copa(**changes):
    return put("data/copa.jsonl", [COPA | changes])


def row_of(name, content):
    return put(f"data/{name}", content)


def xml(content):
    return lambda: (os.unlink("data/copa.jsonl"), put("data/copa.xml", content)())


def folder_at(path):
    def change():
        place = Path(path)
        place.unlink(missing_ok=True)
        place.mkdir(parents=True)

    return change


def link(path, target):
    def change():
        place = Path(path)
        place.unlink(missing_ok=True)
        place.symlink_to(target)

    return change


def tensors(change):
    return lambda: change_tensors(Path("m"), change)


def shards(*names):
    """An index that names these files, which are there."""

    def change():
        for name in names:
            if not Path("m", name).exists():
                shutil.copyfile("m/model.safetensors", Path("m", name))
        index = {"metadata": {}, "weight_map": {f"t{n}": name for n, name in enumerate(names)}}
        put("m/model.safetensors.index.json", index)()
        Path("m/model.safetensors").unlink()

    return change


def own_token(folder):
    """A tokenizer with a token more than its model has embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|mask|>"])
    tokenizer.save_pretrained(folder)


def header(text):
    """Weights with this header."""
    return put("m/model.safetensors", len(text).to_bytes(8, "little") + text.encode())


LONG = "x" * 300
ESCAPE = "\x1b[2J"

ICU = {
    # pairs.jsonl
    "pairs: a folder": ([], folder_at("pairs.jsonl"), "pairs.jsonl: is not a file"),
    "pairs: a link to itself": ([], link("pairs.jsonl", "pairs.jsonl"), "pairs.jsonl"),
    "pairs: a name that is too long": (["--pairs", LONG], None, "too long"),
    "pairs: a device": (["--pairs", "/dev/null"], None, "/dev/null: is not a file"),
    "pairs: a pipe": ([], lambda: (os.unlink("pairs.jsonl"), os.mkfifo("pairs.jsonl")), "is not a file"),
    "pairs: an empty name": (["--pairs", ""], None, "--pairs"),
    "pairs: gzip": ([], put("pairs.jsonl", b"\x1f\x8b\x08\x00"), "not UTF-8 at byte 1"),
    "pairs: UTF-16": ([], put("pairs.jsonl", json.dumps(PAIRS[0]).encode("utf-16")), "not UTF-8 at byte 0"),
    "pairs: NUL bytes": ([], put("pairs.jsonl", "\0" * 9), "line 1: not JSON"),
    "pairs: a BOM in the middle": (
        [], put("pairs.jsonl", json.dumps(PAIRS[0]) + "\n\ufeff" + json.dumps(PAIRS[1])), "line 2: not JSON"),
    "pairs: lines cut by U+2028": (
        [], put("pairs.jsonl", json.dumps(PAIRS[0]) + "\u2028" + json.dumps(PAIRS[1])), "line 1: not JSON"),
    "pairs: two objects on a line": (
        [], put("pairs.jsonl", json.dumps(PAIRS[0]) + " " + json.dumps(PAIRS[1])), "line 1: not JSON"),
    "pairs: an array of pairs": ([], put("pairs.jsonl", json.dumps(PAIRS)), "line 1: expected an object"),
    "pairs: one object over many lines": ([], put("pairs.jsonl", json.dumps(PAIRS[0], indent=1)), "line 1: not JSON"),
    "pairs: a pair of half a surrogate": ([], pairs(learn_prefix="a \udc00 b"), "line 2: `learn_prefix` holds half"),
    "pairs: half a surrogate in an id": ([], pairs(id="\ud800"), "line 2: `id` holds half"),
    "pairs: half a surrogate in a context": ([], pairs(context="\ud800"), "line 2: `context` holds half"),
    "pairs: a suffix of U+2028": ([], pairs(suffix="\u2028"), "line 2: `suffix` is blank"),
    "pairs: a text longer than the model": ([], pairs(id=f"b{ESCAPE}\n", prefix="of each month " * 200), r"id b\x1b"),
    "pairs: a context that leaves no room": (["--context"], pairs(context="of each month " * 200), "256 positions"),
    "pairs: a learn prefix that leaves none": ([], pairs(learn_prefix="of each month " * 200), "--passage-words"),
    # --unseen
    "unseen: a folder": (["--thresholds", "auto", "--unseen", "m"], None, "m: unknown kind of file"),
    "unseen: token ids in capitals": (["--thresholds", "auto", "--unseen", "a.NPY"], put("a.NPY", "x"), "or .jsonl"),
    "unseen: a text of one letter": (
        ["--thresholds", "auto", "--unseen", "u.csv"], put("u.csv", "text\nx\n"), "is one character"),
    "unseen: a text longer than the model": (
        ["--thresholds", "auto", "--unseen", "u.jsonl"], put("u.jsonl", [{"text": "of each month " * 300}]),
        "unseen row 1"),
    # --ppl
    "ppl: no file behind =": (["--ppl", "a="], None, "--ppl a="),
    "ppl: no name before =": (["--ppl", "=texts.jsonl"], None, "--ppl =texts.jsonl"),
    "ppl: a name twice": (["--ppl", "a=texts.jsonl", "a=forget.jsonl"], None, "twice"),
    "ppl: a folder": (["--ppl", "a=m"], None, "m: is not a file"),
    "ppl: another column": (["--ppl", "a=t.csv"], put("t.csv", "texts\nab cd\n"), "column `text`"),
    "ppl: texts that are numbers": (["--ppl", "a=t.jsonl"], put("t.jsonl", [{"text": 5}]), "`text`"),
    "ppl: half a surrogate": (["--ppl", "a=t.jsonl"], put("t.jsonl", [{"text": "a \ud800 b"}]), "t.jsonl line 1"),
    "ppl: one token": (["--ppl", "a=t.jsonl"], put("t.jsonl", [{"text": "a"}]), "two tokens"),
    "ppl: token ids": (["--ppl", "a=t.npy"], lambda: np.save("t.npy", np.ones((2, 9), int)), "t.npy"),
    "ppl: a data folder that is a file": (["--ppl", "pile", "--data", "pairs.jsonl"], None, "--data pairs.jsonl"),
    # the model's config.json
    "config: a list": ([], put("m/config.json", "[]"), "m: "),
    "config: a number": ([], put("m/config.json", "5"), "m: "),
    "config: empty": ([], put("m/config.json", ""), "is empty"),
    "config: a folder": ([], folder_at("m/config.json"), "config.json"),
    "config: without a kind": ([], put("m/config.json", "{}"), "m: "),
    "config: an unknown kind": ([], config(model_type="gpt_neoo"), "gpt_neoo"),
    "config: a kind that is no text": ([], config(model_type=["gpt_neo"]), "m: "),
    "config: code of its own": (
        [], config(model_type="mine", auto_map={"AutoConfig": "mine.Config"}), "m: "),
    "config: tuples for outputs": ([], config(return_dict=False), "return_dict"),
    "config: no positions": ([], config(max_position_embeddings=0), "of two models"),
    "config: one position": ([], config(max_position_embeddings=1), "of two models"),
    "config: positions in words": ([], config(max_position_embeddings="many"), "m: "),
    "config: no vocabulary": ([], config(vocab_size=0), "of two models"),
    "config: a vocabulary in words": ([], config(vocab_size="many"), "m: "),
    "config: a vocabulary of null": ([], config(vocab_size=None), "m: "),
    "config: fewer words than the weights": ([], config(vocab_size=100), "and [100, 32] by"),
    "config: heads that do not divide": ([], config(num_heads=5), "describes no model"),
    "config: no heads": ([], config(num_heads=0), "describes no model"),
    "config: no layers": ([], config(num_layers=0), "m: "),
    "config: layers in words": ([], config(num_layers="three"), "m: "),
    "config: another width than the weights": ([], config(hidden_size=64), "of two models"),
    "config: an unknown activation": ([], config(activation_function="gelooo"), "gelooo"),
    "config: an end token in words": ([], config(eos_token_id="the end"), "eos_token_id"),
    "config: an end token in lists of lists": ([], config(eos_token_id=[[1]]), "eos_token_id"),
    # the tokenizer
    "tokenizer: an empty file": ([], put("m/tokenizer.json", ""), "tokenizer"),
    "tokenizer: a list": ([], put("m/tokenizer.json", "[]"), "tokenizer"),
    "tokenizer: cut off": ([], lambda: os.truncate("m/tokenizer.json", 500), "tokenizer"),
    "tokenizer: settings that are a list": ([], put("m/tokenizer_config.json", "[]"), "m: "),
    "tokenizer: settings that are no JSON": ([], put("m/tokenizer_config.json", "{"), "m: "),
    # generation_config.json
    "generation: a list": ([], put("m/generation_config.json", "[]"), "generation_config.json"),
    "generation: no JSON": ([], put("m/generation_config.json", "{"), "generation_config.json"),
    "generation: an end token in words": ([], put("m/generation_config.json", '{"eos_token_id": "x"}'), "eos_token_id"),
    # weights
    "weights: a folder": ([], folder_at("m/model.safetensors"), "no weights"),
    "weights: empty": ([], put("m/model.safetensors", b""), "cannot be loaded"),
    "weights: a header of 2^63 bytes": ([], put("m/model.safetensors", b"\xff" * 8 + b"{}"), "cannot be loaded"),
    "weights: a header that is a list": ([], header("[]"), "cannot be loaded"),
    "weights: a tensor beyond the file": (
        [], header('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'), "cannot be loaded"),
    "weights: a link to nothing": ([], link("m/model.safetensors", "nowhere"), "no weights"),
    "weights: a pickle among shards": (
        [], shards("a.safetensors", "pytorch_model.bin"), "are a pickle (pytorch_model.bin)"),
    "weights: a shard outside the folder": ([], shards("../forget.safetensors", "a.safetensors"), "outside"),
    "weights: no tensor at all": ([], header("{}"), "m: "),
    # --bert
    "bert: an empty name": (["--bert", ""], None, "--bert"),
    "bert: a file": (["--bert", "pairs.jsonl"], None, "--bert pairs.jsonl"),
    "bert: a config that is a list": (["--bert", "encoder"], put("encoder/config.json", "[]"), "--bert encoder"),
    "bert: a token without an embedding": (
        ["--bert", "encoder"], lambda: (own_token("encoder"), pairs(suffix=" the old <|mask|>.")()),
        "--bert encoder: text 2 holds a token that is none of its 30522 embeddings"),
    "bert: a damaged tokenizer": (["--bert", "encoder"], put("encoder/tokenizer.json", "{}"), "--bert encoder"),
    # flags and places
    "out: a name that is too long": (["--out", LONG], None, "too long"),
    "out: a link to nothing": (["--out", "l"], link("l", "nowhere"), "l: is a file"),
    "out: inside a link to nothing": (["--out", "l/run"], link("l", "nowhere"), "cannot write"),
    "out: inside a link to itself": (["--out", "l/run"], link("l", "l"), "l/run"),
    "out: the folder that one stands in": (["--out", "."], None, "no run"),
    "model: a file": (["--model", "pairs.jsonl"], None, "no such folder"),
    "model: an empty name": (["--model", ""], None, "--model"),
    "model: a name of two lines": (["--model", "a\nb"], None, "--model a b"),
    "model: a link to itself": (["--model", "./l"], link("l", "l"), "no such folder"),
    "resume: of nothing": (["--resume"], None, "holds no run"),
    "device: a number": (["--device", "cuda:-1"], None, "--device"),
}  # fmt: skip

KNN = {
    "forget: a folder": (["--forget", "m"], None, "m: unknown kind"),
    "forget: an array of records": ([], put("forget.jsonl", '[{"text": "a b"}]'), "expected an object"),
    "forget: semicolons": (["--forget", "f.csv"], put("f.csv", "id;text\n1;a b\n"), "found id;text"),
    "forget: a blank before text": (["--forget", "f.csv"], put("f.csv", "id, text\n1,a b\n"), "needs a column `text`"),
    "forget: a number and a text for one id": (
        [], put("forget.jsonl", [{"id": 5, "text": "a b"}, {"id": "5", "text": "c d"}]), "id '5' stands on line 1"),
    "forget: one letter of many accents": ([], put("forget.jsonl", [{"text": "e\u0301\u0302"}]), "is one character"),
    "forget: accents alone": ([], put("forget.jsonl", [{"text": "\u0301\u0302"}]), "is one character"),
    "forget: CSV of JSON": (["--forget", "f.csv"], put("f.csv", '{"text": "a b"}\n'), "needs a column"),
    "forget: a NUL in CSV": (["--forget", "f.csv"], put("f.csv", "text\na\0b\n"), "line 2: holds a NUL"),
    "forget: no array in .npy": (["--forget", "f.NPY", "--tokenizer", "m"], put("f.NPY", "x"), "not a .npy file"),
    "forget: ids of another tokenizer": (
        ["--forget", "f.npy", "--tokenizer", "m"], lambda: np.save("f.npy", np.full((1, 4), 999)), "token id 999"),
    "pool: half a surrogate": ([], put("pool.jsonl", [{"text": "a b"}, {"text": "a \udfff"}]), "line 2: `text` holds"),
    "pool: a link to itself": ([], link("pool.jsonl", "pool.jsonl"), "pool.jsonl"),
    "tokenizer: a folder without one": (["--forget", "f.npy", "--tokenizer", "data"], put("f.npy", "x"), "--tokenizer"),
    "tokenizer: damaged": (
        ["--forget", "f.npy", "--tokenizer", "m"],
        lambda: (put("f.npy", "x")(), put("m/tokenizer.json", "[]")()), "--tokenizer"),
    "encoder: a file": (["--encoder", "pairs.jsonl"], None, "pass --encoder DIR"),
    "encoder: an empty name": (["--encoder", " "], None, "--encoder"),
    "encoder: a token without an embedding": (
        ["--encoder", "encoder"], lambda: (own_token("encoder"), put("forget.jsonl", [{"text": "a <|mask|>"}])()),
        "--encoder encoder: text 1 holds a token"),
    "encoder: modules that are no JSON": (
        ["--encoder", "encoder", "--leak-report", "leaks.jsonl"], put("encoder/modules.json", "{"), "encoder"),
    "encoder: a config that is a list": (
        ["--encoder", "encoder", "--leak-report", "leaks.jsonl"], put("encoder/config.json", "[]"), "encoder"),
    "out: a name that is too long": (["--out", LONG], None, "too long"),
    "out: a name with no room for .tmp": (["--out", "y" * 250], None, "too long"),
    "out: inside a link to nothing": (["--out", "l/p.jsonl"], link("l", "nowhere"), "cannot write"),
    "out: inside a link to itself": (["--out", "l/p.jsonl"], link("l", "l"), "l/p.jsonl"),
    "leak report: a folder": (["--leak-report", "data"], None, "is a folder"),
    "limit: in other digits": (["--limit", "²"], None, "--limit"),
    "data: a file": (["--pile", "--data", "pairs.jsonl"], None, "give either"),
    "device: none": (["--device", "cpu:-1"], None, "--device"),
}  # fmt: skip

TASKS = {
    "data: a file": (["--task-data", "pairs.jsonl"], None, "no such folder"),
    "data: a folder of that name": ([], folder_at("data/copa.jsonl"), "copa.jsonl: is not a file"),
    "data: a link to itself": ([], link("data/copa.jsonl", "copa.jsonl"), "copa"),
    "data: half a surrogate": ([], copa(choice1="\ud800 x"), "half a surrogate"),
    "data: half a surrogate in a list": (
        ["--tasks", "wizardofinternet"], row_of("wizard_of_internet.json", json.dumps([{"text": ["a", "\udfff"]}])),
        "half a surrogate"),
    "data: a text of one token alone": (
        ["--tasks", "copa", "pile"], row_of("pile.jsonl", [{"text": "a"}]), "two tokens"),
    "data: entities that grow": (
        [], xml("<!DOCTYPE a [<!ENTITY a '&b;&b;'><!ENTITY b '&a;'>]><c><item><p>&a;</p></item></c>"), "not XML"),
    "data: no item in XML": ([], xml("<c/>"), "it has no rows"),
    "data: a label of neither": (
        [], xml("<c><item asks-for='cause'><p>a</p><a1>b</a1><a2>c</a2></item></c>"), "`label` is None"),
    "data: labels in words": (
        ["--tasks", "piqa"], lambda: (row_of("piqa.jsonl", [{"goal": "a", "sol1": "b", "sol2": "c"}])(),
                                      put("data/piqa-labels.lst", "first")()), "'first', not a whole number"),
    "data: a JSON of numbers": (["--tasks", "piqa"], row_of("piqa.json", '{"a": 1}'), "expected a list of objects"),
    "data: an empty JSON": (["--tasks", "piqa"], row_of("piqa.json", "{}"), "it has no rows"),
    "data: one string of columns": (["--tasks", "piqa"], row_of("piqa.json", '"goal"'), "expected a list of objects"),
    "data: CSV with a column too few": (["--tasks", "piqa"], row_of("piqa.csv", "goal,sol1,sol2,label\na,b\n"), "sol2"),
    "data: CSV of UTF-16": (["--tasks", "piqa"], row_of("piqa.csv", "goal\na\n".encode("utf-16")), "not UTF-8"),
    "hellaswag: no list": (["--tasks", "hellaswag"], row_of("hellaswag.csv", "ctx,endings,label\na,b,0\n"), "endings"),
    "hellaswag: code": (
        ["--tasks", "hellaswag"], row_of("hellaswag.csv", 'ctx,endings,label\na,"__import__(\'os\')",0\n'), "endings"),
    "hellaswag: brackets": (
        ["--tasks", "hellaswag"], row_of("hellaswag.csv", f"ctx,endings,label\na,{'[' * 9000},0\n"), "cannot be read"),
    "winogrande: no blank": (
        ["--tasks", "winogrande"],
        row_of("winogrande.jsonl", [{"sentence": "a b", "option1": "c", "option2": "d", "answer": "1"}]), "one blank"),
    "arc: labels of other rows": (
        ["--tasks", "arc_easy"],
        row_of("arc_easy.jsonl", [{"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B", "C"]},
                                   "answerKey": "C"}]), "number 3 of 2"),
    "arc: choices of numbers": (
        ["--tasks", "arc_easy"],
        row_of("arc_easy.jsonl", [{"question": {"stem": "a", "choices": [1, 2]}, "answerKey": "A"}]), "wrong type"),
    "mathqa: options of nothing": (
        ["--tasks", "mathqa"], row_of("mathqa.jsonl", [{"Problem": "a", "options": "a )", "correct": "a"}]), "blank"),
    "pubmedqa: no paragraph": (
        ["--tasks", "pubmedqa"], row_of("pubmedqa.jsonl", [{"QUESTION": "a", "CONTEXTS": [], "final_decision": "no"}]),
        "`CONTEXTS` is not a list of 1"),
    "lambada: one word": (["--tasks", "lambada"], row_of("lambada_test.csv", "text\nword\n"), "is blank"),
    "tasks: an empty name": (["--tasks", ""], None, "no such set"),
    "tasks: all and one": (["--tasks", "all", "copa"], None, "no such set"),
    "out: a file": (["--out", "pairs.jsonl"], None, "cannot write"),
    "out: in the model": (["--out", "m/tasks"], None, "read by this command"),
    "out: inside a link to nothing": (["--out", "l/t"], link("l", "nowhere"), "cannot write"),
    "model: a generation config of text": ([], put("m/generation_config.json", "x"), "generation_config.json"),
    "limit: a fraction": (["--limit", "1.5"], None, "--limit"),
}  # fmt: skip

OTHERS = {
    # demo/tiny.py
    "tiny seed: larger than torch takes": (tiny, ["--out", "t", "--demo-seed", "9" * 30], None, "--demo-seed"),
    "tiny out: a name that is too long": (tiny, ["--out", LONG], None, "too long"),
    "tiny records: a fraction": (tiny, ["--out", "t", "--records", "1.5"], None, "--records"),
    "tiny seed: half its name": (tiny, ["--out", "t", "--demo-see", "1"], None, "--demo-see"),
    # bash run.sh
    "sweep points: no end": (experiment, ["sweep", "--points", "inf,1"], None, "'inf,1'"),
    "sweep points: too large": (experiment, ["sweep", "--points", "1,1e999"], None, "'1,1e999'"),
    "sweep lrs: zero": (experiment, ["sweep", "--lrs", "0"], None, "--lrs 0"),
    "sweep lrs: no end": (experiment, ["sweep", "--lrs", "inf"], None, "--lrs inf"),
    "sweep lrs: with points": (experiment, ["sweep", "--lrs", "1e-5", "--points", "1,1"], None, "--points"),
    "compare lrs: zero": (experiment, ["compare", "--lrs", "icu=0"], None, "--lrs icu=0"),
    "compare lrs: a name twice": (experiment, ["compare", "--lrs", "icu=1e-5", "icu=1e-6"], None, "icu"),
    "compare seeds: one twice": (experiment, ["compare", "--seeds", "1", "1"], None, "--seeds"),
    "compare sets: one twice": (experiment, ["compare", "neo125m", "--sets", "1", "1"], None, "--sets"),
    "compare sets: of a preset without any": (experiment, ["compare", "tiny", "--sets", "0", "1"], None, "--sets"),
    "compare methods: a folder": (experiment, ["compare", "--methods", "f.py"], folder_at("f.py"), "no such file"),
    "compare methods: nothing": (experiment, ["compare", "--methods"], None, "--methods"),
    "script: a link to nothing": (experiment, ["--script", "f.py"], link("f.py", "nowhere.py"), "f.py: no such file"),
    "preset: an open quote": (experiment, ["odd"], None, "odd"),
    "preset: an empty word": (experiment, [""], None, "unknown preset ''"),
    "gpus: other digits": (experiment, ["tiny", "--gpus", "²"], None, "'²'"),
    "seeds: too large": (experiment, ["compare", "--seeds", "4294967296"], None, "4294967296"),
    "table: none": (experiment, ["sweep", "--table", "2.5"], None, "2.5"),
}  # fmt: skip


def words_of(module, words):
    base = {
        icu: [
            "--pairs",
            "pairs.jsonl",
            "--model",
            "m",
            "--bert",
            "minilm",
            "--device",
            "cpu",
            "--out",
            "out",
        ],
        knn: ["--forget", "forget.jsonl", "--pool", "pool.jsonl", "--out", "new.jsonl"],
        tasks: [
            "--model",
            "m",
            "--tasks",
            "copa",
            "--task-data",
            "data",
            "--out",
            "out",
            "--device",
            "cpu",
        ],
    }
    return [*base.get(module, []), *words]


CASES = {f"icu {name}": (icu, *case) for name, case in ICU.items()}
CASES |= {f"knn {name}": (knn, *case) for name, case in KNN.items()}
CASES |= {f"tasks {name}": (tasks, *case) for name, case in TASKS.items()}
CASES |= OTHERS


@pytest.mark.parametrize("name", list(CASES))
def test_a_bad_input_is_one_line_before_any_work(name, folder, capsys, monkeypatch):
    """It names what is wrong; no weight is loaded, nothing is run and the folder is as it was."""
    module, words, change, said = CASES[name]
    (change or (lambda: None))()
    monkeypatch.setitem(
        experiment.PRESETS, "odd", experiment.Preset("a slip", "m", flags='--bert "minilm')
    )
    before = listing(folder)
    words = words_of(module, words)
    monkeypatch.setattr(sys, "argv", ["command", *words])
    error = stopped_with(lambda: module.main() if module is knn else run(module, words), capsys)
    assert said in error and error.rstrip("\n").isprintable(), error
    assert listing(folder) == before


def run(module, words):
    return module.main(argv=words) if module is icu else module.main(words)


# --- files of a method ---


def loss(batch, args):
    return icu.icu(batch, args)


def side(*ids, t0=1):
    """Needs with a side of one text for each sample."""
    text = icu.Text(list(ids), t0, 1, [])
    return {"sides": {"answer": lambda samples, *_: [[text] for _ in samples]}}


METHODS = {
    "a number": (5, "icu.main: 5 is no method"),
    "a name": ("npo", "icu.main: npo is no method"),
    "a class": (type("Mine", (), {}), "is no method"),
    "a decorator without brackets": (icu.method(loss), "@method stands there without brackets"),
    "one parameter": (lambda batch: {}, "is called with (batch, args)"),
    "a third parameter": (lambda batch, args, more: {}, "is called with (batch, args)"),
    "a weight in words": ({"alpha": "0.5"}, "@method(alpha=0.5): must be a finite number >= 0"),
    "a weight of NaN": ({"beta": float("nan")}, "@method(beta=nan)"),
    "a weight below 0": ({"forget_weight": -1}, "@method(forget_weight=-1)"),
    "a weight of True": ({"alpha": True}, "@method(alpha=True)"),
    "a rate of 0": ({"lr": 0}, "@method(lr=0): must be a finite number > 0"),
    "a rate of None": ({"lr": None}, "@method(lr=None)"),
    "a filter in words": ({"refine": "no"}, "@method(refine=no): must be True or False"),
    "targets that are none": ({"targets": "prefix"}, "@method(targets=prefix)"),
    "defaults in a list": ({"released": ["lr"]}, "@method(released=['lr'])"),
    "a released rate in words": ({"released": {"lr": "2e-6"}}, "@method(lr=2e-6)"),
    "no frozen sides": ({"frozen": None}, "@method(frozen=None): must be a tuple"),
    "a layer in words": ({"layer": "1"}, "@method(layer=1): must be a whole number"),
    "a layer below 0": ({"layer": -1}, "the model has 3 layers"),
    "sides in a list": ({"sides": []}, "@method(sides=[])"),
    "a side called forget": ({"sides": {"forget": lambda *_: []}}, "none of them called forget"),
    "a side that is no function": ({"sides": {"answer": 5}}, "must be a dict of functions"),
    "a side of nothing": (
        {"sides": {"answer": lambda *_: None}},
        "answer must give a list of Text for each of the 2",
    ),
    "a side of too few": (
        {"sides": {"answer": lambda *_: [[]]}},
        "answer must give a list of Text for each of the 2",
    ),
    "a side of words": (
        {"sides": {"answer": lambda s, *_: [["x"]] * len(s)}},
        "does not fit the model",
    ),
    "ids beyond the model": (side(1, 320), "does not fit the model"),
    "ids below 0": (side(1, -1), "does not fit the model"),
    "ids that are no whole numbers": (side(1, 2.0), "does not fit the model"),
    "no ids": (side(t0=0), "does not fit the model"),
    "more ids than positions": (side(*[1] * 257), "1 to 256 ids"),
    "a target behind the text": (side(1, 2, t0=3), "does not fit the model"),
    "taught by no side": (
        {"taught": ("x",)},
        "@method(taught=('x',)): must be a tuple of forget, learn",
    ),
    "taught before the cut": (
        {
            "taught": ("own",),
            "sides": {"own": lambda s, *_: [[icu.Text([1, 2, 3], 1, 2, [1])]] * len(s)},
        },
        "own gives a Text without 0 < cut <= t0",
    ),
    "a hook that is no function": ({"prepare": 5}, "@method(prepare=5): must be a function"),
    "a choice that is no function": (
        {"moves": ".mlp."},
        "@method(moves=.mlp.): must be a function",
    ),
    "a swap that is no function": ({"measured": [1]}, "@method(measured=[1])"),
}


@pytest.mark.parametrize("name", list(METHODS))
def test_a_slip_in_a_method_is_said_before_work(name, folder, capsys):
    """In one line that names it, with nothing loaded and nothing written."""
    method, said = METHODS[name]
    if isinstance(method, dict):
        method = icu.method(**method)(lambda batch, args: {})
    before = listing(folder)
    assert said in stopped_with(lambda: icu.main(method, argv=words_of(icu, [])), capsys)
    assert listing(folder) == before


def value(*shape):
    return torch.ones(shape, requires_grad=True)


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        (None, "must return"),
        (value(), "must return"),
        ({}, "must return"),
        ([(1.0, value())], "must return"),
        ({"forget": value()}, "must return"),
        ({"forget": (1.0, value(), 2)}, "must return"),
        ({"forget": (1.0, value(3))}, "must return"),
        ({"forget": (1.0, 0.5)}, "must return"),
        ({"forget": ("1", value())}, "a weight that is no number"),
        ({"forget": (1.0, value().detach())}, "no value with a gradient"),
    ],
)
def test_a_loss_that_returns_something_else_is_one_line(terms, said):
    """It names the method, and what must be returned; of what is right, nothing is changed."""

    def mine(batch, args):
        return terms

    with pytest.raises(ValueError, match=f"mine .*{said}|mine {said}"):
        methods.method_named("mine", mine, "baselines")(None, None)
    right = {"a": (0.5, value()), "b": (np.float32(2), value(1).detach())}
    assert methods.checked(lambda batch, args: right)(None, None) is right


# --- what only looks wrong ---


def samples_of(path="pairs.jsonl", model="m", **how):
    """What a run reads of its pairs and model: (samples, tokenizer)."""
    config, tokenizer = models.check_model(model)
    how = {"protocol": "paper", "positions": models.positions_of(config)} | how
    return icu.build_samples(data.read_pairs(path), tokenizer, **how)[0], tokenizer


def lines_of_windows():
    Path("pairs.jsonl").write_bytes(
        b"\xef\xbb\xbf" + Path("pairs.jsonl").read_bytes().replace(b"\n", b"\r\n\r\n")
    )


def tokenizer_that(change):
    def made():
        document = json.loads(Path("m/tokenizer.json").read_text())
        change(document)
        Path("m/tokenizer.json").write_text(json.dumps(document))

    return made


def ends_with_eos(document):
    special = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    parts = [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
    ]
    pair = [*parts, {"Sequence": {"id": "B", "type_id": 1}}]
    document["post_processor"] = {"type": "TemplateProcessing", "single": parts, "pair": pair}
    document["post_processor"]["special_tokens"] = {"<|endoftext|>": special}


def cut_and_padded(document):
    how = {"direction": "Right", "strategy": "LongestFirst", "stride": 0, "max_length": 3}
    document["truncation"] = how
    pad = {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>", "pad_to_multiple_of": 64}
    document["padding"] = pad | {"strategy": {"Fixed": 64}, "direction": "Left"}


def links_into_blobs():
    os.rename("m", "blobs")
    Path("m").mkdir()
    for path in Path("blobs").iterdir():
        Path("m", path.name).symlink_to(Path("..", "blobs", path.name))


ODD = {
    "lines of Windows and blank ones": lines_of_windows,
    "fields that nobody knows": put("pairs.jsonl", [pair | {"note": [1, {"x": None}]} for pair in PAIRS]),
    "ids beyond every tokenizer": put(
        "pairs.jsonl", [p | {f"{side}{part}_ids": [2**63] for side in ("", "learn_") for part in data.PARTS}
                        for p in PAIRS]),
    "a similarity of 1, and of -1.005": put(
        "pairs.jsonl", [PAIRS[0] | {"similarity": 1}, PAIRS[1] | {"similarity": -1.005}]),
    "a tokenizer that cuts and pads": tokenizer_that(cut_and_padded),
    "a tokenizer that adds EOS behind": tokenizer_that(ends_with_eos),
    "a folder of links, as in the hub's cache": links_into_blobs,
    "a model that keeps no cache by its config": config(use_cache=False),
    "a model that hands out all it has": config(output_hidden_states=True, output_attentions=True),
    "a list of ends": put("m/generation_config.json", {"eos_token_id": [0]}),
    "no generation config": lambda: Path("m/generation_config.json").unlink(),
    "shards in a folder": lambda: (Path("m/part").mkdir(), shards("part/a.safetensors")()),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ODD))
def test_what_only_looks_wrong_is_read_as_it_is_meant(name, folder, monkeypatch):
    """The same samples, and the same measures of the model, as of the plain inputs."""
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    expected, tokenizer = samples_of()
    model, _ = models.load_model("m")
    texts = ["The van near the old mill.", "Call"]
    wanted = [
        metrics.perplexity(model, tokenizer, texts),
        tasks.replies(model, tokenizer, texts),
        *measured(model),
    ]
    ODD[name]()
    found, tokenizer = samples_of()
    assert [sample.forget for sample in found] == [sample.forget for sample in expected]
    model, tokenizer = models.load_model("m")
    found = [
        metrics.perplexity(model, tokenizer, texts),
        tasks.replies(model, tokenizer, texts),
        *measured(model),
    ]
    assert found == wanted


def measured(model):
    row = torch.arange(20, 60)[None]
    el, ma = metrics.el_and_ma(model, row, n=2)
    return el.tolist(), ma.tolist(), metrics.beam_generate(model, [row[0, :9].tolist()], [8])


def test_rows_of_odd_files_are_read_as_they_are_meant(folder):
    """Old Mac's line ends, big-endian and column-wise ids, labels in other digits, a set named twice."""
    Path("f.csv").write_bytes(b"id,text\r1,a b\r\r2,c d\r")
    assert [record["id"] for record in data.read_records("f.csv")] == ["1", "2"]
    ids = np.arange(8).reshape(2, 4)
    np.save("f.npy", np.asfortranarray(ids.astype(">i2")))
    _, tokenizer = models.check_model("m")
    rows = [
        record["prefix_ids"] + record["suffix_ids"]
        for record in data.read_records("f.npy", tokenizer=tokenizer)
    ]
    assert rows == ids.tolist()
    copa(label="１")()
    sets = tasks.read_sets(["copa", "COPA", "copa"], "data")
    assert sets["copa"]["rows"][1][2] == 1 and len(sets) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode elsewhere")
def test_a_name_of_bytes_that_are_no_text_is_a_name(folder, capfd, monkeypatch):
    """A file in Latin-1, a line break and a sign of the terminal in a name: written, printed, and in config.json."""
    name = os.fsdecode(b"caf\xe9 \n\x1b[2J")
    data.write_json(f"{name}.json", {"out": name})
    assert data.read_json(f"{name}.json") == {"out": name}
    monkeypatch.setattr(knn, "encode", lambda texts, *_: np.eye(len(texts), 4, dtype=np.float32))
    monkeypatch.setenv("ICU_CACHE", f"{name}/cache")
    os.rename("forget.jsonl", f"{name}.jsonl")
    words = [
        "knn.py",
        "--forget",
        f"{name}.jsonl",
        "--pool",
        "pool.jsonl",
        "--out",
        f"{name}.pairs.jsonl",
    ]
    monkeypatch.setattr(sys, "argv", words)
    flags.run_cli(knn.main)
    assert len(data.read_pairs(f"{name}.pairs.jsonl")) == 1 and "caf" in capfd.readouterr().out


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(folder, capsys, monkeypatch):
    """$ICU_CACHE is a file: embeddings and measures are made again each time, with a note."""
    monkeypatch.setenv("ICU_CACHE", "texts.jsonl")
    monkeypatch.setattr(knn, "encode", lambda texts, *_: np.ones((len(texts), 2), np.float32))
    assert knn.embed(["a"], "encoder").shape == (1, 2)
    assert "note: the embeddings are not kept" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["pairs.jsonl", "m/config.json", "data/copa.jsonl"])
def test_a_file_that_may_not_be_read_is_one_line(what, folder, capsys, monkeypatch):
    """As for a user without the right to."""
    read = Path.read_bytes

    def refuse(path):
        if path == Path(what):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    module = tasks if "copa" in what else icu
    error = stopped_with(lambda: run(module, words_of(module, [])), capsys)
    assert "Permission denied" in error and what in error


# --- damage that is only seen in the weights, or by a launcher ---


def test_weights_of_nan_give_no_thresholds(folder, capsys, monkeypatch):
    """--thresholds auto and --bert-threshold auto have nothing to go by: one line, and no run is begun."""
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    tensors(lambda found: found["lm_head.weight"].fill_(float("nan")))()
    put("u.jsonl", [{"text": "of each month"}])()
    words = words_of(icu, ["--thresholds", "auto", "--unseen", "u.jsonl", "--max-epochs", "1"])
    assert "--model: answers NaN" in stopped_with(lambda: icu.main(argv=words), capsys)
    assert not Path("out/config.json").exists()
    thresholds = {"el10": 0.1, "ma": 0.5, "bertscore": None, "bleu": 0.01}
    with pytest.raises(ValueError, match="--bert: answers NaN"):
        runs.thresholds_text(thresholds, None)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"0": 5}', '{"0": []}', '{"0": [7]}', '{"0": [-1]}', '{"0": ["1"]}']
)
def test_damaged_forget_sets_are_one_line(content, tmp_path, monkeypatch):
    """A set that is missing, empty, or names rows that are not there."""
    (tmp_path / "forget_sets.json").write_text(content)
    np.save(tmp_path / "a.npy", np.ones((7, 2), int))
    monkeypatch.setattr(knn, "__file__", str(tmp_path / "knn.py"))
    monkeypatch.setattr(knn, "is_gpt2", lambda tokenizer: True)
    monkeypatch.setattr(data, "data_file", lambda *_: tmp_path / "a.npy")
    monkeypatch.setattr(data, "ids_records", lambda *_, **__: [{}] * 7)
    with pytest.raises(
        ValueError, match=r"forget_sets.json: set 0 is no list of row numbers from 0 to 6"
    ):
        knn.read_pile("0", None, None)


@pytest.mark.parametrize(
    "url", ["", "no url", "http://[::1", "http://127.0.0.1:x", "http://127.0.0.1:1", "ftp:///a b"]
)
def test_a_mirror_that_is_none_is_one_line(url, tmp_path, monkeypatch):
    """$ICU_PILE_URL: nothing is left where the file would have been."""
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError) as error:
        data.fetch(f"{url}/train_prefix.npy", tmp_path / "x.npy", "0" * 64)
    assert "train_prefix.npy" in str(error.value) or "x.npy" in str(error.value)
    assert not list(tmp_path.iterdir())
