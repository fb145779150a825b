"""metrics.py against literal references: Eq. 7-10 of arXiv 2407.20271 written as loops, and the libraries it wraps.

    python -m pytest tests/test_metrics.py -q

The loops below recompute everything for every token: no cache, no batch, no padding. They are what the metrics mean.
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
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from transformers import AutoModelForCausalLM, AutoTokenizer

import metrics

# --- literal references ---


def next_token(model, ids):
    """argmax P(. | ids) from one forward pass over the whole prefix."""
    with torch.no_grad():
        return int(model(torch.tensor([ids])).logits[0, -1].argmax())


def greedy(model, prefix, length, eos=()):
    """The greedy continuation of prefix: `length` tokens, or up to and including a token of `eos`."""
    out = []
    while len(out) < length and not (out and out[-1] in eos):
        out.append(next_token(model, prefix + out))
    return out


def eos_of(model):
    """The model's end tokens as a tuple; the config may hold an int, a list or None."""
    eos = model.generation_config.eos_token_id
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def ngrams(ids, n):
    """Every n-gram of ids, repeated ones repeated."""
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def literal_overlap(generated, reference, n):
    """Eq. 8: the share of the generated n-grams that occur in the reference; 0 where none was generated."""
    known = set(ngrams(reference, n))
    hits = [gram in known for gram in ngrams(generated, n)]
    return sum(hits) / len(hits) if hits else 0.0


def literal_released_overlap(generated, reference, n):
    """What the released code computes in place of Eq. 8: the share of the reference's n-grams that were generated."""
    return literal_overlap(reference, generated, n)


def literal_el(row, continuations, n, start=1, overlap=literal_overlap):
    """Eq. 7 with continuations[t], the greedy answer to row[:t]; NaN where no t leaves room for one n-gram."""
    values = [overlap(continuations[t], row[t:], n) for t in range(start, len(row) - n + 1)]
    return sum(values) / len(values) if values else math.nan


def literal_ma(model, row, start=1):
    """Eq. 9: the share of tokens start .. T-1 that are the greedy answer to what stands before them."""
    hits = [next_token(model, row[:t]) == row[t] for t in range(start, len(row))]
    return sum(hits) / len(hits)


def all_continuations(model, row):
    """{t: greedy answer to row[:t], at most T-t tokens} for every t of a row."""
    return {t: greedy(model, row[:t], len(row) - t, eos_of(model)) for t in range(1, len(row))}


def generate(model, prompt, length, num_beams=1):
    """The new tokens that transformers' own `generate` gives for one prompt, EOS and padding included."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "num_beams": num_beams, "max_new_tokens": length}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return out[0, len(prompt) :].tolist()


# --- rows to measure ---


def pad(rows, filler=0):
    """Rows of different lengths -> ids and attention_mask, both (N, T), padded on the right with `filler`."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [filler] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def random_ids(rng, length):
    """`length` ordinary tokens of the 97; the ids below 4 are special."""
    return [rng.randrange(4, 97) for _ in range(length)]


def answer_that(model, rng, length, wanted):
    """(prompt, greedy answer of `length` tokens at most) for the first random prompt whose answer is as wanted."""
    for _ in range(300):
        prompt = random_ids(rng, 3)
        answer = greedy(model, prompt, length, eos_of(model))
        if wanted(answer):
            return prompt, answer
    raise AssertionError("no prompt found: the tiny model answers nothing of the kind")


def mixed_row(model, rng, length):
    """Random tokens and stretches of the model's own greedy answer in turn, so that some tokens hit and some miss."""
    row = random_ids(rng, 2)
    while len(row) < length:
        row += greedy(model, row, rng.randint(2, 7))
        row += random_ids(rng, rng.randint(1, 2))
    return row[:length]


def make_rows(model):
    """Rows of 2 to 26 tokens: memorised, mixed, with an EOS said by the model, with an EOS it did not expect, short."""
    rng = random.Random(5)
    end = eos_of(model)[0]
    prompt, answer = answer_that(
        model, rng, 22, lambda answer: len(answer) == 22 and end not in answer
    )
    ended_prompt, ended = answer_that(
        model, rng, 8, lambda answer: answer[-1] == end and len(answer) > 2
    )
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
        "three": mixed_row(model, rng, 3),
        "two": random_ids(rng, 2),
    }


@pytest.fixture(scope="session")
def case(kind, tiny_models):
    """A model, its rows, and the literal answers to every prefix of every row, worked out once a kind."""
    model = tiny_models[kind]
    rows = make_rows(model)
    answers = {name: all_continuations(model, row) for name, row in rows.items()}
    return SimpleNamespace(model=model, rows=rows, answers=answers)


def assert_close(values, expected):
    """Equal to 1e-6 each; NaN equals NaN."""
    assert torch.as_tensor(values).tolist() == pytest.approx(list(expected), abs=1e-6, nan_ok=True)


def with_eos(model, eos):
    """A copy of the model with other end tokens."""
    model = copy.deepcopy(model)
    model.config.eos_token_id = model.generation_config.eos_token_id = eos
    return model


# --- the rows are worth measuring ---


def test_the_literal_functions_are_the_fast_ones(case):
    """EL and MA as their formulas stand in metrics.py, with `generate`, and as they are used: the same values."""
    for n in (3, 10):
        el, ma = metrics.el_and_ma(case.model, *pad(list(case.rows.values())), n=n)
        literal = [
            metrics.literal_extraction_likelihood(case.model, row, n) for row in case.rows.values()
        ]
        assert_close(el, literal)
    assert_close(
        ma, [metrics.literal_memorization_accuracy(case.model, row) for row in case.rows.values()]
    )


def test_rows_hold_hits_misses_and_ends(case):
    """The rows hit and miss, and some answers end early: where all were alike the tests below would prove little."""
    row, answers = case.rows["mixed"], case.answers["mixed"]
    hits = [answers[t][0] == row[t] for t in answers]
    assert 5 <= sum(hits) <= len(hits) - 5
    for n in (1, 2, 3):
        assert 0.02 < literal_el(row, answers, n) < 0.98
    early = [
        t
        for name, row in case.rows.items()
        for t, a in case.answers[name].items()
        if len(a) < len(row) - t
    ]
    assert len(early) >= 10
    end = eos_of(case.model)[0]
    row = case.rows["ended"]
    assert case.answers["ended"][row.index(end)] == [end]


def test_window_of_local_attention_changes_answers(make_model, tiny_models):
    """The tiny GPT-Neo's window of 8 is felt: the same weights with a window of 64 answer a long row otherwise."""
    near, far = tiny_models["gpt_neo"], make_model("gpt_neo", window_size=64)
    row = random_ids(random.Random(0), 30)
    assert greedy(near, row[:6], 2) == greedy(far, row[:6], 2)
    assert greedy(near, row, 10) != greedy(far, row, 10)


# --- memorization accuracy ---


@pytest.mark.parametrize("start", [1, 2])
def test_memorization_accuracy_equals_the_loop(case, start):
    """Eq. 9 token by token, on rows of different lengths padded into one batch."""
    rows = [row for row in case.rows.values() if len(row) > start]
    measured = metrics.memorization_accuracy(case.model, *pad(rows), start=start)
    assert measured.shape == (len(rows),) and measured.is_floating_point()
    assert_close(measured, [literal_ma(case.model, row, start) for row in rows])


def test_logits_that_are_not_finite_are_no_measure(make_model):
    """The argmax of NaN is a token, and would pass for a miss."""
    model = make_model("gpt_neo")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        metrics.memorization_accuracy(model, torch.tensor([[5, 6, 7]]))


def test_memorization_accuracy_of_a_row_does_not_depend_on_its_batch(case):
    """A row alone and without a mask scores what it scores among longer rows, whatever fills the padding."""
    rows = list(case.rows.values())
    alone = [metrics.memorization_accuracy(case.model, torch.tensor([row])).item() for row in rows]
    for filler in (eos_of(case.model)[0], 50):
        assert_close(metrics.memorization_accuracy(case.model, *pad(rows, filler)), alone)


def test_own_greedy_answer_is_fully_accurate(case):
    """Tokens the model itself would say score 1; one token put in their place costs that hit and no earlier one."""
    row = case.rows["memorised"]
    prompt = 3
    changed = row[:-1] + [(row[-1] + 1) % 97]
    measured = metrics.memorization_accuracy(case.model, *pad([row, changed]), start=prompt)
    assert_close(measured, [1.0, 1 - 1 / (len(row) - prompt)])


# --- extraction likelihood ---


@pytest.mark.parametrize("start", [1, 2])
@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_extraction_likelihood_equals_the_loop(case, n, start):
    """Eq. 7-8 prefix by prefix, on rows of different lengths padded into one batch; NaN for the rows too short."""
    ids, mask = pad(list(case.rows.values()))
    measured = metrics.extraction_likelihood(case.model, ids, n, mask, start)
    expected = [literal_el(row, case.answers[name], n, start) for name, row in case.rows.items()]
    assert measured.shape == (len(expected),) and measured.is_floating_point()
    assert_close(measured, expected)


def test_extraction_likelihood_equals_generate(case):
    """One `generate` call of transformers for every prefix of a row gives the same share of 2-grams."""
    for name in ("ended", "one value for n = 10"):
        row = case.rows[name]
        answers = {t: generate(case.model, row[:t], len(row) - t) for t in range(1, len(row))}
        measured = metrics.extraction_likelihood(case.model, torch.tensor([row]), n=2)
        assert_close(measured, [literal_el(row, answers, 2)])


def test_default_n_is_ten(case):
    """Without n, EL10 is measured."""
    row = case.rows["mixed"]
    measured = metrics.extraction_likelihood(case.model, torch.tensor([row]))
    assert_close(measured, [literal_el(row, case.answers["mixed"], 10)])


def test_own_greedy_answer_is_fully_extracted(case):
    """Of a row that the model says word for word from token 3 on, every answer is the rest of the row: EL is 1."""
    measured = metrics.extraction_likelihood(
        case.model, torch.tensor([case.rows["memorised"]]), n=10, start=3
    )
    assert_close(measured, [1.0])


def test_row_is_too_short_below_one_ngram(case):
    """T = n + start holds one value; one token fewer is NaN, and the other rows keep theirs."""
    row = case.rows["mixed"]
    ids, mask = pad([row[:12], row[:11], row[:10], row[:2]])
    measured = metrics.extraction_likelihood(case.model, ids, 10, mask, 2)
    assert measured.isnan().tolist() == [False, True, True, True]
    answer = greedy(case.model, row[:2], 10, eos_of(case.model))
    assert_close(measured[:1], [literal_overlap(answer, row[2:12], 10)])


def test_extraction_likelihood_of_a_row_does_not_depend_on_its_batch(case):
    """A row alone and without a mask scores what it scores in any company, in any order, whatever fills the padding."""
    rows = list(case.rows.values())
    alone = [
        metrics.extraction_likelihood(case.model, torch.tensor([row]), n=2).item() for row in rows
    ]
    for filler in (eos_of(case.model)[0], 50):
        order = random.Random(filler).sample(range(len(rows)), len(rows))
        ids, mask = pad([rows[i] for i in order], filler)
        ids, mask = (
            torch.cat([ids, ids[:2]]),
            torch.cat([mask, mask[:2]]),
        )  # and two rows stand there twice
        measured = metrics.extraction_likelihood(case.model, ids, n=2, attention_mask=mask)
        assert_close(measured, [alone[i] for i in order + order[:2]])


def test_padding_columns_change_nothing(case):
    """A mask wider than every row, of bool or of int, gives the same values."""
    ids, mask = pad([case.rows["mixed"], case.rows["ended"]])
    wide_ids, wide_mask = F.pad(ids, (0, 5), value=7), F.pad(mask, (0, 5))
    for measure in (metrics.memorization_accuracy, metrics.extraction_likelihood):
        expected = measure(case.model, ids, attention_mask=mask).tolist()
        assert_close(measure(case.model, wide_ids, attention_mask=wide_mask), expected)
        assert_close(measure(case.model, wide_ids, attention_mask=wide_mask.bool()), expected)


def test_pad_token_does_not_matter(case):
    """With or without a pad token, EOS or another, a row is cut by its mask alone."""
    ids, mask = pad(list(case.rows.values()), filler=eos_of(case.model)[0])
    values = []
    for pad_id in (None, eos_of(case.model)[0], case.rows["mixed"][5]):
        model = copy.deepcopy(case.model)
        model.config.pad_token_id = model.generation_config.pad_token_id = pad_id
        values.append(metrics.extraction_likelihood(model, ids, n=2, attention_mask=mask).tolist())
    assert_close(values[1], values[0])
    assert_close(values[2], values[0])


@pytest.mark.parametrize("end", ["an int", "a list", "none", "a list only for generation"])
def test_end_tokens_of_the_model_are_obeyed(case, end):
    """EOS as an int, as a list, absent, or as a list that only the generation config knows: the loop is the judge."""
    eos = eos_of(case.model)[0]
    said = Counter(
        token for answer in case.answers["mixed"].values() for token in answer if token != eos
    )
    often = said.most_common(1)[0][0]
    model = with_eos(
        case.model, {"an int": often, "a list": [eos, often], "none": None}.get(end, eos)
    )
    if end == "a list only for generation":
        model.generation_config.eos_token_id = [eos, often]
    rows = [case.rows["mixed"], case.rows["surprised"][:14]]
    ids, mask = pad(rows)
    expected = [literal_el(row, all_continuations(model, row), 2) for row in rows]
    before = literal_el(rows[0], case.answers["mixed"], 2)
    assert end == "none" or expected[0] != pytest.approx(before, abs=1e-6)
    assert_close(metrics.extraction_likelihood(model, ids, n=2, attention_mask=mask), expected)


def test_expected_eos_ends_the_answer(case):
    """Where x_t is the EOS that the model says, the answer is x_t alone, though the row goes on as the model would."""
    end = eos_of(case.model)[0]
    prompt, answer = answer_that(case.model, random.Random(1), 8, lambda answer: answer[-1] == end)
    prompt = prompt + answer[:-1]
    endless = with_eos(case.model, None)
    row = torch.tensor(
        [prompt + greedy(endless, prompt, 2)]
    )  # EOS and what would follow it: one value of t, n = 2
    assert_close(metrics.extraction_likelihood(case.model, row, n=2, start=len(prompt)), [0.0])
    assert_close(
        metrics.extraction_likelihood(case.model, row[:, :-1], n=1, start=len(prompt)), [1.0]
    )
    assert_close(metrics.extraction_likelihood(endless, row, n=2, start=len(prompt)), [1.0])


@pytest.mark.parametrize(("row_batch", "decode_batch"), [(1, 1), (2, 3), (4, 7), (64, 256)])
def test_both_measures_in_one_call_whatever_the_batch(case, row_batch, decode_batch):
    """`el_and_ma` gives the two measures of the loop, however many rows and prefixes go through the model at once."""
    names = "mixed", "memorised", "ended", "three", "surprised"
    rows = [case.rows[name] for name in names]
    el, ma = metrics.el_and_ma(
        case.model, *pad(rows), n=3, row_batch=row_batch, decode_batch=decode_batch
    )
    assert_close(el, [literal_el(case.rows[name], case.answers[name], 3) for name in names])
    assert_close(ma, [literal_ma(case.model, row) for row in rows])


@pytest.mark.parametrize("n", [1, 3])
def test_released_measures_equal_the_loop(case, n):
    """As released: the share of the reference's n-grams, and a start of its own for each row and each measure."""
    starts = {"mixed": 4, "ended": 1, "surprised": 9}
    rows = [case.rows[name] for name in starts]
    options = {"share_of": "reference", "start": list(starts.values()), "ma_start": 2}
    el, ma = metrics.el_and_ma(case.model, *pad(rows), n=n, **options)
    expected = [
        literal_el(case.rows[name], case.answers[name], n, start, literal_released_overlap)
        for name, start in starts.items()
    ]
    assert_close(el, expected)
    assert_close(ma, [literal_ma(case.model, row, start=2) for row in rows])


def test_measures_of_a_trained_model_equal_the_loop(shared):
    """On text of the Pile and on its own answer, in float64, a trained GPT-Neo scores what the loop says."""
    folder = shared / "models" / "pile-neo-6m"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (shared / "data" / "validation" / "pile.csv").read_text(encoding="utf-8")[:20_000]
    stream = tokenizer(text)["input_ids"]
    rows = [stream[:12], stream[900:905] + greedy(model, stream[900:905], 6)]
    measured = metrics.el_and_ma(model, *pad(rows), n=2)
    assert_close(measured[0], [literal_el(row, all_continuations(model, row), 2) for row in rows])
    assert_close(measured[1], [literal_ma(model, row) for row in rows])


# --- what a measurement leaves behind ---

TEXTS = [
    "The van was seen near the old mill on Tuesday morning.",
    "Call the clinic at 555-0142 and ask for the report that the night nurse wrote; it is on the third shelf.",
    "ok then",
    "Payments are due on the first day of each month. " * 4,
]


@pytest.fixture
def speaker(kind, save_tiny, tmp_path):
    """A tiny model in float64 and its tokenizer, loaded from a folder as a user's would be."""
    folder = save_tiny(kind, tmp_path / kind, dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return model, AutoTokenizer.from_pretrained(folder)


MEASURES = {
    "memorization_accuracy": lambda model, _, row: metrics.memorization_accuracy(
        model, torch.tensor([row])
    ),
    "extraction_likelihood": lambda model, _, row: metrics.extraction_likelihood(
        model, torch.tensor([row]), n=1
    ),
    "beam_generate": lambda model, _, row: torch.tensor(metrics.beam_generate(model, [row], [8])),
    "perplexity": lambda model, tokenizer, _: torch.tensor(
        metrics.perplexity(model, tokenizer, TEXTS)
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MEASURES)
def test_measuring_leaves_the_model_as_it_was(speaker, name, training):
    """Mode, gradients and weights are afterwards what they were, and no result carries a gradient."""
    model, tokenizer = speaker
    model.train(training)
    weights = {key: weight.clone() for key, weight in model.state_dict().items()}
    result = MEASURES[name](model, tokenizer, random_ids(random.Random(2), 12))
    assert not result.requires_grad
    assert all(module.training == training for module in model.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weight, weights[key]) for key, weight in model.state_dict().items())


@pytest.mark.parametrize("name", MEASURES)
def test_dropout_is_off_while_measuring(kind, make_model, speaker, name):
    """A model in train mode, with dropout, measures as the same weights do in eval mode."""
    model, tokenizer = speaker
    row = mixed_row(model, random.Random(2), 16)
    dropout = {"gpt_neo": "resid_dropout", "opt": "dropout", "llama": "attention_dropout"}[kind]
    noisy = make_model(kind, vocab=len(tokenizer), **{dropout: 0.9}).train()
    expected, measured = (
        MEASURES[name](model, tokenizer, row),
        MEASURES[name](noisy, tokenizer, row),
    )
    assert measured.tolist() == expected.tolist()


# --- beam search ---


def before_end(ids, eos):
    """The tokens before the first end token."""
    return ids[: next((i for i, token in enumerate(ids) if token in eos), len(ids))]


def beam_cases(model):
    """Prompts of 1 to 12 tokens after BOS, one with an EOS in it, and how many tokens each is to be answered with."""
    rng = random.Random(3)
    bos = [] if model.config.model_type == "gpt_neo" else [model.config.bos_token_id]
    prompts = [bos + random_ids(rng, rng.randint(1, 12)) for _ in range(14)]
    prompts[4] += [model.config.eos_token_id, 11]
    return prompts, [rng.randint(2, 18) for _ in prompts[1:]] + [1]


@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_beam_generate_equals_transformers_row_by_row(case, num_beams):
    """Prompts and lengths of all sizes in one batch give what `generate` gives one at a time, cut before its EOS."""
    prompts, lengths = beam_cases(case.model)
    end = eos_of(case.model)
    expected = [
        before_end(generate(case.model, prompt, length, num_beams), end)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    early = [len(answer) < length for answer, length in zip(expected, lengths, strict=True)]
    assert any(early) and not all(early)
    for batch_size in (1, 4, 64):
        answers = metrics.beam_generate(
            case.model, prompts, lengths, num_beams=num_beams, batch_size=batch_size
        )
        assert answers == expected


def test_beam_generate_uses_two_beams_and_keeps_the_order(case):
    """Two beams are the default, they differ from one, and prompts in reverse give answers in reverse."""
    prompts, lengths = beam_cases(case.model)
    answers = metrics.beam_generate(case.model, prompts, lengths)
    assert answers == metrics.beam_generate(case.model, prompts, lengths, num_beams=2)
    assert answers != metrics.beam_generate(case.model, prompts, lengths, num_beams=1)
    assert answers[::-1] == metrics.beam_generate(case.model, prompts[::-1], lengths[::-1])


def test_beam_generate_without_an_end_token_or_a_prompt(case):
    """A model without EOS answers at full length; no prompts give no answers."""
    prompts, lengths = beam_cases(case.model)
    model = with_eos(case.model, None)
    answers = metrics.beam_generate(model, prompts, lengths)
    assert [len(answer) for answer in answers] == lengths
    assert answers[3] == generate(model, prompts[3], lengths[3], num_beams=2)
    assert metrics.beam_generate(model, [], []) == []


# --- entropy ---


@pytest.mark.parametrize("bits", [0, 1, 2, 5])
def test_entropy_of_equally_frequent_tokens_is_their_bits(bits):
    """2^k tokens that occur equally often hold k bits, in any order and however often."""
    ids = [100 + i for i in range(2**bits)] * 3
    random.shuffle(ids)
    assert metrics.token_entropy(ids) == pytest.approx(bits, abs=1e-12)


def test_entropy_equals_its_formula():
    """Eq. 10 over the token counts of one generation."""
    ids = [5] * 4 + [6] * 3 + [7] * 2 + [9]
    expected = -(
        0.4 * math.log2(0.4) + 0.3 * math.log2(0.3) + 0.2 * math.log2(0.2) + 0.1 * math.log2(0.1)
    )
    assert metrics.token_entropy(ids) == pytest.approx(expected, abs=1e-12)
    assert isinstance(metrics.token_entropy(ids), float)


@pytest.mark.parametrize("ids", [[], [42], [42] * 9])
def test_entropy_of_nothing_and_of_repetition_is_zero(ids):
    """No token, one token and one token repeated hold no information."""
    assert metrics.token_entropy(ids) == 0.0


# --- BLEU ---

SENTENCES = [
    "The parcel for Ines Duarte was left at 14 Harbour Lane.",
    "the parcel for ines duarte was LEFT at 14 harbour lane",
    "The parcel for Ines was left at the gate of 14 Harbour Lane, on Tuesday.",
    "Payments are due on the first day of each month",
    "call me",
    "call me now",
    "Call me, now!",
    "we go home now",
    "Zahlung: 3.50 € \u2013 fällig",
    "a",
    "a a a a a a",
]


@pytest.mark.parametrize("reference", SENTENCES)
def test_bleu_equals_sacrebleu(reference):
    """Sentence BLEU, 13a, lowercase, no smoothing, effective order only where a side has under 4 tokens, as 0-1."""
    for candidate in SENTENCES:
        short = (
            min(len(Tokenizer13a()(side.lower()).split()) for side in (candidate, reference)) < 4
        )
        settings = {
            "lowercase": True,
            "tokenize": "13a",
            "smooth_method": "none",
            "use_effective_order": short,
        }
        expected = sacrebleu.sentence_bleu(candidate, [reference], **settings).score / 100
        measured = metrics.bleu(candidate, reference)
        assert measured == pytest.approx(expected, abs=1e-9)
        assert isinstance(measured, float) and 0 <= measured <= 1


@pytest.mark.parametrize("text", SENTENCES)
def test_bleu_of_a_text_with_itself_is_one(text):
    """Identical texts score 1, those of one to three words too, and capitals do not count."""
    assert metrics.bleu(text, text) == pytest.approx(1.0, abs=1e-9)
    assert metrics.bleu(text.upper(), text.upper().lower()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("candidate", "reference"), [("", "some words"), ("some words", ""), ("", ""), (" ", "a")]
)
def test_bleu_of_an_empty_side_is_zero(candidate, reference):
    """Nothing said, or nothing to compare with, is no match."""
    assert metrics.bleu(candidate, reference) == 0.0


# --- BERTScore ---


@pytest.fixture(scope="module")
def bert_score_of(encoder_dir):
    """(candidates, references) -> P, R, F1 of the bert_score package at layer 5 of 6: 9 of 12, the default, scaled."""
    bert_score = pytest.importorskip("bert_score")

    def score(candidates, references):
        return bert_score.score(candidates, references, model_type=str(encoder_dir), num_layers=5)

    return score


def test_bertscore_equals_bert_score(encoder_dir, bert_score_of):
    """Precision, recall and F1 of each pair, in the order given; a text too long for the encoder is no exception."""
    references = SENTENCES[1:] + SENTENCES[:1]
    for pairs in (
        (SENTENCES, references),
        (["word after word " * 200], ["another word that runs on"]),
    ):
        measured = metrics.bertscore(*pairs, str(encoder_dir))
        assert len(measured) == 3
        for values, expected in zip(measured, bert_score_of(*pairs), strict=True):
            assert torch.as_tensor(values).tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_bertscore_of_an_empty_side_is_zero(encoder_dir, bert_score_of):
    """An empty or blank side scores 0 in its place and leaves the scores of the others alone."""
    candidates = ["", SENTENCES[0], SENTENCES[3], "  \n", SENTENCES[4], ""]
    references = [SENTENCES[1], SENTENCES[1], "", SENTENCES[2], SENTENCES[5], ""]
    measured = metrics.bertscore(candidates, references, str(encoder_dir))
    expected = bert_score_of([candidates[1], candidates[4]], [references[1], references[4]])
    for values, two in zip(measured, expected, strict=True):
        values = torch.as_tensor(values).tolist()
        assert [values[i] for i in (0, 2, 3, 5)] == [0.0] * 4
        assert [values[1], values[4]] == pytest.approx(two.tolist(), abs=1e-5)


@pytest.mark.parametrize("count", [0, 3])
def test_bertscore_of_nothing_at_all(encoder_dir, count):
    """No pairs give no scores, only empty candidates give zeros; neither raises."""
    measured = metrics.bertscore([""] * count, ["a reference"] * count, str(encoder_dir))
    assert [torch.as_tensor(values).tolist() for values in measured] == [[0.0] * count] * 3


def test_bertscore_of_a_text_with_itself_is_one(encoder_dir):
    """No rescaling: identical texts score 1, different ones less and more than 0."""
    measured = metrics.bertscore([SENTENCES[0]] * 2, [SENTENCES[0], SENTENCES[3]], str(encoder_dir))
    for values in measured:
        same, other = torch.as_tensor(values).tolist()
        assert same == pytest.approx(1.0, abs=1e-5) and 0 < other < 0.9


# --- perplexity ---


def window_losses(model, ids, window):
    """For each window of ids, the losses of its tokens after the first, one forward pass a window."""
    losses = []
    for cut in range(0, len(ids), window):
        piece = torch.tensor(ids[cut : cut + window])
        with torch.no_grad():
            logits = model(piece[None]).logits[0]
        losses.append(
            [F.cross_entropy(logits[i - 1], piece[i]).item() for i in range(1, len(piece))]
        )
    return [loss for loss in losses if loss]


def literal_perplexity(model, tokenizer, texts, window):
    """exp of the mean loss over all predicted tokens of all texts; a tokenizer's BOS stands first and is no target."""
    losses = []
    for text in texts:
        losses += sum(window_losses(model, tokenizer(text)["input_ids"], window), [])
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("window", [7, 32, 512])
def test_perplexity_equals_the_loop(speaker, window):
    """The mean is over tokens, not over texts or windows, whatever the windows and the batches."""
    model, tokenizer = speaker
    expected = literal_perplexity(model, tokenizer, TEXTS, window)
    for batch_size in (1, 3, 8):
        measured = metrics.perplexity(model, tokenizer, TEXTS, window, batch_size=batch_size)
        assert isinstance(measured, float)
        assert measured == pytest.approx(expected, rel=1e-6)


def test_bos_lets_the_first_word_be_predicted(speaker):
    """With BOS in front the first token of a text counts as a target; without it the count starts at the second."""
    model, tokenizer = speaker
    ids = tokenizer("The van", add_special_tokens=False)["input_ids"]
    adds_bos = model.config.model_type != "gpt_neo"
    context = [tokenizer.bos_token_id] + ids if adds_bos else ids
    with torch.no_grad():
        logp = model(torch.tensor([context])).logits[0].log_softmax(-1)
    targets = ids if adds_bos else ids[1:]
    expected = math.exp(
        -sum(logp[i, token].item() for i, token in enumerate(targets)) / len(targets)
    )
    assert metrics.perplexity(model, tokenizer, ["The van"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("window", [11, 32])
def test_released_perplexity_joins_the_texts(speaker, window):
    """As released: texts joined by a blank line, cut into windows, and the mean of the windows' means."""
    model, tokenizer = speaker
    parts = window_losses(model, tokenizer("\n\n".join(TEXTS))["input_ids"], window)
    expected = math.exp(sum(sum(part) / len(part) for part in parts) / len(parts))
    measured = metrics.perplexity(model, tokenizer, TEXTS, window, released=True)
    assert measured == pytest.approx(expected, rel=1e-6)
    assert measured != pytest.approx(metrics.perplexity(model, tokenizer, TEXTS, window), rel=1e-4)


@pytest.mark.parametrize("released", [False, True])
def test_empty_texts_do_not_count(speaker, released):
    """A text of no token changes nothing, first, last or in between."""
    model, tokenizer = speaker
    measured = metrics.perplexity(
        model, tokenizer, ["", *TEXTS[:2], "", *TEXTS[2:], ""], 32, released=released
    )
    expected = metrics.perplexity(model, tokenizer, TEXTS, 32, released=released)
    assert measured == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_perplexity_of_nothing_is_an_error(speaker, texts, released):
    """Where no token is predicted there is no mean: ValueError, never NaN."""
    model, tokenizer = speaker
    with pytest.raises(ValueError, match="text|token"):
        metrics.perplexity(model, tokenizer, texts, released=released)
