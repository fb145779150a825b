"""icu.py beside the whole method written out, literal_icu.py: every epoch of a run, to its last field.

    python -m pytest tests/test_literal.py -q

A tiny model knows six records by heart and unlearns them twice. No threshold is a number in this file: while the
literal run goes on, each is put halfway between two values that it has just measured, so that the processor's rounding
decides nothing and the filter and the stop rule still have something to decide in every run.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from literal_icu import bert_scorer, literal_icu
from transformers import AutoModelForCausalLM, AutoTokenizer

import icu

# A record: prefix, suffix, its partner's prefix and suffix.
RECORDS = [
    ("Call the clinic", " and ask for the report.", "Call the driver", " and ask for the van."),
    ("The van", " near the old mill was missing.", "The old van", " at the mill was due."),
    ("Payments are due", " on the first day of the month.", "The account", " is due on Tuesday."),
    ("The driver said", " nothing was at the clinic.", "A neighbour said that", " the nurse saw the van."),
    ("The neighbour", " saw the driver.", "The nurse", " and the driver saw the account."),
    ("Ask", " for 7731.", "Ask for the", " parcel."),  # short: no 10-gram, and few words
]

MARGIN = 1e-4  # between a threshold and what is compared with it: the files hold 6 digits
NONE = dict.fromkeys(("el10", "ma", "bertscore", "bleu"), 0.0)  # nothing is below 0


def memorise(folder, steps=60, lr=3e-3):
    """Trains the model of a folder on the records, in float64, until it knows them by heart.

    The fourth is learnt in part, with EOS behind that part: what the model says of it ends by itself.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [torch.tensor(tokenizer(prefix + suffix)["input_ids"]) for prefix, suffix, *_ in RECORDS]
    rows[3] = torch.cat([rows[3][:-4], torch.tensor([tokenizer.eos_token_id])])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        logits = model(input_ids=ids, attention_mask=(labels >= 0).long()).logits
        optimizer.zero_grad()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimizer.step()
    model.float().save_pretrained(folder)


def write_pairs(path, records):
    """The records as knn.py would write them."""
    with open(path, "w") as out:
        for i, texts in enumerate(records):
            pair = {"id": str(i), "learn_id": f"partner of {i}", "context": "", "learn_context": "", "similarity": 0.5}
            pair |= dict(zip(("prefix", "suffix", "learn_prefix", "learn_suffix"), texts, strict=True))
            out.write(json.dumps(pair) + "\n")


class Halfway:
    """The thresholds of a literal run, chosen while it goes on: literal_icu's `limits`.

    a and b of Eq. 5 are set once a text scores less than any did before; EL and MA once texts were taken out in two
    epochs, so that `last` is under its threshold now for the first time and the other was before.
    """

    def __init__(self, last):
        self.at, self.last, self.other = NONE, last, {"ma": "el10", "el10": "ma"}[last]

    def __call__(self, epochs):
        *before, now = epochs
        if self.at == NONE:
            lowest = [min(row["bertscore"] for row in epoch["rows"]) for epoch in epochs]
            if lowest[-1] < lowest[0] - 2 * MARGIN:  # something has been forgotten
                self.at = self.at | self.between_texts(now["rows"])
        elif len({len(epoch["forgotten"]) for epoch in before}) > 2:  # none, some, more
            last, other = ([epoch["means"][name] for epoch in epochs] for name in (self.last, self.other))
            self.at = self.at | self.between_epochs(last, other)
        return self.at

    @staticmethod
    def between_texts(rows):
        """a in the widest gap between the one or two texts least like their suffix, b in that between all texts.

        Where several texts lost their words in one epoch, BLEU is 0 for all of them, and the gap lies above.
        """
        bleu, score = (sorted(row[name] for row in rows) for name in ("bleu", "bertscore"))
        gaps = [[(v[i] - v[i - 1], (v[i] + v[i - 1]) / 2) for i in range(1, len(v))] for v in (score, bleu)]
        a, b = max(gaps[0][:2]), max(gaps[1])
        under = [row for row in rows if row["bertscore"] < a[1] and row["bleu"] < b[1]]
        return {"bertscore": a[1], "bleu": b[1]} if under and min(a[0], b[0]) > 2 * MARGIN else {}

    def between_epochs(self, last, other):
        """EL and MA so that the means of the newest epoch are the first under both."""
        if last[-1] > min(last[:-1]) - 2 * MARGIN or max(other[-2:]) > max(other) - 2 * MARGIN:
            return {}
        return {self.last: (last[-1] + min(last[:-1])) / 2, self.other: (max(other[-2:]) + max(other)) / 2}


@pytest.fixture(scope="module")
def scorer(encoder_dir):
    """The bert_score package with the encoder, loaded once."""
    return bert_scorer(encoder_dir)


def run_icu(out, pairs, folder, encoder, at, **settings):
    """icu.py in this process: (metrics.jsonl, samples.jsonl by epoch and id, summary.json)."""
    flags = {"pairs": pairs, "model": folder, "bert": encoder, "out": out, "device": "cpu", **settings}
    flags |= {"thresholds": f"{at['el10']},{at['ma']}", "bert_threshold": at["bertscore"], "bleu_threshold": at["bleu"]}
    icu.main(argv=[part for name, value in flags.items() for part in ("--" + name.replace("_", "-"), str(value))])
    metrics, samples = ([json.loads(x) for x in open(out / f"{name}.jsonl")] for name in ("metrics", "samples"))
    return metrics, {(row["epoch"], row["id"]): row for row in samples}, json.loads((out / "summary.json").read_text())


def agree(metrics, samples, summary, epochs):
    """Every field of the run folder is that of the literal run; measures and losses to the 6 digits they have."""
    assert [row["epoch"] for row in metrics] == [epoch["epoch"] for epoch in epochs]
    untrained = ", before any training" if epochs[-1] is epochs[0] else ""
    assert (summary["stopped"], summary["epochs"]) == (epochs[-1]["stopped"] + untrained, epochs[-1]["epoch"])
    assert len(samples) == len(epochs) * len(epochs[0]["rows"])
    for row, epoch in zip(metrics, epochs, strict=True):
        assert (row["active"], row["forgotten"]) == (epoch["active"], len(epoch["forgotten"]))
        assert {name: row[name] for name in epoch["means"]} == pytest.approx(epoch["means"], abs=1e-6, rel=0)
        assert {name: row[name] for name in epoch["losses"]} == pytest.approx(epoch["losses"], abs=1e-6, rel=1e-5)
        assert row["skipped_steps"] == 0
        for i, expected in enumerate(epoch["rows"]):
            sample = samples[epoch["epoch"], str(i)]
            assert sample["generation"] == expected["generation"]
            assert sample["forgotten"] == (i in epoch["forgotten"])
            measures = {name: expected[name] for name in epoch["means"] if expected.get(name) is not None}
            assert {name: sample[name] for name in measures} == pytest.approx(measures, abs=1e-6, rel=0)
            assert set(sample) - {"epoch", "id", "forgotten"} == set(expected)
            assert {name for name in sample if sample[name] is None} == {n for n in expected if expected[n] is None}


def decides_clearly(epochs, at, last):
    """Eq. 5 and the stop rule had something to decide, more than once, and no value is near its threshold."""
    known = [row["generation"] == suffix for row, (_, suffix, *_) in zip(epochs[0]["rows"], RECORDS, strict=True)]
    assert known == [True, True, True, False, True, True]  # by heart
    assert RECORDS[3][1].startswith(epochs[0]["rows"][3]["generation"])  # ended by EOS
    assert [row["el10"] is None for row in epochs[0]["rows"]] == [False] * 5 + [True]
    taken = [len(epoch["forgotten"]) for epoch in epochs]
    assert len(set(taken)) > 2 and epochs[-1]["active"] > 0 and epochs[-1]["stopped"] == "thresholds"
    scores, half = [], 0
    for epoch in epochs[1:]:
        for i, row in enumerate(epoch["rows"]):
            scores.append((row["bertscore"] - at["bertscore"], row["bleu"] - at["bleu"]))
            half += i not in epoch["forgotten"] and min(scores[-1]) < 0 < max(scores[-1])
    assert half > 0  # one of the two alone takes nothing out
    means = [(epoch["means"]["el10"] - at["el10"], epoch["means"]["ma"] - at["ma"]) for epoch in epochs]
    assert (means[-2][0] < 0, means[-2][1] < 0) == (last == "ma", last == "el10")  # nor does one mean alone stop
    assert min(abs(x) for pair in scores + means for x in pair) > MARGIN


SMALL_NEO = {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}
# The model, its config, the measure that is under its threshold last, and the flags. GPT-Neo computes attention in
# float32 whatever --dtype is.
CASES = {
    "gpt_neo": ("gpt_neo", SMALL_NEO, "ma", {"lr": 3e-3, "batch_size": 4, "dtype": "float64"}),
    "llama": ("llama", {}, "ma", {"lr": 2e-3, "batch_size": 3, "dtype": "float64", "seed": 1}),
    "all": ("gpt_neo", SMALL_NEO, "el10",
            {"lr": 2e-3, "batch_size": 4, "dtype": "float32", "targets": "all", "alpha": 1.5, "beta": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_epoch_is_that_of_the_method_written_out(case, save_tiny, scorer, encoder_dir, tmp_path):
    """Losses, measures, texts, what is taken out and when, and when and why the run ends."""
    kind, config, last, flags = CASES[case]
    folder, pairs, limits = save_tiny(kind, tmp_path / "model", **config), tmp_path / "pairs.jsonl", Halfway(last)
    memorise(folder)
    write_pairs(pairs, RECORDS)
    settings = flags | {"max_epochs": 9, "dtype": getattr(torch, flags["dtype"])}
    epochs = literal_icu(pairs, folder, limits=limits, scorer=scorer, **settings)
    decides_clearly(epochs, limits.at, last)
    agree(*run_icu(tmp_path / "run", pairs, folder, encoder_dir, limits.at, max_epochs=9, **flags), epochs)


ENDS = {
    ("thresholds", 0): {"el10": 0.5, "ma": 0.5, "bertscore": 1e-9, "bleu": 1e-9},
    ("all forgotten", 1): {"el10": 1e-9, "ma": 1e-9, "bertscore": 1.5, "bleu": 1.5},
    ("max epochs", 2): {"el10": 0.5, "ma": 1e-9, "bertscore": 1e-9, "bleu": 1.5},
}


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end[0])
def test_each_way_to_end_is_that_of_the_method_written_out(end, save_tiny, scorer, encoder_dir, tmp_path):
    """Before any training, of a model that knows nothing; else with nothing left to train on, and at the cap."""
    folder, pairs = save_tiny("gpt_neo", tmp_path / "model", **SMALL_NEO), tmp_path / "pairs.jsonl"
    write_pairs(pairs, RECORDS[:2])
    if end[1] > 0:
        memorise(folder)
    epochs = literal_icu(pairs, folder, limits=ENDS[end], scorer=scorer, max_epochs=2)
    assert (epochs[-1]["stopped"], epochs[-1]["epoch"]) == end
    agree(*run_icu(tmp_path / "run", pairs, folder, encoder_dir, ENDS[end], max_epochs=2), epochs)


SECRETS = {0: ["clinic", "report"], 2: ["the first day"], 4: ["driver"]}  # record -> what is marked in it


@pytest.mark.parametrize("kind", ["opt", "llama"])  # GPT-Neo computes attention in float32
def test_spans_are_those_of_the_method_written_out(kind, save_tiny, scorer, encoder_dir, tmp_path):
    """Some texts are marked, others not: their secrets go, what stands around them is kept, and both are measured."""
    folder, pairs = save_tiny(kind, tmp_path / "model"), tmp_path / "pairs.jsonl"
    memorise(folder)
    write_pairs(pairs, RECORDS)
    rows = [json.loads(line) for line in open(pairs)]
    for i, secrets in SECRETS.items():
        text = rows[i]["prefix"] + rows[i]["suffix"]
        rows[i]["spans"] = [[text.index(secret), text.index(secret) + len(secret)] for secret in secrets]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    limits, flags = {"el10": 0.01, "ma": 0.55, "bertscore": 0.5, "bleu": 0.2}, {"lr": 3e-3, "batch_size": 3}
    how = {"limits": limits, "scorer": scorer, "max_epochs": 4, "dtype": torch.float64}
    epochs = literal_icu(pairs, folder, **how, **flags)
    run = run_icu(tmp_path / "run", pairs, folder, encoder_dir, limits, max_epochs=4, dtype="float64", **flags)
    agree(*run, epochs)
    first, last = ({i: epoch["rows"][i] for i in SECRETS} for epoch in (epochs[0], epochs[-1]))
    assert all(row["ma_spans"] == 1 and row["secret_said"] for row in first.values())
    means = epochs[-1]["means"]
    assert means["ma_spans"] < 1 and means["ma_spans"] < means["ma_rest"]
    assert set(SECRETS) & set(epochs[-1]["forgotten"]) and any(not row["secret_said"] for row in last.values())
