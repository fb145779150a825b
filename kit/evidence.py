"""What evals/audit.py found as figures with intervals, as sentences in fixed words, and as audit.md."""

import math

import numpy as np

RESAMPLES, FEW = 1000, 8  # fewer texts than FEW say nothing


def resampled_means(values, seed=0):
    """The means (RESAMPLES,) of as many samples of n from n numbers (n,), with replacement: the bootstrap, seeded."""
    return values[
        np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    ].mean(axis=1)


def bootstrap(values, *, seed=0):
    """{"value", "low", "high", "n"}: the mean of a number a text and its 95 % percentile interval.

    None stands for no number. Of fewer than FEW texts: {"value": None, "n", "why"}.
    """
    values = np.array([value for value in values if value is not None], dtype=float)
    if len(values) < FEW:
        return {"value": None, "n": len(values), "why": f"cannot be told with n = {len(values)}"}
    # "nearest": no arithmetic between infinities
    low, high = np.percentile(resampled_means(values, seed), [2.5, 97.5], method="nearest")
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


AS_NEVER, MORE, LESS = (
    "as a model that never saw them",
    "still more than that",
    "less than that, which tells, too",
)


def verdict(after, never, *, seed=0):
    """One of the fixed sentences for two lists of a number a text, higher = more is left; None stands for no number.

    Paired where they are of the same texts (of like length), by whether the interval of the mean difference holds 0.
    """
    pairs = [(a, b) for a, b in zip(after, never, strict=False) if a is not None and b is not None]
    if len(pairs) < FEW:
        return f"cannot be told with n = {len(pairs)}"
    found = bootstrap([a - b for a, b in pairs], seed=seed)
    return MORE if found["low"] > 0 else LESS if found["high"] < 0 else AS_NEVER


def privleak(of_model, of_never):
    """Privacy leakage as MUSE has it (arXiv:2407.06460): (AUC - AUC_never) / AUC_never; 0 is none, both ways leak."""
    return (of_model - of_never) / of_never


def robustness(rise_never, rise_model):
    """R = min(rise of a model that never saw / rise of the unlearned, 1): 1 where nothing comes back that was there."""
    return min(max(rise_never, 0.0) / rise_model, 1.0) if rise_model > 0 else 1.0


# --- the report: found is {model: {question: {measure: a number a text}}} ---

MODELS = ("after", "before", "never saw")


def report(found, titles, headlines, *, seed):
    """Of each question its title, its headline measure, a sentence of fixed words and, as "figures", {measure: {model:
    a bootstrapped figure}}; "derived": what follows of two models; "headline": {model: {audit_QUESTION: value}}.
    """
    figures = {question: {} for question in titles}
    for model, questions in found.items():
        for question, measures in questions.items():
            for name, values in measures.items():
                figures[question].setdefault(name, {})[model] = bootstrap(values, seed=seed)
    sentences = {}
    for question, title in titles.items():
        after, never = (
            found.get(m, {}).get(question, {}).get(headlines[question])
            for m in ("after", "never saw")
        )
        said = (
            verdict(after, never, seed=seed)
            if never
            else "cannot be told without a model that never saw them"
        )
        sentences[question] = f"{title} {said[0].upper()}{said[1:]}."
    derived, heads = derive(figures), {}
    for model in found:
        cells = {q: figures[q].get(headlines[q], {}).get(model, {}).get("value") for q in titles}
        heads[model] = {f"audit_{question}": value for question, value in cells.items()}
    told = {"titles": titles, "headlines": headlines, "sentences": sentences}
    return told | {"figures": figures, "derived": derived, "headline": heads}


def derive(figures):
    """{name: value} of what two models give together: privleak beside the AUCs, and R of relearning."""

    def values(measure, *names):
        found = [measure.get(name, {}).get("value") for name in names]
        return None if None in found else found

    found = {}
    for name, cells in figures.get("membership", {}).items():
        if name.startswith("AUC") and (pair := values(cells, "after", "never saw")) and pair[1]:
            found[name.replace("AUC", "privleak")] = privleak(*pair)
    curve = [
        cells for name, cells in figures.get("relearning", {}).items() if name.startswith("MA")
    ]
    ends = (
        [values(cells, "never saw", "after") for cells in (curve[0], curve[-1])]
        if curve
        else [None]
    )
    if None not in ends:
        found["R of relearning"] = robustness(ends[1][0] - ends[0][0], ends[1][1] - ends[0][1])
    return found


def cell(figure):
    """A figure as a table shows it: the mean and its interval, or why there is none."""
    if figure is None:
        return "-"
    if figure["value"] is None:
        return figure["why"]
    digits = 1 if abs(figure["value"]) >= 10 else 3
    return f"{figure['value']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def markdown(found):
    """audit.md: a sentence a question, then a table a question."""
    lines = [f"# What is still in {found['model']}", ""]
    lines += [f"- {sentence}" for sentence in found["sentences"].values()]
    about = (
        f"Means over n = {found['n']} texts [95 % bootstrap interval]; higher is more memorised."
    )
    lines += [
        "",
        f"{about} Evidence of suppression: what no question finds may still be there.",
        "",
    ]
    names = [name for name in MODELS if name in found["models"]]
    for question, measures in found["figures"].items():
        lines += [
            f"## {found['titles'][question]}",
            "",
            f"| | {' | '.join(names)} |",
            "|---" * (len(names) + 1) + "|",
        ]
        for measure, cells in measures.items():
            lines.append(
                f"| {measure} | " + " | ".join(cell(cells.get(name)) for name in names) + " |"
            )
        lines.append("")
    lines += [f"- {name}: {value:.3f}" for name, value in found["derived"].items()]
    return "\n".join(lines).rstrip() + "\n"


def finite(value):
    """The same for JSON: an infinity as text, since JSON has none."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
