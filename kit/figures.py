"""Means with bootstrap intervals, and what a difference of two models means in fixed words.

"As a model that never saw them" means that the 95 % interval of the mean difference, text by text,
lies within MARGIN of 0: five points of a share or an area, or 0.05 nats a token. An interval that
only holds 0 would pass any model, if there are few texts. MARGIN is about half of what the nearest
of fourteen methods differs by in MA (docs/results.md).
"""

import math
import re

import numpy as np

RESAMPLES, FEW = 1000, 8  # fewer texts than FEW say nothing

MARGIN = 0.05
AS_NEVER = f"as a model that never saw them, within {MARGIN}"
MORE = "still more"
LESS = "less, which tells, too"


def draws(n, *, resamples=RESAMPLES, seed=0):
    """Indices (resamples, n) of samples of n from n with replacement: the one bootstrap."""
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
    """[low, high]: the 95 % percentile interval of statistic(list of groups).

    A group is what hangs together, such as all grades of one text. Draws without a finite statistic
    are left out; None where no more than half are left, and for fewer than two groups.
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


def verdict(after, never, says, *, seed=0):
    """What a model says, what one that never saw the texts says, what that means: a predicate.

    after, never: a number (or None) a text, higher = more is left; never is None where there is no
    such model. says: the verb and the rest, with {} for a mean: "recites {:.1%} of the tokens".
    """
    pairs = zip(after, after if never is None else never, strict=True)
    pairs = [(a, b) for a, b in pairs if None not in (a, b) and not math.isnan(a - b)]
    few = f"cannot be told with n = {len(pairs)}"
    if not pairs:
        return few
    mean, mean_never = np.mean(pairs, axis=0)
    sentence = says.format(mean)
    if never is None:
        return f"{sentence}: {few}, without a model that never saw them"
    number = re.search("{.*}", says)[0].format(mean_never)
    sentence = f"{sentence}, a model that never saw them {number}"
    differences = [a - b for a, b in pairs]
    figure = bootstrap(differences, seed=seed)
    if figure["value"] is None:
        return f"{sentence}: {few}"
    value, low, high = figure["value"], figure["low"], figure["high"]
    if max(-low, high) <= MARGIN:
        end = AS_NEVER
    else:
        end = MORE if low > 0 else LESS if high < 0 else few
    figures = f"difference {value:+.3f}, 95% from {low:+.3f} to {high:+.3f}"
    return f"{sentence}: {end} (n = {len(pairs)}, {figures}, of one text up to {max(differences):+.3f})"
