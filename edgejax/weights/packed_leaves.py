"""Leaves of the parameter tree as named arrays of a packed file, in both directions."""

from typing import Any

import jax
import numpy as np

from edgejax.quant import TERNARY, QuantizedArray, codes_per_word
from edgejax.weights.form import Form, form_of
from edgejax.weights.leaves import layout, leaf_layers
from edgejax.weights.names import LeafName, leaf_names
from edgejax.weights.packed_decode import Complaint
from edgejax.weights.packed_layout import Header, Part

_FLOATS = ("float32", "float16", "bfloat16")
_BITS = {
    ("uint32", 16): TERNARY,
    ("uint32", 8): 4,
    ("int8", 1): 8,
}  # by type of the codes, and weights to one of them


def section_of(leaf: LeafName, layer: int) -> str:
    """The section that a leaf lies in: ``"layer.3"``, ``"embed"``, ``"final_norm"``, ``"head"``."""
    return f"layer.{layer}" if leaf.stacked else leaf.path[0]


def leaf_arrays(leaf: LeafName, layer: int, form: Form) -> list[tuple[str, tuple[int, ...], np.dtype]]:
    """Names, shapes and types of the arrays that hold one layer of a leaf, in their order in the file."""
    tree, name = layout(form, leaf.shape), _array_name(leaf, layer)
    if not isinstance(tree, QuantizedArray):
        return [(name, tree.shape, np.dtype(tree.dtype))]
    named = {"codes": tree.codes, "scale": tree.scale, "minimum": tree.minimum}
    return [(f"{name}.{key}", x.shape, np.dtype(x.dtype)) for key, x in named.items() if x is not None]


def leaf_parts(leaf: LeafName, layer: int, parts: dict[str, Part]) -> Any:
    """The ``Part`` of a plain leaf, or the ``QuantizedArray`` of the ``Part``s of a quantised one.

    Raises:
      KeyError: there is none.
    """
    name = _array_name(leaf, layer)
    if name in parts:
        return parts[name]
    codes, scale = parts[f"{name}.codes"], parts[f"{name}.scale"]
    n_codes = leaf.shape[-1] // codes.shape[-1] if codes.shape and codes.shape[-1] else 0
    bits = _BITS.get((codes.dtype.name, n_codes), 0)
    return QuantizedArray(codes, scale, parts.get(f"{name}.minimum"), bits=bits)  # type: ignore[arg-type]


def checked_leaves(header: Header, bad: Complaint) -> dict[tuple[tuple[str, ...], int], Any]:
    """``leaf_parts`` of every leaf by ``(leaf.path, layer)``: all there, as the configuration says, and nothing else.

    Raises:
      WeightsError: through ``bad``.
    """
    found: dict[tuple[tuple[str, ...], int], Any] = {}
    n_arrays = 0
    for leaf in leaf_names(header.config):
        for layer in leaf_layers(leaf, header.config.n_layers):
            name = _array_name(leaf, layer)
            try:
                parts = found[leaf.path, layer] = leaf_parts(leaf, layer, header.parts)
                section = header.sections[section_of(leaf, layer)]
            except KeyError as error:
                bad(f"{name} is missing: there is no {error}")
            form = _checked_form(leaf, parts)
            if form is None or form != form_of(found[leaf.path, 0]):
                bad(f"{name} of shape {leaf.shape} cannot be held as {parts!s:.300}")
            for part in jax.tree.leaves(parts):
                n_arrays += 1
                if not section.start <= part.start <= part.stop <= section.stop:
                    bad(f"array {part.name!r:.80} does not lie in section {section.name!r}")
    if "tokenizer" in header.sections:
        n_arrays += 1
    if n_arrays != len(header.parts):
        bad(f"it holds {len(header.parts)} arrays, {n_arrays} of which its configuration has a place for")
    return found


def _array_name(leaf: LeafName, layer: int) -> str:
    return ".".join([section_of(leaf, layer), *leaf.path[1:]])


def _checked_form(leaf: LeafName, parts: Any) -> Form | None:
    """The form of ``parts`` where they are exactly what ``leaf`` has in that form."""
    if isinstance(parts, Part):
        good = parts.dtype.name in (("float32",) if leaf.kind in ("norm", "bias") else _FLOATS)
        return form_of(parts) if good and parts.shape == leaf.shape else None  # type: ignore[arg-type]
    scale = parts.scale
    if len(leaf.shape) != 2 or len(scale.shape) != 2 or not scale.shape[1] or not parts.bits:
        return None
    if (
        scale.dtype.name not in ("float32", "float16")
        or leaf.shape[1] % scale.shape[1]
        or leaf.shape[1] % codes_per_word(parts.bits)
    ):
        return None
    if parts.bits == TERNARY and parts.minimum is not None:
        return None
    form = Form(
        bits=parts.bits,
        block=leaf.shape[1] // scale.shape[1],
        dtype=scale.dtype,
        has_minimum=parts.minimum is not None,
    )
    wanted = jax.tree.leaves(layout(form, leaf.shape))
    same = all(
        (a.shape, a.dtype) == (b.shape, b.dtype) for a, b in zip(jax.tree.leaves(parts), wanted, strict=True)
    )
    return form if same else None
