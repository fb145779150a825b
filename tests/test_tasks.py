"""Claims about evals/tasks.py: prompts, scores, figures, bad and missing rows, and the command.

    python -m pytest tests/test_tasks.py -q

The references are literal: one forward pass a choice and a softmax over all of it, one token at a time for a reply.
Where lm_eval (EleutherAI's lm-evaluation-harness) is installed, every classification set is compared with it.
"""

import json
import math
import random
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import metrics
from evals import tasks
from kit import data, scoring
from kit import models as kit_models
from kit import rows as row_files
from kit.flags import run_cli

ROOT = Path(__file__).resolve().parents[1]

# Three rows of each set, written by hand in the public schema.
ROWS = {
    "lambada": [
        {"text": "She put the kettle on, found two cups and asked if he took milk in his tea"},
        {"text": "\"It is the third door,\" the porter said, and he pointed down the corridor to the third door"},
        {"text": "The dog ran after the ball and came back without the ball"},
    ],
    "hellaswag": [
        {"ctx": "A man stands on a roof. he", "ctx_a": "A man stands on a roof.", "ctx_b": "he", "label": "2",
         "activity_label": "Roof shingle removal", "source_id": "x",
         "endings": ["is singing.", "eats [laughs] a tile.", "lifts a shingle.", "falls asleep  on it."]},
        {"ctx": "How to peel an onion [title] Cut the ends. [step] Use a knife.", "ctx_a": "Cut the ends. [step] Use a",
         "ctx_b": "knife.", "label": 0, "activity_label": "Food",
         "endings": ["[title] Peel the skin. [step] Do it.", "Eat it.", "Wash the car.", "Call a friend."]},
        {"ctx": "Two girls row a boat. they", "ctx_a": "Two girls row a boat.", "ctx_b": "they", "label": "1",
         "activity_label": "Rowing", "endings": ["fly.", "reach the shore.", "are fish.", "cook."]},
    ],
    "winogrande": [
        {"sentence": "The cup did not fit in the box because the _ was too big.", "option1": "cup", "option2": "box",
         "answer": "1"},
        {"sentence": "Ann paid Mary, so _ had less money.", "option1": "Ann", "option2": "Mary", "answer": "1"},
        {"sentence": "Ann paid Mary and then thanked _ for it.", "option1": "Ann", "option2": "Mary", "answer": "2"},
    ],
    "copa": [
        {"premise": "The glass fell.", "choice1": "It broke.", "choice2": "It sang.", "question": "effect", "label": 0},
        {"premise": "He opened the umbrella.", "choice1": "He was hungry.", "choice2": "It was raining.",
         "question": "cause", "label": 1},
        {"premise": "The milk was old.", "choice1": "It smelled bad.", "choice2": "I drank tea.", "question": "effect",
         "label": 0},
    ],
    "arc_easy": [
        {"id": "a", "question": "Which of these is a metal?", "answerKey": "C",
         "choices": {"text": ["wood", "glass", "iron", "wool"], "label": ["A", "B", "C", "D"]}},
        {"id": "b", "question": "What does a plant need?", "answerKey": "1",
         "choices": {"text": ["light", "noise", "salt"], "label": ["1", "2", "3"]}},
        {"id": "c", "question": "What is ice?", "answerKey": "B",
         "choices": {"text": ["a gas", "frozen water", "a rock", "a salt", "air"], "label": list("ABCDE")}},
    ],
    "piqa": [
        {"goal": "To open a jar,", "sol1": "turn the lid", "sol2": "turn the table ", "label": 0},
        {"goal": "dresser ", "sol1": "replace the drawer with a pin", "sol2": "finish the wood with a pin", "label": 1},
        {"goal": "Dry a shoe.", "sol1": "Put it in the sun.", "sol2": "Put it in the lake.", "label": 0},
    ],
    "mathqa": [
        {"Problem": "how much is 19 x 2 ?", "correct": "a", "category": "general",
         "options": "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these"},
        {"Problem": "what is 20 percent of 5000 ?", "correct": "b", "category": "gain",
         "options": "a ) rs . 400 , b ) 1 , 000 , c ) 1,200 , d ) 100 , e ) 2 , 000"},
        {"Problem": "a train runs 60 km in 1 hour . what is its speed ?", "correct": "e", "category": "physics",
         "options": "a ) 10 km / h , b ) 20 km / h , c ) 30 km / h , d ) 40 km / h , e ) 60 km / h"},
    ],
    "pubmedqa": [
        {"question": "Is tea hot?", "context": {"contexts": ["Cups were filled.", "They were measured."],
         "labels": ["METHODS", "RESULTS"]}, "final_decision": "yes", "long_answer": "It is."},
        {"question": "Is ice warm?", "context": {"contexts": ["Ice was held."]}, "final_decision": "no"},
        {"question": "Is it late?", "context": {"contexts": ["A clock was read."]}, "final_decision": "maybe"},
    ],
    "wizard_of_wikipedia": [
        {"text": ["i like red .", "Me too! is it your favorite colour", "it is , i'm sure"]},
        {"text": ["hello", "hi there"]},
        {"text": ["do you run", "yes", "where", "in the park , every day"]},
    ],
    "pile": [
        {"doc_id": 1, "text": "The parcel was left at the mill."},
        {"doc_id": 2, "text": "A neighbour saw the van on Tuesday morning."},
        {"doc_id": 3, "text": "Call."},
    ],
}  # fmt: skip
ROWS["arc_challenge"] = ROWS["arc_easy"]
ROWS["wikitext"] = ROWS["pile"]
ROWS |= {name: ROWS["wizard_of_wikipedia"] for name in tasks.DIALOGUE}

# The first row (or the one named) in both styles: (released, harness), each (context, choices, answer).
PROMPTS = {
    ("lambada", 0): [("She put the kettle on, found two cups and asked if he took milk in his", [" tea"], 0)] * 2,
    ("hellaswag", 0): [
        ("A man stands on a roof. he",
         [" is singing.", " eats [laughs] a tile.", " lifts a shingle.", " falls asleep  on it."], 2),
        ("Roof shingle removal: A man stands on a roof. He",
         [" is singing.", " eats a tile.", " lifts a shingle.", " falls asleep on it."], 2),
    ],
    ("hellaswag", 1): [
        ("How to peel an onion [title] Cut the ends. [step] Use a knife.",
         [" [title] Peel the skin. [step] Do it.", " Eat it.", " Wash the car.", " Call a friend."], 0),
        ("Food: Cut the ends. Use a Knife.",
         ["  Peel the skin. Do it.", " Eat it.", " Wash the car.", " Call a friend."], 0),
    ],
    ("winogrande", 0): [
        ("The cup did not fit in the box because the", [" cup was too big.", " box was too big."], 0),
        (["The cup did not fit in the box because the cup", "The cup did not fit in the box because the box"],
         [" was too big.", " was too big."], 0),
    ],
    ("copa", 0): [
        ("The glass fell.", [" It broke.", " It sang."], 0),
        ("The glass fell therefore", ["  it broke.", "  it sang."], 0),
    ],
    ("copa", 1): [
        ("He opened the umbrella.", [" He was hungry.", " It was raining."], 1),
        ("He opened the umbrella because", ["  he was hungry.", "  it was raining."], 1),
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
        ("how much is 19 x 2 ?", ["38", "27.675", "30", "data inadequate", "none of these"], 0),
        ("Question: how much is 19 x 2 ?\nAnswer:", [" 38", " 27.675", " 30", " data inadequate", " none of these"], 0),
    ],
    ("mathqa", 1): [
        ("what is 20 percent of 5000 ?", ["rs . 400", "1", "1,200", "100", "2 , 000"], 1),
        ("Question: what is 20 percent of 5000 ?\nAnswer:", [" rs . 400", " 1", " 1,200", " 100", " 2 , 000"], 1),
    ],
    ("pubmedqa", 0): [
        ("Context: Cups were filled.\nQuestion: Is tea hot?\nAnswer:", [" yes", " maybe", " no"], 0),
        ("Abstract: Cups were filled.\nThey were measured.\nQuestion: Is tea hot?\nAnswer:",
         [" yes", " no", " maybe"], 0),
    ],
    ("wizard_of_wikipedia", 0): [
        ("User 1: I like red.\nUser 2: Me too! Is it your favorite colour.\nUser 1:", "It is, I'm sure."),
    ] * 2,
    ("wizard_of_wikipedia", 1): [("User 1: Hello.\nUser 2:", "Hi there.")] * 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(save_tiny, tmp_path_factory):
    """{kind: (float64 model, tokenizer)}, with positions for the longest prompts here."""

    def load(kind):
        folder = save_tiny(kind, tmp_path_factory.mktemp(kind), max_position_embeddings=512)
        return kit_models.load_model(str(folder), dtype="float64")

    return {kind: load(kind) for kind in ("gpt_neo", "opt", "llama")}


@pytest.fixture
def offline(monkeypatch):
    """Neither a known public file nor the hub can be had, whatever is installed or cached."""

    def refuse(name, data_dir=None):
        raise ValueError(f"cannot reach the server for {name}: pass --data DIR with {name} in it")

    monkeypatch.setattr(data, "data_file", refuse)
    monkeypatch.setitem(sys.modules, "datasets", None)


def write_rows(folder, names):
    for name in names:
        data.write_jsonl(folder / f"{name}.jsonl", ROWS[name])
    return folder


def judge(model, tokenizer, rows, **how):
    how = {"length_norm": False, "lenient": False, "batch_tokens": 200, "desc": None} | how
    return tasks.judge_choices(model, tokenizer, rows, **how)


# --- rows and prompts ---


@pytest.mark.parametrize("name, row", PROMPTS, ids=lambda value: str(value))
def test_a_row_becomes_the_documented_prompt_in_both_styles(name, row):
    """Context, choices and answer are the strings of Jang et al. (released) and of lm-evaluation-harness."""
    function = tasks.SETS[name][1]
    assert [function(ROWS[name][row], harness) for harness in (False, True)] == PROMPTS[name, row]


def test_every_set_of_section_5_1_is_there_in_the_order_of_tables_6_and_7():
    """Nine accuracies, four F1, two perplexities, under the paper's column names."""
    assert [column for column, *_ in tasks.SETS.values()] == (
        "Lamba. Hella. Wino. COPA ARC-E ARC-C Piqa MathQ PubQ WoW ED BST WoI Pile Wikitext".split()
    )


def test_original_files_and_hub_rows_give_the_same_items():
    """ARC's, PubMedQA's and COPA's original schema lead to the item of the hub's schema."""
    hub = ROWS["arc_easy"][0]
    own = [{"text": t, "label": label} for t, label in zip(*hub["choices"].values(), strict=True)]
    original = {"id": "a", "question": {"stem": hub["question"], "choices": own}, "answerKey": "C"}
    assert tasks.arc(original, True) == tasks.arc(hub, True)
    hub = ROWS["pubmedqa"][0]
    original = {
        "QUESTION": hub["question"],
        "CONTEXTS": hub["context"]["contexts"],
        "final_decision": "yes",
    }
    for harness in (True, False):
        assert tasks.pubmedqa(original, harness) == tasks.pubmedqa(hub, harness)
    assert tasks.pubmedqa(hub | {"abstract": "Only this."}, False)[0].startswith(
        "Context: Only this.\nQuestion:"
    )


def test_a_column_that_pandas_wrote_as_python_is_read_without_evaluating_it():
    """numpy's repr of the contexts is parsed; anything that would have to be run is refused."""
    text = """{'contexts': array(["It's one.",
       'Two, "quoted" \\n and 3)'],
      dtype=object), 'labels': array(['A', 'B'], dtype=object), 'n': 1}"""
    assert tasks.unpack({"c": text}, "c") == {
        "contexts": ["It's one.", 'Two, "quoted" \n and 3)'], "labels": ["A", "B"], "n": 1,
    }  # fmt: skip
    for attack in (
        "__import__('os').getcwd()",
        "[x for x in (1,)]",
        "array()",
        "[1",
        "(" * 5000,
        "{**{}}",
        "'text'",
    ):
        with pytest.raises(ValueError, match="`c`"):
            tasks.unpack({"c": attack}, "c")


def test_a_turn_is_normalised_as_published():
    """Lower case but for I and the heads of sentences, no space before marks, a full stop at the end."""
    for turn, expected in {
        "hi !  how are you": "Hi! How are you.",
        "I don't know , do i ?": "I don't know, do I?",
        "Yes. NO ... maybe": "Yes. No... Maybe.",
        "I'm it's (fine)": "I'm it's (fine)",
        "the iguana ate 3.5 kg": "The iguana ate 3.5 kg.",
        ' "quote" ': '"quote"',
    }.items():
        assert tasks.normalize_turn(turn) == expected


def bad_rows():
    good = {name: rows[0] for name, rows in ROWS.items()}
    yield (
        "piqa",
        {key: value for key, value in good["piqa"].items() if key != "sol2"},
        "no field `sol2`",
    )
    yield "piqa", good["piqa"] | {"sol1": "  "}, "`sol1` is blank"
    yield "piqa", good["piqa"] | {"sol1": 3}, "`sol1` is int, not a string"
    yield "piqa", good["piqa"] | {"label": 2}, "number 3 of 2 choices"
    yield "piqa", good["piqa"] | {"label": -1}, "not a whole number"
    yield "piqa", good["piqa"] | {"label": True}, "not a whole number"
    yield "copa", good["copa"] | {"question": "why"}, "not one of cause, effect"
    yield "copa", good["copa"] | {"label": None}, "not a whole number"
    yield "hellaswag", good["hellaswag"] | {"label": ""}, "not a whole number"
    yield "hellaswag", good["hellaswag"] | {"endings": ["one"]}, "`endings` is not a list"
    yield "hellaswag", good["hellaswag"] | {"endings": ["one", " "]}, r"`endings\[1\]` is blank"
    yield "winogrande", good["winogrande"] | {"sentence": "No gap here."}, "must have one blank"
    yield "winogrande", good["winogrande"] | {"sentence": "A _ and a _ too."}, "must have one blank"
    yield "winogrande", good["winogrande"] | {"answer": "0"}, "number 0 of 2"
    yield "arc_easy", good["arc_easy"] | {"answerKey": "Z"}, "'Z', not one of A, B, C, D"
    yield "arc_easy", good["arc_easy"] | {"choices": 7}, "`choices` is not a list or an object"
    yield "arc_easy", good["arc_easy"] | {"choices": {"text": ["a", "b"]}}, "wrong type"
    yield "mathqa", good["mathqa"] | {"options": "38 or 40"}, "choice is blank"
    yield "mathqa", good["mathqa"] | {"correct": "f"}, "not one of a, b, c, d, e"
    yield "mathqa", good["mathqa"] | {"options": "a ) 1 , b ) 2", "correct": "e"}, "number 5 of 2"
    yield "pubmedqa", good["pubmedqa"] | {"final_decision": "perhaps"}, "not one of yes, maybe, no"
    yield "pubmedqa", good["pubmedqa"] | {"context": None}, "`context` is missing"
    yield "lambada", {"text": "word"}, "the context or a choice is blank"
    yield "lambada", {"text": "ends with a space "}, "the context or a choice is blank"
    yield "wizard_of_wikipedia", {"text": ["alone"]}, "not a list of 2 texts"
    yield "wizard_of_wikipedia", {"text": ["hello", None]}, r"no field `text\[1\]`"
    yield "pile", {"doc_id": 1}, "no field `text`"


@pytest.mark.parametrize("name, row, why", list(bad_rows()))
def test_a_bad_row_is_counted_and_named_and_the_others_stay(name, row, why):
    """A row that does not fit its schema is left out with its number and the reason."""
    rows = [ROWS[name][0], row, ROWS[name][-1]]
    found = tasks.check_rows(name, rows, False)
    assert list(found["rows"]) == [1, 3]
    (reason,) = found["bad"]
    assert re.match("row 2: .*" + why, reason)


def test_a_set_without_a_good_row_is_an_error(tmp_path, offline):
    """Asked for by name it stops; among all sets it is recorded, and the others are read."""
    write_rows(tmp_path, ["copa"])
    data.write_jsonl(tmp_path / "piqa.jsonl", [{"goal": "x"}])
    with pytest.raises(
        ValueError, match=r"piqa\.jsonl: no good row for piqa, row 1: no field `sol1`"
    ):
        tasks.read_sets(["piqa"], tmp_path)
    sets = tasks.read_sets("all", tmp_path)
    assert "no field `sol1`" in sets["piqa"]["error"] and list(sets["copa"]["rows"]) == [1, 2, 3]


# --- files ---


def test_each_kind_of_file_gives_the_same_rows(tmp_path):
    """CSV, JSON (list, by id, pandas' columns), JSON lines and COPA's XML; PIQA's labels in a file of their own."""
    rows = ROWS["piqa"]
    (tmp_path / "b").mkdir()
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b" / "a.json").write_text(
        json.dumps({f"id{i}": row for i, row in enumerate(rows)})
    )
    columns = {key: {str(i): row[key] for i, row in enumerate(rows)} for key in rows[0]}
    (tmp_path / "c.json").write_text(json.dumps(columns))
    data.write_jsonl(
        tmp_path / "d.jsonl", [{k: v for k, v in row.items() if k != "label"} for row in rows]
    )
    (tmp_path / "d-labels.lst").write_text("0\n1\n0\n")
    lines = [
        "goal,sol1,sol2,label",
        *(",".join(f'"{value}"' for value in row.values()) for row in rows),
    ]
    (tmp_path / "e.csv").write_text("\n".join(lines))
    expected = tasks.check_rows("piqa", rows, True)
    for path in ("a.json", "b/a.json", "c.json", "d.jsonl", "e.csv"):
        assert tasks.check_rows("piqa", row_files.read_rows(tmp_path / path), True) == expected, (
            path
        )

    items = "".join(
        f'<item id="{i}" asks-for="{row["question"]}" most-plausible-alternative="{row["label"] + 1}">'
        f"<p>{row['premise']}</p><a1>{row['choice1']}</a1><a2>{row['choice2']}</a2></item>"
        for i, row in enumerate(ROWS["copa"])
    )
    head = '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE copa-corpus SYSTEM "copa.dtd">\n'
    (tmp_path / "copa-dev.xml").write_text(
        f'{head}<copa-corpus version="1.0">{items}</copa-corpus>'
    )
    assert row_files.read_rows(tmp_path / "copa-dev.xml") == ROWS["copa"]


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("piqa.json", "[1, 2]", "expected a list of objects"),
        ("piqa.json", "{", "not JSON"),
        ("piqa.json", "[" * 100_000, "not JSON"),
        ("piqa.jsonl", '{"goal": "x"}\n{', "line 2"),
        ("piqa.csv", 'goal\n"x', "not CSV"),
        ("piqa.csv", "", "empty"),
        ("copa.xml", "<a><b></a>", "not XML"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, why):
    """The error names the file and what is wrong with it."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=why) as error:
        tasks.read_sets([Path(name).stem], tmp_path)
    assert name in str(error.value)


def test_labels_must_match_their_rows(tmp_path):
    """A label file of another length is refused, with both numbers."""
    data.write_jsonl(tmp_path / "piqa.jsonl", ROWS["piqa"])
    (tmp_path / "piqa-labels.lst").write_text("0\n1\n")
    with pytest.raises(ValueError, match="2 labels for the 3 rows"):
        tasks.read_sets(["piqa"], tmp_path)


@pytest.mark.parametrize(
    "file, name",
    [
        ("ARC-Easy-Dev.jsonl", "arc_easy"),
        ("piqa_valid.jsonl", "piqa"),
        ("hellaswag_val.jsonl", "hellaswag"),
        ("sub/lambada_test.jsonl", "lambada"),
        ("MathQA.jsonl", "mathqa"),
        ("pubmed_qa.jsonl", "pubmedqa"),
    ],
)
def test_local_files_are_found_under_their_usual_names(tmp_path, offline, file, name):
    """NAME with or without its split, in the folder or one below; another split's file is not taken for it."""
    (tmp_path / "sub").mkdir()
    data.write_jsonl(tmp_path / file, ROWS[name])
    data.write_jsonl(tmp_path / f"{name}_train.jsonl", ROWS[name][:1])
    found = tasks.read_sets([name.upper()], tmp_path)[name]
    assert len(found["rows"]) == 3 and found["source"] == str(tmp_path / file)


def test_a_missing_set_is_reported_and_not_averaged(tmp_path, offline, models):
    """What cannot be had has the reason and no value; averages list it; the table shows how many sets it covers."""
    results = tasks.evaluate(*models["gpt_neo"], data_dir=write_rows(tmp_path, ["piqa", "copa"]))
    assert (
        "pip install datasets" in results["hellaswag"]["missing"]
        and "value" not in results["hellaswag"]
    )
    assert "--task-data DIR with lambada.csv" in results["lambada"]["missing"]
    averages = results["averages"]
    assert (
        averages["cls"] == (results["piqa"]["value"] + results["copa"]["value"]) / 2
        and averages["dia"] is None
    )
    assert len(averages["cls_missing"]) == 7 and averages["dia_missing"] == list(tasks.DIALOGUE)
    text = tasks.table({"mine": results})
    assert "(2 of 9 sets)" in text and "- mine: hellaswag is missing: " in text


def test_nothing_at_hand_is_an_error(tmp_path, offline):
    """No set to be had at all: the message says what to pass."""
    with pytest.raises(
        ValueError, match="piqa is not at hand: pass --task-data DIR with piqa.jsonl"
    ):
        tasks.read_sets(["piqa"], tmp_path)


def test_a_set_without_a_local_file_comes_from_the_hub_where_datasets_is_installed(
    tmp_path, monkeypatch
):
    """The repository, configuration and split are asked for; rows are used as they come."""
    asked = []

    def load_dataset(*where, split):
        asked.append((*where, split))
        return ROWS["arc_easy"]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = tasks.read_sets(["arc_challenge"], tmp_path)["arc_challenge"]
    assert asked == [("allenai/ai2_arc", "ARC-Challenge", "validation")] and len(data["rows"]) == 3


def test_a_known_public_file_is_fetched_when_there_is_no_local_one(tmp_path, monkeypatch):
    """data.data_file is asked, by the file's own name, only where no local file is."""
    data.write_jsonl(tmp_path / "known.jsonl", ROWS["pubmedqa"])
    asked = []
    monkeypatch.setattr(
        data, "data_file", lambda name: asked.append(name) or tmp_path / "known.jsonl"
    )
    assert len(tasks.read_sets(["pubmedqa"], tmp_path)["pubmedqa"]["rows"]) == 3
    assert asked == ["pubmed_qa.csv"]
    tasks.read_sets(["pubmedqa"], write_rows(tmp_path, ["pubmedqa"]))
    assert asked == ["pubmed_qa.csv"]


def test_an_unknown_set_names_the_nearest(tmp_path):
    """A typing error stops before anything is read."""
    with pytest.raises(ValueError, match="--tasks helaswag: no such set; did you mean hellaswag"):
        tasks.read_sets(["helaswag"], tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        tasks.read_sets(["piqa"], tmp_path / "nowhere")


# --- scores ---


# GPT-Neo's attention computes in float32 in a float64 model too.
TOLERANCE = {"gpt_neo": 2e-5, "opt": 1e-9, "llama": 1e-9}


def literal_score(model, context, continuation):
    """One row, one pass, a softmax over every position: (sum of log p, greedy ids)."""
    positions = model.config.max_position_embeddings
    ids = (context + continuation)[-(positions + 1) :]
    logp = F.log_softmax(model(torch.tensor([ids[:-1]])).logits[0], dim=-1)[-len(continuation) :]
    return sum(logp[i, token].item() for i, token in enumerate(continuation)), logp.argmax(
        -1
    ).tolist()


def random_pairs(vocab, count=12, positions=512):
    """Contexts of every length with 1 to 5 continuations of 1 to 9 tokens, one context too long for the model.

    Some continuations begin alike, some are equal, some are the beginning of another.
    """
    draw, pairs = random.Random(1), []
    for length in [1, 2, positions + 40, *(draw.randint(1, 60) for _ in range(count))]:
        context, stem = ([draw.randrange(3, vocab) for _ in range(n)] for n in (length, 4))
        for _ in range(draw.randint(1, 5)):
            tail = [draw.randrange(3, vocab) for _ in range(draw.randint(0, 5))]
            pairs.append((context, draw.choice([stem, stem[:1], tail[:1] or stem]) + tail))
    draw.shuffle(pairs)
    return pairs


@pytest.mark.parametrize("window", [8, 40, 128], ids=["cached", "some", "lines"])
@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_scores_equal_the_literal_loop(make_model, kind, window, batch_tokens, monkeypatch):
    """Whatever the batch, and whether the choices share a line or a cache, a choice scores as if it were alone."""
    more = {"window_size": window} if kind == "gpt_neo" else {}
    model = make_model(kind, max_position_embeddings=128, **more)
    assert scoring.window_of(model) == (window if more else 128)
    monkeypatch.setattr(scoring, "window_of", lambda model: window)
    pairs = random_pairs(97, positions=128)
    with torch.inference_mode():
        expected = [literal_score(model, *pair) for pair in pairs]
    found = scoring.loglikelihoods(model, pairs, batch_tokens=batch_tokens)
    assert [said for _, said in found] == [said for _, said in expected]
    assert [logp for logp, _ in found] == pytest.approx(
        [logp for logp, _ in expected], abs=TOLERANCE[kind]
    )


def test_a_model_that_scales_its_logits_is_scored_by_its_logits(make_model):
    """The output layer is applied to few positions only where it is all that makes the logits."""
    model = make_model("llama")
    plain = scoring.loglikelihoods(model, random_pairs(97, 3, 200))
    hook = model.register_forward_hook(
        lambda module, args, output: output.__setitem__("logits", output.logits / 2)
    )
    with torch.inference_mode():
        pairs = random_pairs(97, 3, 200)
        expected = [literal_score(model, *pair)[0] for pair in pairs]
    found = [logp for logp, _ in scoring.loglikelihoods(model, pairs)]
    hook.remove()
    assert found == pytest.approx(expected, abs=1e-9) and found != pytest.approx(
        [logp for logp, _ in plain], abs=1e-3
    )


def test_the_output_layer_sees_only_the_tokens_of_the_choices(make_model):
    """With lone requests the head gets one row a continuation token, not one a position."""
    model, seen = make_model("gpt_neo"), []
    pairs = [([5, 6, 7, 8, 9, 10], [11, 12]), ([4] * 30, [9])]
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape)
    )
    scoring.loglikelihoods(model, pairs, batch_tokens=1000)
    hook.remove()
    assert [shape[0] for shape in seen if len(shape) == 2] == [3]


def test_the_body_sees_a_context_once_for_all_its_choices(make_model):
    """One line of the context and each choice without its last token; behind the cache where that is too long.

    The longest context is read twice more, a choice a row and as it will be shared, to see that the two agree.
    """
    pairs, seen = [([5] * 20, [7, 8, 9]), ([5] * 20, [3, 4]), ([5] * 20, [6])], []
    for window, expected in ((64, [(1, 23)]), (8, [(1, 20), (3, 2)])):
        model = make_model("gpt_neo", window_size=window)
        model.base_model.wte.register_forward_hook(
            lambda module, args, output: seen.append(tuple(args[0].shape))
        )
        scoring.loglikelihoods(model, pairs)
        assert [shape for shape in seen if shape != (1, 8)] == [
            (3, 22),
            *expected,
            *expected,
        ]  # (1, 8): split_model
        seen.clear()


def test_context_and_choice_are_split_where_the_context_ends(models, kind):
    """Both sides join to the encoding of the whole, BOS stands once, and a trailing space goes to the choice."""
    _, tokenizer = models[kind]
    requests = [
        ("Call the clinic", " and"),
        ("Call the clinic ", "and"),
        ("Call the clin", "ic"),
        ("", "alone"),
    ]
    pairs = scoring.encode_pairs(tokenizer, requests)
    for (context, continuation), (left, right) in zip(requests[:3], pairs[:3], strict=True):
        assert left == tokenizer(context.rstrip())["input_ids"]
        assert right == tokenizer(context + continuation)["input_ids"][len(left) :]
    assert pairs[0] == pairs[1]
    bos = [] if kind == "gpt_neo" else [tokenizer.bos_token_id]
    for left, right in pairs[:3]:
        assert left[: len(bos)] == bos and tokenizer.bos_token_id not in left[len(bos) :] + right
    assert pairs[3] == (
        [tokenizer.bos_token_id],
        tokenizer("alone", add_special_tokens=False)["input_ids"],
    )


def test_the_choice_with_the_highest_score_is_taken(models, kind):
    """Accuracy is the share of rows whose answer has the largest sum of log p; with the norm, per character."""
    model, tokenizer = models[kind]
    for name in ("piqa", "arc_easy", "winogrande", "pubmedqa"):
        rows = tasks.check_rows(name, ROWS[name], True)["rows"]
        for norm in (False, True):
            judged, unfit = judge(model, tokenizer, rows, length_norm=norm)
            assert not unfit and [row["row"] for row in judged] == [1, 2, 3]
            for row, (context, choices, answer) in zip(judged, rows.values(), strict=True):
                contexts = [context] * len(choices) if isinstance(context, str) else context
                pairs = scoring.encode_pairs(tokenizer, list(zip(contexts, choices, strict=True)))
                with torch.inference_mode():
                    expected = [literal_score(model, *pair)[0] for pair in pairs]
                assert row["logp"] == pytest.approx(expected, abs=TOLERANCE[kind])
                if norm:
                    expected = [
                        logp / (len(choice) - 1)
                        for logp, choice in zip(expected, choices, strict=True)
                    ]
                assert row["right"] == (
                    max(range(len(choices)), key=expected.__getitem__) == answer
                )


def test_lambada_counts_a_word_only_if_each_token_is_the_greedy_one(models, monkeypatch):
    """All tokens right is right, the last one wrong is wrong; "Zebra!" for "zebra" only in the released protocol."""
    model, tokenizer = models["llama"]
    word, near = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" zebra", " Zebra!")
    )
    guesses = [(-1.0, word), (-1.0, [*word[:-1], word[-1] + 1]), (-1.0, near)]
    monkeypatch.setattr(scoring, "loglikelihoods", lambda model, pairs, **how: guesses)
    rows = {n: ("I saw the", [" zebra"], 0) for n in (1, 2, 3)}
    assert [row["right"] for row in judge(model, tokenizer, rows)[0]] == [1.0, 0.0, 0.0]
    assert [row["right"] for row in judge(model, tokenizer, rows, lenient=True)[0]] == [
        1.0,
        0.0,
        1.0,
    ]


def test_a_row_that_does_not_fit_the_model_is_a_bad_row(save_tiny, tmp_path):
    """A choice longer than the model's positions is counted and named; its set goes on without it."""
    model, tokenizer = kit_models.load_model(
        str(save_tiny("gpt_neo", tmp_path / "m", max_position_embeddings=40))
    )
    rows = tasks.check_rows(
        "piqa", [*ROWS["piqa"], ROWS["piqa"][0] | {"sol2": "word " * 60}], False
    )["rows"]
    judged, unfit = judge(model, tokenizer, rows)
    assert len(judged) == 3 and len(unfit) == 1 and re.match(r"row 4: .* 40 positions", unfit[0])


def test_a_model_of_nan_gets_no_figure(save_tiny, tmp_path, offline):
    """NaN is an error of the set, never an accuracy."""
    model, tokenizer = kit_models.load_model(str(save_tiny("opt", tmp_path / "m")))
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    results = tasks.evaluate(
        model, tokenizer, tasks=["piqa"], data_dir=write_rows(tmp_path, ["piqa"])
    )
    assert (
        results["piqa"] == {"error": "piqa: the model answers NaN"}
        and results["averages"]["cls"] is None
    )


# --- replies ---


def independent_f1(candidate, reference):
    """Unigram F1 by crossing words off a list."""

    def clean(text):
        kept = "".join(
            c if c.isalnum() or c.isspace() or ord(c) > 127 else "" for c in text.lower()
        )
        return [word for word in kept.split() if word not in ("a", "an", "the")]

    left, right, same = clean(candidate), clean(reference), 0
    left_count, right_count = len(left), len(right)
    for word in left:
        if word in right:
            right.remove(word)
            same += 1
    if not same:
        return 0.0
    precision, recall = same / left_count, same / right_count
    return 2 * precision * recall / (precision + recall)


def test_f1_equals_an_independent_implementation():
    """On a thousand random pairs with repeats, articles, marks and empty sides."""
    draw = random.Random(0)
    vocabulary = [
        "The",
        "a",
        "an",
        "cat",
        "Cat.",
        "dog",
        "dog's",
        "runs,",
        "RUNS",
        "...",
        "é",
        "theory",
        "(an",
    ]
    for _ in range(1000):
        a, b = (" ".join(draw.choices(vocabulary, k=draw.randint(0, 8))) for _ in range(2))
        assert tasks.unigram_f1(a, b) == pytest.approx(independent_f1(a, b), abs=1e-12)
    assert tasks.unigram_f1("the red cat", "A cat, red!") == 1.0 and tasks.unigram_f1("", "") == 0.0


def test_replies_do_not_depend_on_their_batch(models, kind):
    """Left-padded batches say what one token at a time says for each prompt alone; too long loses its beginning."""
    model, tokenizer = models[kind]
    words = data.read_text(Path(__file__)).split()
    prompts = [
        "User 1: " + " ".join(words[i : i + n]) + "\nUser 2:"
        for i, n in ((0, 3), (40, 30), (90, 1), (9, 120))
    ]
    prompts.append("long " * 600)
    batched = tasks.replies(model, tokenizer, prompts, new_tokens=8, batch_tokens=100_000)
    assert batched == tasks.replies(model, tokenizer, prompts, new_tokens=8, batch_tokens=1)
    eos = kit_models.eos_ids(model)
    for prompt, reply in zip(prompts, batched, strict=True):
        ids, said = (
            tokenizer(prompt)["input_ids"][-(model.config.max_position_embeddings - 8) :],
            [],
        )
        while len(said) < 8 and not eos & set(said):
            with torch.inference_mode():
                said.append(model(torch.tensor([ids + said])).logits[0, -1].argmax().item())
        assert reply == tokenizer.decode(said, skip_special_tokens=True).split("\nUser ")[0]


def test_a_reply_ends_where_the_next_user_speaks(models, monkeypatch):
    """What the model goes on to say for the other side is not part of its reply."""
    model, tokenizer = models["gpt_neo"]
    said = tokenizer(" Yes.\nMaybe.\nUser 1: No.")["input_ids"]
    monkeypatch.setattr(
        metrics, "beam_generate", lambda model, prompts, lengths, **how: [said] * len(prompts)
    )
    assert tasks.replies(model, tokenizer, ["User 1: Well?\nUser 2:"]) == [" Yes.\nMaybe."]


# --- the whole ---


def test_before_and_after_on_the_same_rows_are_the_same_for_the_same_model(
    models, tmp_path, offline
):
    """evaluate is a pure function of model and rows; perplexity is that of metrics.perplexity in both protocols."""
    model, tokenizer = models["opt"]
    names = ["lambada", "piqa", "wizard_of_wikipedia", "pile"]
    sets = tasks.read_sets(names, write_rows(tmp_path, names))
    first, second = [], []
    before, after = (
        tasks.evaluate(model, tokenizer, sets=sets, samples=rows) for rows in (first, second)
    )
    assert before == after and first == second and len(first) == 9
    texts = [row["text"] for row in ROWS["pile"]]
    assert before["pile"]["value"] == metrics.perplexity(model, tokenizer, texts)
    released = tasks.evaluate(model, tokenizer, sets=sets, protocol="released")
    assert released["pile"]["value"] == metrics.perplexity(model, tokenizer, texts, released=True)
    text = tasks.table({"before": before, "after": after})
    assert text.count("| before |") == text.count("| after |") == 2


def test_the_command_measures_every_set_and_writes_the_table(save_tiny, tmp_path):
    """One command on a folder with all sets: figures, averages, the paper's columns, bad rows named."""
    found = write_rows(tmp_path / "data", tasks.SETS)
    data.write_jsonl(
        found / "piqa.jsonl", [*ROWS["piqa"], {"goal": "x", "sol1": "y", "sol2": "", "label": 0}]
    )
    save_tiny("llama", tmp_path / "model", max_position_embeddings=512)
    out = tmp_path / "out"
    command = [
        sys.executable,
        "evals/tasks.py",
        "--model",
        str(tmp_path / "model"),
        "--task-data",
        str(found),
    ]
    command += ["--out", str(out)]
    done = subprocess.run(
        [*command, "--prompts", "harness"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "tasks.json").read_text(encoding="utf-8"))
    assert list(results) == [*tasks.SETS, "averages", "settings"]
    assert all(results[name]["rows"] == 3 for name in tasks.SETS)
    assert results["piqa"]["bad"] == ["row 4: `sol2` is blank"] and results["piqa"]["bad_rows"] == 1
    for kind, group in (("cls", tasks.CLASSIFICATION), ("dia", tasks.DIALOGUE)):
        values = [results[name]["value"] for name in group]
        assert results["averages"][kind] == pytest.approx(sum(values) / len(values))
        assert results["averages"][f"{kind}_missing"] == []
    table = (out / "tasks.md").read_text(encoding="utf-8")
    assert (
        table.strip() in done.stdout
        and "1 bad rows of piqa are left out: row 4: `sol2` is blank" in table
    )
    assert table.startswith(
        "| | Lamba. (ACC) | Hella. (ACC) | Wino. (ACC) | COPA (ACC) | ARC-E (ACC) | ARC-C (ACC) |"
    )
    assert len(data.read_jsonl(out / "task_rows.jsonl")) == 3 * 13
    assert "wizard_of_internet: 100%" in done.stderr

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        again.returncode == 2 and "--overwrite" in again.stderr and "Traceback" not in again.stderr
    )


@pytest.mark.parametrize(
    "change, why",
    [
        (["--tasks", "helaswag"], "did you mean hellaswag"),
        (["--task-data", "nowhere"], "no such folder"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--limit", "0"], "not a whole number above 0"),
        (["--prompts", "own"], "invalid choice"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_exit_2(tmp_path, change, why, capsys):
    """Nothing is loaded and nothing is written."""
    write_rows(tmp_path, ["piqa"])
    flags = ["--model", str(tmp_path / "none"), "--tasks", "piqa", "--task-data", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: tasks.main([*flags, "--out", str(tmp_path / "out"), *change]))
    assert stop.value.code == 2 and why in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# --- real files, and the harness itself ---


def test_the_published_files_are_read_without_a_bad_row(shared):
    """The real files have the rows they are known to have, and every one becomes an item in both styles."""
    counts = {
        "lambada": 4992,
        "copa": 500,
        "piqa": 1838,
        "pubmedqa": 500,
        "pile": 1500,
        "wikitext": 500,
    }
    counts |= {"wizard_of_wikipedia": 967, "empathetic_dialogues": 2758, "blended_skill_talk": 1009}
    counts |= {"wizard_of_internet": 516}
    for prompts in ("released", "harness"):
        sets = tasks.read_sets(list(counts), shared / "data", prompts=prompts)
        assert {name: len(data["rows"]) for name, data in sets.items()} == counts
        assert not any(data["bad"] for data in sets.values())
    copa = tasks.read_sets(["copa"], shared / "data", protocol="released")["copa"]["rows"]
    assert len(copa) == 100 and copa[1][0] == "The man turned on the faucet."
    rows, _ = tasks.find_rows("pubmedqa", shared / "data")
    assert all(tasks.unpack(row, "context")["contexts"][0] == row["abstract"] for row in rows)


HARNESS_FILES = {
    "lambada": "lambada/lambada_openai.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
    "mathqa": "mathqa/mathqa.yaml",
    "pubmedqa": "pubmedqa/pubmedqa.yaml",
}


@pytest.mark.parametrize("name", HARNESS_FILES)
def test_scores_equal_those_of_lm_evaluation_harness(models, kind, name, tmp_path):
    """The harness' own task file on the same rows: per-choice log-likelihood to 1e-4, accuracy and acc_norm exactly."""
    lm_eval = pytest.importorskip(
        "lm_eval", reason="lm_eval is not installed: pip install lm-eval==0.4.13"
    )
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = models[kind]
    rows, split = ROWS[name], "test" if name == "lambada" else "validation"
    if name == "pubmedqa":  # the harness reads the original's fields
        rows = [{"QUESTION": row["question"], "CONTEXTS": row["context"]["contexts"],
                 "final_decision": row["final_decision"]} for row in rows]  # fmt: skip
    if name == "hellaswag":
        rows = [row | {"label": str(row["label"]), "source_id": "x"} for row in rows]
    data.write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "local.yaml").write_text(f"""
include: {Path(lm_eval.__file__).parent / "tasks" / HARNESS_FILES[name]}
task: local_{name}
tag: []
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{{split}: {tmp_path / "rows.jsonl"}}}, cache_dir: {tmp_path / "cache"}}}
training_split: null
validation_split: {"validation" if split == "validation" else "null"}
test_split: {"test" if split == "test" else "null"}
""")
    output = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2), tasks=[f"local_{name}"], log_samples=True,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    theirs = sorted(output["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
    items = tasks.check_rows(name, rows, True)["rows"]
    ours, _ = judge(model, tokenizer, items)
    for mine, sample in zip(ours, theirs, strict=True):
        assert mine["logp"] == pytest.approx(
            [response[0][0] for response in sample["resps"]], abs=1e-4
        )
    figures = output["results"][f"local_{name}"]
    assert sum(row["right"] for row in ours) / 3 == pytest.approx(figures["acc,none"])
    if "acc_norm,none" in figures:
        normed, _ = judge(model, tokenizer, items, length_norm=True)
        assert sum(row["right"] for row in normed) / 3 == pytest.approx(figures["acc_norm,none"])
