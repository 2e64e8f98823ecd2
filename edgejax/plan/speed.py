"""How fast settings are beside each other: by the operations of their steps, where nothing can be timed."""

from edgejax.models import ModelConfig
from edgejax.plan.candidate import Candidate

# What the backward pass computes again, of a layer's linear maps. Full recomputation needs all but the last one,
# whose output no gradient needs; `attention` and `mlp` have attention's output, `mlp` the MLP's input too.
_RECOMPUTED = {
    "none": (),
    "full": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"),
    "mlp": ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
}
_RECOMPUTES_ATTENTION = {"none": False, "full": True, "attention": False, "mlp": False}


def flop_per_token(candidate: Candidate, config: ModelConfig) -> float:
    """Operations a token: of linear maps (2 a weight and pass), of attention (causal), of what is computed again.

    A frozen weight has a forward pass and one for the gradient of its input; a trained one a third for its own
    (adapters are left out: under a hundredth). A frozen head computes its loss and the gradient in one pass over two products.

    >>> from edgejax.models.shapes import find_shape
    >>> config = find_shape("smollm2-135m")
    >>> none, full = (flop_per_token(Candidate(remat=remat), config) for remat in ("none", "full"))
    >>> 1.2 < full / none < 1.4
    True
    """
    shapes = config.linear_shapes()
    passes = 3 if candidate.mode == "full" else 2
    linear = sum(o * i for o, i in shapes.values())
    again = sum(shapes[name][0] * shapes[name][1] for name in _RECOMPUTED[candidate.remat])
    # Two products over half of the keys forward, five backward (the scores are made again).
    attention = candidate.seq * config.n_heads * config.head_dim
    attention_passes = 2 + 5 + 2 * _RECOMPUTES_ATTENTION[candidate.remat]
    layers = config.n_layers * (2 * (passes * linear + again) + attention_passes * attention)
    return layers + 2 * passes * config.vocab_size * config.d_model


def relative_speed(candidate: Candidate, config: ModelConfig) -> float:
    """Speed as a part of the same step's that keeps all and computes nothing again: calculated, not measured."""
    import dataclasses

    plain = dataclasses.replace(candidate, remat="none", boundaries="f32", schedule="whole")
    return flop_per_token(plain, config) / flop_per_token(candidate, config)
