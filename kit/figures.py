"""Means with bootstrap intervals, and what a difference of two models means in fixed words."""

import math

import numpy as np

RESAMPLES, FEW = 1000, 8  # fewer texts than FEW say nothing

AS_NEVER = "as a model that never saw them"
MORE = "still more than that"
LESS = "less than that, which tells, too"


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


def verdict(after, never, *, seed=0):
    """One of the fixed sentences for two lists of a number (or None) a text, higher = more is left.

    Paired by text, by whether the interval of the mean difference holds 0.
    """
    pairs = [(a, b) for a, b in zip(after, never, strict=False) if a is not None and b is not None]
    figure = bootstrap([a - b for a, b in pairs], seed=seed)
    if figure["value"] is None:
        return figure["why"]
    return MORE if figure["low"] > 0 else LESS if figure["high"] < 0 else AS_NEVER
