"""Any optimizer of ``edgejax.optim`` or optax by its name, behind global-norm clipping, with no option ignored.

The gradient g of all trained leaves together is first scaled by ``min(1, clip_norm / |g|)`` (Pascanu et al. 2013,
arXiv 1211.5063, algorithm 1), then given to the named optimizer. Decoupled weight decay (Loshchilov and Hutter
2019, arXiv 1711.05101) skips norm scales and biases where optax lets a mask say so.
"""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from edgejax.core.arrays import PyTree
from edgejax.core.errors import ConfigError
from edgejax.optim import adamw4bit, adamw8bit, apollo, apollo_mini, lion8bit, scale_sgd, sgd8bit

# They have a learning rate in their signature, but are not optimizers a training step can drive.
_NOT_OPTIMIZERS = {
    "lbfgs": "its line search evaluates the loss again inside the update",
    "optimistic_adam": "it is deprecated; use optimistic_adam_v2",
    "noisy_sgd": "its noise needs a random key, which is no plain setting",
    "scale_by_learning_rate": "it is a building block",
    "scale_by_rprop": "it is a building block",
}
# Those of edgejax.optim; every other name is optax's.
_OWN: dict[str, Callable[..., optax.GradientTransformation]] = {
    factory.__name__: factory
    for factory in (adamw4bit, adamw8bit, apollo, apollo_mini, lion8bit, scale_sgd, sgd8bit)
}
_DECAY_NAMES = ("weight_decay", "weight_decay_rate")
_MASK_NAMES = ("mask", "weight_decay_mask")
_UNDECAYED_LEAVES = ("scale", "bias")


def optimizer_names() -> tuple[str, ...]:
    """Names ``make_optimizer`` takes, sorted: those of ``edgejax.optim``, and the functions of the optax namespace with a learning rate.

    >>> {"adamw", "sgd", "lion", "adafactor", "lamb"} <= set(optimizer_names())
    True
    """
    names = {name for name in dir(optax) if name not in _NOT_OPTIMIZERS and _is_optimizer(name)}
    return tuple(sorted(names.union(_OWN)))


def make_optimizer(
    name: str,
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    options: Mapping[str, Any] | None = None,
) -> optax.GradientTransformation:
    """The optimizer ``name`` after clipping by the global gradient norm.

    Args:
      name: a name of ``optimizer_names()``.
      learning_rate: a constant, or an optax schedule from the step (counted from 0) to the rate.
      weight_decay: decoupled decay; 0 turns it off, also where optax has another default. Leaves named ``scale``
        or ``bias`` are not decayed if the optimizer takes a mask.
      clip_norm: largest global norm of the gradient; None does not clip.
      options: further arguments of the optax function, like ``{"b2": 0.95}``.

    Returns:
      A transformation whose state keeps its shapes and dtypes from step to step.

    Raises:
      ConfigError: an unknown name, an option the optimizer does not take or cannot use, a weight decay it has not.

    Example:
      >>> tx = make_optimizer("adamw", 1e-3, weight_decay=0.01, options={"b2": 0.95})
      >>> import jax.numpy as jnp
      >>> state = tx.init({"kernel": jnp.ones((2, 3))})
    """
    if name not in optimizer_names():
        reason = f" ({_NOT_OPTIMIZERS[name]})" if name in _NOT_OPTIMIZERS else ""
        raise ConfigError(f"no optimizer named {name!r}{reason}; there are: {', '.join(optimizer_names())}")
    if clip_norm is not None and not 0 < clip_norm < float("inf"):
        raise ConfigError(f"clip_norm must be above 0 and finite, not {clip_norm}; None turns clipping off")
    if not 0 <= weight_decay < float("inf"):
        raise ConfigError(f"weight_decay must be at least 0 and finite, not {weight_decay}")
    factory = _factory(name)
    parameters = inspect.signature(factory).parameters
    arguments = _checked_options(name, dict(options or {}), parameters)
    arguments |= _decay_arguments(name, weight_decay, parameters)
    try:
        optimizer = factory(learning_rate, **arguments)
        if clip_norm is not None:
            optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
        jax.eval_shape(lambda: _one_update(optimizer))
    except (TypeError, ValueError, AttributeError) as error:
        rate = "a schedule" if callable(learning_rate) else learning_rate
        raise ConfigError(
            f"optimizer {name!r} cannot be used with options {dict(options or {})} and learning rate {rate}: {error}. "
            "Change the options; some optimizers need a constant learning rate without warm-up."
        ) from error
    return optimizer


def decay_mask(params: PyTree) -> PyTree:
    """True for the leaves that weight decay applies to: all but norm scales and biases.

    >>> decay_mask({"norm": {"scale": 0}, "q_proj": {"kernel": 0, "bias": 0}})
    {'norm': {'scale': False}, 'q_proj': {'bias': False, 'kernel': True}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: str(getattr(path[-1], "key", "")) not in _UNDECAYED_LEAVES if path else True, params
    )


def _factory(name: str) -> Callable[..., optax.GradientTransformation]:
    return _OWN.get(name) or getattr(optax, name)


def _is_optimizer(name: str) -> bool:
    function = getattr(optax, name, None)
    # nadam and nadamw are functools.partial objects, the others plain functions.
    if name.startswith("_") or not isinstance(function, types.FunctionType | functools.partial):
        return False
    return "learning_rate" in inspect.signature(function).parameters


def _checked_options(name: str, options: dict[str, Any], parameters: Mapping[str, inspect.Parameter]) -> dict:
    reserved = ("learning_rate", *_DECAY_NAMES, *_MASK_NAMES)
    taken = [option for option in parameters if option not in reserved]
    for option in options:
        if option in reserved:
            raise ConfigError(f"optimizer option {option!r} has a setting of its own; set it there")
        if option not in taken:
            raise ConfigError(
                f"optimizer {name!r} has no option {option!r}; it has: {', '.join(taken) or 'none'}"
            )
    return options


def _decay_arguments(
    name: str, weight_decay: float, parameters: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    decay_name = next((candidate for candidate in _DECAY_NAMES if candidate in parameters), None)
    if decay_name is None:
        if weight_decay:
            with_decay = [n for n in optimizer_names() if set(_DECAY_NAMES) & set(_signature(n))]
            raise ConfigError(
                f"optimizer {name!r} has no weight decay (asked for {weight_decay}); those that have: "
                f"{', '.join(with_decay)}"
            )
        return {}
    arguments: dict[str, Any] = {decay_name: weight_decay}
    mask_name = next((candidate for candidate in _MASK_NAMES if candidate in parameters), None)
    if mask_name is not None:
        arguments[mask_name] = decay_mask
    return arguments


def _signature(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_factory(name)).parameters


def _one_update(optimizer: optax.GradientTransformation) -> PyTree:
    # Traced, never run: what optax would only notice in the first step is an error here.
    params = {"kernel": jnp.ones((2, 4, 4)), "scale": jnp.ones((2, 4))}
    return optimizer.update(params, optimizer.init(params), params)
