"""Two one-sided tests of equivalence, as an interval of paired differences inside a margin.

The mean of n paired differences d has the interval mean(d) +- t_{c} s / sqrt(n), s their standard deviation and t_c
the quantile of Student's t with n - 1 degrees of freedom at (1 + confidence) / 2. The 90% interval lies inside
(-margin, margin) exactly when both one-sided tests reject at 5% (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15,
657-680).
"""

import math
import statistics
from collections.abc import Sequence

EQUIVALENT, DIFFERENT, OPEN = "equivalent", "not equivalent", "inconclusive"


def t_central(t: float, dof: int) -> float:
    """P(|T| < t) for Student's T: the finite sums of Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even).

    >>> round(t_central(1.0, 1), 6), round(t_central(1.0, 2), 6)
    (0.5, 0.57735)
    """
    if dof < 1:
        raise ValueError(f"{dof} degrees of freedom: a spread needs two values at least")
    angle = math.atan2(t, math.sqrt(dof))
    term = math.cos(angle) if dof % 2 else 1.0
    total = 0.0
    for k in range(2 + dof % 2, dof + 1, 2):
        total += term
        term *= (k - 1) / k * math.cos(angle) ** 2
    if dof % 2:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def t_quantile(probability: float, dof: int) -> float:
    """The value below which Student's T lies with this probability, of 1/2 or more.

    >>> round(t_quantile(0.95, 7), 4)
    1.8946
    """
    if not 0.5 <= probability < 1:
        raise ValueError(f"probability {probability}: must be from 1/2 to below 1")
    central = 2 * probability - 1
    low, high = 0.0, 1.0
    while t_central(high, dof) < central:
        high *= 2
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        low, high = (middle, high) if t_central(middle, dof) < central else (low, middle)


def interval(differences: Sequence[float], confidence: float) -> tuple[float, float]:
    """The two-sided interval of the mean difference.

    >>> low, high = interval([0.01, 0.02, 0.03], 0.90)
    >>> round(low, 4), round(high, 4)
    (0.0031, 0.0369)
    """
    n, mean = len(differences), statistics.fmean(differences)
    half = t_quantile((1 + confidence) / 2, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return mean - half, mean + half


def verdict(low: float, high: float, margin: float) -> str:
    """``equivalent``: inside the margin. ``not equivalent``: wholly outside. Else ``inconclusive``.

    >>> verdict(-0.001, 0.004, 0.005), verdict(0.006, 0.009, 0.005), verdict(0.004, 0.006, 0.005)
    ('equivalent', 'not equivalent', 'inconclusive')
    """
    if -margin < low and high < margin:
        return EQUIVALENT
    return DIFFERENT if low > margin or high < -margin else OPEN
