"""The mesh of devices that one step runs on: ``data=4,shard=2``.

Both axes carry rows of the batch: each of the ``data * shard`` devices computes the gradient of its own rows. Along
``shard`` the trained leaves, the optimizer's state and the frozen base are split as well, and a layer's weights are put
together when it runs (ZeRO stage 3, Rajbhandari et al. 2020, arXiv 1910.02054); along ``data`` they are repeated. So
``shard`` saves memory and sends weights over the wire in each step, ``data`` sends gradients only.
"""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from edgejax.core.errors import ConfigError

DATA, SHARD = "data", "shard"
AXES = (DATA, SHARD)
SCHEDULES_OVER_A_MESH = ("whole",)
SIMULATE = "XLA_FLAGS=--xla_force_host_platform_device_count=8 in the environment makes 8 of one CPU"


class MeshShape(NamedTuple):
    """Devices along each axis.

    Attributes:
      data: groups of devices that each hold everything.
      shard: devices of a group; each holds a part.
    """

    data: int = 1
    shard: int = 1

    @property
    def n_devices(self) -> int:
        return self.data * self.shard

    def __str__(self) -> str:
        return f"data={self.data},shard={self.shard}"


def parse_mesh(text: str) -> MeshShape:
    """Reads ``data=4,shard=2``; an axis that is left out has 1 device.

    Raises:
      ConfigError: an unknown axis, one named twice, or a size that is no whole number of at least 1.

    Example:
      >>> parse_mesh("data=4,shard=2"), parse_mesh("shard=8")
      (MeshShape(data=4, shard=2), MeshShape(data=1, shard=8))
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or name not in AXES:
            raise ConfigError(
                f"the mesh {text!r} has the part {part.strip()!r}; write it as data=4,shard=2, with one or both of the "
                f"axes {' and '.join(AXES)}"
            )
        if name in sizes:
            raise ConfigError(f"the mesh {text!r} names the axis {name} twice; name it once")
        if not value.isdecimal() or int(value) < 1:
            raise ConfigError(
                f"the mesh {text!r} has {value or 'nothing'} along {name}; it takes a whole number of at least 1"
            )
        sizes[name] = int(value)
    return MeshShape(**sizes)


def check_mesh(shape: MeshShape, *, batch_size: int, schedule: str) -> None:
    """Refuses what cannot run over this mesh, before a device is asked for.

    Args:
      shape: the mesh.
      batch_size: rows of a micro-step, over all devices.
      schedule: how a step is run.

    Raises:
      ConfigError: rows that the devices cannot share evenly, or a schedule of one device.
    """
    if schedule not in SCHEDULES_OVER_A_MESH:
        raise ConfigError(
            f"the schedule {schedule} runs on one device: it updates a layer where its gradient appears, before other "
            f"devices could add theirs. Over a mesh can: {', '.join(SCHEDULES_OVER_A_MESH)}"
        )
    if batch_size % shape.n_devices:
        below = batch_size - batch_size % shape.n_devices
        choices = " or ".join(str(rows) for rows in (below, below + shape.n_devices) if rows)
        raise ConfigError(
            f"{batch_size} rows of a micro-step cannot be shared evenly by the {shape.n_devices} devices of the mesh "
            f"{shape} (both axes carry rows); take {choices} rows, or a smaller mesh"
        )


def make_mesh(shape: MeshShape) -> Mesh:
    """The mesh over this machine's devices, or over those of all processes; starts the back end.

    With fewer devices than there are, the first ones are used. Neighbours along ``shard``, which send the most, are
    devices that JAX lists side by side, so of one process where its number of devices allows.

    Raises:
      ConfigError: more devices than there are, a number of them that does not divide those, or fewer than all in a run
        of many processes (each must have a part).
    """
    devices = jax.devices()
    count = f"{len(devices)} ({jax.device_count() // jax.process_count()} in each of {jax.process_count()} processes)"
    if jax.process_count() > 1 and shape.n_devices != len(devices):
        raise ConfigError(
            f"the mesh {shape} has {shape.n_devices} devices and the processes have {count}; in a run of many processes "
            "it must have all of them"
        )
    if shape.n_devices > len(devices) or len(devices) % shape.n_devices:
        kind = devices[0].platform
        raise ConfigError(
            f"the mesh {shape} has {shape.n_devices} devices, which is not {len(devices)} or a divisor of it: the number "
            f"of devices ({kind}) there are. Choose another mesh, or simulate more devices: {SIMULATE}"
        )
    grid = np.array(devices[: shape.n_devices]).reshape(shape.data, shape.shard)
    return Mesh(grid, AXES)
