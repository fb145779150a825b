"""Folders and flags that are not what they say: one line before a weight is loaded, also under --dry-run.

python -m pytest tests/test_folders.py -q
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import icu
import knn
from evals import tasks
from kit import data, flags, models

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [("The van near", " the old mill."), ("Call the clinic", " on Tuesday morning.")]
PAIRS = [
    {
        "id": str(i),
        "context": "",
        "prefix": a,
        "suffix": b,
        "learn_id": "x",
        "learn_context": "",
        "similarity": 0.5,
    }
    | {"learn_prefix": a, "learn_suffix": b}
    for i, (a, b) in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def given(tmp_path_factory, save_tiny, encoder_dir):
    """A folder with models of three kinds and pairs.jsonl."""
    root = tmp_path_factory.mktemp("folders")
    for kind in ("gpt_neo", "opt", "llama"):
        save_tiny(kind, root / kind)
    data.write_jsonl(root / "pairs.jsonl", PAIRS)
    return root


def edit(path, **changes):
    """Changes fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def fewer_layers(folder):
    layers = ["local", "global"]
    edit(
        folder / "config.json", num_layers=2, attention_types=[[layers, 1]], attention_layers=layers
    )


def cut_off(folder):
    os.truncate(folder / "model.safetensors", 5000)


def with_index(text):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def without_tokenizer(folder):
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


BAD = {  # damage of the model folder, what is said
    "fewer layers than weights": (fewer_layers, "2 layers and the weights have 13 tensors more"),
    "an adapter beside": (lambda f: (f / "adapter_config.json").write_text("{}"), "merge it"),
    "cut weights": (cut_off, "cannot be loaded"),
    "weights of text": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "cannot be loaded"),
    "an index of nothing": (with_index("{}"), "names no weights"),
    "an index that is a list": (with_index("[]"), "names no weights"),
    "an index of numbers": (with_index('{"weight_map": {"a": 1}}'), "names no weights"),
    "ten million layers": (lambda f: edit(f / "config.json", num_layers=10**7), "is damaged"),
    "ten million attentions": (
        lambda f: edit(f / "config.json", attention_types=[[["local"], 10**7]]), "is damaged"),
    "a huge hidden size": (lambda f: edit(f / "config.json", hidden_size=10**8 - 1), "is damaged"),
}  # fmt: skip


def stopped_with(command, capsys):
    """The one line of a command that ends with exit 2."""
    with pytest.raises(SystemExit) as stopped:
        flags.run_cli(command)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def argv(given, model, *words):
    said = [
        "--pairs",
        given / "pairs.jsonl",
        "--model",
        model,
        "--bert",
        "minilm",
        "--device",
        "cpu",
    ]
    return [str(word) for word in [*said, "--out", given / "out", *words]]


@pytest.mark.parametrize("name", list(BAD))
def test_a_folder_that_is_not_what_it_says_is_refused(name, given, tmp_path, capsys, monkeypatch):
    """Under --dry-run, so before weights, by icu.py, evals/tasks.py and evals/report.py's loader; nothing is written."""
    damage, message = BAD[name]
    folder = Path(shutil.copytree(given / "gpt_neo", tmp_path / "model"))
    damage(folder)
    monkeypatch.setattr(torch.nn.Module, "__init__", None)  # no model is made
    error = stopped_with(lambda: icu.main(argv=argv(given, folder, "--dry-run")), capsys)
    assert message in error and str(folder) in error
    data.write_jsonl(
        tmp_path / "data" / "piqa.jsonl", [{"goal": "x", "sol1": "y", "sol2": "z", "label": 0}]
    )
    said = [
        "--model",
        folder,
        "--tasks",
        "piqa",
        "--task-data",
        tmp_path / "data",
        "--out",
        tmp_path / "o",
    ]
    said = [*map(str, said), "--device", "cpu", "--dry-run"]
    assert message in stopped_with(lambda: tasks.main(said), capsys)
    assert not (given / "out").exists() and not (tmp_path / "o").exists()


@pytest.mark.parametrize("kind", ["gpt_neo", "opt", "llama"])
def test_surplus_tensors_are_refused_and_constants_are_not(kind, given, tmp_path, capfd):
    """A head of another task, named. Old masks, frequencies and a tied head's copy: loaded, silently."""
    folder = Path(shutil.copytree(given / kind, tmp_path / kind))
    embedding = next(
        name
        for name in load_file(folder / "model.safetensors")
        if "wte" in name or "embed_tok" in name
    )
    edit(folder / "config.json", tie_word_embeddings=True)
    constants = {
        "gpt_neo": {"transformer.h.0.attn.attention.bias": torch.ones(1, 1, 8, 8).byte(),
                    "transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9)},
        "opt": {"model.decoder.version": torch.ones(1)},
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    }[kind]  # fmt: skip

    def tie(tensors):
        tensors |= {**constants, "lm_head.weight": tensors[embedding].clone()}

    change_tensors(folder, tie)
    models.load_model(str(folder))
    change_tensors(folder, lambda tensors: tensors.update({"score.weight": torch.ones(2, 2)}))
    with pytest.raises(
        ValueError, match=r"1 tensors more than the model, the first is score\.weight"
    ):
        models.load_model(str(folder))
    assert "REPORT" not in "".join(capfd.readouterr())  # transformers' own table


def test_missing_weights_are_one_line(given, tmp_path, capfd):
    """Ours: transformers' table of them does not reach the user."""
    folder = Path(shutil.copytree(given / "llama", tmp_path / "m"))
    change_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"lack 1 tensors, the first is model\.norm\.weight"):
        models.load_model(str(folder))
    assert "REPORT" not in "".join(capfd.readouterr())


# --- encoders ---


def copied(source, folder, damage):
    shutil.copytree(source, folder, dirs_exist_ok=True)
    damage(folder)
    return folder


def test_an_encoder_without_a_tokenizer_is_refused(
    given, tmp_path, encoder_dir, capsys, monkeypatch
):
    """To an empty tokenizer all texts are the same, so that all get the same neighbour."""
    folder = copied(encoder_dir, tmp_path / "encoder", without_tokenizer)
    monkeypatch.chdir(tmp_path)
    data.write_jsonl("texts.jsonl", [{"text": "Anna Smith lives here"}])
    data.write_jsonl("pool.jsonl", [{"text": "The market closed higher"}])
    said = [
        "knn.py",
        "--forget",
        "texts.jsonl",
        "--pool",
        "pool.jsonl",
        "--encoder",
        str(folder),
        "--dry-run",
    ]
    monkeypatch.setattr(sys, "argv", said)
    assert "no tokenizer" in stopped_with(knn.main, capsys) and not Path("pairs.jsonl").exists()
    copied(encoder_dir, folder, cut_off)
    assert "cannot be loaded" in stopped_with(knn.main, capsys)


BERTS = {
    "a causal LM": (lambda d: "gpt_neo", "no encoder"),
    "no tokenizer": (without_tokenizer, "no tokenizer"),
    "cut weights": (cut_off, "cannot be loaded"),
    "a decoder": (lambda f: edit(f / "config.json", is_decoder=True), "no encoder"),
    "fewer layers": (
        lambda f: edit(f / "config.json", num_hidden_layers=3),
        "3 layers and the weights have",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
}


@pytest.mark.parametrize("name", list(BERTS))
def test_a_bert_that_is_none_is_refused(name, given, tmp_path, encoder_dir, capsys):
    """Before weights are loaded."""
    damage, message = BERTS[name]
    folder = (
        given / "gpt_neo"
        if name == "a causal LM"
        else copied(encoder_dir, tmp_path / "bert", damage)
    )
    error = stopped_with(
        lambda: icu.main(argv=argv(given, given / "opt", "--dry-run", "--bert", folder)), capsys
    )
    assert message in error and "--bert" in error


# --- flags ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "meta", "abacus"])
def test_a_device_that_is_not_there_is_refused(
    device, given, tmp_path, encoder_dir, capsys, monkeypatch
):
    """By icu.py, evals/tasks.py and knn.py, also in a dry run; --device cuda is no wish."""
    said = argv(given, given / "opt", "--device", device, "--dry-run")
    assert f"--device {device}" in stopped_with(lambda: icu.main(argv=said), capsys)
    said = [
        "--model",
        str(given / "opt"),
        "--out",
        str(tmp_path / "o"),
        "--device",
        device,
        "--dry-run",
    ]
    assert f"--device {device}" in stopped_with(lambda: tasks.main(said), capsys)
    said = [
        "--forget",
        str(given / "pairs.jsonl"),
        "--pool",
        str(given / "pairs.jsonl"),
        "--device",
        device,
    ]
    monkeypatch.setattr(sys, "argv", ["knn.py", *said, "--dry-run"])
    assert f"--device {device}" in stopped_with(knn.main, capsys)


@pytest.mark.parametrize("seed", [2**32, 10**30, -1, "x", "1.5"])
def test_a_seed_that_numpy_refuses_is_refused(seed, given, capsys):
    """And the largest that it takes is taken."""
    error = stopped_with(
        lambda: icu.main(argv=argv(given, given / "opt", f"--seed={seed}")), capsys
    )
    assert "--seed" in error and "4294967295" in error
    assert icu.parse_args(argv(given, given / "opt", "--seed", "4294967295")).seed == 2**32 - 1


def test_a_missing_model_is_found_in_a_dry_run_of_tasks(given, tmp_path, capsys):
    data.write_jsonl(tmp_path / "piqa.jsonl", [{"goal": "x", "sol1": "y", "sol2": "z", "label": 0}])
    said = [
        "--tasks",
        "piqa",
        "--task-data",
        str(tmp_path),
        "--out",
        str(tmp_path / "o"),
        "--device",
        "cpu",
    ]
    error = stopped_with(lambda: tasks.main([*said, "--dry-run", "--model", "./nowhere"]), capsys)
    assert "./nowhere: no such folder" in error


def test_ids_of_another_tokenizer_are_said_to_be_encoded_anew(given, tmp_path, capsys):
    """One note where no row's *_ids fit; none where there are none, or where they fit."""
    _, tokenizer = models.check_model(str(given / "gpt_neo"))
    names = [f"{side}{part}" for side in ("", "learn_") for part in data.PARTS]
    own = [pair | {f"{n}_ids": tokenizer(pair[n])["input_ids"] for n in names} for pair in PAIRS]
    foreign = [pair | {f"{n}_ids": [5, 6] for n in names} for pair in PAIRS]
    for pairs, notes in ((PAIRS, 0), (own, 0), (foreign, 1)):
        data.write_jsonl(tmp_path / "pairs.jsonl", pairs)
        icu.main(
            argv=argv(given, given / "gpt_neo", "--dry-run", "--pairs", tmp_path / "pairs.jsonl")
        )
        said = capsys.readouterr().out
        assert said.count("note: the *_ids of 2 pairs are not this tokenizer's") == notes, said


def test_a_run_prints_no_table_of_transformers(given, tmp_path, encoder_dir):
    """The whole command, with an encoder that has a tensor more, as BERT has its heads: no report on either stream."""
    more = {"cls.predictions.bias": torch.ones(3)}
    encoder = copied(
        encoder_dir,
        tmp_path / "bert",
        lambda f: change_tensors(f, lambda tensors: tensors.update(more)),
    )
    said = argv(
        given, given / "gpt_neo", "--bert", encoder, "--eval-only", "--out", tmp_path / "run"
    )
    done = subprocess.run(
        [sys.executable, ROOT / "icu.py", *said], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "REPORT" not in done.stdout + done.stderr, done.stderr
