"""evals/tofu.py: each figure beside an independent reference, and the two commands.

python -m pytest tests/test_tofu.py -q
"""

import csv
import itertools
import json
import math

import pytest
import torch
from scipy.stats import hmean
from sklearn.metrics import roc_auc_score

from evals import report, tofu
from kit import data, models

# rouge_score 0.1.2: what is said, the reference, (recall, F1) with use_stemmer and without.
GOLDEN = [
    ("Ines was born in Köln; she's writing poems, 14 of them.",
     "Ines, a poet born in Köln in 1971, writes poems about running rivers.",
     (0.5, 0.5185185185185186), (0.42857142857142855, 0.4444444444444444)),
    ("The runner is running easily",
     "Runners ran easily through the relational database of generalizations",
     (0.2222222222222222, 0.2857142857142857), (0.1111111111111111, 0.14285714285714285)),
    ("a b c d e f g", "b d f x y", (0.6, 0.5), (0.6, 0.5)),
    ("", "nothing was said", (0, 0), (0, 0)),
]  # fmt: skip
# nltk's Porter stems of the words above that differ from them
STEMS = {
    "writing": "write", "writes": "write", "poems": "poem", "running": "run", "rivers": "river",
    "runners": "runner", "easily": "easili", "relational": "relat",
    "database": "databas", "generalizations": "gener", "nothing": "noth",
}  # fmt: skip


@pytest.mark.parametrize(("said", "reference", "stemmed", "plain"), GOLDEN)
def test_rouge_l_is_that_of_google(said, reference, stemmed, plain):
    """Recall and F1, with Porter's stems and without."""
    assert tofu.rouge_l(said, reference) == pytest.approx(plain)
    stem = tofu.stemmer() or (lambda word: STEMS.get(word, word))
    assert tofu.rouge_l(said, reference, stem) == pytest.approx(stemmed)


def test_forget_quality_counts_how_many_splits_are_further_apart():
    """The exact p-value, over every way to deal eight ratios to two models."""
    mine, never = [0.1, 0.2, 0.25, 0.6], [0.3, 0.5, 0.8, 0.9]

    def apart(some, others):
        return max(
            abs(sum(x <= t for x in some) - sum(x <= t for x in others)) for t in mine + never
        )

    values = mine + never
    splits = [
        apart([values[i] for i in chosen], [values[i] for i in range(8) if i not in chosen])
        for chosen in itertools.combinations(range(8), 4)
    ]
    expected = sum(split >= apart(mine, never) for split in splits) / len(splits)
    assert tofu.forget_quality(mine, never) == pytest.approx(expected)
    inverse = [1 / x for x in mine], [1 / x for x in never]
    assert tofu.forget_quality(*inverse) == pytest.approx(expected)


# --- the command on invented rows ---

PEOPLE = "Ines Duarte", "the night nurse", "the driver", "a neighbour"


def rows_of(about, choices=False):
    """Four questions in TOFU's form."""
    rows = []
    for i, name in enumerate(PEOPLE):
        row = {"question": f"{about} {name}?", "answer": f"{name} at {i} Harbour Lane."}
        wrong = [f"{name} by the old mill {k}." for k in range(3)]
        rows.append(row | {"perturbed_answer": wrong})
        if not choices:
            rows[-1]["paraphrased_answer"] = f"At {i} Harbour Lane, {name}."
    return rows


@pytest.fixture(scope="module")
def asked(tmp_path_factory, save_tiny):
    """(folder, flags of the models): a model, the retain model, and both benchmarks' files."""
    folder = tmp_path_factory.mktemp("tofu")
    for number, name in enumerate(("model", "never")):
        save_tiny("llama", folder / name, seed=number)
    for name, rows in {
        "tofu/forget10_perturbed.json": rows_of("Who lives with"),
        "tofu/retain_perturbed.json": rows_of("Who works with"),
        "tofu/real_authors_perturbed.json": rows_of("Who wrote of", choices=True),
        "tofu/world_facts_perturbed.json": rows_of("Where is", choices=True),
        "tofu/holdout10.json": [{"question": f"What is {i}?", "answer": f"{i}!"} for i in range(9)],
        "muse/verbmem/forget.json": [{"prompt": "Call the clinic", "gt": " at 555-0142 and ask"}],
        "muse/knowmem/forget_qa_icl.json": [{"question": "Which mill?", "answer": "The old one"}],
        "muse/knowmem/forget_qa.json": [{"question": "Which van?", "answer": "The driver's"}],
        "muse/privleak/forget.json": [
            {"text": f"The parcel for {name} was left"} for name in PEOPLE
        ],
        "muse/privleak/holdout.json": [{"text": f"A letter of day {i} is due"} for i in range(6)],
    }.items():
        data.write_jsonl(folder / name, rows)
    never, model = (str(folder / name) for name in ("never", "model"))
    return folder, ["--model", model, "--never-saw", never, "--device", "cpu"]


def run(asked, capsys, benchmark):
    folder, flags = asked
    out = ["--data", str(folder / benchmark), "--out", str(folder / benchmark), "--overwrite"]
    tofu.main([*flags, *out, "--template", "plain"])
    return json.loads((folder / benchmark / "tofu.json").read_text()), capsys.readouterr().out


def logps_of(model, ids, first):
    """log p of each token from `first` on, one forward pass a token."""
    with torch.no_grad():
        return [
            model(torch.tensor([ids[:t]])).logits[0, -1].log_softmax(-1)[ids[t]].item()
            for t in range(first, len(ids))
        ]


def said_by(model, tokenizer, prompt, length):
    """transformers' own greedy answer."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(ids, max_new_tokens=length, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_tofus_figures_are_those_of_plain_loops(asked, capsys, monkeypatch):
    """Probability, truth ratios, ROUGE-L, forget quality, model utility: a row and a token at a
    time."""
    monkeypatch.setattr(tofu, "stemmer", lambda: None)
    document, table = run(asked, capsys, "tofu")
    model, tokenizer = models.load_model(str(asked[0] / "model"))
    rows, figures = document["rows"]["after"], document["headline"]["after"]

    def p(question, answer):  # to the power 1/|a|; EOS is a token of the answer
        prompt = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
        ids = tokenizer(f"Question: {question}\nAnswer: {answer}")["input_ids"]
        logps = logps_of(model, [*ids, tokenizer.eos_token_id], len(prompt))
        return math.exp(sum(logps) / len(logps))

    nine = []
    for name, about in (
        ("retain", "Who works with"), ("real_authors", "Who wrote of"), ("world_facts", "Where is"),
        ("forget", "Who lives with"),
    ):  # fmt: skip
        choices = name in ("real_authors", "world_facts")
        for i, row in enumerate(rows_of(about, choices)):
            q, wrong = row["question"], [p(row["question"], x) for x in row["perturbed_answer"]]
            right = p(q, row.get("paraphrased_answer", row["answer"]))
            own = p(q, row["answer"])
            probability = own / (own + sum(wrong)) if choices else own
            expected = {"probability": probability, "truth_ratio_paper": sum(wrong) / 3 / right}
            expected["truth_ratio"] = math.prod(wrong) ** (1 / 3) / right
            said = said_by(model, tokenizer, f"Question: {q}\nAnswer:", 200)
            expected["rouge"] = tofu.rouge_l(said, row["answer"])[0]
            for measure, value in expected.items():
                assert rows[f"{name}_{measure}"][i] == pytest.approx(value, rel=1e-4), measure
        means = [sum(rows[f"{name}_{x}"]) / 4 for x in ("rouge", "probability")]
        ratios = rows[f"{name}_truth_ratio"]
        score = (lambda R: min(R, 1 / R)) if name == "forget" else (lambda R: max(0, 1 - R))
        means.append(sum(map(score, ratios)) / 4)
        assert [figures[f"{name}_{x}"] for x in ("rouge", "probability", "truth_ratio")] == (
            pytest.approx(means)
        )
        nine += means
    assert figures["model_utility"] == pytest.approx(hmean(nine[:9]))
    never = document["rows"]["never saw"]["forget_truth_ratio"]
    assert figures["forget_quality"] == tofu.forget_quality(ratios, never)
    assert "| forget_quality |" in table and "stems" in table


def test_muses_figures_are_those_of_its_code(asked, capsys):
    """F1 of what goes on, of an answer after examples; privleak from sklearn's AUC with the texts
    to forget as class 0."""
    document, _ = run(asked, capsys, "muse")
    aucs = []
    for column, name in (("after", "model"), ("never saw", "never")):
        model, tokenizer = models.load_model(str(asked[0] / name))
        scores, labels = [], []
        for label, kind in enumerate(("forget", "holdout")):
            for row in data.read_jsonl(asked[0] / f"muse/privleak/{kind}.json"):
                logps = sorted(logps_of(model, tokenizer(row["text"])["input_ids"], 1))
                least = logps[: int(0.4 * len(logps))]
                scores.append(sum(least) / len(least))
                labels.append(label)
        aucs.append(roc_auc_score(labels, scores))
        rows = document["rows"][column]
        said = said_by(model, tokenizer, "Call the clinic", 128)
        expected = tofu.rouge_l(said, " at 555-0142 and ask")[1]
        assert rows["forget_verbmem_rouge"] == [pytest.approx(expected)]
        shots = "Question: Which mill?\nAnswer: The old one\n\nQuestion: Which van?\nAnswer: "
        said = said_by(model, tokenizer, shots, 32).split("\n\n")[0].split("Question:")[0]
        expected = tofu.rouge_l(said, "The driver's")[1]
        assert rows["forget_knowmem_rouge"] == [pytest.approx(expected)]
    privleak = 100 * (aucs[0] - aucs[1]) / aucs[1]
    assert document["headline"]["after"]["privleak"] == pytest.approx(privleak)


def test_a_run_has_them_in_its_report(own_world, asked):
    """Of the model before, of the run, and of the retain model where it is a row, too."""
    run, never = str(own_world.run), str(own_world.never_saw)
    words = [run, "--never-saw", never, "--data", str(asked[0] / "tofu"), "--template", "plain"]
    tofu.main([*words, "--device", "cpu"])
    report.main([run, never, "--out", run])
    table = {row["model"]: row for row in csv.DictReader(open(own_world.run / "table.csv"))}
    headline = json.loads((own_world.run / "tofu.json").read_text())["headline"]
    rows = {"before": "model (before)", "after": "icu", "never saw": "never"}
    for column, row in rows.items():
        for name in ("forget_quality", "model_utility", "forget_rouge", "privleak"):
            assert float(table[row][name]) == headline[column][name], (row, name)
