"""What a layer keeps for its backward pass, by name."""

import jax

from edgejax.core.errors import ConfigError
from edgejax.memory.residuals import Boundary, boundary_named

ATTENTION = ("attention_out", "attention_lse")
PRODUCTS = ("query", "key", "value", *ATTENTION, "mlp_input", "gate", "up")

# policy -> values of a layer kept beside its input (the names given by checkpoint_name)
KEPT_VALUES: dict[str, tuple[str, ...]] = {
    "none": PRODUCTS,
    "attention": ATTENTION,
    "mlp": (*ATTENTION, "mlp_input"),
    "full": (),
}
POLICIES = (*KEPT_VALUES, "sqrt")  # sqrt: inputs of about sqrt(L) layers only (layer_stack)
NARROW_WITH = {
    "bf16": ("full", "sqrt", "attention", "mlp"),
    "int8": ("full",),
}  # boundaries -> their policies


def check_kept(remat: str, boundaries: str | Boundary = "f32") -> None:
    """Whether a policy and a storage of boundaries exist and go together.

    ``none`` keeps many float32 values of a layer, beside which a narrow input would save next to nothing. What
    ``attention`` and ``mlp`` keep waits in bf16 with the input, but for the log-sum-exps; ``int8`` codes small changes
    from layer to layer, which that is not. ``int8`` with ``sqrt`` would round a group's input once and the inputs inside
    it again: the gradient's cosine falls below 0.9999, and its two references take what the narrower codes save.

    Raises:
      ConfigError: an unknown name, or the two together.
    """
    if remat not in POLICIES:
        raise ConfigError(f"unknown remat policy {remat!r}; there are: {', '.join(POLICIES)}")
    boundary_named(boundaries)
    allowed = NARROW_WITH.get(boundaries, POLICIES) if isinstance(boundaries, str) else ("full", "sqrt")
    if remat not in allowed:
        reason = (
            "rounds the inputs of layers twice, and the gradient is off by more than is promised"
            if remat == "sqrt"
            else "keeps float32 values beside the input of each layer, which would not be narrowed"
        )
        raise ConfigError(
            f"boundaries {boundaries!r} do not go with remat {remat!r}, which {reason}; "
            f"choose remat {' or '.join(allowed)}, or boundaries f32"
        )


def rematerialize(function, policy: str):
    """``function`` with its values recomputed in the backward pass, except those the policy keeps.

    ``none`` keeps the result of every product that the backward pass reads, so no product runs twice; only
    elementwise work (norms, rotations, gates) is made again, which is faster than to write and read it.
    ``full`` keeps only the function's inputs. ``attention`` keeps what attention gave, so that its forward pass
    is not run twice; ``mlp`` keeps the MLP's input too.

    Raises:
      ConfigError: unknown policy, or ``sqrt``, which is one of a stack (``layer_stack.run_layers``).
    """
    if policy not in KEPT_VALUES:
        raise ConfigError(f"no remat policy {policy!r} of one layer; there are: {', '.join(KEPT_VALUES)}")
    keep = jax.checkpoint_policies.save_only_these_names(*KEPT_VALUES[policy])
    return jax.checkpoint(
        function, policy=keep, prevent_cse=False
    )  # safe inside scan, which is where it is used
