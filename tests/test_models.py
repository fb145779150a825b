"""kit/models.py: what a folder must hold, what loads, what can be read."""

import json

import conftest
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_icu import args_of, memorise
from tokenizers import decoders, normalizers, processors
from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM

import icu
import knn
import metrics
from evals import tasks
from kit import data, models

THAI = ["ห้องสมุดปิดเวลา", "เรือข้ามฟากมาช้า"]
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


# --- text to ids ---


def read_as(reading, tokenizer, text):
    """(a record, the ids that a model learns) of a text that is read in one of four ways."""
    at = text.index(" saw") + 2 if reading == "a cut inside a token" else text.index(" saw")
    record = pair("a", text[:at], text[at:])
    if reading == "two tokens in front":
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<unk> <s> $A", special_tokens=[("<unk>", 0), ("<s>", 1)]
        )
    ids = tokenizer(text)["input_ids"]
    if reading == "ids that are cut inside a letter":
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        cut = next(i for i in range(len(own)) if "\ufffd" in tokenizer.decode(own[:i]))
        rows = [np.array([part]) for part in ([], own[:cut], own[cut:])]
        (row,) = data.ids_records(*rows, tokenizer=tokenizer, where="ids.npy")
        assert row["prefix"] + row["suffix"] == text and "\ufffd" not in row["suffix"]
        record |= row
    return record, ids


READINGS = [
    "BOS",
    "two tokens in front",
    "a cut inside a token",
    "ids that are cut inside a letter",
]


@pytest.mark.parametrize("reading", READINGS)
def test_a_text_known_by_heart_is_measured_as_known(reading, make_model, save_tiny, tmp_path):
    """EL, MA and BLEU are 1, however its tokenizer reads it: it is read whole."""
    tokenizer = AutoTokenizer.from_pretrained(save_tiny("llama", tmp_path / "m"))
    text = "Call the clinic at Zoë 555-0142, the neighbour saw the van near the old mill."
    record, ids = read_as(reading, tokenizer, text)
    model = make_model("llama", vocab=len(tokenizer), dtype=torch.float32)
    memorise(model, [icu.Text(ids, 1, 1, [])], steps=150)
    (sample,), notes = icu.build_samples([record], tokenizer, protocol="paper", positions=256)
    assert sample.forget.ids == ids and bool(notes) == (reading == READINGS[2])
    (row,) = icu.memorisation(model, tokenizer, [sample], args_of())
    length = len(ids) - sample.forget.cut
    generations = metrics.beam_generate(model, [sample.forget.prompt], [length], num_beams=2)
    bleu = metrics.bleu(
        *models.decode(tokenizer, generations), *models.true_suffixes(tokenizer, [sample])
    )
    assert (row["el10"], row["ma"], bleu) == (1, 1, pytest.approx(1))


# --- folders ---


def test_weights_must_be_those_of_the_config(save_tiny, tmp_path, capfd):
    """A layer or head more or a tensor less is refused; constants and a tied head's copy load."""
    folder = save_tiny("gpt_neo", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    old = "attn.attention.bias", "attn.attention.masked_bias", "rotary_emb.inv_freq"
    constants = {f"transformer.h.0.{name}": torch.ones(1) for name in old}

    def with_constants(tensors):
        tensors |= constants | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}

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


# --- folders that only look wrong ---


def changed(name, **fields):
    """Fields of a JSON file of the folder."""

    def change(folder):
        data.write_json(folder / name, data.read_json(folder / name) | fields)

    return change


def sharded(folder):
    """The weights in several files and an index, as those of large models are."""
    model, _ = models.load_model(str(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")


def test_a_model_of_nan_gives_no_threshold(own_world):
    """--thresholds auto has nothing to go by: it names --model, and no run is begun."""
    change_tensors(own_world.model, lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))
    out, unseen = own_world.root / "new", own_world.root / "unseen.jsonl"
    flags = ["--out", str(out), "--thresholds", "auto", "--unseen", str(unseen)]
    with pytest.raises(ValueError, match="--model: answers NaN, .* no threshold for ma"):
        icu.main(argv=[*own_world.flags, *flags])
    assert not (out / "config.json").exists()


EOS = "<|endoftext|>"
ENDS = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": EOS, "type_id": 0}}]
CUT = {"direction": "Right", "strategy": "LongestFirst", "stride": 0, "max_length": 3}
PAD = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0}
ODD = {
    "a tokenizer that cuts and pads": changed(
        "tokenizer.json", truncation=CUT, padding=PAD | {"pad_type_id": 0, "pad_token": EOS}
    ),
    "a tokenizer that adds EOS": changed(
        "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing",
            "single": ENDS,
            "pair": [*ENDS, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {EOS: {"id": EOS, "ids": [0], "tokens": [EOS]}},
        },
    ),
    "no cache by its config": changed("config.json", use_cache=False),
    "all that it has handed out": changed(
        "config.json", output_hidden_states=True, output_attentions=True
    ),
    "no generation config": lambda folder: (folder / "generation_config.json").unlink(),
    "weights in several files": sharded,
}


@pytest.mark.parametrize("name", ODD)
def test_what_only_looks_wrong_is_measured_as_the_plain_folder(name, save_tiny, tmp_path):
    """The same samples, perplexity, replies, EL, MA and generations."""
    folder = save_tiny("gpt_neo", tmp_path / "m")
    pairs = [pair("0", "The van near", " the old mill."), pair("1", "Call the clinic", " now.")]
    row, texts = torch.arange(20, 60)[None], ["The van near the old mill.", "Call"]

    def measured():
        model, tokenizer = models.load_model(str(folder))
        samples, _ = icu.build_samples(pairs, tokenizer, protocol="paper", positions=256)
        memory = [values.tolist() for values in metrics.el_and_ma(model, row, n=2)]
        said = metrics.beam_generate(model, [row[0, :9].tolist()], [8])
        replies = tasks.replies(model, tokenizer, texts)
        return samples, metrics.perplexity(model, tokenizer, texts), memory, said, replies

    before = measured()
    ODD[name](folder)
    assert measured() == before


def test_a_run_needs_no_git_and_no_home(world, tmp_path, monkeypatch):
    """A container's user without a name keeps no cache, and finds nothing where he works."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.delenv("ICU_CACHE")
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    icu.main(argv=[*world.flags, "--eval-only", "--out", "run"])
    assert data.read_json("run/config.json")["git"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- marked texts ---


@pytest.mark.parametrize("context", [True, False])
def test_spans_are_found_where_a_tokenizer_adds_a_space_and_takes_it_away(context):
    """As Llama 2's, with the context in front and without it."""
    tokenizer, text = conftest._make_tokenizer("llama"), "Call the clinic at 555-0142 and ask"
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    parts = [decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(parts)
    row = pair("0", text[:15], text[15:]) | {"context": "Z\u00fcrich: ", "spans": [[19, 27]]}
    (sample,), _ = icu.build_samples(
        [row], tokenizer, protocol="paper", positions=99, context=context
    )
    ids = [sample.forget.ids[t] for t in sample.forget.span_positions]
    assert tokenizer.decode(ids).strip() == "555-0142"


def test_an_encoder_of_robertas_kind_reads_as_far_as_its_positions_go(save_tiny, tmp_path):
    """They begin after the padding's; where the tokenizer has no limit, texts are cut there."""
    changed("tokenizer_config.json", model_max_length=10**30)(save_tiny("opt", tmp_path))
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RobertaConfig(**size, max_position_embeddings=34)
    RobertaForMaskedLM(config).save_pretrained(tmp_path)
    text = "The van near the old mill. " * 30
    assert metrics.bertscore([text], [text + "more"], tmp_path)[2].item() == pytest.approx(1)
    one, other = knn.encode([text, text + "more"], tmp_path, 2, "cpu")
    assert (one == other).all()


# --- scripts that an encoder, or BLEU's usual words, cannot read ---


def test_unrelated_texts_of_unknown_pieces_have_no_bertscore(encoder_dir):
    """All pieces are [UNK], so any two would score 1; readable rows beside them score as alone."""
    f1 = metrics.bertscore([THAI[1], LATIN[0], ""], [THAI[0], LATIN[1], THAI[0]], encoder_dir)[2]
    assert f1.isnan().tolist() == [True, False, True]
    alone = metrics.bertscore(LATIN[:1], LATIN[1:], encoder_dir)[2].item()
    assert f1[1].item() == pytest.approx(alone, abs=1e-6)
    assert 0 < metrics.unrelated_bertscore([*THAI, *LATIN], encoder_dir) < 0.9


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


@pytest.mark.parametrize(("text", "tokens"), [
    ("患者林晓雨住在青石镇，账户尾号是 7731。", "zh"), ("図書館は午後五時に閉まります", "char"),
    (THAI[0], "char"), (LATIN[0], "13a"), ("도서관은 다섯 시에", "13a"), ("7731", "13a"),
    ("The sign says 出口 and nothing else.", "13a"),
])  # fmt: skip
def test_words_of_bleu_are_those_of_the_references_script(text, tokens):
    """By the script that most of its letters are of."""
    assert models.bleu_tokens(text) == tokens
