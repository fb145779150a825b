"""What a model can still do: nine classification sets, four dialogue sets, two perplexities (the rest of Table 1).

    python evals/tasks.py --model DIR --tasks all --task-data DIR --out DIR        # writes DIR/tasks.json and DIR/tasks.md
    python evals/tasks.py --model DIR --tasks piqa copa --prompts harness --task-data DIR --out DIR

Sets and splits are those of section 5.1 of "Learn while Unlearn" (ICU), arXiv 2407.20271; what is printed are the
columns of Tables 6 and 7. `--prompts released` are the bare prompts of Jang et al. (arXiv 2210.01504), which the
published figures were made with, `harness` the templates of EleutherAI's lm-evaluation-harness 0.4. Departures from
the published evaluation:
1. Context and choice are encoded together and split where the context ends, as the harness does. The released code
   encodes the two apart; with GPT-2's tokenizer only a context that ends in a space makes a difference.
2. What is too long for the model loses its beginning, as in the harness. The released code cuts at 512 tokens, and
   cuts a context at its end, where the question is.
3. Every ARC row keeps its own choices. The released code pads or cuts the few rows that have not exactly four.
4. Rows run in batches of like length instead of padded to 512, the output layer sees the choices' tokens only, and
   the choices of a row share one pass over their context. The scores are those of the plain loop (tests/test_tasks.py).
"""

import ast
import math
import re
import string
from collections import Counter
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

import metrics
from kit import data, flags, models, paths, processes, scoring
from kit import rows as row_files
from kit.protocols import PROTOCOLS
from kit.text import visible

# --- the sets: a row of the public schema -> (context, choices, answer), or (context, reply), or a text ---
# A choice begins with what separates it from its context, a space. A row that does not fit raises ValueError.


def lambada(row, harness):
    """{text}. Both styles: the text without its last word, and that word, which must be the model's greedy guess."""
    context, _, word = field(row, "text").rpartition(" ")
    return context, [" " + word], 0


def hellaswag(row, harness):
    """{ctx, endings, label}; harness: {activity_label, ctx_a, ctx_b} for ctx, without the marks of WikiHow's pages."""
    endings, label = texts(row, "endings"), number(row, "label")
    if not harness:
        return field(row, "ctx"), [" " + ending for ending in endings], label

    def clean(text):
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    context = (
        f"{field(row, 'activity_label')}: {field(row, 'ctx_a')} {row.get('ctx_b', '').capitalize()}"
    )
    return clean(context), [" " + clean(ending) for ending in endings], label


def winogrande(row, harness):
    """{sentence, option1, option2, answer "1" or "2"}: which of two words fits in the sentence's "_".

    Released: the text before " _", then each option with the rest of the sentence. Harness: the sentence up to and
    with each option, two contexts, then the rest, so that the same tokens are scored twice.
    """
    sentence, answer = field(row, "sentence"), number(row, "answer") - 1
    options = [field(row, "option1"), field(row, "option2")]
    before, blank, after = sentence.partition("_" if harness else " _")
    if not blank or not harness and " _" in after:
        raise ValueError(f"`sentence` must have one blank, _, behind a space: {sentence!r}")
    if harness:
        return [before + option for option in options], [" " + after.strip()] * 2, answer
    return before, [f" {option}{after}" for option in options], answer


def copa(row, harness):
    """SuperGLUE's {premise, choice1, choice2, question "cause" or "effect", label 0 or 1}. Released: the bare premise.

    Harness: "because" or "therefore" for the full stop, then the choice in lower case (behind two spaces, indeed).
    """
    premise, choices = field(row, "premise"), [field(row, "choice1"), field(row, "choice2")]
    link = {"cause": "because", "effect": "therefore"}[one_of(row, "question", ["cause", "effect"])]
    if not harness:
        return premise, [" " + choice for choice in choices], number(row, "label")
    choices = [f"  {choice[0].lower()}{choice[1:]}" for choice in choices]
    return f"{premise.strip()[:-1]} {link}", choices, number(row, "label")


def arc(row, harness):
    """{question, choices {text, label}, answerKey}, or the original {question {stem, choices [{text, label}]}}."""
    question = row.get("question")
    if isinstance(question, dict):
        columns = {
            key: [choice.get(key) for choice in question["choices"]] for key in ("text", "label")
        }
        row = {
            "question": question.get("stem"),
            "choices": columns,
            "answerKey": row.get("answerKey"),
        }
    choices, question = unpack(row, "choices"), field(row, "question")
    labels = list(choices["label"])
    context = f"Question: {question}\nAnswer:" if harness else question
    return (
        context,
        [" " + text for text in texts(choices, "text")],
        labels.index(one_of(row, "answerKey", labels)),
    )


def piqa(row, harness):
    """{goal, sol1, sol2, label}; the label may stand in a file of its own (see kit/rows.py)."""
    goal, choices = field(row, "goal"), [" " + field(row, "sol1"), " " + field(row, "sol2")]
    return f"Question: {goal}\nAnswer:" if harness else goal, choices, number(row, "label")


def mathqa(row, harness):
    """{Problem, options "a ) 38 , b ) 27 , ... e ) none", correct "a" to "e"}.

    Both styles end options a to d at their first ", " ("1 , 000" is read as "1"). Released choices have no space in
    front.
    """
    problem, answer = field(row, "Problem"), "abcde".index(one_of(row, "correct", list("abcde")))
    *others, last = re.split(r"(?:^|, )[a-e] \) ", field(row, "options"))[1:] or [""]
    choices = [choice.split(", ")[0].rstrip(" ,") for choice in others] + [last.rstrip(" ,")]
    if not harness:
        return problem, choices, answer
    return f"Question: {problem}\nAnswer:", [choice and " " + choice for choice in choices], answer


def pubmedqa(row, harness):
    """{question, context {contexts}, final_decision}, or the original's {QUESTION, CONTEXTS, final_decision}.

    Released: one paragraph, `abstract` in Jang et al.'s file, which is the first of contexts. Harness: all of them.
    """
    question = field(row, "QUESTION" if "QUESTION" in row else "question")
    decisions = ["yes", "no", "maybe"] if harness else ["yes", "maybe", "no"]
    if "abstract" in row and not harness:
        paragraphs = [field(row, "abstract")]
    else:
        paragraphs = (
            texts(row, "CONTEXTS", 1)
            if "CONTEXTS" in row
            else texts(unpack(row, "context"), "contexts", 1)
        )
    context = "Abstract: " + "\n".join(paragraphs) if harness else "Context: " + paragraphs[0]
    answer = decisions.index(one_of(row, "final_decision", decisions))
    return (
        f"{context}\nQuestion: {question}\nAnswer:",
        [" " + decision for decision in decisions],
        answer,
    )


def dialogue(row, harness):
    """{text: [turn, ...]}: all turns but the last, and the last as the reply. The harness has no such sets."""
    turns = [normalize_turn(turn) for turn in texts(row, "text")]
    lines = [f"User {1 + i % 2}: {turn}\n" for i, turn in enumerate(turns)]
    return "".join(lines[:-1]) + lines[-1][: len("User 1:")], turns[-1]


def normalize_turn(text):
    """A turn as Jang et al. give it to the model: lower case but for "I" and the heads of sentences, with a full stop.

    No space stands before a mark or beside an apostrophe. Of the 39,932 turns of the four sets 26 differ from the
    released code's, by a space that it leaves between a closing quote and the mark behind it.
    """
    text = re.sub(" +", " ", text.lower())
    text = re.sub(" ([.,?!])", r"\1", text)
    text = re.sub(" ?' ?", "'", text)
    text = re.sub(r"(^|[.?!] )(\w)", lambda match: match[1] + match[2].upper(), text)
    text = re.sub(r"(?<![^ '])i(?![^ .,?!'])", "I", text).strip()
    return text if text.endswith(tuple("!.?)\"'")) else text + "."


def plain_text(row, harness):
    """{text}, whose perplexity is measured."""
    return field(row, "text")


# In the order and with the names of Tables 6 and 7: set -> (column, function, source if there is no local file). A
# source is a file that knn.py fetches and checks, or a repository of the hub with the configuration.
CLASSIFICATION = {
    "lambada": ("Lamba.", lambada, "lambada.csv"),
    "hellaswag": ("Hella.", hellaswag, ("Rowan/hellaswag", None)),
    "winogrande": (
        "Wino.",
        winogrande,
        ("allenai/winogrande", "winogrande_xl"),
    ),  # its sizes share one split
    "copa": ("COPA", copa, ("aps/super_glue", "copa")),
    "arc_easy": ("ARC-E", arc, ("allenai/ai2_arc", "ARC-Easy")),
    "arc_challenge": ("ARC-C", arc, ("allenai/ai2_arc", "ARC-Challenge")),
    "piqa": ("Piqa", piqa, ("baber/piqa", None)),
    "mathqa": ("MathQ", mathqa, ("regisss/math_qa", None)),
    "pubmedqa": ("PubQ", pubmedqa, "pubmed_qa.csv"),
}
DIALOGUE = {
    "wizard_of_wikipedia": ("WoW", dialogue, "wizard_of_wikipedia.json"),
    "empathetic_dialogues": ("ED", dialogue, "empathetic_dialogues.json"),
    "blended_skill_talk": ("BST", dialogue, "blended_skill_talk.json"),
    "wizard_of_internet": ("WoI", dialogue, "wizard_of_internet.json"),
}
PERPLEXITY = {
    "pile": ("Pile", plain_text, "pile.csv"),
    "wikitext": ("Wikitext", plain_text, "wikitext.csv"),
}
SETS = CLASSIFICATION | DIALOGUE | PERPLEXITY

# --- the fields of a row ---


def field(row, name):
    """A text of a row. ValueError where it is missing, blank or no text."""
    if row.get(name) is None:
        raise ValueError(f"no field `{name}`")
    data.check_string(row[name], f"`{name}`")
    return row[name]


def one_of(row, name, values):
    if field(row, name) not in values:
        raise ValueError(f"`{name}` is {row[name]!r}, not one of {', '.join(map(str, values))}")
    return row[name]


def number(row, name):
    """A whole number, which CSV files and the hub's HellaSwag write as text."""
    value = row.get(name)
    if isinstance(value, bool) or not re.fullmatch(r"\s*\d{1,9}\s*", str(value)):
        raise ValueError(f"`{name}` is {value!r}, not a whole number")
    return int(value)


def texts(row, name, least=2):
    """A list of at least `least` texts, none of them blank."""
    values = unpack(row, name)
    if not isinstance(values, list) or len(values) < least:
        raise ValueError(f"`{name}` is not a list of {least} texts or more")
    return [field({f"{name}[{i}]": value}, f"{name}[{i}]") for i, value in enumerate(values)]


def unpack(row, name):
    """A list or dict; in a CSV file as Python writes it, `{'contexts': array(['a', 'b'], dtype=object)}` included.

    Nothing is evaluated: the text is parsed, and of a call array(...) only the first argument is read.
    """

    def read(node):
        if isinstance(node, ast.Dict):
            return {
                read(key): read(value) for key, value in zip(node.keys, node.values, strict=True)
            }
        if isinstance(node, ast.List):
            return [read(item) for item in node.elts]
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "array"
        ):
            return read(node.args[0])
        if isinstance(node, ast.Constant):
            return node.value
        raise ValueError(f"`{name}` holds more than lists and texts")

    value = row.get(name)
    if isinstance(value, str):
        try:
            value = read(ast.parse(value.strip(), mode="eval").body)
        except (SyntaxError, IndexError, TypeError, RecursionError, MemoryError):
            raise ValueError(f"`{name}` cannot be read as a list: {value[:40]!r}") from None
    if not isinstance(value, list | dict):
        raise ValueError(f"`{name}` is {'missing' if value is None else 'not a list or an object'}")
    return value


def check_rows(name, rows, harness):
    """{"rows": {row number from 1: item}, "bad": ["row 3: why", ...]}: every row goes into one or the other."""
    items, bad = {}, []
    for n, row in enumerate(rows, start=1):
        try:
            item = SETS[name][1](row, harness)
            if name in CLASSIFICATION:
                context, choices, answer = item
                for text in [*choices, *([context] if isinstance(context, str) else context)]:
                    data.check_string(text, "the context or a choice")
                if not 0 <= answer < len(choices):
                    raise ValueError(f"the answer is number {answer + 1} of {len(choices)} choices")
            items[n] = item
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            bad.append(
                f"row {n}: {error}"
                if isinstance(error, ValueError)
                else f"row {n}: a field of the wrong type"
            )
    return {"rows": items, "bad": bad}


# --- where rows come from ---


def read_sets(tasks="all", data_dir=None, *, prompts="released", protocol="paper", limit=None):
    """The rows of the sets, read and checked before any model is loaded: {set: what `evaluate` takes}.

    tasks: "all", or names of sets. A set is {"rows", "bad", "source"} (see check_rows), or {"missing": why} if it is to
    be had nowhere, or {"error": why} if no row of it is good. ValueError: an unknown name, no such folder, no set at
    hand at all, and no good row in a set that was asked for by name.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ValueError(f"--task-data {data_dir}: no such folder")
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    by_name = tasks != ["all"]
    names = {bare(name): name for name in SETS}
    for task in tasks if by_name else ():
        if bare(task) not in names:
            close = get_close_matches(bare(task), names, n=1) or names
            raise ValueError(
                f"--tasks {task}: no such set; did you mean {', '.join(names[name] for name in close)}?"
            )
    wanted = {names[bare(task)] for task in tasks} if by_name else SETS
    sets = {}
    for name in (name for name in SETS if name in wanted):
        try:
            rows, source = find_rows(name, data_dir)
            if name == "copa" and PROTOCOLS[protocol].superglue_copa and len(rows) == 500:
                rows = rows[
                    400:
                ]  # of the original 500, the released code reads SuperGLUE's validation split
            sets[name] = check_rows(name, rows[:limit], prompts == "harness") | {"source": source}
            if not sets[name]["rows"]:
                why = sets[name]["bad"][0] if rows else "it has no rows"
                raise ValueError(f"{source}: no good row for {name}, {why}")
        except FileNotFoundError as error:
            sets[name] = {"missing": str(error)}
        except ValueError as error:
            if by_name:
                raise
            sets[name] = {"error": str(error)}
    if all("missing" in data for data in sets.values()):
        raise ValueError(
            "; ".join(f"{name} is not at hand: {data['missing']}" for name, loaded in sets.items())
        )
    return sets


def bare(name):
    return re.sub("[^a-z0-9]", "", name.lower())


def find_rows(name, data_dir):
    """(rows, where they come from): a local file, else a known public file, else the hub; else FileNotFoundError.

    Local is NAME.csv, .json, .jsonl or .xml in data_dir or a folder in it, also as NAME-dev, NAME_test and the like:
    the test split for Lambada, the validation split for the others (section 5.1).
    """
    splits, source = ("", "validation", "valid", "val", "dev"), SETS[name][2]
    stems = [bare(name) + split for split in (("", "test") if name == "lambada" else splits)]
    if data_dir is not None:
        found = [path for depth in ("*", "*/*") for path in sorted(Path(data_dir).glob(depth))]
        found = [
            path for path in found if path.suffix in row_files.READERS and bare(path.stem) in stems
        ]
        if found:
            file = min(found, key=lambda path: stems.index(bare(path.stem)))
            return row_files.read_rows(file), str(file)
    if isinstance(source, str):
        try:
            path = data.data_file(source)
        except (ValueError, OSError) as error:
            raise FileNotFoundError(str(error).replace("--data DIR", "--task-data DIR")) from None
        return row_files.read_rows(path), str(path)
    advice = f"pass --task-data DIR with {name}.jsonl or {name}.csv in it"
    try:
        from datasets import load_dataset
    except ImportError:
        raise FileNotFoundError(
            f"{advice}, or pip install datasets to get {source[0]} from the hub"
        ) from None
    try:
        return list(load_dataset(*source, split="validation")), f"hub: {source[0]}"
    except (
        Exception
    ) as error:  # no connection, no such file, a loading script: a dozen types for one thing
        raise FileNotFoundError(
            f"no {source[0]} from the hub ({type(error).__name__}): {advice}"
        ) from None


# --- scoring: flat lists of requests in, one answer a request out ---


def replies(model, tokenizer, prompts, *, new_tokens=32, batch_tokens=2048, desc=None):
    """The greedy reply to each prompt, up to `new_tokens` tokens and to where the model has the next user speak."""
    new_tokens = min(
        new_tokens, scoring.positions_of(model) // 2
    )  # a very short model still reads some of the prompt
    keep, answers = scoring.positions_of(model) - new_tokens, [""] * len(prompts)
    ids = [row[-keep:] for row in models.encode_whole(tokenizer, prompts)]
    with tqdm(total=len(prompts), desc=desc, unit=" replies", disable=desc is None) as bar:
        lines = [(len(row) + new_tokens, [i]) for i, row in enumerate(ids)]
        for batch in scoring.batches(lines, batch_tokens):
            batch, lengths = [i for (i,) in batch], [new_tokens] * len(batch)
            said = metrics.beam_generate(
                model, [ids[i] for i in batch], lengths, num_beams=1, batch_size=len(batch)
            )
            for i, reply in zip(batch, said, strict=True):
                answers[i] = tokenizer.decode(reply, skip_special_tokens=True).split("\nUser ")[0]
            bar.update(len(batch))
    return answers


def words(text):
    """What of a text counts in F1: its words in lower case without punctuation and articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def unigram_f1(candidate, reference):
    """F1 of two texts' words as multisets, 0-1: 2PR / (P + R) with precision P and recall R; nothing shared is 0."""
    a, b = Counter(words(candidate)), Counter(words(reference))
    return 2 * (a & b).total() / max(a.total() + b.total(), 1)


# --- measuring ---


def evaluate(
    model, tokenizer, *, tasks="all", data_dir=None, prompts="released", protocol="paper", limit=None, sets=None,
    length_norm=False, batch_tokens=None, samples=None,
):  # fmt: skip
    """Every set's figure: {set: {"metric", "value", "rows", "bad_rows", ...}, "averages": {"cls", "dia", ...}}.

    sets: what read_sets gave for tasks, data_dir, prompts, protocol and limit, so that a run measures the same rows
    before and after. samples: a list that gets a dict a row. Accuracies and F1 are 0-1. A set without a figure has
    "missing" or "error" instead of "value"; it is in no average, and the averages list it.
    """
    sets = sets or read_sets(tasks, data_dir, prompts=prompts, protocol=protocol, limit=limit)
    batch_tokens = batch_tokens or (4096 if model.device.type == "cuda" else 512)
    protocol, results = PROTOCOLS[protocol], {}
    for name, loaded in sets.items():
        if "rows" not in loaded:
            results[name] = loaded
            continue
        # Each process judges its share of the rows; all get all.
        rows, bad = dict(processes.share(list(loaded["rows"].items()))), loaded["bad"]
        if name in CLASSIFICATION:
            how = {
                "length_norm": length_norm,
                "lenient": protocol.lenient_tasks,
                "batch_tokens": batch_tokens,
            }
            how["desc"] = name if processes.is_main else None
            rows, unfit = judge_choices(model, tokenizer, rows, **how) if rows else ([], [])
            rows, unfit = all_rows(rows), sum(processes.gather([unfit]), [])
            metric, value, bad = "accuracy", mean([row["right"] for row in rows]), bad + unfit
        elif name in DIALOGUE:
            # A step of decoding costs much the same for one row as for many, so here batches are never small.
            how = {
                "batch_tokens": max(batch_tokens, 4096),
                "desc": name if processes.is_main else None,
            }
            rows = all_rows(judge_replies(model, tokenizer, rows, **how) if rows else [])
            metric, value = "f1", mean([row["f1"] for row in rows])
        else:
            metric = "perplexity"
            rows = list(loaded["rows"].values())
            value = perplexity(model, tokenizer, rows, joined=protocol.joined_perplexity, desc=name)
        if value is None or math.isnan(value):
            results[name] = {
                "error": f"{name}: "
                + ("the model answers NaN" if rows else f"no row fits, {bad[0]}")
            }
            continue
        results[name] = {
            "metric": metric,
            "value": value,
            "rows": len(rows),
            "bad_rows": len(bad),
            "bad": bad,
        }
        if metric == "accuracy" and name != "lambada":
            results[name]["chance"] = mean([1 / len(row["logp"]) for row in rows])
        results[name]["source"] = data["source"]
        if samples is not None and metric != "perplexity":
            samples += [{"task": name, **row} for row in rows]
    results["averages"] = averages(results)
    return results


def all_rows(judged):
    """The judged rows of all processes, in their order."""
    return sorted(
        (row for part in processes.gather([judged]) for row in part), key=lambda row: row["row"]
    )


def judge_choices(model, tokenizer, rows, *, length_norm, lenient, batch_tokens, desc):
    """({"row", "logp" of each choice, "right"} a row, ["row 3: why it does not fit the model", ...]).

    The choice with the highest sum of log p is the model's; with length_norm, per character, the harness' acc_norm. A
    single choice must be the greedy guess, token by token; lenient, as the released code: but for case, punctuation
    and articles.
    """
    requests = []
    for context, choices, _ in rows.values():
        contexts = [context] * len(choices) if isinstance(context, str) else context
        requests += zip(contexts, choices, strict=True)
    encoded, positions = (
        iter(scoring.encode_pairs(tokenizer, requests)),
        scoring.positions_of(model),
    )
    fitting, unfit = {}, []
    for n, (_, choices, _) in rows.items():
        pairs = list(islice(encoded, len(choices)))
        lengths = [len(continuation) for _, continuation in pairs]
        if all(0 < length <= positions for length in lengths):
            fitting[n] = pairs
        else:
            unfit.append(
                f"row {n}: choices of {lengths} tokens, where the model has {positions} positions"
            )
    flat = [pair for pairs in fitting.values() for pair in pairs]
    scores = iter(scoring.loglikelihoods(model, flat, batch_tokens=batch_tokens, desc=desc))

    judged = []
    for n, pairs in fitting.items():
        _, choices, answer = rows[n]
        logps, said = zip(*islice(scores, len(choices)), strict=True)
        if len(choices) == 1:
            right = said[0] == pairs[0][1]
            right = right or (lenient and words(tokenizer.decode(said[0])) == words(choices[0]))
        else:
            lengths = [len(choice.removeprefix(" ")) if length_norm else 1 for choice in choices]
            values = [logp / length for logp, length in zip(logps, lengths, strict=True)]
            right = values.index(max(values)) == answer
        judged.append(
            {
                "row": n,
                "logp": list(logps),
                "right": math.nan if math.isnan(sum(logps)) else float(right),
            }
        )
    return judged, unfit


def judge_replies(model, tokenizer, rows, *, batch_tokens, desc):
    """{"row", "reply", "f1"} a row: the model's reply and its unigram F1 with the person's."""
    said = replies(
        model,
        tokenizer,
        [prompt for prompt, _ in rows.values()],
        batch_tokens=batch_tokens,
        desc=desc,
    )
    return [
        {"row": n, "reply": reply, "f1": unigram_f1(reply, reference)}
        for (n, (_, reference)), reply in zip(rows.items(), said, strict=True)
    ]


def perplexity(model, tokenizer, texts, *, joined, desc):
    """metrics.perplexity with a progress bar: a hook counts the tokens that have gone through the model."""
    total = sum(map(len, tokenizer(texts, verbose=False)["input_ids"]))
    with tqdm(total=total, desc=desc, unit=" tokens", disable=not processes.is_main) as bar:

        def count(module, args, inputs, output):
            bar.update(int(inputs["attention_mask"].sum()))

        hook = model.register_forward_hook(count, with_kwargs=True)
        try:
            return metrics.perplexity(
                model, tokenizer, texts, released=joined, added_up=processes.added_up
            )
        finally:
            hook.remove()


def mean(values):
    return sum(values) / len(values) if values else None


def averages(results):
    """Cls Avg. and Dia Avg. of Table 1, each over the sets that have a figure, and the sets that have none."""
    found = {}
    for kind, group in (("cls", CLASSIFICATION), ("dia", DIALOGUE)):
        present = [name for name in group if "value" in results.get(name, {})]
        found[kind] = mean([results[name]["value"] for name in present])
        found[f"{kind}_missing"] = [name for name in group if name not in present]
    return found


def table(results_by_label):
    """Markdown: a line a label in the columns of Tables 6 and 7, accuracy and F1 in percent, and what was left out."""

    def cell(results, name, scale):
        return f"{scale * results[name]['value']:.1f}" if "value" in results.get(name, {}) else "-"

    def average_cell(results, kind, group):
        value, missing = results["averages"][kind], len(results["averages"][f"{kind}_missing"])
        partial = f" ({len(group) - missing} of {len(group)} sets)" if missing else ""
        return "-" if value is None else f"{100 * value:.1f}{partial}"

    lines = []
    for group, kind, unit, more in (
        (CLASSIFICATION, "cls", "ACC", {}),
        (DIALOGUE, "dia", "F1", PERPLEXITY),
    ):
        heads = [f"{SETS[name][0]} ({unit})" for name in group] + [f"Avg. ({unit})"]
        heads += [f"{SETS[name][0]} (PPL)" for name in more]
        lines += ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for label, results in results_by_label.items():
            cells = [cell(results, name, 100) for name in group] + [
                average_cell(results, kind, group)
            ]
            lines.append(
                f"| {label} | "
                + " | ".join(cells + [cell(results, name, 1) for name in more])
                + " |"
            )
        lines.append("")
    for label, results in results_by_label.items():
        for name, result in results.items():
            if "missing" in result:
                lines.append(f"- {label}: {name} is missing: {result['missing']}")
            elif "error" in result:
                lines.append(f"- {label}: {name} is not measured: {result['error']}")
            elif result.get("bad_rows"):
                some = "; ".join(result.get("bad", [])[:3])
                lines.append(
                    f"- {label}: {result['bad_rows']} bad rows of {name} are left out: {some}"
                )
    return "\n".join(map(visible, lines)).rstrip() + "\n"


# --- main ---


def make_parser():
    """The flags; experiment.py asks it which of a run's flags are this file's."""
    parser = flags.command_parser(__doc__.split("\n\n")[0])
    g = parser.add_argument_group("model and data")
    g.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="the causal LM: a folder, or a name on the hub",
    )
    g.add_argument(
        "--tasks",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help=f"all, or some of: {', '.join(SETS)}",
    )
    g.add_argument(
        "--task-data",
        metavar="DIR",
        help="folder with NAME.csv, .json, .jsonl or .xml, or NAME-dev, ...",
    )
    g.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="where tasks.json, tasks.md and task_rows.jsonl go",
    )
    g.add_argument("--overwrite", action="store_true", help="replace a tasks.json that is there")
    g.add_argument("--revision", metavar="SHA", help="hub revision of --model")
    g.add_argument(
        "--allow-pickle", action="store_true", help="also load pickled weights, which can run code"
    )

    g = parser.add_argument_group("measuring")
    g.add_argument(
        "--prompts", default="released", choices=["released", "harness"], help="bare, or templates"
    )
    g.add_argument("--protocol", default="paper", choices=[*PROTOCOLS], help="released: texts joined for "
                   "perplexity, of COPA SuperGLUE's 100 rows, of Lambada also words in other case (paper)")  # fmt: skip
    g.add_argument(
        "--length-norm", action="store_true", help="judge choices by their log p a character"
    )
    g.add_argument(
        "--limit", type=flags.positive, metavar="N", help="only the first N rows of each set"
    )

    g = parser.add_argument_group("running")
    g.add_argument(
        "--batch-tokens",
        type=flags.positive,
        metavar="N",
        help="tokens a batch (512; on a GPU 4096)",
    )
    g.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda where there is one)")
    g.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bf16", "float64"],
        help="bf16 is autocast",
    )
    g.add_argument("--dry-run", action="store_true", help="only say which sets are at hand")
    g.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def parse_args(argv=None):
    return make_parser().parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out, device = Path(args.out), processes.device_of(args.device)
    sets = read_sets(
        args.tasks, args.task_data, prompts=args.prompts, protocol=args.protocol, limit=args.limit
    )
    outputs = [
        (out / "tasks.json", paths.holds("averages")),
        (out / "tasks.md", paths.begins_with("| | ")),
    ]
    outputs += [(out / "task_rows.jsonl", paths.holds("task", "row", lines=True))]
    reads = [args.model, *(found["source"] for found in sets.values() if "source" in found)]
    paths.check_outputs(outputs, reads=reads, overwrite=args.overwrite)
    config, tokenizer = models.check_model(
        args.model, allow_pickle=args.allow_pickle, revision=args.revision
    )
    for name, found in sets.items():  # str(item) has all texts of a row in it
        texts = {f"{name} row {n}": str(item) for n, item in found.get("rows", {}).items()}
        models.check_texts(config, tokenizer, texts)
    if args.dry_run:
        for name, found in sets.items():
            good = f"{len(found['rows'])} rows from {found['source']}" if "rows" in found else None
            processes.print0(f"{name}: {good or found.get('missing') or found['error']}")
        return
    processes.start(device)
    how = {"dtype": args.dtype, "allow_pickle": args.allow_pickle, "revision": args.revision}
    model, tokenizer = models.load_model(args.model, device=device, **how)
    samples = []
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.dtype == "bf16"):
        results = evaluate(
            model, tokenizer, sets=sets, protocol=args.protocol, length_norm=args.length_norm,
            batch_tokens=args.batch_tokens, samples=samples,
        )  # fmt: skip
    if not processes.is_main:
        return
    settings = {
        name: getattr(args, name)
        for name in ("model", "prompts", "protocol", "length_norm", "limit", "dtype")
    }
    text = table({args.model: results})
    text += (
        "\n"
        + visible(", ".join(f"{name} {value}" for name, value in settings.items() if value))
        + "\n"
    )
    print(text)
    data.write_jsonl(out / "task_rows.jsonl", samples)
    data.write_bytes(out / "tasks.md", text.encode("utf-8", "backslashreplace"))
    data.write_json(out / "tasks.json", results | {"settings": settings})
    failed = [result["error"] for result in results.values() if "error" in result]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(sets)} sets not measured, the others are in {out}: {failed[0]}"
        )


if __name__ == "__main__":
    flags.run_cli(main)
