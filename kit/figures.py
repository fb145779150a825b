"""Means with bootstrap intervals, and what a difference of two models means in fixed words.

"As a model that never saw them": the 95 % interval of the mean difference, text by text, lies
within MARGIN of 0. Merely to hold 0 is easy for few texts. The nearest of fourteen methods differs
by 0.09 (docs/results.md).
"""

import math
import re

import numpy as np

RESAMPLES, FEW = 1000, 8  # fewer texts than FEW say nothing

MARGIN = 0.05
AS_NEVER = f"as a model that never saw them, within {MARGIN}"
MORE = "still more"
LESS = "less, which tells, too"


def mean(values):
    """The mean of what is not None, or None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def draws(n, *, resamples=RESAMPLES, seed=0):
    """Indices (resamples, n) of samples of n from n with replacement."""
    return np.random.default_rng(seed).integers(0, n, (resamples, n))


def bootstrap(values, *, seed=0):
    """{"value", "low", "high", "n"}: the mean of a number a text and its 95 % percentile interval.

    None and NaN stand for no number. Of fewer than FEW texts: {"value": None, "n", "why"}.
    """
    values = np.array(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) < FEW:
        return {"value": None, "n": len(values), "why": f"cannot be told with n = {len(values)}"}
    means = values[draws(len(values), seed=seed)].mean(axis=1)  # (RESAMPLES,)
    # "nearest": no arithmetic between infinities
    low, high = np.percentile(means, [2.5, 97.5], method="nearest")
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def bootstrap_interval(statistic, groups, *, resamples=RESAMPLES, seed=0):
    """[low, high]: the 95 % percentile interval of statistic(list of groups), or None.

    Draws without a finite statistic are left out, if they are under a half.
    """
    if len(groups) < 2:
        return None
    values = [
        statistic([groups[i] for i in chosen])
        for chosen in draws(len(groups), resamples=resamples, seed=seed)
    ]
    values = [value for value in values if value is not None and math.isfinite(value)]
    if len(values) <= resamples / 2:
        return None
    return [float(x) for x in np.quantile(values, (0.025, 0.975))]


def markdown_table(head, rows):
    """The lines of a Markdown table of texts."""
    cells = [[f" {cell} |" if cell else " |" for cell in row] for row in (head, *rows)]
    head, *rows = ["|" + "".join(row) for row in cells]
    return [head, "|---" * len(cells[0]) + "|", *rows]


def verdict(after, never, says, *, seed=0):
    """What a model does, what one that never saw the texts does, and what that means.

    after, never (None: no such model): a number or None a text, higher = more is left. says: a verb
    with the mean, "recites {:.1%} of the tokens".
    """
    pairs = zip(after, after if never is None else never, strict=True)
    pairs = [(a, b) for a, b in pairs if None not in (a, b) and not math.isnan(a - b)]
    words = f"cannot be told with n = {len(pairs)}"
    if not pairs:
        return words
    mean, mean_never = np.mean(pairs, axis=0)
    if never is None:
        return f"{says.format(mean)}: {words}, without a model that never saw them"
    gaps = [a - b for a, b in pairs]
    figure = bootstrap(gaps, seed=seed)
    if figure["value"] is not None:
        low, high = figure["low"], figure["high"]
        if max(-low, high) <= MARGIN:
            words = AS_NEVER
        elif low > 0 or high < 0:
            words = MORE if low > 0 else LESS
        words += (
            f" (n = {figure['n']}, difference {figure['value']:+.3f}, 95% from {low:+.3f} to "
            f"{high:+.3f}, of one text up to {max(gaps):+.3f})"
        )
    number = re.search("{.*}", says)[0].format(mean_never)
    return f"{says.format(mean)}, a model that never saw them {number}: {words}"
