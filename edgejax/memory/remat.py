"""What a layer keeps for its backward pass, by name."""

import jax

from edgejax.core.errors import ConfigError

ATTENTION = ("attention_out", "attention_lse")
PRODUCTS = ("query", "key", "value", *ATTENTION, "mlp_input", "gate", "up")

# policy -> values of a layer kept beside its input (the names given by checkpoint_name)
KEPT_VALUES: dict[str, tuple[str, ...]] = {
    "none": PRODUCTS,
    "attention": ATTENTION,
    "mlp": (*ATTENTION, "mlp_input"),
    "full": (),
}


def rematerialize(function, policy: str):
    """``function`` with its values recomputed in the backward pass, except those the policy keeps.

    ``none`` keeps the result of every product that the backward pass reads, so no product runs twice; only
    elementwise work (norms, rotations, gates) is made again, which is faster than to write and read it.
    ``full`` keeps only the function's inputs. ``attention`` keeps what attention gave, so that its forward pass
    is not run twice; ``mlp`` keeps the MLP's input too.

    Raises:
      ConfigError: unknown policy.
    """
    if policy not in KEPT_VALUES:
        raise ConfigError(f"unknown remat policy {policy!r}; there are: {', '.join(KEPT_VALUES)}")
    keep = jax.checkpoint_policies.save_only_these_names(*KEPT_VALUES[policy])
    return jax.checkpoint(
        function, policy=keep, prevent_cse=False
    )  # safe inside scan, which is where it is used
