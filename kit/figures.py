"""Figures with intervals: the bootstrap."""

import math

import numpy as np


def bootstrap_interval(statistic, groups, *, resamples=1000, seed=0):
    """[low, high], the 95% percentile bootstrap interval of statistic(list of groups).

    A group is what hangs together, such as all grades of one text; groups are drawn with
    replacement. Draws for which the statistic is None or not finite are left out. None for fewer
    than two groups, or where at most half of the draws have a value.
    """
    if len(groups) < 2:
        return None
    random, values = np.random.default_rng(seed), []
    for _ in range(resamples):
        drawn = random.integers(len(groups), size=len(groups))
        value = statistic([groups[i] for i in drawn])
        if value is not None and math.isfinite(value):
            values.append(value)
    if len(values) <= resamples / 2:
        return None
    return [float(x) for x in np.quantile(values, (0.025, 0.975))]
