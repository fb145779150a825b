"""What a model can still do: nine classification sets, four dialogue sets, two perplexities.

    bash run.sh tasks --model DIR --task-data DIR --out DIR   # all: tasks.json, tasks.md
    bash run.sh tasks --model DIR --tasks piqa copa --prompts harness --task-data DIR --out DIR

Sets, splits and columns are those of section 5.1 and Tables 6 and 7 of "Learn while Unlearn" (ICU),
arXiv 2407.20271. `--prompts released` are the bare prompts of Jang et al. (arXiv 2210.01504), as
published; `harness` are the templates of EleutherAI's lm-evaluation-harness 0.4. Departures:
1. Context and choice are encoded together and split where the context ends, as in the harness.
   Released code: apart; with GPT-2's tokenizer only a context that ends in a space is another.
2. What is too long for the model loses its beginning, as in the harness. Released code: cuts at 512
   tokens, and a context at its end, where the question is.
3. Every ARC row keeps its own choices. Released code: pads or cuts rows without exactly four.
"""

import ast
import math
import re
import string
import xml.etree.ElementTree as ElementTree
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

import metrics
from kit import data, flags, models, processes
from kit.figures import markdown_table, mean
from kit.protocols import PROTOCOLS
from kit.text import visible

# --- the sets: a row -> (context or contexts, choices, answer), (prompt, reply), or a text ---
# A choice begins with what separates it from its context, a space.


def lambada(row, harness):
    """{text}: the last word must be the model's greedy guess after the text before it."""
    context, _, word = field(row, "text").rpartition(" ")
    return context, [" " + word], 0


def hellaswag(row, harness):
    """{ctx, endings, label}. Harness: {activity_label, ctx_a, ctx_b} for ctx, no WikiHow marks."""
    endings, label = texts(row, "endings"), int(row["label"])
    if not harness:
        return field(row, "ctx"), [" " + ending for ending in endings], label

    def clean(text):
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    end = row.get("ctx_b", "").capitalize()
    context = f"{field(row, 'activity_label')}: {field(row, 'ctx_a')} {end}"
    return clean(context), [" " + clean(ending) for ending in endings], label


def winogrande(row, harness):
    """{sentence, option1, option2, answer "1" or "2"}: which word fits in the sentence's "_".

    Harness: two contexts, each up to and with an option, then the rest.
    """
    sentence, answer = field(row, "sentence"), int(row["answer"]) - 1
    options = [field(row, "option1"), field(row, "option2")]
    before, after = sentence.split("_", 1) if harness else sentence.split(" _")
    if harness:
        return [before + option for option in options], [" " + after.strip()] * 2, answer
    return before, [f" {option}{after}" for option in options], answer


def copa(row, harness):
    """SuperGLUE's {premise, choice1, choice2, question "cause" or "effect", label 0 or 1}.

    Harness: "because" or "therefore" for the full stop, two spaces, the choice in lower case.
    """
    premise, choices = field(row, "premise"), [field(row, "choice1"), field(row, "choice2")]
    link = ["because", "therefore"][place(row, "question", ["cause", "effect"])]
    if harness:
        premise = f"{premise.strip()[:-1]} {link}"
        choices = [f" {choice[0].lower()}{choice[1:]}" for choice in choices]
    return premise, [" " + choice for choice in choices], int(row["label"])


def arc(row, harness):
    """{question, choices {text, label}, answerKey}, or {question {stem, choices [{text, label}]},
    answerKey}.
    """
    if isinstance(original := row["question"], dict):
        columns = {key: [one[key] for one in original["choices"]] for key in ("text", "label")}
        row = row | {"question": original["stem"], "choices": columns}
    question, choices = field(row, "question"), unpack(row, "choices")
    context = f"Question: {question}\nAnswer:" if harness else question
    answer = place(row, "answerKey", list(choices["label"]))
    return context, [" " + text for text in texts(choices, "text")], answer


def piqa(row, harness):
    """{goal, sol1, sol2, label}."""
    goal, choices = field(row, "goal"), [" " + field(row, "sol1"), " " + field(row, "sol2")]
    return f"Question: {goal}\nAnswer:" if harness else goal, choices, int(row["label"])


def mathqa(row, harness):
    """{Problem, options "a ) 38 , b ) 27 , ... e ) none", correct "a" to "e"}.

    Both styles end options a to d at their first ", ": "1 , 000" is "1". Released: no space first.
    """
    problem, answer = field(row, "Problem"), place(row, "correct", list("abcde"))
    *others, last = re.split(r"(?:^|, )[a-e] \) ", field(row, "options"))[1:] or [""]
    choices = [choice.split(", ")[0].rstrip(" ,") for choice in others] + [last.rstrip(" ,")]
    if not harness:
        return problem, choices, answer
    return f"Question: {problem}\nAnswer:", [choice and " " + choice for choice in choices], answer


def pubmedqa(row, harness):
    """{question, context {contexts}, final_decision}, or {QUESTION, CONTEXTS, final_decision}.

    Released: the first paragraph, `abstract` in Jang et al.'s file. Harness: all of them.
    """
    question = field(row, "QUESTION" if "QUESTION" in row else "question")
    decisions = ["yes", "no", "maybe"] if harness else ["yes", "maybe", "no"]
    if "abstract" in row and not harness:
        paragraphs = [field(row, "abstract")]
    elif "CONTEXTS" in row:
        paragraphs = texts(row, "CONTEXTS")
    else:
        paragraphs = texts(unpack(row, "context"), "contexts")
    context = "Abstract: " + "\n".join(paragraphs) if harness else "Context: " + paragraphs[0]
    context = f"{context}\nQuestion: {question}\nAnswer:"
    answer = place(row, "final_decision", decisions)
    return context, [" " + decision for decision in decisions], answer


def dialogue(row, harness):
    """{text: [turn, ...]}: all turns but the last; the last is the reply. Not in the harness."""
    turns = [normalize_turn(turn) for turn in texts(row, "text")]
    lines = [f"User {1 + i % 2}: {turn}\n" for i, turn in enumerate(turns)]
    return "".join(lines[:-1]) + lines[-1][: len("User 1:")], turns[-1]


def normalize_turn(text):
    """A turn as Jang et al. give it to the model.

    Released code: leaves a space between a closing quote and a mark (26 turns of 39,932).
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


# As in Tables 6 and 7: set -> (column, function, source if there is no local file: a public file,
# or a repository of the hub and its configuration).
# fmt: off
CLASSIFICATION = {
    "lambada": ("Lamba.", lambada, "lambada.csv"),
    "hellaswag": ("Hella.", hellaswag, ("Rowan/hellaswag", None)),
    "winogrande": ("Wino.", winogrande, ("allenai/winogrande", "winogrande_xl")),
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
# fmt: on

# --- the fields of a row ---


def field(row, name):
    """A text of a row, not blank."""
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{name}` is {value!r}, not a text")
    return value


def place(row, name, values):
    """Which of `values` a field is, from 0."""
    if row[name] not in values:
        raise ValueError(f"`{name}` is {row[name]!r}, not one of {', '.join(map(str, values))}")
    return values.index(row[name])


def texts(row, name):
    """A list of texts, none of them blank."""
    return [field({name: text}, name) for text in unpack(row, name)]


class _Arrays(ast.NodeTransformer):
    """numpy's `array([...], dtype=object)` is its first argument."""

    def visit_Call(self, node):
        return self.visit(node.args[0]) if getattr(node.func, "id", "") == "array" else node


def unpack(row, name):
    """A list or dict; in a CSV file as Python writes it. It is parsed, and never evaluated."""
    value = row[name]
    if isinstance(value, str):
        value = ast.literal_eval(_Arrays().visit(ast.parse(value.strip(), mode="eval")))
    return value


def check_rows(name, rows, harness):
    """{"rows": {row number from 1: item}, "bad": ["row 3: why", ...]}: each row is in one."""
    items, bad = {}, []
    for n, row in enumerate(rows, start=1):
        try:
            item = SETS[name][1](row, harness)
            if name in CLASSIFICATION:
                context, choices, answer = item
                for text in [*choices, *([context] if isinstance(context, str) else context)]:
                    field({"context or choice": text}, "context or choice")
                if not 0 <= answer < len(choices):
                    raise ValueError(f"the answer is number {answer + 1} of {len(choices)} choices")
            items[n] = item
        except KeyError as error:
            bad.append(f"row {n}: no field `{error.args[0]}`")
        except Exception as error:
            bad.append(f"row {n}: {error}")
    return {"rows": items, "bad": bad}


# --- where rows come from ---


def read_sets(tasks=("all",), data_dir=None, *, prompts="released", protocol="paper", limit=None):
    """{set: {"rows", "bad", "source"}, or {"missing": why}, or {"error": why} without a good row}.

    tasks: ["all"], or names of sets; limit: the first rows only. ValueError: no set at hand, or no
    good row in a set that was named.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ValueError(f"--task-data {data_dir}: no such folder")
    everything, sets = "all" in tasks, {}
    for name in [name for name in SETS if everything or name in tasks]:
        try:
            rows, source = find_rows(name, data_dir)
            if name == "copa" and PROTOCOLS[protocol].superglue_copa and len(rows) == 500:
                # Released code: SuperGLUE's validation split, 100 of the original 500.
                rows = rows[400:]
            checked = check_rows(name, rows[:limit], prompts == "harness")
            if not checked["rows"]:
                why = (checked["bad"] or ["it has no rows"])[0]
                raise ValueError(f"{source}: no good row for {name}, {why}")
            sets[name] = checked | {"source": source}
        except FileNotFoundError as error:
            sets[name] = {"missing": str(error)}
        except ValueError as error:
            if not everything:
                raise
            sets[name] = {"error": str(error)}
    missing = [f"{name}: {x['missing']}" for name, x in sets.items() if "missing" in x]
    if len(missing) == len(sets):
        raise ValueError("no set is at hand: " + "; ".join(missing))
    return sets


def bare(name):
    return re.sub("[^a-z0-9]", "", name.lower())


def find_rows(name, data_dir):
    """(rows, source): a file in data_dir or a folder in it, a public one, or the hub's.

    The test split for Lambada, the validation split for the others (section 5.1): NAME-dev.csv, ...
    """
    splits = ("", "test") if name == "lambada" else ("", "validation", "valid", "val", "dev")
    stems, source = [bare(name) + split for split in splits], SETS[name][2]
    if data_dir is not None:
        files = [*sorted(Path(data_dir).iterdir()), *sorted(Path(data_dir).glob("*/*"))]
        files = [file for file in files if file.suffix in READERS and bare(file.stem) in stems]
        if files:
            file = min(files, key=lambda file: stems.index(bare(file.stem)))
            return read_rows(file), str(file)
    if isinstance(source, str):
        try:
            path = data.data_file(source)
        except (ValueError, OSError) as error:
            raise FileNotFoundError(str(error).replace("--data DIR", "--task-data DIR")) from None
        return read_rows(path), str(path)
    try:
        from datasets import load_dataset

        return list(load_dataset(*source, split="validation")), f"hub: {source[0]}"
    except Exception as error:  # no such package, no connection: a dozen types for one thing
        raise FileNotFoundError(
            f"no {source[0]} from the hub ({type(error).__name__}): pass --task-data DIR with "
            f"{name}.jsonl or .csv in it, or pip install datasets"
        ) from None


def read_rows(path):
    """The rows of a file as dicts; PIQA's labels are in FILE-labels.lst."""
    rows, labels = READERS[path.suffix](path), path.with_name(f"{path.stem}-labels.lst")
    if labels.is_file():
        values = data.read_text(labels).split()
        with data.reading(f"{labels}: not a label for each row of {path.name}"):
            rows = [row | {"label": value} for row, value in zip(rows, values, strict=True)]
    return rows


def read_json(path):
    """A list of rows, {id: row}, or pandas' columns, {"text": {"0": [turn, ...], "1": ...}}."""
    rows = data.read_json(path)
    if isinstance(rows, dict):
        columns, rows = rows, list(rows.values())
        if all(key.isdigit() for column in rows for key in column):
            rows = [{name: columns[name][i] for name in columns} for i in rows[0]]
    return rows


def read_copa_xml(path):
    """The original COPA's items, with SuperGLUE's fields."""
    text = data.read_text(path)
    with data.reading(f"{path}: not COPA's XML"):
        return [
            {
                "premise": item.findtext("p"),
                "choice1": item.findtext("a1"),
                "choice2": item.findtext("a2"),
                "question": item.get("asks-for"),
                "label": int(item.get("most-plausible-alternative")) - 1,
            }
            for item in ElementTree.fromstring(text).iter("item")
        ]


READERS = {
    ".csv": lambda path: [row for _, row in data.numbered_csv(path)],
    ".json": read_json,
    ".jsonl": data.read_jsonl,
    ".xml": read_copa_xml,
}

# --- scoring: how likely texts are after others ---


def encode_pairs(tokenizer, requests):
    """(context, continuation) texts -> ids, together, split at the length of the context's alone.

    Without its last spaces: a BPE's word begins with its space. An empty context is BOS, or EOS.
    """
    contexts = [context.rstrip() for context, _ in requests]
    joined = [context + continuation for context, continuation in requests]
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = (models.encode_whole(tokenizer, side) for side in (contexts, joined))
    return [(context or [start], both[len(context) :]) for context, both in zip(*ids, strict=True)]


@torch.inference_mode()
def loglikelihoods(model, pairs, *, batch_tokens=2048, desc=None):
    """How likely each continuation is after its context: [(sum of log p in nats, greedy ids)].

    pairs: (context ids, continuation ids). A context that is too long loses its beginning; None for
    a continuation that is empty or does not fit the model.
    """
    positions, answers, same_input = positions_of(model), [None] * len(pairs), {}
    for i, (context, continuation) in enumerate(pairs):
        if 0 < len(continuation) <= positions:
            # The last token is only predicted: a row may have one more than the model's positions.
            row = (context + continuation)[-positions - 1 : -1]
            same_input.setdefault(tuple(row), []).append(i)  # yes, no, maybe: one pass
    rows, pad = list(same_input), partial(metrics.padded, padding_side="left")
    with progress(pairs, desc) as bar:
        for batch in batches([len(row) for row in rows], batch_tokens):
            members = [(place, i) for place, r in enumerate(batch) for i in same_input[rows[r]]]
            inputs = [torch.tensor(rows[r], device=model.device) for r in batch]
            ids, mask = pad(inputs), pad([torch.ones_like(row) for row in inputs])  # (B, T)
            last = max(len(pairs[i][1]) for _, i in members)
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=last,
            ).logits  # (B, last, V): the shift by one, position t predicts token t + 1
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            for place, i in members:
                target = torch.tensor(pairs[i][1], device=model.device)  # (K,)
                logp = logits[place, -len(target) :].log_softmax(1)  # (K, V)
                score = logp.gather(1, target[:, None]).sum().item()
                answers[i] = score, logp.argmax(1).tolist()
                bar.update()
    return answers


def progress(items, desc):
    return tqdm(total=len(items), desc=desc, disable=desc is None or not processes.is_main)


def batches(lengths, budget):
    """Lists of indices, the longest text first, of about `budget` tokens."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while order:
        size = max(1, budget // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def positions_of(model):
    return models.positions_of(model.config) or 1 << 20


# --- replies ---


def replies(
    model, tokenizer, prompts, *, new_tokens=32, batch_tokens=2048, stops=("\nUser ",), desc=None
):
    """The greedy reply to each prompt: up to `new_tokens` tokens, or to a stop, such as the next
    user's turn."""
    positions = positions_of(model)
    new_tokens = min(new_tokens, positions // 2)  # some of the prompt is always read
    ids = models.encode_whole(tokenizer, prompts)
    ids, answers = [row[new_tokens - positions :] for row in ids], [""] * len(prompts)
    with progress(prompts, desc) as bar:
        for batch in batches([len(row) + new_tokens for row in ids], batch_tokens):
            generations = metrics.beam_generate(
                model,
                [ids[i] for i in batch],
                [new_tokens] * len(batch),
                num_beams=1,
                batch_size=len(batch),
            )
            for i, generation in zip(batch, generations, strict=True):
                text = tokenizer.decode(generation, skip_special_tokens=True)
                for stop in stops:
                    text = text.split(stop)[0]
                answers[i] = text
            bar.update(len(batch))
    return answers


def words(text):
    """A text's words in lower case without punctuation and articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def unigram_f1(candidate, reference):
    """F1 of two texts' words as multisets, 0-1: 2PR / (P + R) of precision P and recall R."""
    a, b = Counter(words(candidate)), Counter(words(reference))
    return 2 * (a & b).total() / max(a.total() + b.total(), 1)


# --- measuring ---


def evaluate(
    model, tokenizer, sets, *, protocol="paper", length_norm=False, batch_tokens=None, samples=None
):
    """{set: {"metric", "value" (accuracy and F1 0-1), "rows", "bad_rows", ...}, "averages": {...}}.

    sets: of read_sets. samples: a list that gets a dict a row.
    """
    protocol, results = PROTOCOLS[protocol], {}
    batch_tokens = batch_tokens or (4096 if model.device.type == "cuda" else 512)
    choices = partial(judge_choices, length_norm=length_norm, lenient=protocol.lenient_tasks)
    for name, loaded in sets.items():
        if "rows" not in loaded:
            results[name] = loaded
            continue
        rows, bad = loaded["rows"], loaded["bad"]
        if name in PERPLEXITY:
            metric, judged = "perplexity", rows
            value = metrics.perplexity(
                model,
                tokenizer,
                [*rows.values()],
                released=protocol.joined_perplexity,
                added_up=processes.added_up,
            )
        else:
            metric, column, judge = "accuracy", "right", choices
            if name in DIALOGUE:
                metric, column, judge = "f1", "f1", judge_replies
            judge = partial(judge, model, tokenizer, batch_tokens=batch_tokens, desc=name)
            judged = processes.over_processes(judge, [*rows.items()])
            bad = bad + [row["unfit"] for row in judged if "unfit" in row]
            judged = [row for row in judged if "unfit" not in row]
            value = mean([row[column] for row in judged])
        if value is None or math.isnan(value):
            why = "the model answers NaN" if judged else f"no row fits, {bad[0]}"
            results[name] = {"error": f"{name}: {why}"}
            continue
        results[name] = {"metric": metric, "value": value, "rows": len(judged)}
        results[name] |= {"bad_rows": len(bad), "bad": bad}
        if metric == "accuracy" and name != "lambada":
            results[name]["chance"] = mean([1 / len(row["logp"]) for row in judged])
        results[name]["source"] = loaded["source"]
        if samples is not None and metric != "perplexity":
            samples += [{"task": name, **row} for row in judged]
    return results | {"averages": averages(results)}


def judge_choices(model, tokenizer, items, *, length_norm, lenient, batch_tokens, desc=None):
    """{"row", "logp" of each choice, "right"} of each (row number, (context, choices, answer)).

    The choice with the highest sum of log p is the model's; with length_norm, per character. A
    single choice must be the greedy guess; lenient, as the released code: but for case, punctuation
    and articles. {"row", "unfit": why} of a row without room.
    """
    requests = []
    for _, (context, choices, _) in items:
        contexts = [context] * len(choices) if isinstance(context, str) else context
        requests += zip(contexts, choices, strict=True)
    pairs, judged = encode_pairs(tokenizer, requests), []
    scores = loglikelihoods(model, pairs, batch_tokens=batch_tokens, desc=desc)
    answered = iter(zip(pairs, scores, strict=True))
    for n, (_, choices, answer) in items:
        ids, answers = zip(*islice(answered, len(choices)), strict=True)
        if None in answers:
            lengths = ", ".join(str(len(choice)) for _, choice in ids)
            why = f"choices of {lengths} tokens, and the model has {positions_of(model)} positions"
            judged.append({"row": n, "unfit": f"row {n}: {why}"})
            continue
        logps = [logp for logp, _ in answers]
        if len(choices) == 1:
            (_, word), (_, guess) = ids[0], answers[0]
            alike = lenient and words(tokenizer.decode(guess)) == words(choices[0])
            right = alike or guess == word
        else:
            lengths = [len(choice.removeprefix(" ")) if length_norm else 1 for choice in choices]
            values = [logp / length for logp, length in zip(logps, lengths, strict=True)]
            right = values.index(max(values)) == answer
        right = math.nan if math.isnan(sum(logps)) else float(right)
        judged.append({"row": n, "logp": logps, "right": right})
    return judged


def judge_replies(model, tokenizer, items, *, batch_tokens, desc=None):
    """{"row", "reply", "f1"} for each (row number, (prompt, reply))."""
    prompts = [prompt for _, (prompt, _) in items]
    # A step of decoding costs much the same for one row as for many: batches are never small.
    batch_tokens = max(batch_tokens, 4096)
    texts = replies(model, tokenizer, prompts, batch_tokens=batch_tokens, desc=desc)
    return [
        {"row": n, "reply": text, "f1": unigram_f1(text, reference)}
        for (n, (_, reference)), text in zip(items, texts, strict=True)
    ]


def averages(results):
    """Cls Avg. and Dia Avg. of Table 1, over the sets with a figure, and those without."""
    means = {}
    for kind, group in (("cls", CLASSIFICATION), ("dia", DIALOGUE)):
        present = [name for name in group if "value" in results.get(name, {})]
        means[kind] = mean([results[name]["value"] for name in present])
        means[f"{kind}_missing"] = [name for name in group if name not in present]
    return means


def table(results_by_label):
    """Markdown as Tables 6 and 7, in percent; what was left out."""

    def cell(value, scale):
        return "-" if value is None else f"{scale * value:.1f}"

    lines = []
    kinds = ("cls", CLASSIFICATION, "ACC", {}), ("dia", DIALOGUE, "F1", PERPLEXITY)
    for kind, group, unit, further in kinds:
        heads = ["", *(f"{SETS[name][0]} ({unit})" for name in group), f"Avg. ({unit})"]
        heads += [f"{SETS[name][0]} (PPL)" for name in further]
        rows = []
        for label, results in results_by_label.items():
            values = {name: results.get(name, {}).get("value") for name in SETS}
            average = cell(results["averages"][kind], 100)
            if average != "-" and (missing := results["averages"][f"{kind}_missing"]):
                average += f" ({len(group) - len(missing)} of {len(group)} sets)"
            cells = [label, *(cell(values[name], 100) for name in group), average]
            rows.append([*cells, *(cell(values[name], 1) for name in further)])
        lines += [*markdown_table(heads, rows), ""]
    for label, results in results_by_label.items():
        for name, result in results.items():
            if why := result.get("missing") or result.get("error"):
                state = "missing" if "missing" in result else "not measured"
                lines.append(f"- {label}: {name} is {state}: {why}")
            elif count := result.get("bad_rows"):
                some = "; ".join(result["bad"][:3])
                lines.append(f"- {label}: {count} bad rows of {name} are left out: {some}")
    return "\n".join(map(visible, lines)).rstrip() + "\n"


# --- main ---


# fmt: off
def make_parser():
    parser = flags.command_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a folder, or a hub name")
    add("--tasks", nargs="+", default=["all"], type=flags.one_of(["all", *SETS]), metavar="NAME",
        help=f"all, or some of: {', '.join(SETS)}")
    add("--task-data", metavar="DIR", help="with NAME.csv, .json, .jsonl, .xml, NAME-dev...")
    add("--out", required=True, metavar="DIR", help="for tasks.json, tasks.md, task_rows.jsonl")
    add("--overwrite", action="store_true", help="replace a tasks.json")
    add("--revision", metavar="SHA", help="hub revision of --model")
    add("--prompts", default="released", choices=["released", "harness"], help="bare, or templates")
    add("--protocol", default="paper", choices=[*PROTOCOLS],
        help="released: texts joined for perplexity, of COPA SuperGLUE's 100 rows, of Lambada also "
             "words in other case (%(default)s)")
    add("--length-norm", action="store_true", help="judge choices by log p a character")
    add("--task-limit", type=flags.positive, metavar="N", help="the first N rows of each set")
    add("--batch-tokens", type=flags.positive, metavar="N", help="tokens a batch (512; GPU 4096)")
    flags.add_model_flags(add, ("float32", "bf16", "float64"))
    add("--dry-run", action="store_true", help="say which sets are at hand")
    return parser
# fmt: on


def main(argv=None):
    args = make_parser().parse_args(argv)
    args.device = processes.device_of(args.device)
    sets = read_sets(
        args.tasks,
        args.task_data,
        prompts=args.prompts,
        protocol=args.protocol,
        limit=args.task_limit,
    )
    outputs = [Path(args.out, name) for name in ("tasks.json", "tasks.md", "task_rows.jsonl")]
    sources = [loaded["source"] for loaded in sets.values() if "source" in loaded]
    data.check_outputs(outputs, overwrite=args.overwrite, reads=sources)
    weights = {"allow_pickle": args.allow_pickle, "revision": args.revision}
    config, tokenizer = models.check_model(args.model, **weights)
    for name, loaded in sets.items():  # str(item) has all texts of a row in it
        rows = loaded.get("rows", {})
        lines = {f"{name} row {n}": str(item) for n, item in rows.items()}
        models.check_texts(config, tokenizer, lines)
        if args.dry_run:
            state = f"{len(rows)} rows from {loaded['source']}" if rows else [*loaded.values()][0]
            processes.print0(f"{name}: {state}")
    if args.dry_run:
        return
    processes.start(args.device)
    model, tokenizer = models.load_model(
        args.model, dtype=args.dtype, device=args.device, **weights
    )
    samples = []
    with processes.autocast(args):
        results = evaluate(
            model,
            tokenizer,
            sets,
            protocol=args.protocol,
            length_norm=args.length_norm,
            batch_tokens=args.batch_tokens,
            samples=samples,
        )
    if processes.is_main:
        write(args, outputs, results, samples)


def write(args, outputs, results, samples):
    """Prints the table and writes the files; ValueError for sets that could not be measured."""
    names = ("model", "prompts", "protocol", "length_norm", "dtype")
    settings = {name: getattr(args, name) for name in names} | {"limit": args.task_limit}
    shown = ", ".join(f"{name} {value}" for name, value in settings.items() if value)
    text = f"{table({args.model: results})}\n{visible(shown)}\n"
    print(text)
    document, page, rows = outputs
    data.write_jsonl(rows, samples)
    data.write_bytes(page, text.encode())
    data.write_json(document, results | {"settings": settings})
    if failed := [result["error"] for result in results.values() if "error" in result]:
        raise ValueError(f"{len(failed)} sets are not measured, the first: {failed[0]}")


if __name__ == "__main__":
    flags.run_cli(main)
