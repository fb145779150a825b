"""How far grades agree: Pearson, Spearman, quadratic-weighted kappa, Krippendorff's alpha, and bootstrap intervals.

evals/judge.py uses it. Each function is its textbook formula, and None where the formula has no value (too few grades, or
grades that are all the same); tests/test_judge.py compares with scipy, scikit-learn and published examples.
"""

import math

import numpy as np


def pearson(x, y):
    """Pearson's r of two lists of numbers of the same length, -1 to 1."""
    if len(x) < 2 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def ranks(values):
    """The rank of each value from 1; equal values share the mean of their places."""
    first, count = {}, {}
    for place, value in enumerate(sorted(values), start=1):
        first.setdefault(value, place)
        count[value] = count.get(value, 0) + 1
    return [first[value] + (count[value] - 1) / 2 for value in values]


def spearman(x, y):
    """Spearman's rho: Pearson's r of the ranks."""
    return pearson(ranks(x), ranks(y))


def quadratic_kappa(x, y):
    """Cohen's kappa of two lists of whole grades, a disagreement weighing its square: 1 alike, 0 as by chance.

    1 - sum of (x_i - y_i)^2 / n over its mean for all pairs (x_i, y_j). Cohen 1968, Psychological Bulletin 70(4).
    """
    if not x:
        return None
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    seen = ((x - y) ** 2).mean()
    by_chance = (x**2).mean() + (y**2).mean() - 2 * x.mean() * y.mean()  # the mean of (x_i - y_j)^2
    return float(1 - seen / by_chance) if by_chance > 1e-12 else None


def krippendorff_alpha(units):
    """Krippendorff's alpha for ordered grades, from any number of raters with gaps: 1 alike, 0 as by chance.

    units: for each rated thing the list of its grades, whoever gave them; those with fewer than two say nothing.
    1 - D_o / D_e over the coincidences o_ck, with the ordinal distance (sum of n_g, g = c .. k, - (n_c + n_k) / 2)^2.
    Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".
    """
    units = [grades for grades in units if len(grades) > 1]
    grades = sorted({grade for unit in units for grade in unit})
    if not units:
        return None
    given = np.array(
        [[unit.count(grade) for grade in grades] for unit in units], dtype=float
    )  # [U, G]
    weight = given / (
        given.sum(axis=1, keepdims=True) - 1
    )  # a unit of m grades has m (m - 1) pairs and counts as m
    o = given.T @ weight - np.diag(
        weight.sum(axis=0)
    )  # [G, G], pairs of grades within a unit, none with itself
    n = o.sum(axis=1)  # [G], how often each grade was given
    middle = n.cumsum() - n / 2  # [G], the mean rank of a grade but for a constant
    distance = (middle[:, None] - middle[None]) ** 2
    expected = (n[:, None] * n[None] * distance).sum()
    return float(1 - (n.sum() - 1) * (o * distance).sum() / expected) if expected else None


def interval(groups, statistic, *, draws=1000, seed=0):
    """[low, high], the 95% percentile bootstrap interval of statistic(list of groups), groups drawn with replacement.

    A group is what hangs together, such as all grades of one text. Draws for which the statistic is None are left out;
    None for fewer than two groups, or where more than half of the draws have no value.
    """
    if len(groups) < 2:
        return None
    random = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        value = statistic([groups[i] for i in random.integers(len(groups), size=len(groups))])
        if value is not None and math.isfinite(value):
            found.append(value)
    return (
        [float(x) for x in np.quantile(found, (0.025, 0.975))] if len(found) > draws / 2 else None
    )
