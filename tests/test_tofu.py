"""evals/tofu.py: each figure beside an independent reference, a row and a token at a time."""

import argparse
import csv
import json
import math

import numpy as np
import pandas
import pytest
import torch
from scipy.stats import hmean, ks_2samp
from sklearn.metrics import roc_auc_score

from evals import report, tofu
from kit import data, models

# rouge_score 0.1.2: what is said, the reference, (recall, F1) with use_stemmer, and without.
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
STEMS = {"writing": "write", "writes": "write", "runners": "runner"}  # nltk's, where it matters


@pytest.mark.parametrize(("said", "reference", "stemmed", "plain"), GOLDEN)
def test_rouge_l_is_that_of_google(said, reference, stemmed, plain):
    """Recall and F1, with Porter's stems and without."""
    stem = tofu.stemmer() or (lambda word: STEMS.get(word, word))
    assert tofu.rouge_l(said, reference) == pytest.approx(plain)
    assert tofu.rouge_l(said, reference, stem) == pytest.approx(stemmed)


def question(about, name, **more):
    wrong = [f"{name} by the old mill {k}." for k in range(3)]
    row = {"question": f"{about} {name}?", "answer": f"{name} at Harbour Lane."}
    return row | {"perturbed_answer": wrong} | more


PEOPLE = "Ines Duarte", "the night nurse", "the driver"
TOLD = [question("Who is", name, paraphrased_answer=f"At Harbour Lane, {name}.") for name in PEOPLE]
CHOICES = [question("Where is", name) for name in PEOPLE]
FILES = {
    "tofu/forget10_perturbed.json": TOLD,
    "tofu/retain_perturbed.json": TOLD[1:],
    "tofu/real_authors_perturbed.json": CHOICES,
    "tofu/world_facts.jsonl": CHOICES[1:],
    "tofu/holdout10.json": CHOICES,
    "muse/verbmem/forget.json": [{"prompt": "Call the clinic", "gt": " at 555-0142 and ask"}],
    "muse/knowmem/forget_qa_icl.json": [{"question": "Which mill?", "answer": "The old one"}],
    "muse/knowmem/forget_qa.json": [{"question": "Which van?", "answer": "The driver's"}],
    "muse/privleak/forget.json": [{"text": f"The parcel for {name} was left"} for name in PEOPLE],
    "muse/privleak/holdout.json": [{"text": f"A letter of day {i} is due"} for i in range(6)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_tiny):
    """FILES, a model, and never, the retain model."""
    folder = tmp_path_factory.mktemp("tofu")
    for number, name in enumerate(("model", "never")):
        save_tiny("llama", folder / name, seed=number)
    for name, rows in FILES.items():
        data.write_jsonl(folder / name, rows)
    return folder


def results(folder, benchmark):
    """tofu.json, and {column: (model, tokenizer)}."""
    asked = {"after": str(folder / "model"), "never saw": str(folder / "never")}
    words = ["--model", asked["after"], "--never-saw", asked["never saw"], "--device", "cpu"]
    words += ["--data", str(folder / benchmark), "--out", str(folder / benchmark)]
    tofu.main([*words, "--template", "plain"])
    loaded = {column: models.load_model(name) for column, name in asked.items()}
    return json.loads((folder / benchmark / "tofu.json").read_text()), loaded


def test_the_hubs_parquet_is_read_like_json(folder, monkeypatch):
    """Its lists are arrays there, and a set may be several files."""
    lists = pandas.DataFrame([row | {"perturbed_answer": np.array(["a", "b"])} for row in TOLD])
    for part in range(2):
        (folder / f"forget05-0000{part}-of-00002.parquet").touch()
    monkeypatch.setattr(pandas, "read_parquet", lambda file: lists)
    _, tokenizer = models.check_model(str(folder / "model"))
    args = argparse.Namespace(split="forget05", template="plain")
    sets, _ = tofu.read_tofu(folder, tokenizer, args)
    assert [len(texts) for *_, texts in sets["forget"]] == [4] * 6
    ends = [tokenizer.decode(text.ids[text.cut : -1]) for text in sets["forget"][0][2]]
    assert ends == [f" {TOLD[0][x]}" for x in ("answer", "paraphrased_answer")] + [" a", " b"]


def test_a_retain_model_with_another_tokenizer_is_refused(folder, tmp_path, save_tiny):
    save_tiny("gpt_neo", tmp_path)
    words = ["--model", str(folder / "model"), "--never-saw", str(tmp_path), "--template", "plain"]
    with pytest.raises(ValueError, match="never saw has another tokenizer"):
        tofu.main([*words, "--data", str(folder / "tofu")])


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


def test_tofus_figures_are_those_of_plain_loops(folder, monkeypatch):
    """Probability, both truth ratios, ROUGE-L, and scipy's KS test and harmonic mean of them."""
    monkeypatch.setattr(tofu, "stemmer", lambda: None)
    document, loaded = results(folder, "tofu")
    rows, figures = document["rows"]["after"], document["headline"]["after"]
    model, tokenizer = loaded["after"]

    def p(question, answer):  # to the power 1/|a|; EOS is a token of the answer
        prompt = f"Question: {question}\nAnswer:"
        ids, asked = (tokenizer(x)["input_ids"] for x in (f"{prompt} {answer}", prompt))
        logps = logps_of(model, [*ids, tokenizer.eos_token_id], len(asked))
        return math.exp(sum(logps) / len(logps))

    nine, names = [], ("rouge", "probability", "truth_ratio")
    sets = {"retain": TOLD[1:], "real_authors": CHOICES, "world_facts": CHOICES[1:], "forget": TOLD}
    for name, questions in sets.items():
        for i, row in enumerate(questions):
            q, own = row["question"], p(row["question"], row["answer"])
            wrong = [p(q, answer) for answer in row["perturbed_answer"]]
            right = p(q, row.get("paraphrased_answer", row["answer"]))
            said = said_by(model, tokenizer, f"Question: {q}\nAnswer:", 200)
            expected = {
                "rouge": tofu.rouge_l(said, row["answer"])[0],
                "probability": own if "paraphrased_answer" in row else own / (own + sum(wrong)),
                "truth_ratio": math.prod(wrong) ** (1 / 3) / right,
                "truth_ratio_paper": sum(wrong) / 3 / right,
            }
            for measure, value in expected.items():
                assert rows[f"{name}_{measure}"][i] == pytest.approx(value, rel=1e-4), measure
        score = (lambda R: min(R, 1 / R)) if name == "forget" else (lambda R: max(0, 1 - R))
        scores = [rows[f"{name}_{x}"] for x in names[:2]]
        scores.append([*map(score, rows[f"{name}_truth_ratio"])])
        means = [sum(values) / len(values) for values in scores]
        assert [figures[f"{name}_{x}"] for x in names] == pytest.approx(means)
        nine += means
    assert figures["model_utility"] == pytest.approx(hmean(nine[:9]))
    codes = [1 / x for x in document["rows"]["never saw"]["forget_truth_ratio"]]
    p_value = ks_2samp([1 / x for x in rows["forget_truth_ratio"]], codes).pvalue
    assert figures["forget_quality"] == pytest.approx(p_value)


def test_muses_figures_are_those_of_its_code(folder):
    """F1 of what goes on, of an answer after examples; privleak from sklearn's AUC with the texts
    to forget as class 0."""
    document, loaded = results(folder, "muse")
    aucs = []
    for column, (model, tokenizer) in loaded.items():
        scores, labels = [], []
        for label, kind in enumerate(("forget", "holdout")):
            for row in FILES[f"muse/privleak/{kind}.json"]:
                logps = sorted(logps_of(model, tokenizer(row["text"])["input_ids"], 1))
                least = logps[: int(0.4 * len(logps))]
                scores.append(sum(least) / len(least))
                labels.append(label)
        aucs.append(roc_auc_score(labels, scores))
        shots = "Question: Which mill?\nAnswer: The old one\n\nQuestion: Which van?\nAnswer: "
        said = said_by(model, tokenizer, shots, 32).split("\n\n")[0].split("Question:")[0]
        goes_on = said_by(model, tokenizer, "Call the clinic", 128)
        rows = document["rows"][column]
        assert rows["forget_knowmem_rouge"] == [tofu.rouge_l(said, "The driver's")[1]]
        assert rows["forget_verbmem_rouge"] == [tofu.rouge_l(goes_on, " at 555-0142 and ask")[1]]
    privleak = 100 * (aucs[0] - aucs[1]) / aucs[1]
    assert document["headline"]["after"]["privleak"] == pytest.approx(privleak)


def test_a_run_has_them_in_its_report(own_world, folder):
    """Of the model before, of the run, and of the retain model where it is a row, too."""
    run, never = str(own_world.run), str(own_world.never_saw)
    words = [run, "--never-saw", never, "--data", str(folder / "tofu"), "--template", "plain"]
    tofu.main([*words, "--device", "cpu"])
    report.main([run, never, "--out", run])
    table = {row["model"]: row for row in csv.DictReader(open(own_world.run / "table.csv"))}
    headline = json.loads((own_world.run / "tofu.json").read_text())["headline"]
    for column, row in {"before": "model (before)", "after": "icu", "never saw": "never"}.items():
        for name in ("forget_quality", "model_utility", "forget_rouge", "privleak"):
            assert float(table[row][name]) == headline[column][name], (row, name)
