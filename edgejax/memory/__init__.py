"""What a training step keeps in memory: remat policies, the boundaries between layers, tiles."""

from edgejax.memory.layer_stack import group_of, kept_boundaries, run_layers, sqrt_group
from edgejax.memory.remat import KEPT_VALUES, POLICIES, check_kept, rematerialize
from edgejax.memory.residuals import BOUNDARIES, Boundary, batch_key, boundary_named, layer_key, stored_bytes
from edgejax.memory.tiles import check_tile, over_positions

__all__ = [
    "BOUNDARIES",
    "KEPT_VALUES",
    "POLICIES",
    "Boundary",
    "batch_key",
    "boundary_named",
    "check_kept",
    "check_tile",
    "group_of",
    "kept_boundaries",
    "layer_key",
    "over_positions",
    "rematerialize",
    "run_layers",
    "sqrt_group",
    "stored_bytes",
]
