"""The same three steps on one device, on eight simulated ones and in two processes; runs that lose a process.

    python -m helpers.mesh_driver numbers FOLDER                  all meshes of 8 simulated devices against one device
    python -m helpers.mesh_driver process FOLDER INDEX PORT MESH  the same steps in one of two real processes
    python -m helpers.mesh_driver train FOLDER INDEX PORT PAUSE [CHANGES]
                                                                  a whole run in one of two; PAUSE seconds between steps

How many devices there are is fixed when the back end starts, so each is a process of its own. The first prints one JSON
object.
"""

import functools
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax

import edgejax  # noqa: F401  first: the numerics guard
from edgejax.core.errors import EdgejaxError
from edgejax.core.trees import tree_bytes, tree_paths
from edgejax.data import Batch
from edgejax.measure.memory import xla_memory
from edgejax.models import Decoder, ModelConfig
from edgejax.optim import adamw, stochastic_rounding
from edgejax.train import (
    SilentProgress,
    bytes_per_device,
    finetune,
    init_state,
    is_run_folder,
    joined,
    make_mesh,
    make_sharded_step,
    make_train_step,
    mesh_receipt,
    parse_mesh,
    start_over_mesh,
)
from edgejax.train.held import hold_weights, wide
from edgejax.train.processes import gather
from helpers.tiny_run import LORA, make_model, make_rows, make_settings

# Matrices of 4 to 24 units of a quantised moment, so that some divide by 8 and some do not.
CONFIG = ModelConfig(
    family="llama", vocab_size=384, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=128,
    max_position=64, tie_embeddings=True,
)  # fmt: skip
ROWS, LENGTH, STEPS = 8, 24, 3
MESHES = ("data=8", "data=4,shard=2", "shard=8")
RUNS = (
    *(("f32", mesh) for mesh in (None, *MESHES)),
    *(("adamw4bit", mesh) for mesh in (None, "data=4,shard=2", "shard=8")),
    *(("bfloat16", mesh) for mesh in (None, "data=2,shard=4")),
    *(("kept", mesh) for mesh in (None, "data=4,shard=2")),
)


def make_run_optimizer(variant: str) -> optax.GradientTransformation:
    # A large epsilon: where a gradient is rounding noise, Adam's quotient of two noises would tell nothing.
    optimizer = adamw(1e-2, eps=1e-3, weight_decay=0.01, bits=4 if variant == "adamw4bit" else 32)
    return optax.chain(optimizer, stochastic_rounding(0)) if variant == "bfloat16" else optimizer


def make_params() -> dict:
    shapes = jax.eval_shape(lambda: Decoder(CONFIG).init(jax.random.key(0)))
    random = np.random.default_rng(3)
    return jax.tree.map(lambda x: 0.2 * random.standard_normal(x.shape).astype(np.float32), shapes)


def batch(seed: int, shape: tuple[int, int, int]) -> Batch:
    """The same 8 rows for each seed, however they are cut: two documents a row, every fifth token without loss."""
    random = np.random.default_rng(seed)
    rows = (ROWS, LENGTH)
    tokens = random.integers(0, CONFIG.vocab_size, (ROWS, LENGTH + 1), dtype=np.int32)
    half = LENGTH // 2
    segments = np.broadcast_to(1 + (np.arange(LENGTH) >= half), rows).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH) % half, rows).astype(np.int32)
    whole = Batch(tokens[:, :-1], tokens[:, 1:], random.random(rows) < 0.8, segments, positions)
    return jax.tree.map(lambda leaf: leaf.reshape(shape), whole)


def three_steps(variant: str, mesh_text: str | None, accumulate: int):
    """(trained leaves by path, figures)."""
    optimizer = make_run_optimizer(variant)
    how = {"remat": "mlp", "boundaries": "bf16"} if variant == "kept" else {}
    shape = (accumulate, ROWS // accumulate, LENGTH)

    def start(params):
        return {}, init_state(hold_weights(params, bfloat16=variant == "bfloat16"), optimizer)

    if mesh_text is None:
        state = jax.jit(lambda params: start(params)[1])(make_params())
        step = make_train_step(Decoder(CONFIG), optimizer, mode="full", **how)
    else:
        mesh = make_mesh(parse_mesh(mesh_text))
        _, state = start_over_mesh(start, "full", make_params(), mesh)
        step = make_sharded_step(Decoder(CONFIG), optimizer, mesh, mode="full", **how)
    compiled = step.lower(state, {}, batch(0, shape)).compile()
    memory = xla_memory(compiled)
    figures = {
        "whole_bytes": tree_bytes(state),
        "argument_bytes": memory.argument_bytes,
        "alias_bytes": memory.alias_bytes,
        "temp_bytes": memory.temp_bytes,
    }
    if mesh_text is not None:
        receipt = mesh_receipt(state, mesh)
        figures |= {
            "bytes_per_device": sorted(bytes_per_device(state).values()),
            "receipt_bytes": receipt.device_bytes,
            "receipt": str(receipt),
            "repeated": {leaf.name: leaf.n_bytes for leaf in receipt.repeated},
        }
    for seed in range(STEPS):
        state, metrics = compiled(state, {}, batch(seed, shape))
    figures |= {name: float(value) for name, value in metrics.items()}
    whole = gather(state.trainable)  # all processes take part
    return tree_paths(wide(whole)) if jax.process_index() == 0 else {}, figures


def gaps(ours: dict, theirs: dict) -> dict[str, float]:
    """The largest difference of an element, and the share of elements further than 2e-6; relative to a leaf's largest."""
    pairs = [(np.asarray(ours[name]), np.asarray(leaf)) for name, leaf in theirs.items()]
    apart = np.concatenate([(np.abs(a - b) / np.abs(b).max()).ravel() for a, b in pairs])
    return {"gap": float(apart.max()), "apart": float((apart > 2e-6).mean())}


def numbers(folder: Path) -> dict:
    found: dict = {}
    alone: dict = {}
    for variant, mesh in RUNS:
        leaves, figures = three_steps(variant, mesh, ROWS if mesh is None else 1)
        leaves = jax.device_get(leaves)
        if mesh is None:
            alone[variant] = leaves
            np.savez(folder / f"{variant}.npz", **leaves)
        figures |= gaps(leaves, alone[variant])
        found.setdefault(variant, {})[mesh or "alone"] = figures
    return found


def process(folder: Path, index: int, port: int, mesh: str) -> None:
    with joined(f"127.0.0.1:{port}", 2, index):
        leaves, figures = three_steps("f32", mesh, ROWS // 2)
        if index == 0:
            np.savez(folder / f"processes-{mesh}.npz", **jax.device_get(leaves))
            (folder / f"processes-{mesh}.json").write_text(json.dumps(figures))


def train(folder: Path, index: int, port: int, pause_s: float, changes: dict) -> None:
    """A run as the command line starts it; ends with the code and the message that it would."""

    def pause(figures) -> None:
        time.sleep(pause_s)

    run = functools.partial(finetune, make_model(), make_rows(), make_rows(1, 5), lora=LORA, hooks=[pause])
    settings = make_settings(**{"batch_size": 2, "mesh": "shard=2", **changes})
    resume = is_run_folder(folder)
    try:
        with joined(f"127.0.0.1:{port}", 2, index, how_to_go_on="Go on with this."):
            result = run(settings=settings, out_dir=folder, resume=resume, progress=SilentProgress())
            if index == 0:
                leaves = tree_paths(result.trainable)
                np.savez(folder.with_suffix(".npz"), held_out=result.held_out_after.loss, **leaves)
    except EdgejaxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    what, folder, *rest = sys.argv[1:]
    if what == "numbers":
        print(json.dumps(numbers(Path(folder))))
    elif what == "process":
        process(Path(folder), int(rest[0]), int(rest[1]), rest[2])
    else:
        train(Path(folder), int(rest[0]), int(rest[1]), float(rest[2]), json.loads("".join(rest[3:]) or "{}"))
