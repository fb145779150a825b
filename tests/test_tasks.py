"""Claims about evals/tasks.py: prompts, scores, figures, bad and missing rows, and the command.

The references are literal: one forward pass a choice, one token at a time for a reply. The prompts
of the harness were seen to be lm_eval 0.4.13's, and scores to be its to 1e-4.
"""

import json
import math
import random
import sys
from unittest.mock import Mock

import numpy as np
import pandas
import pytest
import torch
from architectures import literal_score

import metrics
from evals import tasks
from kit import data
from kit import models as kit_models

# One or two rows of each set, written by hand in the public schema.
ROWS = {
    "lambada": [
        {"text": "He took milk in his tea"},
    ],
    "hellaswag": [
        {
            "ctx": "How to peel an onion [title] Cut the ends. [step] Use a knife.",
            "ctx_a": "Cut the ends. [step] Use a",
            "ctx_b": "knife.",
            "label": 0,
            "activity_label": "Food",
            "endings": ["[title] Peel the skin. [step] Do it.", "Wash  it."],
        },
    ],
    "winogrande": [
        {
            "sentence": "The cup left the box as the _ was too big.",
            "option1": "cup",
            "option2": "box",
            "answer": "1",
        },
    ],
    "copa": [
        {
            "premise": "The glass fell.",
            "choice1": "It broke.",
            "choice2": "It sang.",
            "question": "effect",
            "label": 0,
        },
        {
            "premise": "He opened the umbrella.",
            "choice1": "He was hungry.",
            "choice2": "It was raining.",
            "question": "cause",
            "label": 1,
        },
    ],
    "arc_easy": [
        {
            "question": "Which of these is a metal?",
            "answerKey": "C",
            "choices": {"text": ["wood", "glass", "iron", "wool"], "label": ["A", "B", "C", "D"]},
        },
        {
            "question": "What does a plant need?",
            "answerKey": "1",
            "choices": {"text": ["light", "noise", "salt"], "label": ["1", "2", "3"]},
        },
    ],
    "piqa": [
        {"goal": "To open a jar,", "sol1": "turn the lid", "sol2": "turn the table ", "label": 0},
        {
            "goal": "dresser ",
            "sol1": "replace the drawer",
            "sol2": "finish the wood",
            "label": 1,
        },
    ],
    "mathqa": [
        {
            "Problem": "what is 20 percent of 5000 ?",
            "correct": "b",
            "options": "a ) rs . 400 , b ) 1 , 000 , c ) 1,200 , d ) 100 , e ) 2 , 000",
        },
    ],
    "pubmedqa": [
        {
            "question": "Is tea hot?",
            "context": {"contexts": ["Cups were filled.", "They were measured."]},
            "final_decision": "yes",
        },
    ],
    "wizard_of_wikipedia": [
        {"text": ["i like red .", "Me too! is it your favorite colour", "it is , i'm sure"]},
    ],
    "pile": [
        {"text": "The parcel was left at the mill."},
        {"text": "A neighbour saw the van on Tuesday morning."},
    ],
}
ROWS["arc_challenge"] = ROWS["arc_easy"]
ROWS["wikitext"] = ROWS["pile"]
ROWS |= {name: ROWS["wizard_of_wikipedia"] for name in tasks.DIALOGUE}

# A row in both styles: (released, harness), each (context, choices, answer).
PROMPTS = {
    ("lambada", 0): [("He took milk in his", [" tea"], 0)] * 2,
    ("hellaswag", 0): [
        (
            "How to peel an onion [title] Cut the ends. [step] Use a knife.",
            [" [title] Peel the skin. [step] Do it.", " Wash  it."],
            0,
        ),
        (
            "Food: Cut the ends. Use a Knife.",
            ["  Peel the skin. Do it.", " Wash it."],
            0,
        ),
    ],
    ("winogrande", 0): [
        ("The cup left the box as the", [" cup was too big.", " box was too big."], 0),
        (
            ["The cup left the box as the cup", "The cup left the box as the box"],
            [" was too big."] * 2,
            0,
        ),
    ],
    ("copa", 0): [
        ("The glass fell.", [" It broke.", " It sang."], 0),
        ("The glass fell therefore", ["  it broke.", "  it sang."], 0),
    ],
    ("arc_easy", 1): [
        ("What does a plant need?", [" light", " noise", " salt"], 0),
        ("Question: What does a plant need?\nAnswer:", [" light", " noise", " salt"], 0),
    ],
    ("piqa", 0): [
        ("To open a jar,", [" turn the lid", " turn the table "], 0),
        ("Question: To open a jar,\nAnswer:", [" turn the lid", " turn the table "], 0),
    ],
    ("mathqa", 0): [
        ("what is 20 percent of 5000 ?", ["rs . 400", "1", "1,200", "100", "2 , 000"], 1),
        (
            "Question: what is 20 percent of 5000 ?\nAnswer:",
            [" rs . 400", " 1", " 1,200", " 100", " 2 , 000"],
            1,
        ),
    ],
    ("pubmedqa", 0): [
        (
            "Context: Cups were filled.\nQuestion: Is tea hot?\nAnswer:",
            [" yes", " maybe", " no"],
            0,
        ),
        (
            "Abstract: Cups were filled.\nThey were measured.\nQuestion: Is tea hot?\nAnswer:",
            [" yes", " no", " maybe"],
            0,
        ),
    ],
    ("wizard_of_wikipedia", 0): [
        (
            "User 1: I like red.\nUser 2: Me too! Is it your favorite colour.\nUser 1:",
            "It is, I'm sure.",
        ),
    ]
    * 2,
}


@pytest.fixture(scope="module")
def models(save_tiny, tmp_path_factory):
    """{kind: (float64 model, tokenizer)}."""

    def load(kind):
        folder = save_tiny(kind, tmp_path_factory.mktemp(kind), max_position_embeddings=512)
        return kit_models.load_model(str(folder), dtype="float64")

    return {kind: load(kind) for kind in ("gpt_neo", "opt", "llama")}


@pytest.fixture
def offline(monkeypatch):
    """Neither a known public file nor the hub can be had."""
    refusal = ValueError("cannot reach the server: pass --data DIR with it")
    monkeypatch.setattr(data, "data_file", Mock(side_effect=refusal))
    monkeypatch.setitem(sys.modules, "datasets", None)


def write_rows(folder, names):
    for name in names:
        data.write_jsonl(folder / f"{name}.jsonl", ROWS[name])
    return folder


def judge(model, tokenizer, rows, *, length_norm=False, lenient=False):
    return tasks.judge_choices(
        model,
        tokenizer,
        list(rows.items()),
        length_norm=length_norm,
        lenient=lenient,
        batch_tokens=200,
    )


# --- rows and prompts ---


@pytest.mark.parametrize("name, row", PROMPTS, ids=lambda value: str(value))
def test_a_row_becomes_the_documented_prompt_in_both_styles(name, row):
    """The strings of Jang et al. (released) and of the harness."""
    function = tasks.SETS[name][1]
    assert [function(ROWS[name][row], harness) for harness in (False, True)] == PROMPTS[name, row]


def test_original_files_and_hub_rows_give_the_same_items():
    """ARC's and PubMedQA's original schema."""
    hub = ROWS["arc_easy"][0]
    own = pandas.DataFrame(hub["choices"]).to_dict("records")
    original = {"question": {"stem": hub["question"], "choices": own}, "answerKey": "C"}
    assert tasks.arc(original, True) == tasks.arc(hub, True)
    hub = ROWS["pubmedqa"][0]
    original = {"QUESTION": hub["question"], "final_decision": "yes"}
    original["CONTEXTS"] = hub["context"]["contexts"]
    for harness in (True, False):
        assert tasks.pubmedqa(original, harness) == tasks.pubmedqa(hub, harness)
    assert "Context: Only this.\n" in tasks.pubmedqa(hub | {"abstract": "Only this."}, False)[0]


def test_a_column_that_pandas_wrote_as_python_is_read_without_evaluating_it():
    """numpy's repr is parsed; what would have to be run is a bad row."""
    text = """{'contexts': array(["It's one.",
       'Two, "quoted" \\n and 3)'],
      dtype=object), 'labels': array(['A', 'B'], dtype=object), 'n': 1}"""
    expected = {"contexts": ["It's one.", 'Two, "quoted" \n and 3)'], "labels": ["A", "B"], "n": 1}
    assert tasks.unpack({"c": text}, "c") == expected
    attack = [{"text": "__import__('os').getcwd()"}]
    assert not tasks.check_rows("wizard_of_wikipedia", attack, False)["rows"]


def test_a_turn_is_normalised_as_published():
    """Lower case but for I and heads of sentences, a full stop."""
    for turn, expected in {
        "hi !  how are you": "Hi! How are you.",
        "I don't know , do i ?": "I don't know, do I?",
        "the iguana ate 3.5 kg ... I'm": "The iguana ate 3.5 kg... I'm.",
        ' "quote" ': '"quote"',
    }.items():
        assert tasks.normalize_turn(turn) == expected


BAD_ROWS = [
    ("piqa", "sol1", "  ", "`sol1` is '  ', not a text"),
    ("piqa", "label", -1, "number 0 of 2 choices"),
    ("lambada", "text", "word", "`context or choice` is '', not a text"),
]


@pytest.mark.parametrize("name, field, value, why", BAD_ROWS)
def test_a_bad_row_is_counted_and_named_and_the_others_stay(name, field, value, why):
    """It is left out with its number and the reason."""
    rows = [ROWS[name][0], ROWS[name][0] | {field: value}, ROWS[name][-1], {}]
    checked = tasks.check_rows(name, rows, False)
    assert list(checked["rows"]) == [1, 3]
    assert checked["bad"][0].startswith("row 2: ") and why in checked["bad"][0]
    assert checked["bad"][1].startswith("row 4: no field `")


# --- files ---


def test_each_kind_of_file_gives_the_same_rows(tmp_path):
    """CSV, JSON in three forms, JSON lines, XML; labels apart."""
    rows, folder = ROWS["piqa"], tmp_path
    frame = pandas.DataFrame(rows)
    frame.to_json(folder / "a.json", orient="records")
    frame.to_json(folder / "b.json", orient="index")
    frame.to_json(folder / "c.json", orient="columns")
    frame.to_csv(folder / "d.csv", index=False)
    frame.drop(columns="label").to_json(folder / "e.jsonl", orient="records", lines=True)
    (folder / "e-labels.lst").write_text("0\n1\n")
    expected = tasks.check_rows("piqa", rows, True)
    for name in ("a.json", "b.json", "c.json", "d.csv", "e.jsonl"):
        assert tasks.check_rows("piqa", tasks.read_rows(folder / name), True) == expected, name
    items = "".join(
        f'<item asks-for="{row["question"]}" most-plausible-alternative="{row["label"] + 1}">'
        f"<p>{row['premise']}</p><a1>{row['choice1']}</a1><a2>{row['choice2']}</a2></item>"
        for row in ROWS["copa"]
    )
    head = '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE copa-corpus SYSTEM "copa.dtd">\n'
    (folder / "copa-dev.xml").write_text(f'{head}<copa-corpus version="1.0">{items}</copa-corpus>')
    assert tasks.read_rows(folder / "copa-dev.xml") == ROWS["copa"]


def test_local_files_are_found_under_their_usual_names(tmp_path):
    """With or without the split, in the folder or one below."""
    files = {"arc_easy": "ARC-Easy-Dev.jsonl", "lambada": "sub/lambada_test.jsonl"}
    for name, file in files.items():
        data.write_jsonl(tmp_path / file, ROWS[name])
        data.write_jsonl(tmp_path / f"{name}_train.jsonl", ROWS[name])
        assert tasks.read_sets([name], tmp_path)[name]["source"] == str(tmp_path / file)


def test_a_set_without_rows_is_reported_and_not_averaged(tmp_path, offline, models):
    """It has the reason and no value; asked for by name it stops."""
    write_rows(tmp_path, ["piqa", "copa"])
    data.write_jsonl(tmp_path / "mathqa.jsonl", [{"goal": "x"}])
    results = tasks.evaluate(*models["gpt_neo"], tasks.read_sets(["all"], tmp_path))
    assert "pip install datasets" in results["hellaswag"]["missing"]
    assert "--task-data DIR with it" in results["lambada"]["missing"]
    averages = results["averages"]
    assert averages["cls"] == (results["piqa"]["value"] + results["copa"]["value"]) / 2
    assert averages["dia"] is None and averages["dia_missing"] == list(tasks.DIALOGUE)
    text = tasks.table({"mine": results})
    assert "(2 of 9 sets)" in text and "- mine: hellaswag is missing: " in text
    why = "mathqa.jsonl: no good row for mathqa, row 1: no field `Problem`"
    assert why in results["mathqa"]["error"]
    with pytest.raises(ValueError, match=why):
        tasks.read_sets(["mathqa"], tmp_path)
    with pytest.raises(ValueError, match="no set is at hand: pubmedqa: .*--task-data DIR"):
        tasks.read_sets(["pubmedqa"], tmp_path)


# --- scores ---


# GPT-Neo's attention computes in float32 in a float64 model too.
TOLERANCE = {"gpt_neo": 2e-5, "opt": 1e-9, "llama": 1e-9}


def random_pairs(vocab, count=12, positions=512):
    """Contexts, one too long, with continuations of 1 to 9 tokens, some alike."""
    draw, pairs = random.Random(1), []
    for length in [1, 2, positions + 40, *(draw.randint(1, 60) for _ in range(count))]:
        context, stem = ([draw.randrange(3, vocab) for _ in range(n)] for n in (length, 4))
        for _ in range(draw.randint(1, 5)):
            tail = [draw.randrange(3, vocab) for _ in range(draw.randint(0, 5))]
            pairs.append((context, draw.choice([stem, stem[:1], tail[:1] or stem]) + tail))
    draw.shuffle(pairs)
    return pairs


@pytest.mark.parametrize("batch_tokens", [1, 300])
def test_scores_equal_the_literal_loop(make_model, kind, batch_tokens):
    """Whatever the batch, a choice scores as if alone."""
    model, pairs = make_model(kind, max_position_embeddings=128), random_pairs(97, positions=128)
    expected = [literal_score(model, *pair) for pair in pairs]
    scores = tasks.loglikelihoods(model, pairs, batch_tokens=batch_tokens)
    assert [guesses for _, guesses in scores] == [guesses for _, guesses in expected]
    logps = [logp for logp, _ in expected]
    assert [logp for logp, _ in scores] == pytest.approx(logps, abs=TOLERANCE[kind])


def test_context_and_choice_are_split_where_the_context_ends(models, kind):
    """Both join to the whole; a trailing space goes to the choice."""
    _, tokenizer = models[kind]
    requests = [("Call the clinic", " and"), ("Call the clinic ", "and"), ("Call the clin", "ic")]
    pairs = tasks.encode_pairs(tokenizer, [*requests, ("", "alone")])
    for (context, continuation), (left, right) in zip(requests, pairs, strict=False):
        assert left == tokenizer(context.rstrip())["input_ids"]
        assert right == tokenizer(context + continuation)["input_ids"][len(left) :]
    assert pairs[0] == pairs[1]
    assert pairs[3] == ([tokenizer.bos_token_id], kit_models.encode(tokenizer, "alone"))


@pytest.mark.parametrize("name", ["arc_easy", "winogrande"])
def test_the_choice_with_the_highest_score_is_taken(models, kind, name):
    """By log p; with the norm, per character."""
    model, tokenizer = models[kind]
    rows = tasks.check_rows(name, ROWS[name], True)["rows"]
    plain, normed = (judge(model, tokenizer, rows, length_norm=norm) for norm in (False, True))
    for row, by_length, item in zip(plain, normed, rows.values(), strict=True):
        context, choices, answer = item
        contexts = [context] * len(choices) if isinstance(context, str) else context
        pairs = tasks.encode_pairs(tokenizer, list(zip(contexts, choices, strict=True)))
        expected = [literal_score(model, *pair)[0] for pair in pairs]
        assert row["logp"] == pytest.approx(expected, abs=TOLERANCE[kind])
        assert row["right"] == (np.argmax(expected) == answer)
        lengths = [len(choice) - 1 for choice in choices]
        assert by_length["right"] == (np.argmax(np.divide(expected, lengths)) == answer)


def test_lambada_counts_a_word_only_if_each_token_is_the_greedy_one(models, monkeypatch):
    """In the released protocol "Zebra!" is right for "zebra"."""
    model, tokenizer = models["llama"]
    word, near = (kit_models.encode(tokenizer, text) for text in (" zebra", " Zebra!"))
    guesses = [(-1.0, word), (-1.0, [*word[:-1], word[-1] + 1]), (-1.0, near)]
    monkeypatch.setattr(tasks, "loglikelihoods", lambda model, pairs, **_: guesses)
    rows = {n: ("I saw the", [" zebra"], 0) for n in (1, 2, 3)}
    assert [row["right"] for row in judge(model, tokenizer, rows)] == [1, 0, 0]
    assert [row["right"] for row in judge(model, tokenizer, rows, lenient=True)] == [1, 0, 1]


def test_what_the_model_cannot_answer_gets_no_figure(save_tiny, tmp_path):
    """No room is a bad row; NaN is an error of the set."""
    folder = save_tiny("opt", tmp_path / "m", max_position_embeddings=40)
    model, tokenizer = kit_models.load_model(str(folder))
    rows = [*ROWS["piqa"], ROWS["piqa"][0] | {"sol2": "word " * 60}]
    sets = {"piqa": tasks.check_rows("piqa", rows, False) | {"source": "-"}}
    result = tasks.evaluate(model, tokenizer, sets)["piqa"]
    assert result["rows"] == 2 and result["bad_rows"] == 1
    assert result["bad"][0].startswith("row 3: ") and "40 positions" in result["bad"][0]
    assert len(tasks.replies(model, tokenizer, ["long " * 60, "short"], new_tokens=50)) == 2
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    results = tasks.evaluate(model, tokenizer, sets)
    assert results["piqa"] == {"error": "piqa: the model answers NaN"}
    assert results["averages"]["cls"] is None


# --- replies ---


@pytest.mark.parametrize("one, other, f1", [
    ("the red cat", "A cat, red!", 1), ("cat cat dog", "cat an", 0.5), ("", "the", 0),
    ("RUNS runs é ...", "runs, é. é", 2 / 3),
])  # fmt: skip
def test_f1_is_of_words_as_multisets(one, other, f1):
    """Without case, punctuation and articles."""
    assert tasks.unigram_f1(one, other) == pytest.approx(f1) == tasks.unigram_f1(other, one)


def test_replies_do_not_depend_on_their_batch(models, kind, monkeypatch):
    """Batches say what one token at a time says, up to the next user."""
    model, tokenizer = models[kind]
    prompts = ["User 1: red tea\nUser 2:", f"User 1: {ROWS['copa']}\nUser 2:", "long " * 600]
    batched = tasks.replies(model, tokenizer, prompts, new_tokens=8, batch_tokens=100_000)
    eos, room = kit_models.eos_ids(model), model.config.max_position_embeddings - 8
    for prompt, reply in zip(prompts, batched, strict=True):
        ids, generation = tokenizer(prompt)["input_ids"][-room:], []
        while len(generation) < 8 and not eos & set(generation):
            with torch.inference_mode():
                logits = model(torch.tensor([ids + generation])).logits
            generation.append(logits[0, -1].argmax().item())
        assert reply == tokenizer.decode(generation, skip_special_tokens=True).split("\nUser ")[0]
    ids = tokenizer("Yes.\nMaybe.\nUser 1: No.")["input_ids"]
    monkeypatch.setattr(metrics, "beam_generate", lambda *_, **__: [ids])
    assert tasks.replies(model, tokenizer, prompts[:1]) == ["Yes.\nMaybe."]


# --- the whole ---


@pytest.mark.parametrize("protocol", ["paper", "released"])
def test_perplexity_is_that_of_the_metrics(models, tmp_path, protocol):
    """The released protocol joins the texts."""
    model, tokenizer = models["opt"]
    sets = tasks.read_sets(["pile"], write_rows(tmp_path, ["pile"]))
    value = tasks.evaluate(model, tokenizer, sets, protocol=protocol)["pile"]["value"]
    texts, released = [row["text"] for row in ROWS["pile"]], protocol == "released"
    assert value == metrics.perplexity(model, tokenizer, texts, released=released)


def test_the_command_measures_every_set_and_writes_the_table(save_tiny, tmp_path, capsys):
    """Figures, averages, the paper's columns, bad rows named."""
    folder, out = write_rows(tmp_path / "data", tasks.SETS), tmp_path / "out"
    bad = {"goal": "x", "sol1": "y", "sol2": "", "label": 0}
    data.write_jsonl(folder / "piqa.jsonl", [*ROWS["piqa"], bad])
    save_tiny("llama", tmp_path / "model", max_position_embeddings=512)
    command = ["--model", tmp_path / "model", "--task-data", folder, "--out", out]
    command = [*map(str, command), "--prompts", "harness", "--device", "cpu"]
    tasks.main(command)
    printed = capsys.readouterr().out
    results = json.loads((out / "tasks.json").read_text(encoding="utf-8"))
    assert list(results) == [*tasks.SETS, "averages", "settings"]
    assert all(results[name]["rows"] == len(ROWS[name]) for name in tasks.SETS)
    assert results["piqa"]["bad"] == ["row 3: `sol2` is '', not a text"]
    table = (out / "tasks.md").read_text(encoding="utf-8")
    assert table.strip() in printed and "1 bad rows of piqa are left out: row 3: " in table
    columns = "Lamba. Hella. Wino. COPA ARC-E ARC-C Piqa MathQ PubQ".split()
    assert table.startswith("| | " + " (ACC) | ".join([*columns, "Avg."]))
    assert " (F1) | ".join(["WoW", "ED", "BST", "WoI", "Avg."]) in table
    scored = [name for name in tasks.SETS if name not in tasks.PERPLEXITY]
    assert len(data.read_jsonl(out / "task_rows.jsonl")) == sum(len(ROWS[name]) for name in scored)
    tasks.main([*command, "--overwrite", "--tasks", "piqa", "--task-limit", "1"])
    assert json.loads((out / "tasks.json").read_text(encoding="utf-8"))["piqa"]["rows"] == 1


# --- real files ---


def test_the_published_files_are_read_without_a_bad_row(shared):
    """They have their known rows, in both styles."""
    counts = {"lambada": 4992, "copa": 500, "piqa": 1838, "pubmedqa": 500, "pile": 1500}
    counts |= {"wizard_of_wikipedia": 967, "empathetic_dialogues": 2758, "blended_skill_talk": 1009}
    counts |= {"wizard_of_internet": 516, "wikitext": 500}
    for prompts in ("released", "harness"):
        sets = tasks.read_sets(list(counts), shared / "data", prompts=prompts)
        assert {name: len(loaded["rows"]) for name, loaded in sets.items()} == counts
        assert not any(loaded["bad"] for loaded in sets.values())
    copa = tasks.read_sets(["copa"], shared / "data", protocol="released")["copa"]["rows"]
    assert len(copa) == 100 and copa[1][0] == "The man turned on the faucet."
