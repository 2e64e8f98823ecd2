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
    (adapters are left out: under a hundredth). A frozen head computes its loss and the gradient in one pass over two
    products, a trained one makes its logits twice. Norms after attention and the MLP (gemma) need what they normalise again.

    >>> from edgejax.models.shapes import find_shape
    >>> config = find_shape("smollm2-135m")
    >>> none, full = (flop_per_token(Candidate(remat=remat), config) for remat in ("none", "full"))
    >>> 1.2 < full / none < 1.4
    True
    """
    shapes = config.linear_shapes()
    is_full = candidate.mode == "full"
    linear = sum(o * i for o, i in shapes.values())
    repeated = set(_RECOMPUTED[candidate.remat]) | ({"o_proj", "down_proj"} if config.post_norms else set())
    again = sum(shapes[name][0] * shapes[name][1] for name in repeated)
    # Two products over the keys that are seen forward, five backward (the scores are made again).
    n_sliding = sum(config.sliding_layers)
    seen = candidate.seq / 2  # of a causal row, on average
    seen_sliding = min(seen, config.sliding_window or candidate.seq)
    keys = (config.n_layers - n_sliding) * seen + n_sliding * seen_sliding
    attention_passes = 2 + 5 + 2 * _RECOMPUTES_ATTENTION[candidate.remat]
    attention = 2 * attention_passes * keys * config.n_heads * config.head_dim
    head = (4 if is_full else 2) * config.vocab_size * config.d_model
    return config.n_layers * 2 * ((3 if is_full else 2) * linear + again) + attention + 2 * head


def relative_speed(candidate: Candidate, config: ModelConfig) -> float:
    """Speed as a part of the same step's that keeps all and computes nothing again: calculated, not measured."""
    import dataclasses

    plain = dataclasses.replace(candidate, remat="none", boundaries="f32", schedule="whole")
    return flop_per_token(plain, config) / flop_per_token(candidate, config)
