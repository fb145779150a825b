"""TOFU's and MUSE's own measures (arXiv 2401.06121, 2407.06460), on files like theirs.

    bash run.sh tofu --model DIR --data DIR --split forget10 --never-saw DIR  # the retain model
    bash run.sh tofu RUN --data DIR  # its models; tofu.json. MUSE where DIR has knowmem/

docs/tofu.md says what a figure means. `logp` of an answer a is the mean of its tokens' log p in
nats, EOS among them: exp(logp) = p(a|q)^(1/|a|).
"""

import re
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import ks_2samp

import icu
from evals import audit, tasks
from kit import data, figures, flags, models, processes, runs

# --- ROUGE-L, as google's rouge_score has it ---


def words(text, stem=None):
    """Runs of a-z and 0-9 in lower case; of more than three letters, their stems."""
    parts = re.findall("[a-z0-9]+", text.lower())
    return [stem(word) if stem and len(word) > 3 else word for word in parts]


def rouge_l(said, reference, stem=None):
    """(recall, F1), 0-1, of the longest common subsequence of words. TOFU: recall, of stems."""
    said, reference = words(said, stem), words(reference, stem)
    if not (said and reference):
        return 0.0, 0.0
    recall, precision = audit.in_order(said, reference), audit.in_order(reference, said)
    return recall, 2 * precision * recall / max(precision + recall, 1e-12)


def stemmer():
    """Porter's, or None where nltk is not installed."""
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError:
        return None
    return PorterStemmer().stem


# --- TOFU ---


def choice(right, wrong):
    """p_1 / sum of p_i of a right answer and wrong ones. Paper: of p(a|q); code: p(a|q)^(1/|a|)."""
    return float(1 / np.exp([logp - right for logp in (right, *wrong)]).sum())


def truth_ratio(right, wrong):
    """R of the right answer in other words and of wrong ones, about 0 by heart: (paper's, code's).

    Paper: the mean of p(wrong_i|q)^(1/|.|), over p(right|q)^(1/|.|). Code, in the forget quality
    and in open-unlearning: the geometric mean, which is never larger.
    """
    gaps = np.array(wrong) - right
    return float(np.exp(gaps).mean()), float(np.exp(gaps.mean()))


def ratio_score(ratios, forget):
    """The mean of min(R, 1/R) of what is to be forgotten, else of max(0, 1 - R)."""
    R = np.maximum(ratios, 1e-300)
    return float((np.minimum(R, 1 / R) if forget else np.maximum(0, 1 - R)).mean())


def forget_quality(ratios, retain):
    """The p-value of the two-sample Kolmogorov-Smirnov test: whether R on the forget set is spread
    as that of a model that never saw it. TOFU's code has 1/R: the same p."""
    return float(ks_2samp(ratios, retain).pvalue)


def model_utility(means, end):
    """The harmonic mean of nine: three figures of each set to keep. None where one is missing."""
    sets, measures = ("retain", *CHOICES), ("rouge", "probability", f"truth_ratio{end}")
    nine = [means.get(f"{name}_{measure}") for name in sets for measure in measures]
    return None if None in nine else statistics.harmonic_mean(nine)


CHOICES = "real_authors", "world_facts"  # their questions are multiple choice


def summary(rows, never):
    """{figure: value} of {SET_MEASURE: a number a row}; never: the retain model's rows."""
    first, means = {}, {}
    for name, values in rows.items():
        is_ratio, forget = "ratio" in name, name.startswith("forget")
        means[name] = ratio_score(values, forget) if is_ratio else float(np.mean(values))
    for end in ("", "_paper"):
        ratios = f"forget_truth_ratio{end}"
        if never and ratios in rows:
            first[f"forget_quality{end}"] = forget_quality(rows[ratios], never[ratios])
        first[f"model_utility{end}"] = model_utility(means, end)
    if never and "auc_min_k" in rows:
        auc = means["auc_min_k"], float(np.mean(never["auc_min_k"]))
        first["privleak"] = audit.privleak(*auc)
    return {name: value for name, value in (first | means).items() if value is not None}


# --- asking a model ---

# How many tokens an answer may have, and what else ends it, as in the benchmarks' code.
STOPS = "\n\n", "\nQuestion", "Question:"
LENGTHS = {
    "forget_verbmem": (128, ()),
    "forget_knowmem": (32, STOPS),
    "retain_knowmem": (32, STOPS),
}


def ask(model, tokenizer, sets, rouge):
    """{SET_MEASURE: a number a row} of {set: [(prompt, true answer, icu.Texts to weigh)]}."""
    rows = defaultdict(list)
    for name, asked in sets.items():
        prompts, truths, texts = zip(*asked, strict=True)
        length, stops = LENGTHS.get(name, (200, ()))
        said = tasks.replies(
            model,
            tokenizer,
            [*prompts],
            new_tokens=length,
            batch_tokens=8192,
            stops=stops,
            desc=name,
        )
        truths = [models.encode(tokenizer, truth)[:length] for truth in truths]
        rows[f"{name}_rouge"] = [*map(rouge, said, models.decode(tokenizer, truths))]
        for own, right, *wrong in (weigh(model, some) for some in texts if some):
            share = choice(own, wrong) if name in CHOICES else float(np.exp(own))
            rows[f"{name}_probability"].append(share)
            if wrong:
                paper, code = truth_ratio(right, wrong)
                rows[f"{name}_truth_ratio"].append(code)
                rows[f"{name}_truth_ratio_paper"].append(paper)
    return rows


def weigh(model, texts):
    """The mean log p of each icu.Text's suffix."""
    pairs = [(text.ids[: text.cut], text.ids[text.cut :]) for text in texts]
    scores = zip(tasks.loglikelihoods(model, pairs), pairs, strict=True)
    return [logp / len(ids) for (logp, _), (_, ids) in scores]


def least_likely(model, texts):
    """Of each icu.Text, the mean log p of the 40 % least likely tokens of its suffix."""
    room = tasks.positions_of(model)
    readings = audit.read(model, [text._replace(ids=text.ids[:room]) for text in texts])
    suffixes = [one._replace(logp=one.logp[one.start :]) for one in readings]
    return [audit.membership(one, "")["min-40%"] for one in suffixes]


# --- their files: {set: what is asked}, {"forget", "holdout": icu.Texts} ---


def read_rows(folder, name, *fields):
    """The rows of NAME.json (JSON lines, or a list), .jsonl, or the hub's parquet; [] of none."""
    found = (sorted(folder.glob(name + end)) for end in (".json*", ".parquet", "-*.parquet"))
    rows = []
    for file in next(filter(None, found), []):  # a large set has several of the last
        if file.suffix == ".parquet":
            with data.reading(f"{file}: pip install pyarrow"):
                import pandas

                own = pandas.read_parquet(file).to_dict("records")
        else:
            is_list = data.read_text(file).lstrip()[:1] == "["
            own = (data.read_json if is_list else data.read_jsonl)(file)
        for number, row in enumerate(own, start=1):
            with data.reading(f"{file} row {number}: no field"):
                [row[field] for field in fields]
        rows += own
    return rows


def as_text(tokenizer, row):
    """An icu.Text of prefix and suffix, read as one text with one BOS."""
    body, (start,), _ = models.read_parts(tokenizer, row, ["prefix", "suffix"])
    ids = models.begin(models.front_of(tokenizer), body)
    cut = start + len(ids) - len(body)
    return icu.Text(ids, cut, cut, [])


def read_tofu(folder, tokenizer, args):
    # {file: set}; a split that is not called forget has no holdout.
    files = {args.split.replace("forget", "holdout"): "holdout", args.split: "forget"}
    sets, fields = defaultdict(list), ("question", "answer")
    for file, name in (files | {name: name for name in ("retain", *CHOICES)}).items():
        rows = read_rows(folder, f"{file}_perturbed", *fields) or read_rows(folder, file, *fields)
        for row in rows:
            question, answer = row["question"], row["answer"]
            right = row.get("paraphrased_answer") or answer
            answers = [answer, right, *row.get("perturbed_answer", ())]
            turns = [data.conversation(question, text) for text in answers]
            own = [data.render(tokenizer, messages, args.template) for messages in turns]
            texts = [as_text(tokenizer, text) for text in own]
            sets[name].append((own[0]["prefix"], answer, texts))
    if not sets["forget"]:
        where = f"{args.split}_perturbed.json there, nor MUSE's knowmem/"
        raise ValueError(f"--data {folder}: no {where}: {DOWNLOAD}")
    texts = {name: [own[0] for *_, own in sets[name]] for name in ("forget", "holdout")}
    del sets["holdout"]
    # Without EOS, as in open-unlearning.
    return sets, {name: [x._replace(ids=x.ids[:-1]) for x in own] for name, own in texts.items()}


def read_muse(folder, tokenizer, args):
    rows = read_rows(folder / "verbmem", "forget", "prompt", "gt")
    sets = {"forget_verbmem": [(row["prompt"], row["gt"], []) for row in rows]}
    form, texts, fields = "Question: {question}\nAnswer: ", {}, ("question", "answer")
    for name in ("forget", "retain"):
        shots = read_rows(folder / "knowmem", f"{name}_qa_icl", *fields)
        shown = "".join((form + "{answer}\n\n").format(**row) for row in shots)
        sets[f"{name}_knowmem"] = [
            (shown + form.format(**row), row["answer"], [])
            for row in read_rows(folder / "knowmem", f"{name}_qa", *fields)
        ]
    for name in ("forget", "holdout"):
        rows = [row["text"] for row in read_rows(folder / "privleak", name, "text")]
        ids = models.encode_whole(tokenizer, rows)
        texts[name] = [icu.Text(own, 1, 1, []) for own in ids]
    return {name: asked for name, asked in sets.items() if asked}, texts


# --- the command ---

DOWNLOAD = "hf download locuslab/TOFU (or muse-bench/MUSE-News) --repo-type dataset --local-dir DIR"


def make_parser():
    parser = flags.command_parser(__doc__)
    add = parser.add_argument
    audit.add_models(add)
    add("--data", required=True, metavar="DIR", help=DOWNLOAD)
    add("--split", default="forget10", metavar="NAME", help="TOFU's forget set (%(default)s)")
    add("--template", default="chat", choices=data.TEMPLATES, help="of TOFU's (%(default)s)")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    if bool(args.run) == bool(args.model):
        raise ValueError("name a run folder RUN, or pass --model DIR")
    folder, out = Path(args.data), args.out or args.run
    outputs = [Path(out, "tofu.json")] if out else []
    data.check_outputs(outputs, overwrite=args.overwrite)
    args.models = audit.models_asked(args, args.run and runs.read_run(args.run))
    args.device = processes.device_of(args.device)
    muse = any((folder / name).is_dir() for name in ("knowmem", "verbmem", "privleak"))
    read, stem = (read_muse, None) if muse else (read_tofu, stemmer())
    checked = audit.check_models(args)
    _, tokenizer = checked["after"]
    (sets, texts), rows = read(folder, tokenizer, args), {}
    audit.check_tokenizers(checked, [row[0] for asked in sets.values() for row in asked])
    for name in audit.columns(args):
        model = None  # the one before is let go first
        model = audit.load(args, name)
        with processes.autocast(args):
            rows[name] = ask(model, tokenizer, sets, lambda *pair: rouge_l(*pair, stem)[muse])
            if texts["forget"] and texts["holdout"]:
                scores = (least_likely(model, own) for own in texts.values())
                rows[name]["auc_min_k"] = audit.ranks(*scores)
    shown = {name: summary(own, rows.get("never saw")) for name, own in rows.items()}
    table = [
        [name, *(f"{own[name]:.4g}" if name in own else "-" for own in shown.values())]
        for name in max(shown.values(), key=len)
    ]
    print("\n".join(figures.markdown_table(["", *shown], table)))
    if not (muse or stem):
        print("ROUGE-L of words, TOFU's is of stems: pip install nltk")
    document = {key: getattr(args, key) for key in ("data", "split", "template", "dtype")}
    document["models"] = {name: model for name, (model, _) in args.models.items()}
    for output in outputs:
        data.write_json(output, document | {"stems": bool(stem), "headline": shown, "rows": rows})


if __name__ == "__main__":
    flags.run_cli(main)
