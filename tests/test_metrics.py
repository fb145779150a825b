"""metrics.py against literal references: Eq. 7-10 as loops, and the libraries that it wraps.

The loops recompute everything for every token: no cache, no batch, no padding.
"""

import copy
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from literal_icu import memorization_accuracy, ngrams, overlap
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from transformers import AutoModelForCausalLM, AutoTokenizer

import metrics
from kit import fast_el

# --- literal references ---


def next_token(model, ids):
    """argmax P(. | ids)."""
    with torch.no_grad():
        return int(model(torch.tensor([ids])).logits[0, -1].argmax())


def greedy(model, prefix, length, eos=()):
    """At most `length` tokens, up to and including one of `eos`."""
    out = []
    while len(out) < length and not (out and out[-1] in eos):
        out.append(next_token(model, prefix + out))
    return out


def eos_of(model):
    """The model's end tokens, of an int, a list or None."""
    eos = model.generation_config.eos_token_id
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def literal_el(row, continuations, n, start=1, released=False):
    """Eq. 7 with continuations[t], the greedy answer to row[:t]; released code: the share of the text's."""
    sides = [(continuations[t], row[t:]) for t in range(start, len(row) - n + 1)]
    sides = [(b, a) if released else (a, b) for a, b in sides]
    values = [overlap(a, ngrams(b, n), n) for a, b in sides]
    return sum(values) / len(values) if values else math.nan


def literal_ma(model, row, start=1):
    """Eq. 9, NaN without a token."""
    ma = memorization_accuracy(model, row, range(start, len(row)))
    return math.nan if ma is None else ma


def all_continuations(model, row):
    """{t: greedy answer to row[:t], at most T-t tokens}."""
    return {t: greedy(model, row[:t], len(row) - t, eos_of(model)) for t in range(1, len(row))}


# --- rows to measure ---


def pad(rows, filler=0):
    """Rows -> ids and attention_mask, both (N, T), right-padded."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [filler] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def random_ids(rng, length):
    """Ordinary tokens; the ids below 4 are special."""
    return [rng.randrange(4, 97) for _ in range(length)]


def answer_that(model, rng, length, wanted):
    """The first random (prompt, greedy answer) that is as wanted."""
    for _ in range(300):
        prompt = random_ids(rng, 3)
        answer = greedy(model, prompt, length, eos_of(model))
        if wanted(answer):
            return prompt, answer
    raise AssertionError("the tiny model answers nothing of the kind")


def mixed_row(model, rng, length):
    """Random tokens and the model's own greedy answers in turn."""
    row = random_ids(rng, 2)
    while len(row) < length:
        row += greedy(model, row, rng.randint(2, 7))
        row += random_ids(rng, rng.randint(1, 2))
    return row[:length]


def make_rows(model):
    """Rows of 2 to 26 tokens."""
    rng = random.Random(5)
    end = eos_of(model)[0]
    prompt, answer = answer_that(model, rng, 22, lambda a: len(a) == 22 and end not in a)
    ended_prompt, ended = answer_that(model, rng, 8, lambda a: a[-1] == end and len(a) > 2)
    surprised = mixed_row(model, rng, 20)
    surprised[9] = surprised[17] = end
    return {
        "memorised": prompt + answer,
        "mixed": mixed_row(model, rng, 26),
        "ended": ended_prompt + ended + mixed_row(model, rng, 8),
        "surprised": surprised,
        "random": random_ids(rng, 12),
        "one value for n = 10": mixed_row(model, rng, 11),
        "none for n = 10": mixed_row(model, rng, 10),
        "two": random_ids(rng, 2),
    }


@pytest.fixture(scope="session")
def case(kind, tiny_models):
    """A model, its rows, and the literal answers to their prefixes."""
    model = tiny_models[kind]
    rows = make_rows(model)
    answers = {name: all_continuations(model, row) for name, row in rows.items()}
    return SimpleNamespace(model=model, rows=rows, answers=answers)


def assert_close(values, expected):
    """Equal to 1e-6 each; NaN equals NaN."""
    assert torch.as_tensor(values).tolist() == pytest.approx(list(expected), abs=1e-6, nan_ok=True)


# --- EL and MA ---


@pytest.mark.parametrize(
    ("n", "start", "row_batch", "decode_batch"), [(2, 1, 64, 256), (3, 1, 1, 1), (10, 2, 2, 3)]
)
def test_el_and_ma_equal_the_loop(case, n, start, row_batch, decode_batch, monkeypatch):
    """Eq. 7-9 prefix by prefix, in any company, order and padding."""
    monkeypatch.setattr(fast_el, "ROW_BATCH", row_batch)
    monkeypatch.setattr(fast_el, "DECODE_BATCH", decode_batch)
    for filler in (eos_of(case.model)[0], 50):
        names = random.Random(filler).sample(sorted(case.rows), len(case.rows))
        names.append(names[0])  # one stands there twice
        ids, mask = pad([case.rows[name] for name in names], filler)
        ids, mask = F.pad(ids, (0, 5), value=7), F.pad(mask, (0, 5)).bool()
        el, ma = metrics.el_and_ma(case.model, ids, mask, n=n, start=start)
        assert el.is_floating_point() and ma.is_floating_point()
        assert_close(el, [literal_el(case.rows[x], case.answers[x], n, start) for x in names])
        assert_close(ma, [literal_ma(case.model, case.rows[name], start) for name in names])


@pytest.mark.parametrize("n", [1, 3])
def test_released_measures_equal_the_loop(case, n):
    """The share of the reference's n-grams, a start for each row and measure."""
    starts = {"mixed": 4, "ended": 1, "surprised": 9}
    rows = [case.rows[name] for name in starts]
    el, ma = metrics.el_and_ma(
        case.model, *pad(rows), n=n, share_of="reference", start=[*starts.values()], ma_start=2
    )
    answers = [(case.rows[name], case.answers[name], start) for name, start in starts.items()]
    assert_close(el, [literal_el(row, a, n, start, True) for row, a, start in answers])
    assert_close(ma, [literal_ma(case.model, row, start=2) for row in rows])


def test_end_tokens_of_the_model_are_obeyed(case):
    """An int, none, or a list of the generation config."""
    model, eos = copy.deepcopy(case.model), eos_of(case.model)[0]
    answered = Counter(token for a in case.answers["mixed"].values() for token in a if token != eos)
    often = answered.most_common(1)[0][0]
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    rows, values = [case.rows["mixed"], case.rows["surprised"][:14]], []
    for end in (eos, None, often, [eos, often]):
        model.generation_config.eos_token_id = end
        model.config.eos_token_id = eos if isinstance(end, list) else end
        expected = [literal_el(row, all_continuations(model, row), 2) for row in rows]
        assert_close(metrics.el_and_ma(model, *pad(rows), n=2)[0], expected)
        values.append(expected)
    assert values[0] not in values[2:]


# --- what a measurement leaves behind ---

TEXTS = [
    "The van was seen near the old mill on Tuesday morning.",
    "Call the clinic at 555-0142 and ask for the report; it is on the third shelf.",
    "ok then",
    "Payments are due on the first day of each month. " * 4,
]


@pytest.fixture
def speaker(kind, save_tiny, tmp_path):
    """A tiny model in float64 and its tokenizer."""
    folder = save_tiny(kind, tmp_path / kind, dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def test_measuring_is_without_dropout_and_leaves_the_model_as_it_was(kind, make_model, speaker):
    """Mode, gradients and weights are what they were."""
    model, tokenizer = speaker
    dropout = {"gpt_neo": "resid_dropout", "opt": "dropout", "llama": "attention_dropout"}[kind]
    noisy = make_model(kind, vocab=len(tokenizer), **{dropout: 0.9}).train()
    weights = {key: weight.clone() for key, weight in noisy.state_dict().items()}
    row = mixed_row(model, random.Random(2), 16)

    def measured(model):
        el = metrics.el_and_ma(model, torch.tensor([row]), n=1)[0].tolist()
        generations = metrics.beam_generate(model, [row], [8])
        return el, generations, metrics.perplexity(model, tokenizer, TEXTS)

    assert measured(noisy) == measured(model)
    assert all(module.training for module in noisy.modules())
    assert not any(module.training for module in model.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in noisy.parameters())
    assert all(torch.equal(weight, weights[key]) for key, weight in noisy.state_dict().items())


# --- beam search ---


def beam_cases(model):
    """Prompts of 1 to 12 tokens after BOS, and the lengths of answers."""
    rng = random.Random(3)
    bos = [] if model.config.model_type == "gpt_neo" else [model.config.bos_token_id]
    prompts = [bos + random_ids(rng, rng.randint(1, 12)) for _ in range(14)]
    prompts[4] += [model.config.eos_token_id, 11]
    return prompts, [rng.randint(2, 18) for _ in prompts[1:]] + [1]


@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_beam_generate_equals_transformers_row_by_row(case, num_beams):
    """All sizes in one batch, cut before EOS."""
    prompts, lengths = beam_cases(case.model)
    (end,) = eos_of(case.model)
    expected = []
    for prompt, length in zip(prompts, lengths, strict=True):
        answer = case.model.generate(
            torch.tensor([prompt]), do_sample=False, num_beams=num_beams, max_new_tokens=length
        )[0, len(prompt) :].tolist()
        expected.append(answer[: answer.index(end)] if end in answer else answer)
    early = [len(answer) < length for answer, length in zip(expected, lengths, strict=True)]
    assert any(early) and not all(early)
    for batch_size in (1, 4, 64):
        answers = metrics.beam_generate(
            case.model, prompts, lengths, num_beams=num_beams, batch_size=batch_size
        )
        assert answers == expected
    assert (metrics.beam_generate(case.model, prompts, lengths) == expected) == (num_beams == 2)


# --- entropy ---


# --- BLEU ---

SENTENCES = [
    "The parcel for Ines Duarte was left at 14 Harbour Lane.",
    "the parcel for ines duarte was LEFT at 14 harbour lane",
    "The parcel for Ines was left at the gate of 14 Harbour Lane, on Tuesday.",
    "call me",
    "Call me, now!",
    "Zahlung: 3.50 € \u2013 fällig",
    "a",
    "a a a a a a",
]


@pytest.mark.parametrize("reference", SENTENCES)
def test_bleu_equals_sacrebleu(reference):
    """13a, lowercase, no smoothing; effective order under 4 tokens."""
    for candidate in SENTENCES:
        lengths = [len(Tokenizer13a()(side.lower()).split()) for side in (candidate, reference)]
        expected = sacrebleu.sentence_bleu(
            candidate,
            [reference],
            lowercase=True,
            tokenize="13a",
            smooth_method="none",
            use_effective_order=min(lengths) < 4,
        )
        assert metrics.bleu(candidate, reference) == pytest.approx(expected.score / 100, abs=1e-9)
    assert 1 - 1e-9 < metrics.bleu(reference.upper(), reference) <= 1
    assert metrics.bleu("", reference) == metrics.bleu(reference, " ") == 0.0


# --- BERTScore ---


def test_an_encoder_in_a_folder_called_t5_is_no_t5(encoder_dir, tmp_path):
    (tmp_path / "wt5").symlink_to(encoder_dir)
    texts, folders = [["a van"], ["one letter"]], [encoder_dir, tmp_path / "wt5"]
    here, there = (metrics.bertscore(*texts, folder) for folder in folders)
    assert here == there


def test_bertscore_equals_bert_score(encoder_dir):
    """At layer 5 of 6 (9 of 12, scaled); an empty side scores 0."""
    bert_score = pytest.importorskip("bert_score")
    references = [*SENTENCES[1:], SENTENCES[0], "another word that runs on", SENTENCES[0]]
    candidates = [*SENTENCES, "word after word " * 200, SENTENCES[0]]  # the long one is cut
    expected = bert_score.score(candidates, references, model_type=str(encoder_dir), num_layers=5)
    measured = metrics.bertscore(
        ["", *candidates, "  \n"], [references[0], *references, ""], str(encoder_dir)
    )
    for values, two in zip(measured, expected, strict=True):
        values = values.tolist()
        assert values == pytest.approx([0, *two.tolist(), 0], abs=1e-5)
        assert values[-2] == pytest.approx(1.0, abs=1e-5)  # no rescaling: equal texts score 1
    assert [len(values) for values in metrics.bertscore([], [], encoder_dir)] == [0, 0, 0]


# --- perplexity ---


def window_losses(model, ids, window):
    """For each window of ids, the losses of its tokens after the first."""
    losses = []
    for cut in range(0, len(ids), window):
        piece = torch.tensor(ids[cut : cut + window])
        with torch.no_grad():
            logits = model(piece[None]).logits[0]
        losses.append(F.cross_entropy(logits[:-1], piece[1:], reduction="none").tolist())
    return [loss for loss in losses if loss]


@pytest.mark.parametrize("window", [7, 512])
def test_perplexity_equals_the_loop(speaker, window):
    """Also as released, of joined texts."""
    model, tokenizer = speaker
    parts = [window_losses(model, tokenizer(text)["input_ids"], window) for text in TEXTS]
    losses = sum(sum(parts, []), [])
    for batch_size in (1, 3, 8):
        measured = metrics.perplexity(
            model, tokenizer, ["", *TEXTS, ""], window, batch_size=batch_size
        )
        assert measured == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    parts = window_losses(model, tokenizer("\n\n".join(TEXTS))["input_ids"], window)
    expected = math.exp(sum(sum(part) / len(part) for part in parts) / len(parts))
    measured = metrics.perplexity(model, tokenizer, ["", *TEXTS], window, released=True)
    assert measured == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="no text of two tokens"):
        metrics.perplexity(model, tokenizer, ["", ""])
