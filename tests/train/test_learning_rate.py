"""Schedules against the formulas of the module's docstring."""

import math

import numpy as np
import pytest

from edgejax.core.errors import ConfigError
from edgejax.train import make_schedule, rates, warmup_steps

pytestmark = pytest.mark.quick


def expected(kind: str, peak: float, steps: int, n_warmup: int, final: float) -> list[float]:
    values = []
    for i in range(steps):
        x = (i - n_warmup) / (steps - n_warmup)
        if i < n_warmup:
            values.append(peak * (i + 1) / n_warmup)
        elif kind == "cosine":
            values.append(peak * (final + (1 - final) * (1 + math.cos(math.pi * x)) / 2))
        elif kind == "linear":
            values.append(peak * (1 - (1 - final) * x))
        else:
            values.append(peak)
    return values


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "n_warmup"), [(1, 0), (2, 1), (7, 0), (20, 2), (20, 19), (31, 5)])
def test_values(kind, steps, n_warmup):
    final = 0.0 if kind == "constant" else 0.1
    schedule = make_schedule(kind, 3e-3, steps=steps, warmup=n_warmup, final_fraction=final)
    wanted = expected(kind, 3e-3, steps, n_warmup, final)
    np.testing.assert_allclose(rates(schedule, steps), wanted, rtol=2e-5)
    np.testing.assert_allclose([schedule(np.int32(i)) for i in range(steps)], wanted, rtol=2e-5)


def test_first_step_already_learns_and_peak_is_reached():
    values = rates(make_schedule("cosine", 1.0, steps=10, warmup=4), 10)
    assert values[0] == pytest.approx(0.25)
    assert values.max() == pytest.approx(1.0)
    assert values[3] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("warmup", "steps", "n"), [(0, 5, 0), (3, 5, 3), (0.05, 100, 5), (0.05, 10, 1), (0.3, 10, 3)]
)
def test_warmup_as_steps_or_share(warmup, steps, n):
    assert warmup_steps(warmup, steps) == n


@pytest.mark.parametrize("warmup", [-1, 1.0, 1.5, True, float("nan"), 10, 12, 10**400])
def test_bad_warmup(warmup):
    with pytest.raises(ConfigError, match="warm"):
        warmup_steps(warmup, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "cosin"}, "there are: cosine, linear, constant"),
        ({"peak": 0.0}, "not 0.0"),
        ({"peak": float("inf")}, "finite"),
        ({"steps": 0}, "not 0"),
        ({"final_fraction": 1.5}, "1.5"),
        ({"kind": "constant", "final_fraction": 0.5}, "no final fraction"),
    ],
)
def test_bad_values(changes, message):
    values = {"kind": "cosine", "peak": 1.0, "steps": 10, **changes}
    with pytest.raises(ConfigError, match=message):
        make_schedule(values.pop("kind"), values.pop("peak"), **values)
