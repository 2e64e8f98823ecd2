"""What a layer keeps for its backward pass, by name."""

import jax

from edgejax.core.errors import ConfigError

# name -> values of a layer kept beside its input (see checkpoint_name in layers.py); None: keep everything
KEPT_VALUES: dict[str, tuple[str, ...] | None] = {
    "none": None,
    "attention": ("attended", "attention_lse"),
    "mlp": ("attended", "attention_lse", "mlp_input"),
    "full": (),
}


def rematerialize(function, policy: str):
    """``function`` with its values recomputed in the backward pass, except those the policy keeps.

    ``none`` keeps all; ``full`` keeps only the function's inputs; ``attention`` keeps what attention gave, so
    that its forward pass is not run twice.

    Raises:
      ConfigError: unknown policy.
    """
    if policy not in KEPT_VALUES:
        raise ConfigError(f"unknown remat policy {policy!r}; there are: {', '.join(KEPT_VALUES)}")
    names = KEPT_VALUES[policy]
    if names is None:
        return function
    keep = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(function, policy=keep, prevent_cse=False)  # safe inside scan, which is where it is used
