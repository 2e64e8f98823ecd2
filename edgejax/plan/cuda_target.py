"""An NVIDIA card as XLA's compiler sees it: the text of a ``GpuTargetConfigProto``.

XLA compiles for a card that is not there when it is told these figures. Those of a card are in the table of devices; those of
a compute capability are NVIDIA's (CUDA C++ Programming Guide, technical specifications by compute capability) and
the ones that XLA's own descriptions of data-centre cards have.
"""

from typing import NamedTuple

from edgejax.core.errors import ConfigError
from edgejax.devices import DeviceProfile

OLDEST = (8, 0)  # Pallas' Triton kernels need Ampere
RESERVE_BYTES = 2**30  # what no buffer assignment sees: CUDA context, library workspaces, fragmentation


class _Capability(NamedTuple):
    shared_per_core: int
    shared_per_block_optin: int
    threads_per_core: int
    fpus_per_core: int


_CAPABILITIES = {
    (8, 0): _Capability(167936, 166912, 2048, 64),
    (8, 6): _Capability(102400, 101376, 1536, 128),
    (8, 9): _Capability(102400, 101376, 1536, 128),
    (9, 0): _Capability(233472, 232448, 2048, 128),
    (12, 0): _Capability(102400, 101376, 1536, 128),
}


def check_card(card: DeviceProfile) -> None:
    """Refuses what cannot be compiled for.

    Raises:
      ConfigError: not an NVIDIA card, or one too old; says what can be.
    """
    capability = card.compute_capability
    if card.kind != "gpu" or capability is None:
        raise ConfigError(
            f"programs are compiled for NVIDIA's cards, and {card.name} is none; name one of them, like rtx3060"
        )
    version = ".".join(map(str, capability))
    if capability < OLDEST:
        raise ConfigError(
            f"{card.name} has compute capability {version}; plans are made from {'.'.join(map(str, OLDEST))} (Ampere) "
            "on, for JAX has no Pallas path below it"
        )
    if capability not in _CAPABILITIES:
        raise ConfigError(
            f"what XLA has to know of compute capability {version} ({card.name}) is not in the table"
        )


def target_config(card: DeviceProfile) -> str:
    """The text for ``topologies.get_topology_desc(target_config=...)``.

    >>> from edgejax.devices import find_device
    >>> "core_count: 28" in target_config(find_device("rtx3060"))
    True

    Raises:
      ConfigError: as ``check_card``.
    """
    check_card(card)
    capability, clock, bandwidth = card.compute_capability, card.boost_clock_ghz, card.bandwidth_gb_per_s
    assert capability is not None
    assert clock is not None  # the table has them for each card of a known capability
    assert bandwidth is not None
    limits = _CAPABILITIES[capability]
    return f"""\
gpu_device_info {{
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {limits.threads_per_core}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {limits.shared_per_block_optin}
  shared_memory_per_core: {limits.shared_per_core}
  fpus_per_core: {limits.fpus_per_core}
  core_count: {card.multiprocessors}
  clock_rate_ghz: {clock:g}
  l2_cache_size: {card.l2_bytes}
  memory_bandwidth: {round(bandwidth * 1e9)}
  device_memory_size: {card.memory_bytes}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{card.name}"
"""
