"""Where each leaf of a step lives on a mesh, and what that costs a device.

A matrix is split over the axis ``shard`` along its largest axis that the number of shards divides (for a stack of layers
never along the layers: a device would hold whole layers and wait for the others). Codes and scales of a quantised moment
are split along their units, which the update treats one by one. Everything else is repeated on each device, and the
receipt says why.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from edgejax.core.arrays import PyTree
from edgejax.core.trees import tree_paths
from edgejax.core.units import format_bytes
from edgejax.data.batch import Batch
from edgejax.optim.moments import is_moment
from edgejax.train.mesh import AXES, SHARD

STACKS = "blocks"  # leaves below a node of this name have a first axis of layers
REPEATED = -1  # in a tree of axes: not split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repeated:
    """A leaf that every device holds whole."""

    name: str
    n_bytes: int
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshReceipt:
    """What one device of a mesh holds of a tree, and which leaves were not split and why."""

    n_shards: int
    whole_bytes: int  # of the tree on one device
    device_bytes: int  # of the part that a device of the mesh holds
    repeated: tuple[Repeated, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        text = f"a device holds {format_bytes(self.device_bytes)} of {format_bytes(self.whole_bytes)}"
        reasons: dict[str, list[Repeated]] = {}
        for leaf in self.repeated:
            reasons.setdefault(leaf.reason, []).append(leaf)
        for reason, leaves in reasons.items():
            size = format_bytes(sum(leaf.n_bytes for leaf in leaves))
            names = ", ".join(leaf.name for leaf in leaves[:2]) + (", ..." if len(leaves) > 2 else "")
            text += f"\n  {size} in {len(leaves)} leaves whole on each ({names}): {reason}"
        return text


def shard_axes(tree: PyTree, n_shards: int) -> PyTree:
    """For each array of a tree, the axis it is split along, or ``REPEATED``.

    Args:
      tree: parameters, adapters, or an optimizer's state; arrays or their shapes.
      n_shards: devices along ``shard``.

    Example:
      >>> shape = lambda *axes: jax.ShapeDtypeStruct(axes, np.float32)
      >>> shard_axes({"blocks": {"kernel": shape(6, 4, 8), "scale": shape(6, 8)}, "head": shape(9, 4)}, 2)
      {'blocks': {'kernel': 2, 'scale': -1}, 'head': 1}
    """
    return jax.tree.unflatten(jax.tree.structure(tree), [axis for axis, _ in _choices(tree, n_shards)])


def partition_specs(tree: PyTree, n_shards: int) -> PyTree:
    """``shard_axes`` as partition specs."""
    return jax.tree.map(_spec, shard_axes(tree, n_shards))


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """``shard_axes`` as the sharding of each array on ``mesh``."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(tree, mesh.shape[SHARD]))


def batch_spec(ndim: int) -> PartitionSpec:
    """Of batch leaves ``[B, T]`` or ``[A, B, T]``: rows over both axes."""
    return PartitionSpec(*[None] * (ndim - 2), AXES, None)


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device whole."""
    return NamedSharding(mesh, PartitionSpec())


def shard_tree(tree: PyTree, mesh: Mesh) -> PyTree:
    """The arrays of a tree, split over the mesh; every process gives the same whole arrays and keeps its part.

    Args:
      tree: numpy arrays, mapped files, or arrays of this process's devices.
      mesh: where to.
    """
    return jax.tree.map(_put, tree, shardings(tree, mesh))


def shard_state(state: PyTree, mesh: Mesh) -> PyTree:
    """A ``TrainState`` as a step over ``mesh`` takes it; see ``shard_tree``."""
    return shard_tree(state, mesh)


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """A batch with leaves ``[A, B, T]`` or ``[B, T]``, its rows over all devices; a process takes only its own rows."""
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, batch_spec(leaf.ndim))), batch)


def bytes_per_device(tree: PyTree) -> dict[int, int]:
    """Bytes that each of this process's devices holds of a tree of arrays, by the device's id.

    Example:
      >>> bytes_per_device({"w": jax.numpy.zeros((2, 3))})
      {0: 24}
    """
    held: dict[int, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return held


def mesh_receipt(tree: PyTree, mesh: Mesh) -> MeshReceipt:
    """What a device holds of ``tree`` (arrays or their shapes) once it is placed, counted leaf by leaf."""
    n_shards = mesh.shape[SHARD]
    whole = split = 0
    repeated = []
    for (name, leaf), (axis, reason) in zip(tree_paths(tree).items(), _choices(tree, n_shards), strict=True):
        n_bytes = math.prod(leaf.shape) * leaf.dtype.itemsize
        whole += n_bytes
        split += n_bytes // n_shards if axis != REPEATED else n_bytes
        if axis == REPEATED and leaf.ndim and n_shards > 1:
            repeated.append(Repeated(name=name, n_bytes=n_bytes, reason=reason))
    return MeshReceipt(n_shards=n_shards, whole_bytes=whole, device_bytes=split, repeated=tuple(repeated))


def _choices(tree: PyTree, n_shards: int) -> list[tuple[int, str]]:
    """For each array in the order of ``jax.tree.leaves``: its axis, and why there is none."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_moment)
    found: list[tuple[int, str]] = []
    for path, node in nodes:
        if is_moment(node):
            whole = node.n_units % n_shards != 0
            reason = f"{node.n_units} units of 1,024 elements do not divide by {n_shards}"
            found += [(REPEATED if whole or n_shards == 1 else 0, reason)] * len(jax.tree.leaves(node))
        else:
            found.append(_choice(node.shape, _is_stacked(path), n_shards))
    return found


def _choice(shape: tuple[int, ...], stacked: bool, n_shards: int) -> tuple[int, str]:
    axes = range(int(stacked), len(shape))
    if len(axes) < 2:
        return REPEATED, "a vector, too small to be worth sending"
    fitting = [axis for axis in axes if shape[axis] % n_shards == 0]
    if not fitting or n_shards == 1:
        return REPEATED, f"no axis of {list(shape[int(stacked) :])} divides by {n_shards}"
    return max(fitting, key=lambda axis: shape[axis]), ""


def _is_stacked(path: tuple[Any, ...]) -> bool:
    return any(getattr(key, "key", None) == STACKS for key in path)


def _spec(axis: int) -> PartitionSpec:
    return PartitionSpec() if axis == REPEATED else PartitionSpec(*[None] * axis, SHARD)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and leaf.is_fully_addressable and sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
