"""Statistics for comparing runs: tokens to a loss, noise between seeds, a power law over sizes."""

import math
import statistics
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kit.record import read_curves, read_record

# of Student's t distribution, by degrees of freedom: 95% of its values are within plus or minus this
T95 = (math.inf, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass
class Result:
    """A finished run, from its log directory."""

    log_dir: str

    @cached_property
    def record(self):
        return read_record(self.log_dir)

    @cached_property
    def curves(self):
        return read_curves(self.log_dir)

    @property
    def finished(self):
        """Whether the run has reached its last step."""
        steps, _ = self.curves.get("val", ((0,), ()))
        return steps[-1] > 0 and steps[-1] == self.record["flags"].get("max_steps")

    @property
    def final(self):
        """The last validation loss, in nats per token."""
        return self.curves["val"][1][-1]

    @property
    def tokens_per_step(self):
        return self.record["flags"]["total_batch_size"]

    @property
    def tokens(self):
        """The tokens that the whole run has read."""
        return self.record["flags"]["max_steps"] * self.tokens_per_step

    @property
    def seconds_per_token(self):
        """Of a typical training step: the median."""
        return 1 / statistics.median(self.curves["tok/s"][1])

    def tokens_to(self, loss):
        """The tokens after which the validation loss is at most `loss`, or None if it never is.

        The loss is interpolated linearly between evaluations.
        """
        steps, values = self.curves["val"]
        for i, value in enumerate(values):
            if value <= loss:
                part = (values[i - 1] - loss) / (values[i - 1] - value) if i else 1
                before = steps[i - 1] if i else 0
                return (before + part * (steps[i] - before)) * self.tokens_per_step
        return None


def t95(freedom):
    """95% of Student's t distribution with this many degrees of freedom is within +-(the result)."""
    return T95[freedom] if freedom < len(T95) else 1.96 + 2.7 / freedom


def interval(values):
    """The mean of values and half the width of its 95% interval, by Student's t: inf for a single value."""
    n = len(values)
    if n == 1:
        return values[0], math.inf
    return statistics.fmean(values), t95(n - 1) * statistics.stdev(values) / math.sqrt(n)


@dataclass
class PowerLaw:
    """loss = scale * size ** -exponent, fitted to three models or more by least squares of the logarithms."""

    sizes: list
    losses: list

    def __post_init__(self):
        x, y = np.log(self.sizes), np.log(self.losses)
        self.slope, self.intercept = np.polyfit(x, y, 1)
        self.freedom, self.center = len(x) - 2, x.mean()
        residuals = y - (self.intercept + self.slope * x)
        self.spread = ((x - self.center) ** 2).sum()
        self.noise = math.sqrt((residuals**2).sum() / self.freedom)

    @property
    def exponent(self):
        """The exponent and half the width of its 95% interval."""
        return -self.slope, t95(self.freedom) * self.noise / math.sqrt(self.spread)

    def predict(self, size):
        """The loss of one more model of this size, and the ends of its 95% interval."""
        x = math.log(size)
        error = self.noise * math.sqrt(1 + 1 / len(self.sizes) + (x - self.center) ** 2 / self.spread)
        half, middle = t95(self.freedom) * error, self.intercept + self.slope * x
        return tuple(math.exp(middle + sign * half) for sign in (0, -1, 1))


def with_deviation(values):
    """The mean of losses and their standard deviation, as text."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else " (one seed)"
    return f"{statistics.fmean(values):.4f}{deviation}"


def as_text(values, digits):
    """The mean of values with its 95% interval, as text."""
    mean, half = interval(values)
    if half == math.inf:
        return f"{mean:.{digits}f} (one seed)"
    return f"{mean:.{digits}f} ({mean - half:.{digits}f} to {mean + half:.{digits}f})"
