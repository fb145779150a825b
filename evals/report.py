"""Finished runs -> tables, plots and case studies; and asking a model a prefix before and after.

    python evals/report.py RUN [RUN ...] --out DIR       # table.md, table.csv, curves.png, tradeoff.png, cases.md
    python evals/report.py RUN --redact                  # the same without a text: no cases.md
    python evals/report.py RUN --explain                 # and RUN/explain.html: each token's probability before and after
    python evals/report.py RUN --speech FILE             # two columns more: how what was said reads to the model before
    python evals/report.py --ask RUN "some prefix"       # what the model says before and after
    python evals/report.py RUN --certificate             # what was done, with hashes and no text (docs/certificate.md)
    python evals/report.py --verify RUN/certificate.json    # whether it still holds

Reads run folders (kit/finished.py checks them) and knows nothing of how a run is made. All is computed before the first
file is written, and only files that this command has written are replaced.
The table has the columns of the paper's Table 1 (arXiv:2407.20271), those that the runs have measured; the case table
is that of its Figures 4 and 5.
"""

import csv
import io
import math
import os
import statistics
import textwrap
from itertools import zip_longest
from pathlib import Path

from kit import data, flags, models, paths
from kit.protocols import PROTOCOLS
from kit.runs import BEFORE_SETTINGS, SETTINGS, models_of, read_pairs_of, read_run
from kit.text import visible

# Column: (header, key in before / after, factor, digits, which end is better: -1 low, 1 high, 0 neither).
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
    ("Said (PPL)", "said_ppl", 1, 1, 0),  # --speech
    ("New words (%)", "new_words", 100, 1, 0),
    ("Cls Avg. (ACC)", "cls_avg", 100, 1, 1),
    ("Dia Avg. (F1)", "dia_avg", 100, 1, 1),
    ("Pile (PPL)", "ppl_pile", 1, 1, -1),
    ("Wikitext (PPL)", "ppl_wikitext", 1, 1, -1),
    ("Held-out (PPL)", "ppl_heldout", 1, 1, -1),
    ("GPT (0-10)", "gpt", 1, 2, 1),
    ("Human (0-10)", "human", 1, 2, 1),
    ("Best of 64 (%)", "audit_sampling", 100, 1, -1),  # evals/audit.py's headlines
    ("Other prompts (EL10, %)", "audit_prompts", 100, 1, -1),
    ("Strength (%)", "audit_strength", 100, 1, -1),
    ("MIA (AUC, %)", "audit_membership", 100, 1, 0),
    ("Relearned (MA, %)", "audit_relearning", 100, 1, -1),
    ("int4 (MA, %)", "audit_quantised", 100, 1, -1),
    ("Probe (AUC, %)", "audit_inside", 100, 1, 0),
    ("Epoch", "epochs", 1, 1, 0),
]

# Tables 1 and 4 of the paper, in their units: EL10 %, MA %, BERT F1 %, entropy, Cls %, Dia %, Pile PPL, Wikitext PPL,
# GPT 0-10 (before: Table 3's), epochs. inf stands for the paper's ">10000".
INF = float("inf")
KEYS = (
    "el10",
    "ma",
    "bertscore",
    "entropy",
    "cls_avg",
    "dia_avg",
    "ppl_pile",
    "ppl_wikitext",
    "gpt",
    "epochs",
)
PUBLISHED = {
    "neo125m": {
        "before": (51.9, 76.8, 70.3, 4.139, 43.5, 10.0, 20.1, 38.0, 3.75, None),
        "opt": (7.5, 52.9, 49.2, 3.014, 42.7, 10.8, 29.1, 38.0, 3.08, None),
        "kumpr": (0.7, 19.1, 29.7, 0.712, 35.1, 3.7, INF, INF, 1.05, 3.2),
        "po": (17.4, 49.4, 42.2, 1.643, 39.0, 1.8, 61.2, 158.5, 1.99, 79.0),
        "kl": (4.9, 56.2, 54.3, 3.670, 42.6, 9.9, 27.0, 54.0, 3.64, 14.0),
        "llmu": (3.3, 58.7, 43.1, 1.825, 42.7, 10.3, 23.6, 47.4, 2.98, 7.0),
        "icu": (4.4, 55.6, 53.3, 3.833, 43.3, 10.3, 21.6, 40.1, 3.92, 21.4),
    },
    "neo1.3b": {
        "before": (98.2, 92.3, 86.3, 4.640, 49.7, 12.3, 13.2, 18.7, 2.72, None),
        "opt": (31.0, 67.8, 65.8, 3.856, 51.7, 13.3, 18.0, 19.2, 3.63, None),
        "kumpr": (0.8, 8.1, 26.6, 0.817, 34.0, 0.1, INF, INF, 1.26, 2.0),
        "po": (20.0, 58.4, 55.1, 2.564, 44.8, 4.8, 26.6, 44.6, 2.56, 30.0),
        "kl": (3.7, 61.5, 38.7, 1.627, 47.4, 11.8, 17.5, 26.0, 2.18, 7.0),
        "llmu": (4.4, 63.3, 41.4, 1.805, 47.4, 11.9, 17.5, 25.7, 2.43, 8.0),
        "icu": (4.7, 51.3, 52.7, 3.900, 49.0, 12.1, 14.1, 19.3, 4.33, 29.2),
    },
    "neo2.7b": {
        "before": (96.7, 93.7, 90.2, 4.719, 52.4, 12.3, 12.0, 16.2, 2.11, None),
        "opt": (34.4, 70.1, 66.8, 3.921, 53.9, 13.7, 16.3, 16.7, 3.65, None),
        "kumpr": (1.4, 18.7, 26.5, 0.519, 34.0, 5.4, 4926.2, INF, 1.00, 6.6),
        "po": (20.4, 58.6, 57.5, 2.772, 49.0, 7.6, 24.1, 36.5, 2.66, 31.0),
        "kl": (3.4, 62.5, 41.3, 1.730, 51.3, 12.5, 14.7, 20.9, 2.39, 6.0),
        "llmu": (4.9, 63.2, 40.7, 1.639, 50.9, 12.4, 16.0, 22.4, 2.26, 8.0),
        "icu": (4.5, 48.3, 52.7, 3.725, 52.1, 12.1, 13.1, 17.0, 4.40, 32.6),
    },
    "tinyllama": {
        "before": (56.2, 76.8, 71.2, 4.742, 46.2, 12.4, 12.8, 10.7, None, None),
        "kumpr": (0.0, 0.3, 21.4, 2.015, 34.9, 0.0, INF, 2152.2, 1.99, 4.0),
        "po": (3.1, 52.6, 38.3, 1.392, 40.8, 11.7, 13.9, 11.5, 1.82, 3.0),
        "kl": (1.8, 52.2, 31.9, 2.753, 42.8, 12.3, 36.7, 14.0, 1.63, 6.0),
        "llmu": (2.5, 46.0, 41.9, 3.683, 45.6, 12.4, 14.9, 11.2, 2.82, 8.0),
        "icu": (1.4, 44.0, 44.8, 3.932, 45.8, 12.3, 14.3, 11.0, 3.35, 10.0),
    },
}
# Table 3: what people gave, 1 to 8, which section 5.8 puts on GPT's scale by 10 (s - 1) / 7.
HUMAN = {
    "neo125m": {"before": 3.1, "opt": 3.7, "kumpr": 1.1, "icu": 5.7},
    "neo1.3b": {"before": 1.8, "opt": 3.1, "kumpr": 1.4, "icu": 4.8},
    "neo2.7b": {"before": 1.5, "opt": 3.2, "kumpr": 1.1, "icu": 4.7},
}
# The OPT rows of Table 1 are measured as presets of their own.
for table in (PUBLISHED, HUMAN):
    table |= {
        f"opt{size}": {"before": table[f"neo{size}"]["opt"]} for size in ("125m", "1.3b", "2.7b")
    }


# --- which runs are alike ---


def label_of(name, config, peers, settings):
    """`name` and whatever settings its peers differ in, such as `icu lr=1e-05`."""
    differ = [key for key in settings if len({str(peer.get(key)) for peer in peers}) > 1]
    return visible(" ".join([name, *(f"{key}={config.get(key)}" for key in differ)]))


def is_trained(run):
    """Whether a run has unlearned; else it has measured a model: the one before, or one that never saw the texts."""
    return run["summary"]["method"] != "none"


def name_of(run):
    return run["summary"]["method"] if is_trained(run) else Path(run["config"]["model"]).name


def group_runs(runs):
    """Runs -> {label: runs}: those that differ only in forget set and seed share a row of the table."""
    groups = {}
    for run in runs:
        peers = [r["config"] for r in runs if name_of(r) == name_of(run)]
        groups.setdefault(label_of(name_of(run), run["config"], peers, SETTINGS), []).append(run)
    return groups


def group_befores(runs):
    """Runs -> {label: runs}: those that began with the same model, measured alike."""
    groups, trained = {}, {run["config"]["model"] for run in runs if is_trained(run)}
    for run in runs:
        model = run["config"]["model"]
        name = Path(model).name + (" (before)" if model in trained or not trained else "")
        peers = [r["config"] for r in runs if Path(r["config"]["model"]).name == Path(model).name]
        groups.setdefault(label_of(name, run["config"], peers, BEFORE_SETTINGS), []).append(run)
    return groups


# --- the table ---


def table_rows(runs):
    """Table 1: (columns, rows), a row = {"label", "runs", "collapsed", "cells": {key: (mean, std or None)}}.

    First the untouched models, then each group of runs; under the released protocol the published row behind ours.
    """
    groups, rows = group_runs(runs), []
    for label, members in group_befores(runs).items():
        befores = []  # one a forget set: seeds and methods begin alike
        for run in members:
            if run["summary"]["before"] not in befores:
                befores.append(run["summary"]["before"])
        rows += [make_row(label, befores), *published_row(members[0], "before")]
    for label, members in groups.items():
        if not is_trained(members[0]):
            continue  # its figures are a row above
        row = make_row(label, [run["summary"]["after"] for run in members])
        row["collapsed"] = any(run["summary"]["collapsed"] for run in members)
        published = published_row(members[0], members[0]["summary"]["method"])
        rows += [
            row,
            *(r for r in published if r not in rows),
        ]  # once, whatever the number of settings
    columns = [
        c for c in COLUMNS if any(c[1] in row["cells"] for row in rows if not row.get("published"))
    ]
    return [c for c in columns if c[1] != "gpt" or len(judges_of(runs)) == 1], rows


def judges_of(runs):
    """The (model, hash of the question) that the runs' samples were graded by; grades of several are not compared."""
    return sorted({(run["gpt"]["judge"], run["gpt"]["prompt"]) for run in runs if "gpt" in run})


def make_row(label, measured):
    """Mean and standard deviation over the runs of what each has measured."""
    cells = {}
    for _, key, *_ in COLUMNS:
        values = [m[key] for m in measured if m.get(key) is not None]
        if values:
            cells[key] = (
                statistics.mean(values),
                statistics.stdev(values) if len(values) > 1 else None,
            )
    return {"label": label, "runs": len(measured), "collapsed": False, "cells": cells}


def published_row(run, method):
    """The paper's row beside ours, only where our protocol computes what theirs did."""
    preset, name = (
        run["config"].get("preset"),
        method if method == "before" else run["config"].get("published", method),
    )
    figures = PUBLISHED.get(preset, {}).get(name)
    if not PROTOCOLS[run["config"]["protocol"]].published or figures is None:
        return []
    factors = {key: factor for _, key, factor, _, _ in COLUMNS}
    cells = {
        key: (x / factors[key], None) for key, x in zip(KEYS, figures, strict=True) if x is not None
    }
    if grade := HUMAN.get(preset, {}).get(name):
        cells["human"] = 10 * (grade - 1) / 7, None
    return [
        {
            "label": f"published: {name} ({preset})",
            "runs": 0,
            "collapsed": False,
            "cells": cells,
            "published": True,
        }
    ]


def markdown_table(columns, rows):
    """The table in Markdown: best bold, second underlined, among our rows after unlearning that did not collapse."""
    ranked = [
        row
        for row in rows
        if not row.get("published") and "epochs" in row["cells"] and not row["collapsed"]
    ]

    def cell(row, column):
        _, key, factor, digits, better = column
        if key not in row["cells"]:
            return "-"
        value, spread = row["cells"][key]
        text = ">10000" if value * factor > 10000 else f"{value * factor:.{digits}f}"
        text += (
            f" ± {spread * factor:.{digits}f}"
            if spread is not None and value * factor <= 10000
            else ""
        )
        order = sorted({-better * r["cells"][key][0] for r in ranked if key in r["cells"]})
        if (
            row in ranked
            and better
            and len(order) > 1
            and value in (-better * x for x in order[:2])
        ):
            text = f"**{text}**" if -better * value == order[0] else f"<u>{text}</u>"
        return text

    arrow = {-1: " ↓", 0: "", 1: " ↑"}
    lines = [
        "| "
        + " | ".join(["Model", *(header + arrow[better] for header, _, _, _, better in columns)])
        + " |"
    ]
    lines.append("|" + "---|" * (len(columns) + 1))
    for row in rows:
        label = markdown_cell(row["label"]) + (" (collapsed)" if row["collapsed"] else "")
        lines.append("| " + " | ".join([label, *(cell(row, column) for column in columns)]) + " |")
    return "\n".join(lines) + "\n"


def csv_table(columns, rows):
    """The same rows for a program: raw values, mean and standard deviation."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    keys = [key for _, key, *_ in columns]
    writer.writerow(
        ["model", "runs", "collapsed", *(f"{key}{end}" for key in keys for end in ("", "_std"))]
    )
    for row in rows:
        cells = [row["cells"].get(key, (None, None)) for key in keys]
        writer.writerow(
            [row["label"], row["runs"], row["collapsed"], *(x for pair in cells for x in pair)]
        )
    return stream.getvalue()


# --- plots ---


def plt():
    """matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    pyplot.rcParams.update(
        {"legend.frameon": False, "text.parse_math": False}
    )  # a $ in a name is no formula
    return pyplot


def png(figure):
    """A figure as the bytes of a file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    plt().close(figure)
    return file.getvalue()


def look(i, line=False):
    """How the i-th of many is drawn: ten colours, then the same with other lines or points."""
    kind = (
        {"linestyle": ("-", "--", ":", "-.")[i // 10 % 4]}
        if line
        else {"marker": "os^Dv"[i // 10 % 5]}
    )
    return {"color": f"C{i % 10}", **kind}


MEASURE_NAMES = {"el10": "EL10", "ma": "MA", "bleu": "BLEU", "bertscore": "BERTScore"}


def curve(rows, key):
    """(epochs, values); NaN, where a line breaks, for an epoch without it: --el lazy leaves EL10 out."""
    return [row["epoch"] for row in rows], [
        math.nan if row[key] is None else row[key] for row in rows
    ]


def in_legend(label):
    """A label as a plot can show it: lines of like length, and no _ in front, which would hide it."""
    return textwrap.fill(label[:160].lstrip("_"), 40)


def plot_run(run):
    """One run over its epochs: EL10, MA, BLEU and BERTScore with their thresholds, active samples and entropy."""
    pyplot = plt()
    rows = run["metrics"]
    epochs = [row["epoch"] for row in rows]
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(7, 5.5), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    for i, (key, name) in enumerate(MEASURE_NAMES.items()):
        top.plot(*curve(rows, key), color=f"C{i}", marker="o", markersize=3, label=name)
        limit = run["summary"]["thresholds"].get(key)
        if limit is not None:
            top.axhline(limit, color=f"C{i}", linestyle=":", linewidth=1)
    top.set_ylim(0, 1.02)
    top.set_ylabel("fraction (dotted: threshold)")
    top.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    bottom.bar(epochs, [row["active"] for row in rows], color="0.8", width=0.6)
    bottom.set_ylabel("samples still active")
    bottom.set_xlabel("epoch")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    entropy = bottom.twinx()
    entropy.spines["right"].set_visible(True)
    entropy.plot(epochs, [row["entropy"] for row in rows], color="C4", marker="o", markersize=3)
    entropy.set_ylim(0, 1.1 * max(row["entropy"] or 0 for row in rows) or 1)
    entropy.set_ylabel("entropy (bits)", color="C4")
    summary = run["summary"]
    title = f"{summary['method']}, {summary['protocol']} protocol; stopped: {summary['stopped']}"
    figure.suptitle(visible(title), fontsize=10)
    return png(figure)


def plot_curves(runs):
    """Several runs: one panel a measure, one line a run, one colour a row of the table."""
    pyplot = plt()
    panels = {**MEASURE_NAMES, "entropy": "entropy (bits)", "active": "active samples"}
    figure, axes = pyplot.subplots(2, 3, figsize=(10, 5.5), sharex=True, layout="constrained")
    for axis, (key, name) in zip(axes.flat, panels.items(), strict=True):
        for i, (label, members) in enumerate(group_runs(runs).items()):
            for k, run in enumerate(members):
                epochs, values = curve(run["metrics"], key)
                marker = "." if any(map(math.isnan, values)) else None  # a point alone has no line
                how = {"label": in_legend(label) if k == 0 else None, "marker": marker}
                axis.plot(epochs, values, linewidth=1, **look(i, line=True), **how)
        limits = {run["summary"]["thresholds"].get(key) for run in runs} - {None}
        for limit in limits if len(limits) == 1 else ():
            axis.axhline(limit, color="0.5", linestyle=":", linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.set_ylim(0, None)
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return png(figure)


def plot_relearning(runs):
    """MA after unlearning against MA after relearning the other half of the texts: who only hides moves up. None where
    fewer than two runs were audited.
    """
    audited = [run for run in runs if run["summary"]["after"].get("audit_relearning") is not None]
    if len(audited) < 2:
        return None
    figure, axis = plt().subplots(figsize=(6, 4.5), layout="constrained")
    for i, (label, members) in enumerate(group_runs(audited).items()):
        points = [run["summary"]["after"] for run in members]
        ma, again = [p["ma"] for p in points], [p["audit_relearning"] for p in points]
        axis.scatter(ma, again, s=25, **look(i), label=in_legend(label))
    never = audited[0]["audit"]["headline"].get("never saw", {}).get("audit_relearning")
    if never is not None:
        axis.axhline(never, color="0.5", linestyle=":", label="never saw, relearned")
    axis.plot([0, 1], [0, 1], color="0.8", linewidth=1)
    axis.set_xlabel("MA after unlearning")
    axis.set_ylabel("MA of texts that were not relearned")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return png(figure)


def with_never_saw(runs):
    """The runs; one that has measured a model that another's audit compared with has that model's figures, too."""
    asked = {
        run["audit"]["models"].get("never saw"): run["audit"] for run in runs if "audit" in run
    }
    for run in runs:
        if not is_trained(run) and run["config"]["model"] in asked:
            run["summary"]["before"] |= asked[run["config"]["model"]]["headline"].get(
                "never saw", {}
            )
    return runs


def plot_tradeoff(runs):
    """Forgetting against perplexity: a point a run, a star a model before. None where no perplexity was measured."""
    ends = [run["summary"][when] for run in runs for when in ("before", "after")]
    key = next(
        (k for k in ("ppl_pile", "ppl_wikitext", "ppl_heldout") if all(k in end for end in ends)),
        None,
    )
    if key is None or not any(end[key] for end in ends):  # a model of NaN
        return None
    from matplotlib.ticker import LogFormatter

    pyplot = plt()
    figure, axis = pyplot.subplots(figsize=(6, 4.2), layout="constrained")

    def scatter(label, points, **how):
        axis.scatter(
            [p["ma"] for p in points], [p[key] for p in points], label=in_legend(label), **how
        )

    for i, (label, members) in enumerate(
        group_befores(runs).items()
    ):  # the first filled: the model before
        star = {
            "marker": "*",
            "s": 120,
            "edgecolors": "black",
            "facecolors": "none" if i else "black",
        }
        scatter(label, [run["summary"]["before"] for run in members], **star)
    for i, (label, members) in enumerate(
        group_runs([run for run in runs if is_trained(run)]).items()
    ):
        scatter(label, [run["summary"]["after"] for run in members], s=25, **look(i))
    if (limit := runs[0]["summary"]["thresholds"].get("ma")) is not None:
        axis.axvline(limit, color="0.5", linestyle=":", linewidth=1)
    axis.set_yscale("log")
    for set_formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        set_formatter(
            LogFormatter(minor_thresholds=(1, 0.4))
        )  # 240, not 2.4 x 10^2; no crowd over several decades
    axis.set_xlabel("MA (left: more forgotten; dotted: threshold)")
    axis.set_ylabel(f"{key.removeprefix('ppl_')} perplexity (low: language kept)")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return png(figure)


# --- cases ---


def case_ids(runs, count):
    """The samples that were best remembered before: BLEU, then EL10 of epoch 0, highest first."""
    first = [row for row in runs[0]["samples"] if row["epoch"] == 0]
    return [
        row["id"]
        for row in sorted(first, key=lambda row: (-(row["bleu"] or 0), -(row["el10"] or 0)))[:count]
    ]


def chosen_epochs(generations):
    """Figure 5's epochs between before and final: the last unchanged one, the first changed one and one half way."""
    last = len(generations) - 1
    changed = next((e for e in range(last + 1) if generations[e] != generations[0]), last)
    return sorted({e for e in (changed - 1, changed, (changed + last) // 2) if 0 < e < last})


def cases_markdown(runs, pairs, count):
    """Figures 4 to 6: a table a sample; for one run also chosen epochs, for several the final text of each."""
    tables = []
    for sample_id in case_ids(runs, count):
        rows = [("Prefix", pairs[sample_id]["prefix"]), ("Reference", pairs[sample_id]["suffix"])]
        for label, members in group_runs(runs).items():
            said = [row["generation"] for row in members[0]["samples"] if row["id"] == sample_id]
            if not said:
                continue
            if len(rows) == 2:
                rows.append(("Before", said[0]))
            alone = is_trained(members[0]) and sum(map(is_trained, runs)) == 1
            if alone:
                rows += [(f"Epoch {epoch}", said[epoch]) for epoch in chosen_epochs(said)]
            rows.append(("Final" if alone else label, said[-1]))
        lines = [f"### {markdown_cell(sample_id)}", "", "| | |", "|---|---|"]
        lines += [f"| {markdown_cell(name)} | {markdown_cell(text)} |" for name, text in rows]
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"


def markdown_cell(text):
    """A text on one line of a Markdown table, line breaks and controls written out; nothing is shown as <blank>."""
    text = visible(text.replace("\\", "\\\\")).replace("|", "\\|").replace("<", "&lt;")
    return text if text.strip() else "&lt;blank>"


def tasks_markdown(run):
    """The columns of Tables 6 and 7 before and after a run, where evals/tasks.py has measured both."""
    from evals import tasks

    return tasks.table(run["tasks"])


def side_by_side(runs, pairs, count, width=105):
    """What the model said before, and at the end of each run, in columns for the terminal."""
    lines, groups = (
        [],
        {"before": runs[0], **{label: members[0] for label, members in group_runs(runs).items()}},
    )
    room = (width + 3) // len(groups) - 3
    for sample_id in case_ids(runs, count):
        lines += textwrap.wrap("… " + one_line(pairs[sample_id]["prefix"])[-width:], width)
        columns = []
        for label, run in groups.items():
            said = [row["generation"] for row in run["samples"] if row["id"] == sample_id] or [""]
            text = one_line(said[0 if label == "before" else -1])
            columns.append([f"  {label}"[:room], *(textwrap.wrap(text, room) or ["<blank>"])])
        for row in zip_longest(*columns, fillvalue=""):
            lines.append(" | ".join(f"{cell:<{room}}" for cell in row).rstrip())
        lines.append("")
    return "\n".join(lines)


def one_line(text):
    return visible(" ".join(text.split()))


# --- asking ---


def ask(folder, prefix, tokens, *, allow_pickle=False):
    """Prints what the model says behind `prefix` before and after a run (beam 2, like the run's own generations).

    Run, models and prefix are checked before a weight is loaded. The folder may be a stranger's: that pickles, which
    can run code, may be loaded says the caller, never its config.json.
    """
    import metrics

    run = read_run(folder)
    data.check_string(prefix, "the prefix")
    sides = models_of(run)
    prompts = [
        prompt_of(*side, prefix, tokens, allow_pickle=allow_pickle) for side in sides.values()
    ]
    for (when, (name, revision)), prompt in zip(sides.items(), prompts, strict=True):
        model, tokenizer = models.load_model(name, allow_pickle=allow_pickle, revision=revision)
        (said,) = metrics.beam_generate(
            model, [prompt], [tokens], num_beams=run["config"].get("num_beams", 2)
        )
        said = tokenizer.decode(said, clean_up_tokenization_spaces=False)
        asked, said = (visible(text, keep="\n") for text in (prefix, said))
        print(f"{when:>6}: {asked}\033[1m{said}\033[0m")


def prompt_of(name, revision, prefix, tokens, *, allow_pickle):
    """The ids that a model is asked. ValueError: no model, or no room in it for the prefix and `tokens` more."""
    config, tokenizer = models.check_model(name, allow_pickle=allow_pickle, revision=revision)
    models.check_texts(config, tokenizer, {"the prefix": prefix})
    prompt = models.begin(models.bos_of(tokenizer), models.encode(tokenizer, prefix))
    if not prompt:
        raise ValueError("the prefix has no token; give it some text")
    positions = models.positions_of(config) or math.inf
    if len(prompt) + tokens > positions:
        raise ValueError(
            f"the prefix has {len(prompt)} tokens and {tokens} follow; the model has {positions} positions"
        )
    return prompt


# --- flags and main ---


def parse_args(argv=None):
    from extras import certificate

    parser = flags.command_parser(__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="finished run folders")
    parser.add_argument(
        "--out", metavar="DIR", help="where to write (default: the run folder, if there is one run)"
    )
    parser.add_argument(
        "--cases", type=flags.positive, default=4, metavar="N", help="samples in cases.md (4)"
    )
    parser.add_argument(
        "--redact", action="store_true", help="show no text: no cases.md, nothing side by side"
    )
    parser.add_argument(
        "--explain", action="store_true", help="also RUN/explain.html: each token before and after"
    )
    parser.add_argument(
        "--speech", nargs="+", metavar="FILE",
        help="also how what was said reads to the model before, and the share of its words that no pair and no text of "
        "these files has",
    )  # fmt: skip
    parser.add_argument(
        "--ask",
        nargs=2,
        metavar=("RUN", "PREFIX"),
        help="print what the model says before and after",
    )
    parser.add_argument(
        "--tokens",
        type=flags.positive,
        default=40,
        metavar="N",
        help="--ask: how many tokens it may say (40)",
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="also load pickles, which run code"
    )
    certificate.add_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.ask and (args.runs or args.redact or args.explain or args.speech):
        raise ValueError(
            "--ask prints one run's answers: pass no other runs, no --redact, --explain, --speech with it"
        )
    if args.explain and args.redact:
        raise ValueError("--explain shows texts and --redact none: pass one of them")
    if certificate.wanted(args):
        return args
    if not args.ask and not args.runs:
        raise ValueError("name a run folder: python evals/report.py RUN [RUN ...]")
    if len(args.runs) > 1 and not args.out:
        raise ValueError("several runs: say where to write, --out DIR")
    return args


def is_plot(path):
    head = path.read_bytes()[:200]
    return head.startswith(b"\x89PNG") and b"Matplotlib" in head


def remove_texts(out):
    """What an earlier report has shown texts in goes, as it would be replaced; a list of what is to say of it."""
    texts = {"cases.md": paths.is_cases, "explain.html": paths.is_explanation}
    gone = [name for name, own in texts.items() if (out / name).is_file() and own(out / name)]
    for name in gone:
        (out / name).unlink()
    return [f"{name} of an earlier report is removed" for name in gone]


# Whether a file of this name is one that this command has written.
OWN = {
    "table.md": paths.begins_with("| Model |"), "table.csv": paths.begins_with("model,runs,collapsed"),
    "cases.md": paths.is_cases, "curves.png": is_plot, "tradeoff.png": is_plot, "relearned.png": is_plot,
    "tasks.md": paths.begins_with("| | "),
}  # fmt: skip


def check_out(out, names, reads):
    """ValueError unless files of these names can be written in the folder `out` without harm to others."""
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"--out {out}: is no folder")
    paths.check_outputs([(out / name, OWN[name]) for name in names], reads=reads, overwrite=True)


def names_of(runs, shown):
    """The files of text that a report writes; `shown` are the runs whose texts may be seen."""
    tasks = sum(map(is_trained, runs)) < 2 and len(runs[0]["tasks"]) == 2
    return ["table.md", "table.csv", *["cases.md"] * bool(shown), *["tasks.md"] * tasks]


def texts_of(runs, shown, cases):
    """{file: text} of a report, those of `names_of`, and the text for the terminal."""
    columns, rows = table_rows(runs)
    contents, said = (
        {"table.md": markdown_table(columns, rows), "table.csv": csv_table(columns, rows)},
        [],
    )
    if shown:
        # Cases are shown of the first run's texts, beside those of the runs over the same pairs.
        sources = [run["config"].get("sha256", {}).get("pairs") or run["folder"] for run in shown]
        alike = [run for run, source in zip(shown, sources, strict=True) if source == sources[0]]
        for run in alike:  # an earlier request may have been purged since
            run["samples"] = [row for row in run["samples"] if row["generation"] is not None]
        pairs = read_pairs_of(shown[0])
        contents["cases.md"] = cases_markdown(alike, pairs, cases)
        said += [side_by_side(alike, pairs, min(cases, 3))] if len(group_runs(alike)) < 4 else []
    said.append(contents["table.md"])
    if "tasks.md" in names_of(runs, shown):
        contents["tasks.md"] = tasks_markdown(runs[0])
        said.append(contents["tasks.md"])
    return contents, "\n".join(said)


def main(argv=None):
    from extras import certificate

    args = parse_args(argv)
    if certificate.wanted(args):
        return certificate.run(args)
    if args.ask:
        return ask(*args.ask, args.tokens, allow_pickle=args.allow_pickle)
    runs = with_never_saw([read_run(folder) for folder in dict.fromkeys(args.runs)])
    runs.sort(key=is_trained, reverse=True)  # references, which only measured, last
    curves = [run for run in runs if is_trained(run)] or runs[:1]
    shown = [] if args.redact else [run for run in runs if not run["redacted"]]
    out, plots = (
        Path(args.out or runs[0]["folder"]),
        ["curves.png", "tradeoff.png", "relearned.png"],
    )
    reads = [
        run["folder"] / name
        for run in runs
        for name in ("config.json", "summary.json", *paths.GROWING)
    ]
    check_out(
        out,
        [*names_of(runs, shown), *plots],
        [*reads, *(run["config"]["pairs"] for run in shown[:1])],
    )
    if args.speech or args.explain:
        from extras import explain
    if args.speech:
        explain.add_speech(runs, args.speech, allow_pickle=args.allow_pickle)
    contents, said = texts_of(runs, shown, args.cases)
    pages = explain.pages(runs, allow_pickle=args.allow_pickle) if args.explain else {}
    drawn = [plot_run(curves[0]) if len(curves) == 1 else plot_curves(curves)]
    drawn += [plot_tradeoff(runs), plot_relearning(runs)]
    contents = {name: text.encode() for name, text in contents.items()} | dict(
        zip(plots, drawn, strict=True)
    )
    contents = {out / name: content for name, content in contents.items() if content is not None}
    for path, content in (contents | pages).items():
        data.write_bytes(path, content)
    print(visible(said, keep="\n"))
    protocols = sorted({run["config"]["protocol"] for run in runs})
    last = [f"protocol: {', '.join(protocols)}", f"plot: {out / 'curves.png'}"]
    last += [f"cases: {out / 'cases.md'}"] if shown else []
    if judges := judges_of(runs):
        names = ", ".join(f"{model} (question {question[:8]})" for model, question in judges)
        last.append(
            f"GPT column: {'graded by' if len(judges) == 1 else 'left out, the graders differ:'} {names}"
        )
    last += [f"explained: {page}" for page in pages]
    if len(shown) < len(runs):
        why = "--redact" if args.redact else "made by icu.py --redact"
        last.append(f"no texts of {len(runs) - len(shown)} of {len(runs)} runs are shown ({why})")
        last += remove_texts(out) if not shown else []
    print(visible("; ".join(last)))


if __name__ == "__main__":
    flags.run_cli(main)
