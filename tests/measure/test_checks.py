"""The reproducers pass here, where the guard is in place, and notice numbers that are wrong."""

import jax
import jax.numpy as jnp
import pytest

from edgejax.measure.checks import check_sum_over_einsum, check_vmapped_matvec, numerics_checks

pytestmark = pytest.mark.quick


def planted(change):
    """``jax.jit`` that changes the results of what it compiles."""
    return lambda function: lambda *args: change(jax.jit(function)(*args))


def test_right_under_the_guard():
    for check in numerics_checks():
        assert check.passed, check
        assert check.worst_error <= check.tolerance


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda x: x * 1e31, 1e25),
        (lambda x: x.at[-1].multiply(1.008), 1e-5),  # what issue 39103 looks like: only the last row
        (lambda x: x.at[0].set(jnp.nan), float("inf")),
    ],
)
def test_wrong_numbers_are_found(change, error):
    check = check_vmapped_matvec(planted(change))
    assert not check.passed
    assert check.worst_error >= error


def test_wrong_sums_are_found():
    for change in (lambda x: x + 3.0, lambda x: x * jnp.inf, lambda x: -x):
        assert not check_sum_over_einsum(planted(change)).passed
