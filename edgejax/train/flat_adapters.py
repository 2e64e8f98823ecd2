"""All adapters of a layer as one vector: how the streamed schedule holds what it trains.

With a leaf for each matrix, the program that updates a layer has some six hundred kernels for its 14 adapters and 56
moments, and XLA keeps about 100 KB for each: more than the adapters themselves (measured for a layer of Qwen2.5-0.5B,
rank 8, 8-bit AdamW: 75 MB). With one vector they are one leaf.

An optimizer then sees one vector a layer, so it has to treat each element by itself; blocks of narrow moments go across
the borders of matrices, and no leaf is too small for them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from edgejax.core.arrays import Array, PyTree
from edgejax.core.errors import ConfigError
from edgejax.models import LoraConfig, ModelConfig, init_lora

FLAT = "adapters"  # name of the only leaf


@dataclasses.dataclass(frozen=True)
class FlatAdapters:
    """Where each adapter of a layer lies in the layer's vector of N numbers.

    Attributes:
      config: the decoder's.
      lora: its adapters.

    Example:
      >>> config = ModelConfig(family="llama", vocab_size=32, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4,
      ...     d_ff=16, max_position=16)
      >>> flat = FlatAdapters(config, LoraConfig(rank=2, targets=("q_proj",)))
      >>> adapters = init_lora(config, flat.lora, jax.random.key(0))
      >>> trained = flat.join(adapters)
      >>> trained["blocks"]["adapters"].shape
      (2, 32)
      >>> bool((flat.split(trained)["blocks"]["q_proj"]["lora_a"] == adapters["blocks"]["q_proj"]["lora_a"]).all())
      True
    """

    config: ModelConfig
    lora: LoraConfig

    @cached_property
    def _shapes(self) -> PyTree:
        stacks = jax.eval_shape(lambda: init_lora(self.config, self.lora, jax.random.key(0)))["blocks"]
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacks)

    def join(self, adapters: PyTree) -> PyTree:
        """Stacks of adapters ``[L, ...]`` as ``{"blocks": {"adapters": [L, N]}}``."""
        stacks = jax.tree.leaves(adapters["blocks"])
        return {
            "blocks": {FLAT: jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in stacks], axis=1)}
        }

    def split(self, trained: PyTree) -> PyTree:
        """Undoes ``join``; numpy arrays, or views of one, stay such."""
        vectors = trained["blocks"][FLAT]
        return {"blocks": self._cut(vectors, vectors.shape[:1])}

    def layer(self, vectors: PyTree) -> PyTree:
        """A layer's adapters from its vector, ``{"adapters": [N]}``."""
        return self._cut(vectors[FLAT], ())

    def vector(self, layer: PyTree) -> dict[str, Float[Array, " N"]]:
        """Undoes ``layer``."""
        return {FLAT: jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(layer)])}

    def _cut(self, vectors: Array, leading: tuple[int, ...]) -> PyTree:
        shapes, treedef = jax.tree.flatten(self._shapes)
        ends = np.cumsum([math.prod(shape.shape) for shape in shapes])
        starts = [0, *ends[:-1]]
        return jax.tree.unflatten(
            treedef,
            [
                vectors[..., start:end].reshape(*leading, *shape.shape)
                for start, end, shape in zip(starts, ends, shapes, strict=True)
            ],
        )


def check_elementwise(optimizer: optax.GradientTransformation) -> None:
    """Raises ConfigError if what the optimizer does to an element depends on others of its matrix, or on its shape.

    Found out by trying: two steps on a matrix, on its elements as a vector and on half of those must agree.

    Example:
      >>> check_elementwise(optax.adamw(1e-3))
      >>> check_elementwise(optax.lamb(1e-3))
      Traceback (most recent call last):
      ...
      edgejax.core.errors.ConfigError: this optimizer looks at whole matrices ...
    """
    random = np.random.default_rng(0)
    shape = (64, 63)  # below moments.SMALLEST_QUANTIZED elements: blocks of narrow moments are another matter
    draw = lambda: jnp.asarray(10 * random.standard_normal(shape), jnp.float32)  # noqa: E731
    params, gradients = draw(), [draw(), draw()]

    def last_update(cut: Callable[[Array], Array]) -> np.ndarray:
        @jax.jit
        def run(params: Array, gradients: list[Array]) -> Array:
            state = optimizer.init({FLAT: params})
            for gradient in gradients:
                updates, state = optimizer.update({FLAT: gradient}, state, {FLAT: params})
            return updates[FLAT]

        return np.asarray(run(cut(params), [cut(g) for g in gradients])).reshape(-1)

    agree = functools.partial(np.allclose, rtol=1e-5, atol=1e-12)
    try:
        vector = last_update(jnp.ravel)
        half = last_update(lambda leaf: leaf.ravel()[: leaf.size // 2])
        same = agree(vector, last_update(lambda leaf: leaf)) and agree(vector[: half.size], half)
    except (ValueError, TypeError, IndexError):  # it takes matrices only
        same = False
    if not same:
        raise ConfigError(
            "this optimizer looks at whole matrices (norms, projections, or rows and columns), and the streamed schedule "
            "holds all adapters of a layer as one vector. Use the schedule layerwise or whole; or an elementwise "
            "optimizer, like adamw, adamw8bit, adamw4bit or lion8bit."
        )
