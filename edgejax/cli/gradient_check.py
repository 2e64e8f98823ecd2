"""A whole training step's loss and gradients against float64 arithmetic that shares no code with it.

A tiny llama-like decoder with adapters is written out again in numpy, in float64, straight from the equations. Its
loss is compared with ours, and for each leaf p of n values and a random direction v of unit length

    <gradient, v>   with   (loss(p + h v) - loss(p - h v)) / 2h,    h = 1e-4.

An error e of the gradient shows as about |e| / sqrt(n), so the difference is counted sqrt(n) times.

Beyond mistakes in our own derivatives this finds a compiler that computes wrong numbers, on this machine.
"""

import jax
import numpy as np

from edgejax.core.arrays import PyTree
from edgejax.core.trees import tree_paths
from edgejax.data import Batch
from edgejax.measure.checks import CheckResult
from edgejax.models import Decoder, LoraConfig, ModelConfig, init_lora, loss

CONFIG = ModelConfig(
    family="llama", vocab_size=97, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48,
    max_position=256, tie_embeddings=True,
)  # fmt: skip
LORA = LoraConfig(rank=3, alpha=6.0)
LENGTH = 136  # more than a block of query rows
STEP = 1e-4
TOLERANCE = 5e-5  # of the leaf's gradient norm; float32 rounding stays two orders below


def check_gradients(mode: str = "lora", remat: str = "full", perturb: float = 0.0) -> CheckResult:
    """Loss and gradients of the tiny decoder against float64 differences.

    Args:
      mode: ``lora``: of the adapters over a frozen base; ``full``: of all parameters.
      remat: the policy of the step.
      perturb: added to every gradient value, to see that the check notices.

    Returns:
      The worst leaf; its error is relative to the norm of that leaf's gradient.
    """
    rng = np.random.default_rng(0)
    params, adapters, batch = _problem(rng)
    trained = adapters if mode == "lora" else params
    decoder = Decoder(CONFIG, LORA if mode == "lora" else None)

    def mean_loss(tree, rows):
        base, added = (params, tree) if mode == "lora" else (tree, {})
        total, count = loss(decoder, base, added, rows, frozen_head=mode == "lora", remat=remat)
        return total / count

    value, gradients = jax.jit(jax.value_and_grad(mean_loss))(trained, batch)
    gradients = jax.tree.map(lambda g: np.asarray(g, np.float64) + perturb, gradients)
    wide_params, wide_adapters = jax.tree.map(
        lambda x: np.asarray(x, np.float64), (params, adapters if mode == "lora" else {})
    )

    def reference(path: str, direction: np.ndarray, amount: float) -> float:
        base, added = jax.tree.map(np.copy, (wide_params, wide_adapters))
        leaf = tree_paths(base if mode == "full" else added)[path]
        leaf += amount * direction
        return reference_loss(base, added, batch)

    expected_loss = reference_loss(wide_params, wide_adapters, batch)
    errors = {"loss": abs(float(value) - expected_loss) / expected_loss}
    for path, gradient in tree_paths(gradients).items():
        direction = rng.standard_normal(gradient.shape)
        direction /= np.linalg.norm(direction)
        slope = (reference(path, direction, STEP) - reference(path, direction, -STEP)) / (2 * STEP)
        difference = abs(float(np.sum(gradient * direction)) - slope)
        errors[path] = difference * gradient.size**0.5 / float(np.linalg.norm(gradient))
    worst = max(errors, key=lambda path: np.inf if np.isnan(errors[path]) else errors[path])
    error = float("inf") if np.isnan(errors[worst]) else float(errors[worst])
    return CheckResult(
        name=f"gradients, {mode}",
        passed=error <= TOLERANCE,
        worst_error=error,
        tolerance=TOLERANCE,
        detail=f"worst of {len(errors)} at {worst}, against float64 differences",
    )


def reference_loss(params: PyTree, adapters: PyTree, batch: Batch) -> float:
    """Mean next-token loss of the decoder ``CONFIG`` in numpy; all arrays float64."""
    h = params["embed"]["table"][batch.tokens]
    cos, sin = _rotation(np.asarray(batch.positions))
    mask = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    mask &= np.tril(np.ones((LENGTH, LENGTH), bool))
    for layer in range(CONFIG.n_layers):
        block = jax.tree.map(lambda x, layer=layer: x[layer], params["blocks"])
        added = jax.tree.map(lambda x, layer=layer: x[layer], adapters.get("blocks", {}))

        def linear(name, x, block=block, added=added):
            y = x @ block[name]["kernel"].T
            if name in added:
                y = y + LORA.scaling * (x @ added[name]["lora_a"].T) @ added[name]["lora_b"].T
            return y

        x = _norm(h, block["attn_norm"]["scale"])
        q, k, v = (_heads(linear(name, x)) for name in ("q_proj", "k_proj", "v_proj"))
        group = CONFIG.n_heads // CONFIG.n_kv_heads
        k, v = np.repeat(_rotate(k, cos, sin), group, 1), np.repeat(v, group, 1)
        scores = _rotate(q, cos, sin) @ k.swapaxes(-1, -2) * CONFIG.head_dim**-0.5
        scores = np.where(mask[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = (weights @ v).swapaxes(1, 2).reshape(*batch.tokens.shape, -1)
        h = h + linear("o_proj", attended)
        x = _norm(h, block["mlp_norm"]["scale"])
        gate = linear("gate_proj", x)
        h = h + linear("down_proj", gate / (1 + np.exp(-gate)) * linear("up_proj", x))
    logits = _norm(h, params["final_norm"]["scale"]) @ params["embed"]["table"].T
    top = logits.max(-1, keepdims=True)
    log_sum = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[..., 0]
    picked = np.take_along_axis(logits, np.asarray(batch.targets)[..., None], -1)[..., 0]
    return float((log_sum - picked)[batch.loss_mask].mean())


def _problem(rng: np.random.Generator) -> tuple[PyTree, PyTree, Batch]:
    """Weights well away from zero, two rows of which one holds two documents and padding, some tokens uncounted."""
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, Decoder(CONFIG).init(jax.random.key(0)))
    adapters = init_lora(CONFIG, LORA, jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), adapters)
    lengths = ((LENGTH,), (50, 70))
    segments = np.zeros((2, LENGTH), np.int32)
    positions = np.zeros((2, LENGTH), np.int32)
    for row, pieces in enumerate(lengths):
        start = 0
        for number, length in enumerate(pieces, start=1):
            segments[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            start += length
    tokens, targets = rng.integers(0, CONFIG.vocab_size, (2, 2, LENGTH), dtype=np.int32)
    counted = (segments > 0) & (rng.random(segments.shape) < 0.8)
    return params, adapters, Batch(tokens, targets, counted, segments, positions)


def _norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * scale


def _heads(x: np.ndarray) -> np.ndarray:
    """``[B, T, H C] -> [B, H, T, C]``."""
    return x.reshape(*x.shape[:2], -1, CONFIG.head_dim).swapaxes(1, 2)


def _rotation(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = CONFIG.head_dim // 2
    angles = positions[:, None, :, None] * CONFIG.rope_theta ** (-np.arange(half) / half)
    return np.cos(angles), np.sin(angles)


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, -1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
