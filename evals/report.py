"""Finished runs -> tables, plots and case studies; and asking a model a prefix before and after.

    bash run.sh report RUN [RUN ...] --out DIR     # table.md, table.csv, plots, cases.md
    bash run.sh report RUN --redact                # the same without a text: no cases.md
    bash run.sh ask RUN "some prefix"              # what the model says before and after

In a run folder, and over an earlier report, files are replaced; elsewhere this needs --overwrite.
The table has the measured columns of the paper's Table 1 (arXiv:2407.20271); the case table is that
of its Figures 4 and 5.
"""

import csv
import io
import math
import statistics
import textwrap
from pathlib import Path

from kit import data, figures, flags, models, requests
from kit.protocols import PROTOCOLS
from kit.runs import BEFORE_SETTINGS, SETTINGS, models_of, read_pairs_of, read_run
from kit.text import visible

PLOTS = ("curves.png", "tradeoff.png", "relearned.png")
NAMES = ("table.md", "table.csv", "cases.md", "tasks.md", *PLOTS)  # what a report may write
CSV_HEAD = ("model", "runs", "collapsed")
MEASURED = (*BEFORE_SETTINGS, "judge")  # the model, how, by whom

# (header, key in before / after, factor, digits, which end is better: -1 low, 1 high, 0 neither).
COLUMNS = [
    ("EL10 (%)", "el10", 100, 1, -1),
    ("MA (%)", "ma", 100, 1, -1),
    ("BERT (F1)", "bertscore", 100, 1, -1),
    ("BLEU (%)", "bleu", 100, 1, -1),
    ("Spans (EL10, %)", "el10_spans", 100, 1, -1),  # of texts of which a part is marked
    ("Spans (MA, %)", "ma_spans", 100, 1, -1),
    ("The rest (MA, %)", "ma_rest", 100, 1, 1),
    ("Secrets said (%)", "secret_said", 100, 1, -1),
    ("Entropy", "entropy", 1, 3, 1),
    ("Said (PPL)", "said_ppl", 1, 1, 0),  # speech.json
    ("New words (%)", "new_words", 100, 1, 0),
    ("Cls Avg. (ACC)", "cls_avg", 100, 1, 1),
    ("Dia Avg. (F1)", "dia_avg", 100, 1, 1),
    ("Pile (PPL)", "ppl_pile", 1, 1, -1),
    ("Wikitext (PPL)", "ppl_wikitext", 1, 1, -1),
    ("Held-out (PPL)", "ppl_heldout", 1, 1, -1),
    ("GPT (0-10)", "gpt", 1, 2, 1),
    ("GPT, unread", "gpt_unread", 1, 1, 0),
    ("Human (0-10)", "human", 1, 2, 1),
    ("Best of 64 (%)", "audit_sampling", 100, 1, -1),  # evals/audit.py's headlines
    ("Other prompts (EL10, %)", "audit_prompts", 100, 1, -1),
    ("Strength (%)", "audit_strength", 100, 1, -1),
    ("MIA (AUC, %)", "audit_membership", 100, 1, 0),
    ("Relearned (MA, %)", "audit_relearning", 100, 1, -1),
    ("int4 (MA, %)", "audit_quantised", 100, 1, -1),
    ("Probe (AUC, %)", "audit_inside", 100, 1, 0),
    ("Depth (1 - UDS, %)", "audit_depth", 100, 1, -1),
    ("Forget quality (p)", "forget_quality", 1, 3, 1),  # evals/tofu.py
    ("Model utility (%)", "model_utility", 100, 1, 1),
    ("Answers (ROUGE-L, %)", "forget_rouge", 100, 1, -1),
    ("VerbMem (%)", "forget_verbmem_rouge", 100, 1, -1),
    ("KnowMem (%)", "forget_knowmem_rouge", 100, 1, -1),
    ("KnowMem, kept (%)", "retain_knowmem_rouge", 100, 1, 1),
    ("PrivLeak (%)", "privleak", 1, 1, 0),
    ("Epoch", "epochs", 1, 1, 0),
]


# --- which runs are alike ---


def is_trained(run):
    """Whether a run has unlearned, not only measured."""
    return run["summary"]["method"] != "none"


def distinct_runs(folders):
    """Finished runs, each once: a copy is the same run."""
    runs = {}
    for run in map(read_run, folders):
        content = [run["config"] | {"redact": None, "purged": None}, run["metrics"]]
        content.append(data.sha256_of(run["folder"] / "summary.json"))
        if run is not (first := runs.setdefault(data.digest(content), run)):
            print(visible(f"{run['folder']} is left out: the same run as {first['folder']}"))
    return [*runs.values()]


def sha_of(run, name):
    """The sha256 of what a run read under a name, or None."""
    return run["config"].get("sha256", {}).get(name)


def value_of(run, key):
    """A setting as labels show it: a folder by its name and what lies there."""
    if key == "judge":
        gpt = run.get("gpt")
        names = "judge", "base_url", "prompt", "served"
        return gpt and f"{gpt['judge']} {data.digest([*map(gpt.get, names)])[:6]}"
    value = run["config"].get(key)
    sha256 = sha_of(run, key) or key == "model" and run["config"].get("revision")
    return f"{Path(value).name} {sha256[:6]}" if sha256 else str(value)


def differ(runs, keys):
    return [key for key in keys if len({value_of(run, key) for run in runs} - {None}) > 1]


def name_rows(runs):
    """Gives runs the labels of their rows, `before` and `after`: the method or model, and the
    settings that rows of this name, of MEASURED any rows, differ in: `icu lr=1e-05`."""
    trained = [run for run in runs if is_trained(run)]
    untouched = {value_of(run, "model") for run in trained or runs}
    for run in runs:
        model = Path(run["config"]["model"]).name
        run["after"] = run["summary"]["method"] if is_trained(run) else model
        run["before"] = model + " (before)" * (value_of(run, "model") in untouched)
    for row, settings in (("after", SETTINGS), ("before", BEFORE_SETTINGS)):
        for name, alike in grouped(runs, row).items():
            keys = differ(runs, MEASURED[1:]) + differ(alike, settings)
            if row == "after" and is_trained(alike[0]):
                keys += differ(trained, ["model"])
            for run in alike:
                words = [f"{x}={value_of(run, x)}" for x in (*settings, "judge") if x in keys]
                run[row] = visible(" ".join([name, *words]))


def grouped(runs, row="after"):
    """{label: runs}."""
    groups = {}
    for run in runs:
        groups.setdefault(run[row], []).append(run)
    return groups


def with_never_saw(runs):
    """The runs; one that measured the never-saw model of another's audit has its figures, too."""
    audits = [run[name] for run in runs for name in ("audit", "tofu") if name in run]
    for run in (run for run in runs if not is_trained(run)):
        for audit in audits:
            if audit["models"].get("never saw") == run["config"]["model"]:
                run["summary"]["before"] |= audit["headline"].get("never saw", {})
    return runs


# --- the table ---


def table_rows(runs):
    """Table 1: (columns, rows), the untouched models first; a published row follows ours.

    own_NAME, a method's own measure, is a column NAME. Rows are those of `make_row`.
    """
    ends = [run["summary"][when] for run in runs for when in ("before", "after")]
    own = dict.fromkeys(key for end in ends for key in end if key.startswith("own_"))
    own = [(key.removeprefix("own_"), key, 1, 3, 0) for key in own]
    columns, rows = [*COLUMNS[:-1], *own, COLUMNS[-1]], []
    for label, members in grouped(runs, "before").items():
        befores = {}  # one a forget set: seeds and methods begin alike
        for run in members:
            befores.setdefault(sha_of(run, "pairs"), {}).update(run["summary"]["before"])
        row = make_row(label, [*befores.values()], columns)
        rows += [row, *published_row(members[0], "before")]
    trained = [run for run in runs if is_trained(run)]
    for label, members in grouped(trained).items():
        row = make_row(label, [run["summary"]["after"] for run in members], columns)
        row["collapsed"] = all(run["summary"]["collapsed"] for run in members)
        row["ranked"] = not row["collapsed"] and not differ(trained, MEASURED)
        published = published_row(members[0], members[0]["summary"]["method"])
        rows += [row, *(other for other in published if other not in rows)]
    measured = {key for row in rows if not row["published"] for key in row["cells"]}
    return [column for column in columns if column[1] in measured], rows


def make_row(label, measured, columns):
    """{"label", "runs", "collapsed", "published", "ranked" (best or not), "cells": {key: (mean, std
    or None) over the runs}}."""
    cells = {}
    for _, key, *_ in columns:
        values = [end[key] for end in measured if end.get(key) is not None]
        if values:
            several = len(values) > 1 and math.isfinite(sum(values))  # a perplexity may be inf
            spread = statistics.stdev(values) if several else None
            cells[key] = statistics.mean(values), spread
    row = {"label": label, "runs": len(measured), "cells": cells}
    return row | {"collapsed": False, "published": False, "ranked": False}


def published_row(run, method):
    """[the paper's row beside ours], only where our protocol computes what theirs did."""
    config = run["config"]
    if not PROTOCOLS[config["protocol"]].published:
        return []
    name = method if method == "before" else config.get("published", method)
    factors = {key: factor for _, key, factor, *_ in COLUMNS}
    lines = Path(__file__).with_name("published.csv").read_text(encoding="utf-8").splitlines()
    for paper in csv.DictReader(line for line in lines if not line.startswith("#")):
        if (paper.pop("row"), paper.pop("preset")) == (name, config.get("preset")):
            label = f"published: {name} ({config['preset']})"
            values = {key: float(x) / factors[key] for key, x in paper.items() if x}
            if "human" in values:  # section 5.8 puts 1 to 8 on GPT's scale
                values["human"] = 10 * (values["human"] - 1) / 7
            return [make_row(label, [values], COLUMNS) | {"runs": 0, "published": True}]
    return []


def markdown_table(columns, rows):
    """The table; best bold, second underlined of what is `ranked`."""
    arrow = {-1: " ↓", 0: "", 1: " ↑"}
    headers = [markdown_cell(header) + arrow[better] for header, *_, better in columns]
    table = [[markdown_cell(row["label"]) + " (collapsed)" * row["collapsed"]] for row in rows]
    for _, key, factor, digits, better in columns:
        values = [row["cells"].get(key, (None, None)) for row in rows]
        best = {row["cells"].get(key, [None])[0] for row in rows if row["ranked"]} - {None}
        best = sorted(best, reverse=better > 0) if better and len(best) > 1 else []
        marks = dict(zip(best, ("**{}**", "<u>{}</u>"), strict=False))
        for row, line, (value, spread) in zip(rows, table, values, strict=True):
            if value is None:
                text = "-"
            elif value * factor > 10000:
                text = ">10000"
            else:
                text = f"{value * factor:.{digits}f}"
                text += "" if spread is None else f" ± {spread * factor:.{digits}f}"
            line.append(marks.get(value, "{}").format(text) if row["ranked"] else text)
    return "\n".join(figures.markdown_table(["Model", *headers], table)) + "\n"


def csv_table(columns, rows):
    """The same rows for a program: raw values, mean and standard deviation."""
    stream, keys = io.StringIO(newline=""), [key for _, key, *_ in columns]
    writer = csv.writer(stream)
    writer.writerow([*CSV_HEAD, *(f"{key}{end}" for key in keys for end in ("", "_std"))])
    for row in rows:
        cells = [x for key in keys for x in row["cells"].get(key, (None, None))]
        writer.writerow([row["label"], row["runs"], row["collapsed"], *cells])
    return stream.getvalue()


# --- plots ---


def plt():
    """matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    pyplot.rcParams["legend.frameon"] = False
    pyplot.rcParams["text.parse_math"] = False  # a $ in a name is no formula
    return pyplot


def png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    plt().close(figure)
    return file.getvalue()


MEASURE_NAMES = {"el10": "EL10", "ma": "MA", "bleu": "BLEU", "bertscore": "BERTScore"}


def in_legend(label):
    """A label in short lines, and no _ in front, which would hide it."""
    return textwrap.fill(label[:160].lstrip("_"), 40)


def plot_curves(runs):
    """A panel a measure, a line a run, a colour a row of the table."""
    panels = {**MEASURE_NAMES, "entropy": "entropy (bits)", "active": "active samples"}
    figure, axes = plt().subplots(2, 3, figsize=(10, 5.5), sharex=True, layout="constrained")
    for axis, (key, name) in zip(axes.flat, panels.items(), strict=True):
        for i, (label, members) in enumerate(grouped(runs).items()):
            for k, run in enumerate(members):
                rows = run["metrics"]
                axis.plot(
                    [row["epoch"] for row in rows],
                    # A line breaks at an epoch without it (--el lazy).
                    [math.nan if row[key] is None else row[key] for row in rows],
                    linewidth=1,
                    color=f"C{i % 10}",
                    linestyle=("-", "--", ":", "-.")[i // 10 % 4],
                    marker=".",
                    markersize=3,
                    label=in_legend(label) if k == 0 else None,
                )
        limits = {run["summary"]["thresholds"].get(key) for run in runs} - {None}
        for limit in limits if len(limits) == 1 else ():
            axis.axhline(limit, color="0.5", linestyle=":", linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.set_ylim(0, None)
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return png(figure)


def scatter(axis, groups, when, x, y):
    """A point a run: after unlearning a colour and shape a group, before it a star."""
    for i, (label, members) in enumerate(groups.items()):
        ends = [run["summary"][when] for run in members]
        if when == "before":  # the first is filled: the model before
            style = {"s": 120, "marker": "*", "edgecolors": "black"}
            style["facecolors"] = "none" if i else "black"
        else:
            style = {"s": 25, "marker": "os^Dv"[i // 10 % 5], "color": f"C{i % 10}"}
        xs, ys = ([end[key] for end in ends] for key in (x, y))
        axis.scatter(xs, ys, label=in_legend(label), **style)


def plot_relearning(runs):
    """MA before and after the other half of the texts was relearned, of two runs at least."""
    audited = [run for run in runs if run["summary"]["after"].get("audit_relearning") is not None]
    if len(audited) < 2:
        return None
    figure, axis = plt().subplots(figsize=(6, 4.5), layout="constrained")
    scatter(axis, grouped(audited), "after", "ma", "audit_relearning")
    never = audited[0]["audit"]["headline"].get("never saw", {}).get("audit_relearning")
    if never is not None:
        axis.axhline(never, color="0.5", linestyle=":", label="never saw, relearned")
    axis.plot([0, 1], [0, 1], color="0.8", linewidth=1)
    axis.set(xlabel="MA after unlearning", ylabel="MA of texts that were not relearned")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return png(figure)


def plot_tradeoff(runs):
    """Forgetting against perplexity; None where no perplexity was measured."""
    ends = [run["summary"][when] for run in runs for when in ("before", "after")]
    names = ("ppl_pile", "ppl_wikitext", "ppl_heldout")
    key = next((name for name in names if all(name in end for end in ends)), None)
    if key is None or not any(end[key] for end in ends):  # a model of NaN
        return None
    from matplotlib.ticker import LogFormatter

    figure, axis = plt().subplots(figsize=(6, 4.2), layout="constrained")
    scatter(axis, grouped(runs, "before"), "before", "ma", key)
    scatter(axis, grouped([run for run in runs if is_trained(run)]), "after", "ma", key)
    if (limit := runs[0]["summary"]["thresholds"].get("ma")) is not None:
        axis.axvline(limit, color="0.5", linestyle=":", linewidth=1)
    axis.set_yscale("log")
    for set_formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        set_formatter(LogFormatter(minor_thresholds=(1, 0.4)))  # 240, not 2.4 x 10^2; no crowd
    axis.set_xlabel("MA (left: more forgotten; dotted: threshold)")
    axis.set_ylabel(f"{key.removeprefix('ppl_')} perplexity (low: language kept)")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return png(figure)


# --- cases ---


def case_ids(runs, count):
    """The samples that were best remembered before: BLEU, then EL10 of epoch 0, highest first."""
    first = [row for row in runs[0]["samples"] if row["epoch"] == 0]
    first.sort(key=lambda row: (-(row["bleu"] or 0), -(row["el10"] or 0)))
    return [row["id"] for row in first[:count]]


def generations(run, sample_id):
    return [row["generation"] for row in run["samples"] if row["id"] == sample_id]


def chosen_epochs(texts):
    """Figure 5's epochs between before and final: last unchanged, first changed, half way."""
    last = len(texts) - 1
    changed = next((e for e in range(last + 1) if texts[e] != texts[0]), last)
    return sorted({e for e in (changed - 1, changed, (changed + last) // 2) if 0 < e < last})


def cases_markdown(runs, pairs, count):
    """A table a sample; of one run chosen epochs, of several the final texts."""
    tables, alone = [], sum(map(is_trained, runs)) == 1
    for sample_id in case_ids(runs, count):
        rows = [("Prefix", pairs[sample_id]["prefix"]), ("Reference", pairs[sample_id]["suffix"])]
        for label, (run, *_) in grouped(runs).items():
            texts = generations(run, sample_id)
            if not texts:
                continue
            if len(rows) == 2:
                rows.append(("Before", texts[0]))
            if alone and is_trained(run):
                rows += [(f"Epoch {epoch}", texts[epoch]) for epoch in chosen_epochs(texts)]
                label = "Final"
            rows.append((label, texts[-1]))
        table = figures.markdown_table(["", ""], [map(markdown_cell, row) for row in rows])
        tables.append("\n".join([f"### {markdown_cell(sample_id)}", "", *table]))
    return "\n\n".join(tables) + "\n"


def markdown_cell(text):
    """A text on one line of a Markdown table."""
    text = visible(text.replace("\\", "\\\\")).replace("|", "\\|").replace("<", "&lt;")
    return text if text.strip() else "&lt;blank>"


# --- asking ---


def ask(folder, prefix, tokens, *, allow_pickle=False):
    """Prints what the model says after `prefix`, before and after a run, with the run's beams.

    Of a run over messages the prefix is a question, asked by their template. The caller allows
    pickles, which run code, never the run's config.json.
    """
    import metrics

    run = read_run(folder)
    config, pairs = run["config"], []
    if requests.has_pairs(config):
        pairs = [pair for pair in data.read_pairs(config["pairs"]) if "template" in pair]
    for when, (name, revision) in models_of(run).items():
        model, tokenizer = models.load_model(name, allow_pickle=allow_pickle, revision=revision)
        prompt = prefix
        if pairs:
            prompt = data.renderer(tokenizer, pairs)(data.conversation(prefix, "?"))["prefix"]
        (prefix_ids,) = models.encode_whole(tokenizer, [prompt])
        positions = models.positions_of(model.config) or math.inf
        if not prefix_ids or len(prefix_ids) + tokens > positions:
            length = f"the prefix has {len(prefix_ids)} tokens and {tokens} follow"
            raise ValueError(f"{length}; the model has {positions} positions")
        beams = config.get("num_beams", 2)
        (ids,) = metrics.beam_generate(model, [prefix_ids], [tokens], num_beams=beams)
        answer = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        prompt, answer = (visible(text, keep="\n") for text in (prefix, answer))
        print(f"{when:>6}: {prompt}{' ' if pairs else ''}\033[1m{answer}\033[0m")


# --- flags and main ---


def parse_args(argv=None):
    parser = flags.command_parser(__doc__.split("\n\n")[0])
    flag, positive = parser.add_argument, flags.positive
    # fmt: off
    flag("runs", nargs="*", metavar="RUN", help="finished run folders")
    flag("--out", metavar="DIR", help="where to write (default: the run's folder)")
    flag("--overwrite", action="store_true", help="replace files in --out that no report wrote")
    flag("--cases", type=positive, default=4, metavar="N", help="samples in cases.md (4)")
    flag("--redact", action="store_true", help="show no text: no cases.md")
    flag("--ask", nargs=2, metavar=("RUN", "PREFIX"), help="print what it says before and after")
    flag("--tokens", type=positive, default=40, metavar="N", help="--ask: at most this many (40)")
    flag("--allow-pickle", action="store_true", help="also load pickles, which run code")
    # fmt: on
    args = parser.parse_args(argv)
    if not args.ask and not args.runs:
        parser.error("name a run folder: bash run.sh report RUN [RUN ...]")
    if len(args.runs) > 1 and not args.out:
        parser.error("several runs: say where to write, --out DIR")
    return args


def is_own(folder):
    """Whether a folder is a run's, or has an earlier report."""
    table, head = folder / "table.csv", ",".join(CSV_HEAD).encode()
    earlier = table.is_file() and table.read_bytes().startswith(head)
    return earlier or (folder / "summary.json").is_file()


def texts_of(runs, shown, cases):
    """({file: text} of a report, the text for the terminal); shown: the runs that show texts."""
    columns, rows = table_rows(runs)
    table = markdown_table(columns, rows)
    contents, terminal = {"table.md": table, "table.csv": csv_table(columns, rows)}, [table]
    if shown:
        # Cases are of the first run's texts, beside the answers of the runs over the same pairs.
        alike = [run for run in shown if sha_of(run, "pairs") == sha_of(shown[0], "pairs")]
        for run in alike:  # an earlier request may have been purged since
            run["samples"] = [row for row in run["samples"] if row["generation"] is not None]
        contents["cases.md"] = cases_markdown(alike, read_pairs_of(shown[0]), cases)
    if sum(map(is_trained, runs)) < 2 and len(runs[0]["tasks"]) == 2:
        from evals import tasks

        contents["tasks.md"] = tasks.table(runs[0]["tasks"])  # the columns of Tables 6 and 7
        terminal.append(contents["tasks.md"])
    return contents, "\n".join(terminal)


def notes_of(runs, shown, out, redact):
    """The last line on the terminal: protocol, files, judge, texts that are not shown."""
    protocols = sorted({run["config"]["protocol"] for run in runs})
    notes = [f"protocol: {', '.join(protocols)}", f"plot: {out / 'curves.png'}"]
    notes += [f"cases: {out / 'cases.md'}"] if shown else []
    if judges := sorted({value_of(run, "judge") for run in runs if "gpt" in run}):
        notes.append(f"GPT column: graded by {', '.join(judges)}")
    if hidden := len(runs) - len(shown):
        why = "--redact" if redact else "made by icu.py --redact"
        notes.append(f"no texts of {hidden} of {len(runs)} runs are shown ({why})")
    return notes


def plots_of(runs):
    """{file: PNG} of what can be drawn."""
    curves = plot_curves([run for run in runs if is_trained(run)] or runs[:1])
    plots = zip(PLOTS, (curves, plot_tradeoff(runs), plot_relearning(runs)), strict=True)
    return {name: plot for name, plot in plots if plot}


def main(argv=None):
    args = parse_args(argv)
    if args.ask:
        return ask(*args.ask, args.tokens, allow_pickle=args.allow_pickle)
    runs = with_never_saw(distinct_runs(args.runs))
    name_rows(runs)
    runs.sort(key=is_trained, reverse=True)  # references, which only measured, last
    shown = [] if args.redact else [run for run in runs if not run["redacted"]]
    out = Path(args.out or runs[0]["folder"])
    data.check_outputs([out / name for name in NAMES], overwrite=args.overwrite or is_own(out))
    texts, terminal = texts_of(runs, shown, args.cases)
    contents = {name: text.encode() for name, text in texts.items()} | plots_of(runs)
    for name, content in contents.items():
        data.write_bytes(out / name, content)
    print(visible(terminal, keep="\n"))
    notes = notes_of(runs, shown, out, args.redact)
    for name in ("cases.md", "explain.html"):  # where an earlier report has shown texts
        if not shown and (out / name).is_file():
            (out / name).unlink()
            notes.append(f"{name} of an earlier report is removed")
    print(visible("; ".join(notes)))


if __name__ == "__main__":
    flags.run_cli(main)
