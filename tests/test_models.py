"""kit/models.py and the plain engine: what a folder must hold, what loads, what can be read.

python -m pytest tests/test_models.py -q
"""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import icu
import knn
import metrics
from kit import data, models, processes

THAI = ["ห้องสมุดปิดเวลา", "เรือข้ามฟากมาช้า"]
EMOJI = ["😀😃🎉 🚀🔥", "🐟🐳 🌊⛵"]
LATIN = ["Zoë Müller waited at the old mill.", "The ferry was late because of the fog."]
NEAR = {"learn_id": "p", "learn_context": "", "learn_prefix": "A van", "learn_suffix": " stood."}


def pair(name, prefix, suffix):
    text = {"id": name, "context": "", "prefix": prefix, "suffix": suffix, "similarity": 0.5}
    return text | NEAR


def change_tensors(folder, change):
    """Applies `change` to the tensors of a model folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# --- folders ---


def sharded(folder):
    """Weights whose index names two files of which one is missing."""
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"metadata": {}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


LACKING = {
    "holds an adapter": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "b.safetensors is missing": sharded,
    "pass --allow-pickle": lambda folder: (folder / "model.safetensors").rename(
        folder / "pytorch_model.bin"
    ),
}


@pytest.mark.parametrize("message", LACKING)
def test_a_folder_that_is_not_a_whole_model_is_refused(message, save_tiny, tmp_path):
    """Before a weight is loaded, in words that name the folder."""
    folder = save_tiny("gpt_neo", tmp_path / "m")
    models.check_model(str(folder))
    LACKING[message](folder)
    with pytest.raises(ValueError, match=f"--model .*m: .*{message}"):
        models.check_model(str(folder))


CONSTANTS = {
    "gpt_neo": {
        "transformer.h.0.attn.attention.bias": torch.ones(1, 1, 8, 8).byte(),
        "transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9),
    },
    "opt": {"model.decoder.version": torch.ones(1)},
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
}


def test_weights_must_be_those_of_the_config(kind, save_tiny, tmp_path, capfd):
    """A layer or head more or a tensor less is refused; constants and a tied head's copy load."""
    folder = save_tiny(kind, tmp_path / kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    embedding = next(name for name in tensors if "wte" in name or "embed_tok" in name)

    def with_constants(tensors):
        tensors |= CONSTANTS[kind] | {"lm_head.weight": tensors[embedding].clone()}

    change_tensors(folder, with_constants)
    models.load_model(str(folder))
    layer = next(name for name in tensors if ".0." in name)
    for surplus in (layer.replace(".0.", ".7."), "score.weight"):
        change_tensors(folder, lambda tensors, name=surplus: tensors.update({name: torch.ones(2)}))
        with pytest.raises(ValueError, match=f"have more: 1 tensors, the first is {surplus}"):
            models.load_model(str(folder))
        change_tensors(folder, lambda tensors, name=surplus: tensors.pop(name))
    change_tensors(folder, lambda tensors: tensors.pop(layer))
    with pytest.raises(ValueError, match=f"lack 1 tensors, the first is {layer}"):
        models.load_model(str(folder))
    assert "REPORT" not in "".join(capfd.readouterr())  # transformers' own table


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused():
    """--device cuda is no wish; without the flag the run is on the CPU."""
    assert processes.device_of(None) == "cpu"
    for device in ("cuda", "cuda:1", "abacus"):
        with pytest.raises(ValueError, match=f"--device {device}: "):
            processes.device_of(device)


# --- the plain engine ---


def test_the_plain_engine_steps_by_the_gradients_that_backward_makes(make_model):
    """Two halves are one loss; a gradient that is not finite moves nothing."""
    ids, engines = torch.randint(4, 90, (2, 12)), []
    for _ in range(2):
        engines.append(processes.PlainEngine(make_model("gpt_neo"), SimpleNamespace(lr=1e-3)))
    one, other = (engine.model for engine in engines)

    def halves(loss):
        (loss / 2).backward(retain_graph=True)
        (loss / 2).backward()

    assert engines[0].step(one(input_ids=ids, labels=ids).loss, torch.Tensor.backward)
    assert engines[1].step(other(input_ids=ids, labels=ids).loss, halves)
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    before = [parameter.clone() for parameter in one.parameters()]
    loss = one(input_ids=ids, labels=ids).loss * float("nan")
    assert not engines[0].step(loss, torch.Tensor.backward)
    assert all(map(torch.equal, before, one.parameters()))


# --- scripts that an encoder, or BLEU's usual words, cannot read ---


@pytest.mark.parametrize("texts", [THAI, EMOJI])
def test_unrelated_texts_of_unknown_pieces_have_no_bertscore(texts, encoder_dir):
    """All pieces are [UNK], so any two would score 1; readable rows beside them score as alone."""
    f1 = metrics.bertscore([texts[1], LATIN[0], ""], [texts[0], LATIN[1], texts[0]], encoder_dir)[2]
    assert f1.isnan().tolist() == [True, False, True]
    alone = metrics.bertscore(LATIN[:1], LATIN[1:], encoder_dir)[2].item()
    assert f1[1].item() == pytest.approx(alone, abs=1e-6)
    assert 0 < metrics.unrelated_bertscore([*texts, *LATIN], encoder_dir) < 0.9


def test_a_row_without_a_bertscore_is_not_forgotten_by_it():
    """Eq. 5 in the paper, and: the row stays in training. Released code, or: BLEU alone decides."""
    rows = [
        {"bertscore": None, "bleu": 0.0},
        {"bertscore": None, "bleu": 0.9},
        {"bertscore": 0.1, "bleu": 0.0},
    ]
    limits = {"bertscore": 0.3, "bleu": 0.01}
    assert icu.refine(set(), rows, limits, SimpleNamespace(protocol="paper")) == {2}
    assert icu.refine(set(), rows, limits, SimpleNamespace(protocol="released")) == {0, 2}


def test_a_run_warns_of_what_its_encoder_cannot_read_and_finishes(world, tmp_path, capsys):
    """One line names another encoder; the other row counts."""
    rows = [pair("a", "A note:", THAI[0]), pair("b", "A note:", LATIN[0])]
    data.write_jsonl(tmp_path / "pairs.jsonl", rows)
    command = ["--pairs", str(tmp_path / "pairs.jsonl"), "--model", str(world.model)]
    icu.main(argv=[*command, "--bert", "minilm", "--eval-only", "--out", str(tmp_path / "run")])
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "cannot read" in line]
    assert "1 of 2 texts (up to 100%" in warning
    assert "--bert bert-base-multilingual-cased" in warning
    rows = data.read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert {row["id"] for row in rows if row["bertscore"] is None} == {"a"}


def test_a_few_unknown_pieces_are_no_reason_for_a_warning(encoder_dir, capsys):
    """Latin texts with a sign that the encoder does not know are read."""
    text = "Zoë Müller ticked the box ✓ and went home to the old mill by the river."
    models.check_readable(encoder_dir, [*LATIN, text], "--bert")
    assert capsys.readouterr().out == ""


def test_knn_warns_of_forget_texts_that_its_encoder_cannot_read(tmp_path, capsys, monkeypatch):
    """Before it embeds anything, one line that names a multilingual encoder."""
    data.write_jsonl(tmp_path / "forget.jsonl", [{"id": "a", "text": THAI[0]}])
    data.write_jsonl(tmp_path / "pool.jsonl", [{"id": "b", "text": " ".join(LATIN)}])
    command = ["knn.py", "--forget", tmp_path / "forget.jsonl", "--pool", tmp_path / "pool.jsonl"]
    command += ["--out", tmp_path / "pairs.jsonl", "--dry-run"]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    knn.main()
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "cannot read" in line]
    assert f"--encoder {models.MULTILINGUAL['--encoder']}" in warning


@pytest.mark.parametrize(("text", "tokens"), [
    ("患者林晓雨住在青石镇，账户尾号是 7731。", "zh"), ("図書館は午後五時に閉まります", "char"),
    (THAI[0], "char"), (LATIN[0], "13a"), ("도서관은 다섯 시에", "13a"), ("7731", "13a"),
    ("The sign says 出口 and nothing else.", "13a"),
])  # fmt: skip
def test_words_of_bleu_are_those_of_the_references_script(text, tokens):
    """By the script that most of its letters are of."""
    assert models.bleu_tokens(text) == tokens


def test_bleu_of_a_chinese_text_with_one_other_character_is_neither_0_nor_1():
    """As one word it had no n-gram in common with its near copy."""
    true, near = "患者林晓雨住在青石镇柳河路十四号", "患者林晓雨住在青石镇柳河路十五号"
    assert 0.7 < metrics.bleu(near, true) < 1 and metrics.bleu(true, true) == 1
    assert metrics.bleu("天气", true) == 0 and metrics.bleu(THAI[0], THAI[0]) == 1
