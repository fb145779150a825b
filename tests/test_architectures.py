"""What a measure may not depend on: the folder's generation settings, its batch, the architecture behind it.

    python -m pytest tests/test_architectures.py -q
"""

import json

import pytest
import torch
from transformers import GenerationConfig

import bench
import metrics
import tasks
from kit import models

PAIR = {"id": "a", "context": "", "prefix": "The parcel for Ines Duarte was left", "suffix": " at 14 Harbour Lane."}
PAIR |= {"learn_id": "b", "learn_context": "", "learn_prefix": "A neighbour saw the van", "learn_suffix": " near it."}

# --- the folder's generation_config.json ---

FOLDER_SETTINGS = {
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "length_penalty": 3.0},
    "tokens": {"suppress_tokens": [*range(40, 60)], "forced_eos_token_id": 7, "begin_suppress_tokens": [61]},
    "words": {"bad_words_ids": [[70], [71]], "sequence_bias": [[[80], 50.0]], "stop_strings": "e"},
    "lengths": {"min_length": 60, "min_new_tokens": 25, "max_length": 9, "exponential_decay_length_penalty": (2, 2.0)},
    "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 3, "num_return_sequences": 2, "num_beams": 4},
    "guidance": {"guidance_scale": 3.0, "early_stopping": True, "renormalize_logits": True},
    "output": {"return_dict_in_generate": True, "output_scores": True},
}


@pytest.mark.parametrize("name", FOLDER_SETTINGS)
def test_no_measure_obeys_the_folders_generation_config(name, make_model, save_tiny, tmp_path, monkeypatch):
    """Greedy and beam search say what they say under a plain generation config, and the model keeps its own."""
    model, text = make_model("gpt_neo", vocab=320), [5, 9, 40, 41, 70, 71, 80, 40, 41, 9, 5, 40, 41, 70, 71]
    tokenizer = models.load_model(str(save_tiny("gpt_neo", tmp_path / "model")))[1]

    def measured():
        return (
            metrics.beam_generate(model, [text[:4], text[:9]], [20, 12]),
            metrics.literal_extraction_likelihood(model, text, 2),
            bench.literal_el_and_ma(model, [text], n=2),
            bench.plain_beams(model, [text[:4], text[:6]], [8, 8], [[0, 1]]),
            tasks.replies(model, tokenizer, ["User 1: hello there.\nUser 2:"], new_tokens=12),
        )

    plain = measured()
    model.generation_config.update(**FOLDER_SETTINGS[name])
    own = model.generation_config.to_dict()
    assert measured() == plain
    assert model.generation_config.to_dict() == own


def test_a_folders_penalty_neither_hides_what_is_memorised_nor_is_lost_in_export(save_tiny, tmp_path, capsys):
    """A model that says one token for ever: `generate` under the penalty does not, a measure and --ask do."""
    folder = save_tiny("gpt_neo", tmp_path / "model")
    model, tokenizer = models.load_model(str(folder))
    prompt = models.encode(tokenizer, PAIR["prefix"])
    (plain,) = metrics.beam_generate(model, [prompt], [20])
    GenerationConfig(eos_token_id=0, repetition_penalty=1.3, no_repeat_ngram_size=1).save_pretrained(folder)
    model, _ = models.load_model(str(folder))
    under_penalty = model.generate(torch.tensor([prompt]), max_new_tokens=20, num_beams=2)[0, len(prompt) :].tolist()
    assert under_penalty[: len(plain)] != plain
    assert metrics.beam_generate(model, [prompt], [20]) == [plain]
    models.save_model(model, tokenizer, tmp_path / "run" / "model")
    exported = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert exported["repetition_penalty"] == 1.3 and exported["no_repeat_ngram_size"] == 1
