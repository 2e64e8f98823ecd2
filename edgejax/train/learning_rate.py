"""Learning rate over the steps: linear warm-up, then constant, linear or cosine decay.

With w warm-up steps of n in all and a peak p, step i (from 0) uses ``p (i + 1) / w`` while i < w, so that the first
step already learns; then, with x = (i - w) / (n - w) and final fraction f,

    cosine:  p (f + (1 - f) (1 + cos(pi x)) / 2)      (Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5)
    linear:  p (1 - (1 - f) x)
"""

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from edgejax.core.errors import ConfigError

SCHEDULES = ("cosine", "linear", "constant")


def make_schedule(
    kind: str, peak: float, *, steps: int, warmup: int | float = 0, final_fraction: float = 0.0
) -> optax.Schedule:
    """An optax schedule from the step (counted from 0) to the learning rate.

    Args:
      kind: ``"cosine"``, ``"linear"`` or ``"constant"`` after the warm-up.
      peak: the rate at the end of the warm-up.
      steps: optimizer steps of the whole run.
      warmup: steps of linear warm-up (int), or their share of ``steps`` (float below 1, rounded up).
      final_fraction: rate at ``steps`` as a share of the peak; the constant schedule takes none.

    Raises:
      ConfigError: an unknown kind, or a value outside its range.

    Example:
      >>> schedule = make_schedule("linear", 1.0, steps=10, warmup=2)
      >>> [round(float(schedule(i)), 3) for i in (0, 1, 2, 6)]
      [0.5, 1.0, 1.0, 0.5]
    """
    if kind not in SCHEDULES:
        raise ConfigError(f"no learning-rate schedule named {kind!r}; there are: {', '.join(SCHEDULES)}")
    if not (peak > 0 and np.isfinite(peak)):
        raise ConfigError(f"learning rate must be above 0 and finite, not {peak}")
    if steps < 1:
        raise ConfigError(f"a schedule needs at least 1 step, not {steps}")
    if not 0 <= final_fraction <= 1:
        raise ConfigError(f"the final learning-rate fraction must be between 0 and 1, not {final_fraction}")
    if kind == "constant" and final_fraction:
        raise ConfigError(
            f"a constant learning rate has no final fraction (asked for {final_fraction}); leave it 0"
        )
    n_warmup = warmup_steps(warmup, steps)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps - n_warmup, alpha=final_fraction),
        "linear": lambda: optax.linear_schedule(peak, peak * final_fraction, steps - n_warmup),
        "constant": lambda: optax.constant_schedule(peak),
    }[kind]()
    if n_warmup == 0:
        return after
    rising = optax.linear_schedule(peak / n_warmup, peak, n_warmup - 1) if n_warmup > 1 else lambda _: peak
    return optax.join_schedules([rising, after], [n_warmup])


def warmup_steps(warmup: int | float, steps: int) -> int:
    """Warm-up as a number of steps: an int is one already, a float below 1 is a share of ``steps``, rounded up.

    >>> warmup_steps(5, 100), warmup_steps(0.05, 100), warmup_steps(0.0, 100)
    (5, 5, 0)
    """
    if (
        isinstance(warmup, bool)
        or not 0 <= warmup < float("inf")
        or (isinstance(warmup, float) and warmup >= 1)
    ):
        raise ConfigError(
            f"warmup must be a number of steps (int) or a share of them (float below 1), not {warmup!r}"
        )
    n_warmup = int(np.ceil(round(warmup * steps, 6))) if isinstance(warmup, float) else int(warmup)
    if n_warmup >= steps:
        raise ConfigError(f"{n_warmup} warm-up steps leave none of the run's {steps} steps; use fewer")
    return n_warmup


def rates(schedule: optax.Schedule, steps: int) -> Float[np.ndarray, " steps"]:
    """The schedule's value at each step 0 .. steps - 1, float32 (what the log shows).

    >>> rates(make_schedule("constant", 0.5, steps=3), 3).tolist()
    [0.5, 0.5, 0.5]
    """
    values = jnp.asarray(schedule(jnp.arange(steps)), jnp.float32)  # type: ignore[arg-type]  # elementwise in all ours
    return np.broadcast_to(np.asarray(values), (steps,))
