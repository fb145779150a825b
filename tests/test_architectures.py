"""What a measure may not depend on: the folder's generation settings, its batch, the architecture.

python -m pytest tests/test_architectures.py -q            # seven architectures
python -m pytest tests/test_architectures.py -q -m slow    # the others
"""

import json

import architectures
import pytest
import torch
from test_models import pair
from transformers import AutoConfig, AutoTokenizer, Gemma3Config
from world import samples_of

import metrics
from evals import tasks
from kit import models

PAIR = pair("a", "The parcel for Ines Duarte was left", " at 14 Harbour Lane.")


@pytest.fixture
def speaker(save_tiny, tmp_path):
    """speaker(kind="gpt_neo", **config) -> a tiny model and its tokenizer."""
    return lambda kind="gpt_neo", **config: models.load_model(
        str(save_tiny(kind, tmp_path / "m", **config))
    )


def beams_alone(model, prompts, lengths):
    """beam_generate of a row at a time."""
    pairs = zip(prompts, lengths, strict=True)
    return [metrics.beam_generate(model, [prompt], [length])[0] for prompt, length in pairs]


def assert_literal(model, rows, el, ma):
    """EL of n = 2 and MA are those of the literal loops."""
    literal = [metrics.literal_extraction_likelihood(model, row, 2) for row in rows]
    assert el.tolist() == pytest.approx(literal)
    literal = [metrics.literal_memorization_accuracy(model, row) for row in rows]
    assert ma.tolist() == pytest.approx(literal)


# --- the folder's generation_config.json ---

FOLDER_SETTINGS = {
    "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "length_penalty": 3.0, "min_length": 60,
    "suppress_tokens": [*range(40, 60)], "sequence_bias": [[[80], 50.0]], "max_length": 9,
    "do_sample": True, "temperature": 5.0, "num_return_sequences": 2, "num_beams": 4,
    "return_dict_in_generate": True,
}  # fmt: skip


def test_no_measure_obeys_the_folders_generation_config(save_tiny, tmp_path):
    """The model keeps it, also where it is exported."""
    folder = save_tiny("gpt_neo", tmp_path / "model")
    text = [5, 9, 40, 41, 70, 71, 80, 40, 41, 9, 5, 40, 41, 70, 71]

    def measured(model, tokenizer):
        return (
            metrics.beam_generate(model, [text[:4], text[:9]], [20, 12]),
            metrics.literal_extraction_likelihood(model, text, 2),
            tasks.replies(model, tokenizer, ["User 1: hello there.\nUser 2:"], new_tokens=12),
        )

    plain = measured(*models.load_model(str(folder)))
    file = "generation_config.json"
    (folder / file).write_text(json.dumps({"eos_token_id": 0} | FOLDER_SETTINGS))
    model, tokenizer = models.load_model(str(folder))
    assert measured(model, tokenizer) == plain
    models.save_model(model, tokenizer, tmp_path / "run" / "model")
    exported = json.loads((tmp_path / "run" / "model" / file).read_text())
    assert FOLDER_SETTINGS.items() <= exported.items()


# --- a limit that holds for a row holds in a batch ---


def test_rows_that_fill_the_models_positions_are_measured_as_alone(make_model):
    """A long prompt beside a short one: beams, EL and MA."""
    model = make_model("gpt_neo", vocab=320, max_position_embeddings=24)
    # Without an end every answer has its full length.
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    rows = [torch.randint(1, 320, (24,)).tolist() for _ in range(4)]
    cuts = [20, 4, 12, 23]
    prompts = [row[:cut] for row, cut in zip(rows, cuts, strict=True)]
    lengths = [24 - cut for cut in cuts]
    alone = beams_alone(model, prompts, lengths)
    assert [len(generation) for generation in alone] == lengths
    assert metrics.beam_generate(model, prompts, lengths) == alone
    el, ma = metrics.el_and_ma(model, torch.tensor(rows), n=2)
    assert_literal(model, rows, el, ma)


def test_positions_are_read_by_every_name():
    """MPT has max_seq_len, models of several parts a text_config, ALiBi models none."""
    names = {name: models.positions_of(architectures.config_of(name)) for name in ("llama", "mpt")}
    assert set(names.values()) == {architectures.POSITIONS}
    assert models.positions_of(Gemma3Config(text_config={"max_position_embeddings": 40})) == 40
    assert models.positions_of(architectures.config_of("bloom")) is None


# --- architectures ---


def check_measures(model):
    """EL, MA, beams and log p of a batch are those of single rows."""
    rows = architectures.rows()
    # A text that it knows.
    rows[1][8:] = metrics.beam_generate(model, [rows[1][:8]], [14], num_beams=1)[0]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = (torch.arange(30)[None] < torch.tensor([len(row) for row in rows])[:, None]).long()
    el, ma = metrics.el_and_ma(model, ids, mask, n=2)
    assert_literal(model, rows, el, ma)
    assert 0 < max(el) and el[1] > 0.5
    prompts, lengths = [rows[0][:20], rows[1][:5], rows[2][:9]], [6, 14, 4]
    assert metrics.beam_generate(model, prompts, lengths) == beams_alone(model, prompts, lengths)
    row = rows[0]
    pairs = [(row[:k], choice) for k in (4, 20, 28) for choice in (row[5:8], row[10:14], row[1:3])]
    scores = tasks.loglikelihoods(model, pairs)
    plain = [architectures.literal_score(model, *pair) for pair in pairs]
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in plain]
    assert [logp for logp, _ in scores] == pytest.approx([logp for logp, _ in plain], abs=2e-3)


REST = sorted(architectures.CONFIGS.keys() - set(architectures.USUAL))
ALL = [*architectures.USUAL, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]


@pytest.mark.parametrize("name", ALL)
def test_every_measure_equals_a_plain_loop_on_every_architecture(name, save_tiny, tmp_path):
    """float64 is right or refused."""
    model, folder = architectures.small(name), save_tiny("gpt_neo", tmp_path / "m")
    check_measures(model)
    model.save_pretrained(folder)
    if (kind := model.config.model_type) in models.NO_FLOAT64:
        with pytest.raises(ValueError, match=f"float64 .*{kind}: pass --dtype float32"):
            models.load_model(str(folder), dtype="float64")
    else:
        check_measures(models.load_model(str(folder), dtype="float64")[0])


@pytest.mark.parametrize("name", architectures.STATEFUL)
def test_what_has_no_plain_cache_is_refused_before_weights_are_loaded(name, save_tiny, tmp_path):
    """In one line with its name."""
    folder = save_tiny("llama", tmp_path / "m")
    config = architectures.config_of(name)
    config.save_pretrained(folder)
    with pytest.raises(ValueError, match=f"--model .*m: a {config.model_type} .*keys and values"):
        models.check_model(str(folder))


# --- ids that a model or a tokenizer does not have ---


def test_a_token_beyond_the_embeddings_is_refused_with_its_row(save_tiny, tmp_path):
    """If the text uses it."""
    folder = save_tiny("gpt_neo", tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|mask|>"])
    config = AutoConfig.from_pretrained(folder)
    samples = samples_of([PAIR, PAIR | {"prefix": "Call<|mask|> and ask"}], tokenizer)
    models.check_inputs(config, tokenizer, {"pair": samples[:1]}, {"own": ["Some words."]})
    with pytest.raises(ValueError, match="pair 2 .id a.: token 320 .*320 embeddings"):
        models.check_inputs(config, tokenizer, {"pair": samples}, {})
    with pytest.raises(ValueError, match="own text 2: token 320"):
        models.check_inputs(config, tokenizer, {}, {"own": ["Some words.", "<|mask|>"]})
