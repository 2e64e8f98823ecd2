"""Array aliases and the one legend of shape letters.

    B  rows in a batch            T  token positions in a row     S  key/value positions
    D  model width                F  feed-forward width           V  vocabulary
    H  query heads                K  key/value heads              C  channels of a head
    L  layers of the stack        R  LoRA rank                    N  rows after flattening B x T
    O  outputs of a linear layer  I  inputs of a linear layer     Q  block of a quantised row

A weight is stored ``[O, I]`` (outputs first), as GGUF and torch do, so that quantisation blocks run along
the inputs; a stack of layers has a leading ``L``.
"""

from typing import Any, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.Array | np.ndarray
PyTree: TypeAlias = Any
