"""The compiling process of a plan for a card: ``python -m edgejax.plan.card_process``.

XLA's GPU compiler runs here without a GPU. It is a process of its own because JAX chooses its back ends once, and
because a compiler that is fed with a program it cannot compile may end the process.

Reads a request as JSON from standard input (``card``, ``model``, ``candidates``), and prints a line of JSON for each
candidate: ``{"footprint": ...}`` or ``{"error": ...}``.
"""

import json
import sys
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from edgejax.core.cache import forget_traces
from edgejax.core.errors import EdgejaxError
from edgejax.devices import find_device
from edgejax.plan.candidate import Candidate, abstract_model
from edgejax.plan.cuda_target import target_config
from edgejax.plan.footprint import compile_footprint

# Triton's tiles are tuned on the card; where there is none, XLA takes usual ones, which a product may not be cut into.
_WAYS: tuple[dict[str, Any] | None, ...] = (None, {"xla_gpu_enable_triton_gemm": False})


def main() -> int:
    """Answers the request; returns 0."""
    request = json.load(sys.stdin)
    place, device = card_device(request["card"])
    for text in request["candidates"]:
        print(json.dumps(answer(request["model"], text, place, device)), flush=True)
    return 0


def answer(model: str, text: str, place: Any, device: Any) -> dict[str, Any]:
    """The footprint of a candidate (JSON), or why there is none."""
    candidate = Candidate.from_json(text)
    why = ""
    for options in _WAYS:
        try:
            config, params = abstract_model(model, candidate.held_base)
            found = compile_footprint(
                candidate, config, params, device=device, place=place, compiler_options=options,
                remark=f"all matrix products by cuBLAS, for with Triton's: {why}" if options else "",
            )  # fmt: skip
        except EdgejaxError as error:
            return {"error": str(error)}
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:  # it cannot be compiled
            why = why or (str(error).splitlines() or [type(error).__name__])[0]
        else:
            forget_traces()
            return {"footprint": found.to_json()}
    return {"error": why}


def card_device(name: str) -> tuple[Any, Any]:
    """A function that puts shapes on a card that is not here, and the card; in a process that ``card.compiling_environment``
    was given to.
    """
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=target_config(find_device(name)), topology="1x1x1"
    )
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("card",)), PartitionSpec())

    def place(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    return place, topology.devices[0]


if __name__ == "__main__":
    sys.exit(main())
