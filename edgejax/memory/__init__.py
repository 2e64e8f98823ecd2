"""What a training step keeps in memory: remat policies."""

from edgejax.memory.remat import KEPT_VALUES, rematerialize

__all__ = ["KEPT_VALUES", "rematerialize"]
