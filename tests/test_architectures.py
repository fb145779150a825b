"""What a measure may not depend on: the folder's generation settings, its batch, the architecture behind it.

python -m pytest tests/test_architectures.py -q
"""

import json
import math
import unicodedata
from types import SimpleNamespace

import architectures
import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import (
    AutoTokenizer,
    BloomConfig,
    Gemma3Config,
    GenerationConfig,
    LlamaConfig,
    MptConfig,
    MptForCausalLM,
    PreTrainedTokenizerFast,
)

import icu
import metrics
from dev import bench
from evals import tasks
from kit import data, models

PAIR = {
    "id": "a",
    "context": "",
    "prefix": "The parcel for Ines Duarte was left",
    "suffix": " at 14 Harbour Lane.",
}
PAIR |= {
    "learn_id": "b",
    "learn_context": "",
    "learn_prefix": "A neighbour saw the van",
    "learn_suffix": " near it.",
}
PAIR |= {"similarity": 0.5}

# --- the folder's generation_config.json ---

FOLDER_SETTINGS = {
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "length_penalty": 3.0},
    "tokens": {
        "suppress_tokens": [*range(40, 60)],
        "forced_eos_token_id": 7,
        "begin_suppress_tokens": [61],
    },
    "words": {"bad_words_ids": [[70], [71]], "sequence_bias": [[[80], 50.0]], "stop_strings": "e"},
    "lengths": {
        "min_length": 60,
        "min_new_tokens": 25,
        "max_length": 9,
        "exponential_decay_length_penalty": (2, 2.0),
    },
    "sampling": {
        "do_sample": True,
        "temperature": 5.0,
        "top_k": 3,
        "num_return_sequences": 2,
        "num_beams": 4,
    },
    "guidance": {"guidance_scale": 3.0, "early_stopping": True, "renormalize_logits": True},
    "output": {"return_dict_in_generate": True, "output_scores": True},
}


@pytest.mark.parametrize("name", FOLDER_SETTINGS)
def test_no_measure_obeys_the_folders_generation_config(
    name, make_model, save_tiny, tmp_path, monkeypatch
):
    """Greedy and beam search say what they say under a plain generation config, and the model keeps its own."""
    model, text = (
        make_model("gpt_neo", vocab=320),
        [5, 9, 40, 41, 70, 71, 80, 40, 41, 9, 5, 40, 41, 70, 71],
    )
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


def test_a_folders_penalty_neither_hides_what_is_memorised_nor_is_lost_in_export(
    save_tiny, tmp_path, capsys
):
    """A model that says one token for ever: `generate` under the penalty does not, a measure and --ask do."""
    folder = save_tiny("gpt_neo", tmp_path / "model")
    model, tokenizer = models.load_model(str(folder))
    prompt = models.encode(tokenizer, PAIR["prefix"])
    (plain,) = metrics.beam_generate(model, [prompt], [20])
    GenerationConfig(
        eos_token_id=0, repetition_penalty=1.3, no_repeat_ngram_size=1
    ).save_pretrained(folder)
    model, _ = models.load_model(str(folder))
    under_penalty = model.generate(torch.tensor([prompt]), max_new_tokens=20, num_beams=2)[
        0, len(prompt) :
    ].tolist()
    assert under_penalty[: len(plain)] != plain
    assert metrics.beam_generate(model, [prompt], [20]) == [plain]
    models.save_model(model, tokenizer, tmp_path / "run" / "model")
    exported = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert exported["repetition_penalty"] == 1.3 and exported["no_repeat_ngram_size"] == 1


# --- a limit that holds for a row holds in a batch ---


def test_rows_that_fill_the_models_positions_are_measured_as_alone(make_model):
    """A long prompt with a short answer beside a short prompt with a long one: beams, EL and MA of each as alone."""
    model = make_model("gpt_neo", vocab=320, max_position_embeddings=24)
    model.generation_config.eos_token_id = model.config.eos_token_id = (
        None  # so that every answer has its full length
    )
    rows = [torch.randint(1, 320, (24,)).tolist() for _ in range(4)]
    cuts = [20, 4, 12, 23]
    prompts, lengths = (
        [row[:cut] for row, cut in zip(rows, cuts, strict=True)],
        [24 - cut for cut in cuts],
    )
    alone = [
        metrics.beam_generate(model, [p], [n])[0] for p, n in zip(prompts, lengths, strict=True)
    ]
    assert [len(said) for said in alone] == lengths
    assert metrics.beam_generate(model, prompts, lengths) == alone
    ids = torch.tensor(rows)
    el, ma = metrics.el_and_ma(model, ids, n=2, decode_batch=3)
    assert el.tolist() == pytest.approx(
        [metrics.literal_extraction_likelihood(model, row, 2) for row in rows]
    )
    assert ma.tolist() == pytest.approx(
        [metrics.literal_memorization_accuracy(model, row) for row in rows]
    )


def test_the_case_of_learned_positions(shared):
    """cases/learned-positions: both rows are measured in one batch as each is alone."""
    model, tokenizer = models.load_model(str(shared / "models" / "pile-neo-6m"))
    pairs = data.read_pairs(shared / "cases" / "learned-positions" / "pairs.jsonl")
    samples, _ = icu.build_samples(pairs, tokenizer, protocol="paper", positions=512)
    prompts = [sample.forget.prompt for sample in samples]
    lengths = [len(sample.forget.ids) - sample.forget.cut for sample in samples]
    alone = [
        metrics.beam_generate(model, [p], [n])[0] for p, n in zip(prompts, lengths, strict=True)
    ]
    assert metrics.beam_generate(model, prompts, lengths) == alone


@pytest.mark.parametrize("name", ["max_position_embeddings", "max_seq_len", "text_config"])
def test_positions_are_read_by_every_name(name):
    """MPT calls them max_seq_len, models of several parts have them in their text_config, ALiBi models have none."""
    if name == "text_config":
        config = Gemma3Config(text_config={"max_position_embeddings": 40})
    else:
        config = (LlamaConfig if name == "max_position_embeddings" else MptConfig)(**{name: 40})
    assert models.positions_of(config) == 40
    assert models.positions_of(BloomConfig()) is None


def test_replies_fit_a_model_of_few_positions(save_tiny, tmp_path):
    """Prompts longer than the model, and a model too short for a whole reply: what fits, without an error."""
    model, tokenizer = models.load_model(
        str(save_tiny("gpt_neo", tmp_path / "m", max_position_embeddings=24))
    )
    said = tasks.replies(
        model, tokenizer, ["User 1: hello there, how are you?\nUser 2:", "User 1:"], new_tokens=32
    )
    assert len(said) == 2


def test_perplexity_of_a_model_whose_positions_go_by_another_name():
    """MPT has max_seq_len positions: its windows are no longer."""
    torch.manual_seed(0)
    model = MptForCausalLM(
        MptConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=16, vocab_size=50)
    ).eval()
    ids = torch.randint(1, 50, (40,)).tolist()
    parts = [
        model(torch.tensor([ids[i : i + 16]]), labels=torch.tensor([ids[i : i + 16]])).loss
        for i in (0, 16, 32)
    ]
    expected = float(sum(loss * n for loss, n in zip(parts, (15, 15, 7), strict=True)) / 37)

    class Tokenizer:
        bos_token_id = None

        def __call__(self, texts, **_):
            return {"input_ids": [ids] * len(texts)}

    found = metrics.perplexity(model, Tokenizer(), ["text"])
    assert math.log(found) == pytest.approx(expected, rel=1e-5)


# --- strings that the ids do not say ---


def pairs_of_case(shared, name):
    if not (shared / "cases" / name).is_dir():
        pytest.skip("the cases are not here")
    return data.read_pairs(shared / "cases" / name / "pairs.jsonl")


def measured_by_heart(pairs, tokenizer, model, monkeypatch):
    """icu.measure_share of pairs whose suffixes the model says by heart: (rows, the strings BERTScore was given)."""
    samples, _ = icu.build_samples(pairs, tokenizer, protocol="paper", positions=256)
    suffixes, seen = [sample.forget.ids[sample.forget.cut :] for sample in samples], []

    def bertscore(candidates, references, *_, **__):
        seen.append((candidates, references))
        return (torch.ones(len(candidates)),) * 3

    monkeypatch.setattr(metrics, "beam_generate", lambda *_, **__: suffixes)
    monkeypatch.setattr(metrics, "bertscore", bertscore)
    args = SimpleNamespace(
        protocol="paper", device="cpu", dtype="float32", num_beams=2, bert="none"
    )
    return icu.measure_share(model, tokenizer, samples, args), seen


def test_a_text_in_another_normal_form_that_is_said_by_heart_scores_bleu_1(
    save_tiny, tmp_path, monkeypatch
):
    """The file is NFD, the tokenizer's ids are those of NFC: what is compared is what the ids say (cases/nfd-text)."""
    model, tokenizer = models.load_model(str(save_tiny("gpt_neo", tmp_path / "m")))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    text = unicodedata.normalize(
        "NFD", " über der Österbrücke neun, sagt Angélique Lefèvre aus Orléans."
    )
    rows, ((said, references),) = measured_by_heart(
        [PAIR | {"suffix": text}], tokenizer, model, monkeypatch
    )
    assert [row["bleu"] for row in rows] == [1.0] and said == references
    assert references == [unicodedata.normalize("NFC", text)]


def test_the_case_of_nfd_text(shared, save_tiny, tmp_path, monkeypatch):
    """cases/nfd-text, said by heart: BLEU 1, and the filter of either protocol does not take it for forgotten."""
    model, tokenizer = models.load_model(str(save_tiny("gpt_neo", tmp_path / "m")))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    pairs = pairs_of_case(shared, "nfd-text")
    rows, ((said, references),) = measured_by_heart(pairs, tokenizer, model, monkeypatch)
    assert not unicodedata.is_normalized("NFC", pairs[0]["suffix"]) and said == references
    assert references == [unicodedata.normalize("NFC", pair["suffix"]) for pair in pairs]
    assert [row["bleu"] for row in rows] == [1.0]
    for protocol in ("paper", "released"):
        limits = {"bertscore": 0.3, "bleu": 0.01}
        assert not icu.refine(set(), rows, limits, SimpleNamespace(protocol=protocol))


def test_an_ordinary_text_is_compared_with_itself(save_tiny, tmp_path, monkeypatch):
    """A byte-level tokenizer gives back the file's own string."""
    model, tokenizer = models.load_model(str(save_tiny("gpt_neo", tmp_path / "m")))
    _, ((_, references),) = measured_by_heart([PAIR], tokenizer, model, monkeypatch)
    assert references == [PAIR["suffix"]]


def test_a_bos_that_the_text_spells_out_is_not_put_there_twice(save_tiny, tmp_path):
    """A text in a chat template begins with <s>, and the tokenizer adds one as well: the model reads one."""
    model, tokenizer = models.load_model(str(save_tiny("llama", tmp_path / "m")))
    spelled = PAIR | {
        "prefix": "<s>" + PAIR["prefix"],
        "learn_prefix": "<s>" + PAIR["learn_prefix"],
    }
    (plain, same), _ = icu.build_samples(
        [PAIR, spelled], tokenizer, protocol="paper", positions=256
    )
    assert plain.forget == same.forget and plain.learn == same.learn
    assert plain.forget.ids[:2].count(tokenizer.bos_token_id) == 1
    inside = PAIR | {"prefix": PAIR["prefix"] + "<s>"}  # elsewhere it is the text's own
    (sample,), _ = icu.build_samples([inside], tokenizer, protocol="paper", positions=256)
    assert sample.forget.ids.count(tokenizer.bos_token_id) == 2
    texts = [PAIR["prefix"] + PAIR["suffix"], spelled["prefix"] + PAIR["suffix"]]
    assert len({metrics.perplexity(model, tokenizer, [text]) for text in texts}) == 1
    assert (
        len({tuple(tasks.encode_pairs(tokenizer, [(text, " x")])[0][0]) for text in texts}) == 1
    )
    assert len(set(tasks.replies(model, tokenizer, texts))) == 1


def test_the_case_of_bos_in_text(shared, save_tiny, tmp_path):
    """cases/bos-in-text: one BOS stands before the text, whose own is that one, and </s> stays in it."""
    _, tokenizer = models.load_model(str(save_tiny("llama", tmp_path / "m")))
    (pair,) = pairs_of_case(shared, "bos-in-text")
    (sample,), _ = icu.build_samples([pair], tokenizer, protocol="paper", positions=256)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert sample.forget.ids[0] == bos != sample.forget.ids[1] and sample.forget.ids[-1] == eos
    assert tokenizer.decode(sample.forget.ids) == pair["prefix"] + pair["suffix"]
    assert sample.learn.ids[0] == bos and sample.learn.ids.count(bos) == 1


# --- architectures ---


def literal_logp(model, context, continuation):
    """(sum of log p, greedy ids) of a continuation, from one pass over one row."""
    with torch.no_grad():
        logp = (
            model(torch.tensor([context + continuation]))
            .logits[0, len(context) - 1 : -1]
            .double()
            .log_softmax(-1)
        )
    return sum(logp[t, token].item() for t, token in enumerate(continuation)), logp.argmax(
        1
    ).tolist()


def some_rows():
    return [torch.randint(3, architectures.VOCAB, (length,)).tolist() for length in (30, 22, 13)]


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_every_measure_equals_a_plain_loop_on_every_architecture(name):
    """EL, MA and beams of a batch, and log p of choices that share a context, against a row at a time."""
    model, rows = architectures.small(name), some_rows()
    models.check_cache(model.config, name)
    rows[1][8:] = metrics.beam_generate(model, [rows[1][:8]], [14], num_beams=1)[
        0
    ]  # a text that it knows
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = (torch.arange(30)[None] < torch.tensor([len(row) for row in rows])[:, None]).long()
    el, ma = metrics.el_and_ma(model, ids, mask, n=2)
    assert el.tolist() == pytest.approx(
        [metrics.literal_extraction_likelihood(model, row, 2) for row in rows]
    )
    assert ma.tolist() == pytest.approx(
        [metrics.literal_memorization_accuracy(model, row) for row in rows]
    )
    assert 0 < max(el) and el[1] > 0.5

    prompts, lengths = [rows[0][:20], rows[1][:5], rows[2][:9]], [6, 14, 4]
    alone = [
        metrics.beam_generate(model, [p], [n])[0] for p, n in zip(prompts, lengths, strict=True)
    ]
    assert metrics.beam_generate(model, prompts, lengths) == alone
    assert_scores_are_plain(model, rows[0])


def assert_scores_are_plain(model, row):
    """The choices of a short context, of one as long as most windows here and of a longer one."""
    pairs = [(row[:k], choice) for k in (4, 20, 28) for choice in (row[5:8], row[10:14], row[1:3])]
    found, plain = (
        tasks.loglikelihoods(model, pairs),
        [literal_logp(model, *pair) for pair in pairs],
    )
    assert [said for _, said in found] == [said for _, said in plain]
    assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in plain], abs=2e-3)


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_the_folder_of_every_architecture_is_taken(name, save_tiny, tmp_path):
    """The shapes of its weights are those that its config.json describes, as far as transformers keeps their names."""
    folder = save_tiny("gpt_neo", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    architectures.small(name).save_pretrained(folder)
    assert models.check_model(str(folder))[0].model_type == config_type(name)


@pytest.mark.parametrize("name", architectures.STATEFUL)
def test_what_has_no_plain_cache_is_refused_before_weights_are_loaded(name, save_tiny, tmp_path):
    """One line that names the folder and the architecture; the folder's weights are never opened."""
    folder = save_tiny("llama", tmp_path / "m")
    architectures.config_of(name).save_pretrained(folder)
    with pytest.raises(
        ValueError, match=f"--model .*m: a {config_type(name)} .*keys and values"
    ) as error:
        models.check_model(str(folder))
    assert "\n" not in str(error.value)


def config_type(name):
    return architectures.config_of(name).model_type


# --- ids that a model or a tokenizer does not have ---


@pytest.fixture
def folder_with_own_token(save_tiny, tmp_path):
    """A folder whose tokenizer has a token more than its model has embeddings (cases/own-token)."""
    folder = save_tiny("gpt_neo", tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|mask|>"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("where", ["pairs", "ppl"])
def test_a_token_beyond_the_embeddings_is_refused_with_its_row(
    where, folder_with_own_token, tmp_path, encoder_dir
):
    """One line before weights are loaded; a text that does not use the token is no reason to refuse."""
    folder, texts = folder_with_own_token, tmp_path / "texts.jsonl"
    pairs = (
        [PAIR, PAIR | {"id": "b", "prefix": "Call the depot <|mask|> and ask"}]
        if where == "pairs"
        else [PAIR]
    )
    data.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    data.write_jsonl(
        texts, [{"text": "Some words."}, {"text": "A <|mask|>." if where == "ppl" else "More."}]
    )
    command = [
        "--pairs",
        tmp_path / "pairs.jsonl",
        "--model",
        folder,
        "--bert",
        encoder_dir,
        "--out",
        tmp_path / "run",
    ]
    command = [*map(str, command), "--ppl", f"own={texts}", "--dry-run"]
    row = {"pairs": "pair 2 .id b.", "ppl": "own text 2"}[where]
    with pytest.raises(ValueError, match=f"{row}: token 320 .*320 embeddings"):
        icu.main(icu.icu, command)
    data.write_jsonl(tmp_path / "pairs.jsonl", [PAIR])
    data.write_jsonl(texts, [{"text": "Some words."}])
    icu.main(icu.icu, command)


def test_the_case_of_own_token(shared, folder_with_own_token):
    """cases/own-token: the second row is named."""
    pairs, (config, tokenizer) = (
        pairs_of_case(shared, "own-token"),
        models.check_model(str(folder_with_own_token)),
    )
    samples, _ = icu.build_samples(pairs, tokenizer, protocol="paper", positions=256)
    with pytest.raises(
        ValueError, match=r"pair 2 \(id b\): token 320 is none of the model's 320 embeddings"
    ):
        models.check_inputs(config, tokenizer, {"pair": samples}, {})


def test_tasks_and_ask_refuse_a_token_beyond_the_embeddings(folder_with_own_token, tmp_path):
    """The same in evals/tasks.py, which names the set and the row, and for --ask."""
    row = {"premise": "A <|mask|> fell.", "choice1": "It was hot.", "choice2": "It was old."}
    data.write_jsonl(tmp_path / "copa.jsonl", [row | {"question": "cause", "label": 0}])
    with pytest.raises(ValueError, match="copa row 1: token 320"):
        command = ["--model", folder_with_own_token, "--tasks", "copa", "--task-data", tmp_path]
        command += ["--out", tmp_path / "out"]
        tasks.main([*map(str, command)])
    config, tokenizer = models.check_model(str(folder_with_own_token))
    with pytest.raises(ValueError, match="the prefix: token 320"):
        models.check_texts(config, tokenizer, {"the prefix": "<|mask|>"})


@pytest.mark.parametrize("model", [WordLevel({"A": 0, "C": 1}), BPE({"A": 0, "C": 1}, [])])
def test_a_tokenizer_without_an_x(model):
    """Letters of proteins or of DNA: no BOS is found, nothing crashes; a text it cannot read is one line."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="A")
    assert models.bos_of(tokenizer) == []
    assert models.encode(tokenizer, "C") == [1]
    if isinstance(model, WordLevel):
        with pytest.raises(ValueError, match="the tokenizer cannot read 'x'"):
            models.encode(tokenizer, "x")


# --- float64, as transformers 5.23 has it ---

NO_FLOAT64 = {"bloom", "gemma2", "mpt", "mixtral", "qwen2_moe", "gpt_oss", "xglm", "deepseek_v3"}


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_float64_is_right_or_refused(name):
    """Where the check lets an architecture pass, batched beams and EL in float64 are those of a row at a time."""
    model, rows = architectures.small(name, dtype=torch.float64), some_rows()
    if name in NO_FLOAT64:
        with pytest.raises(
            ValueError, match=f"x: .*float64 .*{config_type(name)}: pass --dtype float32"
        ):
            models.check_float64(model, "x")
        return
    models.check_float64(model, "x")
    prompts, lengths = [rows[0][:20], rows[1][:5], rows[2][:9]], [6, 14, 4]
    alone = [
        metrics.beam_generate(model, [p], [n])[0] for p, n in zip(prompts, lengths, strict=True)
    ]
    assert metrics.beam_generate(model, prompts, lengths) == alone
    el = metrics.extraction_likelihood(model, torch.tensor([rows[2]]), 2)
    assert el.tolist() == pytest.approx([metrics.literal_extraction_likelihood(model, rows[2], 2)])


def test_float64_is_refused_by_every_command_that_loads_a_model(tmp_path, save_tiny):
    """load_model is where they all load."""
    folder = save_tiny("llama", tmp_path / "m")
    architectures.small("bloom").save_pretrained(folder)
    models.load_model(str(folder))
    with pytest.raises(ValueError, match="float64 .*bloom"):
        models.load_model(str(folder), dtype="float64")
