"""Programs that XLA:CPU is known to get wrong, each against a float64 result of numpy.

Unguarded, both go wrong with jaxlib 0.10.2 (x86-64, AVX2), the first also with 0.12.0.1; under the guard of
``edgejax.core.guard`` all are right. A check compiles through ``compile_fn`` so that a test can plant a wrong number.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

TOLERANCE = 1e-5  # of the sum of magnitudes; float32 accumulation stays two orders below


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One check of the numbers this machine computes."""

    name: str
    passed: bool
    worst_error: float  # relative to the scale named in `detail`; infinity where a result was not finite
    tolerance: float
    detail: str


def check_sum_over_einsum(compile_fn: Compile = jax.jit) -> CheckResult:
    """``sum_ik (E C)_ik E_ik`` with ``C`` a broadcast scalar: the shape of many vector-Jacobian products.

    Unguarded, XLA:CPU is off by up to 31 orders of magnitude or returns NaN.
    """

    def program(e, c):
        return jnp.sum(jnp.einsum("bij,bjk->bik", e, jnp.broadcast_to(c, e.shape)) * e, axis=(1, 2))

    run = compile_fn(program)
    rng = np.random.default_rng(0)
    errors: dict[str, float] = {}
    for rows, width in ((1, 64), (4, 64), (8, 32), (16, 16), (64, 8)):
        e = rng.standard_normal((rows, width, width)).astype(np.float32)
        for c in (rng.standard_normal(()), rng.standard_normal((rows, 1, 1))):
            c = np.asarray(c, np.float32)
            wide = np.broadcast_to(c, e.shape).astype(np.float64)
            terms = np.einsum("bij,bjk->bik", e.astype(np.float64), wide) * e
            errors[f"[{rows}, {width}, {width}]"] = max(
                errors.get(f"[{rows}, {width}, {width}]", 0.0),
                _worst(np.asarray(run(e, c)), terms.sum((1, 2)), np.abs(terms).sum((1, 2))),
            )
    return _result("sum over einsum", errors, "the sum of magnitudes")


def check_vmapped_matvec(compile_fn: Compile = jax.jit) -> CheckResult:
    """``sum((M x)^2)`` for each row x of 32769: jax issue 39103. Unguarded, rows near the end are off by 0.8%."""
    matrix = np.eye(3, dtype=np.float32)

    def program(x):
        return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(x)

    run = compile_fn(program)
    errors = {}
    for n_rows in (32_767, 32_769):
        x = np.zeros((n_rows, 3), np.float32)
        x[:, 0] = np.arange(n_rows)
        expected = x[:, 0].astype(np.float64) ** 2
        errors[f"{n_rows} rows"] = _worst(np.asarray(run(x)), expected, np.maximum(expected, 1.0))
    return _result("vmapped matrix-vector product, then a sum", errors, "each row's value")


def numerics_checks(compile_fn: Compile = jax.jit) -> list[CheckResult]:
    """All reproducers.

    >>> import edgejax
    >>> [check.name for check in numerics_checks()]
    ['sum over einsum', 'vmapped matrix-vector product, then a sum']
    """
    return [check_sum_over_einsum(compile_fn), check_vmapped_matvec(compile_fn)]


def _worst(actual: np.ndarray, expected: np.ndarray, scale: np.ndarray) -> float:
    error = np.max(np.abs(actual.astype(np.float64) - expected) / scale)
    return float(error) if np.isfinite(error) else float("inf")


def _result(name: str, errors: dict[str, float], relative_to: str) -> CheckResult:
    where = max(errors, key=errors.__getitem__)
    return CheckResult(
        name=name,
        passed=errors[where] <= TOLERANCE,
        worst_error=errors[where],
        tolerance=TOLERANCE,
        detail=f"worst at {where}, relative to {relative_to}, against float64",
    )
