"""What runs with equal seeds say about two settings: Student's interval, a verdict, Holm.

The rule is in results/README.md.
"""

import math
import statistics
from typing import NamedTuple

# Student's t with 1, 2, ... degrees of freedom: 95 % lie within plus and minus this
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Difference(NamedTuple):
    """A figure of one setting minus that of another, over the seeds that both were run with."""

    values: list[float]  # one for each pair of runs that have the figure
    done: int  # pairs that were run, diverged ones included
    planned: int
    mean: float | None  # None without a value
    half: float | None  # of the 95 % interval; None with fewer than two values
    p: float | None  # two-sided, for a true difference of 0

    def __str__(self) -> str:
        if self.half is None:
            return "" if self.mean is None else f"{self.mean:+.2f} (no interval)"
        return f"{self.mean:+.2f} ({self.mean - self.half:+.2f} to {self.mean + self.half:+.2f})"

    @property
    def verdict(self) -> str:
        if self.done < self.planned or self.half is None:
            return f"none yet: {self.done} of {self.planned}"
        if abs(self.mean) <= self.half:
            return "no difference shown"
        return "held" if self.mean > 0 else "did not hold"


def difference(better: dict[int, float | None], other: dict, planned: int) -> Difference:
    """From the figures of two settings by seed; None is that of a run that diverged."""
    seeds = [seed for seed in range(planned) if seed in better and seed in other]
    pairs = [(better[seed], other[seed]) for seed in seeds]
    values = [a - b for a, b in pairs if a is not None and b is not None]
    n, mean, half, p = len(values), None, None, None
    if n:
        mean = statistics.mean(values)
    if n > 1:
        error = statistics.stdev(values) / math.sqrt(n)
        half = T95[n - 2] * error
        p = student(mean / error, n - 1) if error else float(mean == 0)
    return Difference(values, len(seeds), planned, mean, half, p)


def student(t: float, df: int) -> float:
    """P(|T| > |t|) for Student's T with df degrees of freedom (Abramowitz and Stegun 26.7.3-4)."""
    angle, odd = math.atan(abs(t) / math.sqrt(df)), df % 2
    term, inside = math.cos(angle) ** odd, 0.0
    for k in range(1 + odd, df, 2):
        inside += term
        term *= k / (k + 1) * math.cos(angle) ** 2
    inside *= math.sin(angle)
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


def holm(ps: list[float | None], level: float = 0.05) -> list[bool]:
    """Which hypotheses Holm's procedure rejects, all p together; None is not counted."""
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    rejected = [False] * len(ps)
    for rank, (p, i) in enumerate(order):
        if p > level / (len(order) - rank):
            break
        rejected[i] = True
    return rejected
