"""Gradients from narrow layer boundaries against exact ones, layer by layer, and what the boundaries take.

    python experiments/residuals/measure.py            about 15 minutes on two cores; times do not matter
    python experiments/residuals/render.py             writes the newest result into README.md of this folder

The model and the text are those of ``edgejax bench``. The result file is never overwritten.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from attempts import Attempt

from edgejax.cli.bench_inputs import BenchInputs, open_inputs
from edgejax.cli.bench_settings import BenchSettings
from edgejax.measure.memory import xla_memory
from edgejax.measure.record import make_record, write_record
from edgejax.memory import stored_bytes
from edgejax.memory.residuals import Bf16, Int8
from edgejax.models import Decoder, LoraConfig, loss
from edgejax.train.recipe import StepRecipe, make_step, start_run

RESULTS = Path(__file__).parent / "results"
LORA = LoraConfig(rank=8)
SETTINGS = BenchSettings(model="smollm2-135m", base="int4", seq=256, repeats=24)
TRAINED_STEPS, LEARNING_RATE = 16, 5e-4
PROMISED = {  # name: remat, boundaries
    "f32": ("full", "f32"),
    "bf16": ("full", "bf16"),
    "int8": ("full", "int8"),
    "sqrt f32": ("sqrt", "f32"),
    "sqrt bf16": ("sqrt", "bf16"),
    "attention bf16": ("attention", "bf16"),
    "mlp bf16": ("mlp", "bf16"),
}
TRIED = {
    "bf16, stochastic": ("full", Bf16(stochastic=True)),
    **{f"int8, stochastic, block {q}": ("full", Attempt(q)) for q in (32, 64)},
    "int8, nearest, block 32": ("full", Attempt(32, rounding="nearest")),
    "int8, dither, block 32": ("full", Attempt(32, rounding="dither")),
    "int8, dither, 4 values a row kept": ("full", Attempt(32, rounding="dither", wide=4)),
    "int8, dither, levelled": ("full", Attempt(32, level=0.5, rounding="dither")),
    "int8, dither, levelled, block 8": ("full", Attempt(8, level=0.5, rounding="dither")),
    "int8, change, stochastic": ("full", Attempt(32, change=True)),
    "int8, change, dither": ("full", Attempt(32, change=True, rounding="dither")),
    "int8, change, dither, level 1": ("full", Attempt(32, change=True, level=1.0, rounding="dither")),
    "int8, change, stochastic, levelled": ("full", Attempt(32, change=True, level=0.5)),
    "int8, change, dither, levelled, block 64": ("full", Int8(block=64)),
    "int8, change, dither, levelled, in groups": ("sqrt", Int8()),
}
TILE = 128


def main() -> None:
    """Measure everything and write one record."""
    inputs = open_inputs(SETTINGS)
    params = inputs.load()
    results: dict[str, Any] = {"gradients": {}, "stored_bytes": {}}
    for state, adapters in adapters_at(inputs, params).items():
        results["gradients"][state] = compare(inputs, params, adapters)
        results["stream"] = stream(inputs, params, adapters)
    shape = (SETTINGS.batch, SETTINGS.seq, inputs.config.d_model)
    for name, (_, kind) in {**PROMISED, **TRIED}.items():
        results["stored_bytes"][name] = stored_bytes(kind, shape)
    results["step_temp_bytes"] = {
        "smollm2-135m T256": temp_of_steps(SETTINGS),
        "smollm2-135m T1024": temp_of_steps(dataclasses.replace(SETTINGS, seq=1024, repeats=1)),
        "llama-3.2-1b T1024": temp_of_steps(
            BenchSettings(model="llama-3.2-1b", random_weights=True, base="int4", seq=1024, repeats=1)
        ),
    }
    config = {"model": dataclasses.asdict(SETTINGS), "lora": dataclasses.asdict(LORA), "tile": TILE,
              "trained_steps": TRAINED_STEPS, "learning_rate": LEARNING_RATE}  # fmt: skip
    record = make_record(
        "residuals", config=config, results=results, seeds={"all": SETTINGS.seed}, hashes=inputs.hashes
    )
    print(write_record(RESULTS / f"{time.strftime('%Y-%m-%d-%H%M')}.json", record))


def adapters_at(inputs: BenchInputs, params: Any) -> dict[str, Any]:
    """Adapters as a run starts (B zero: only B has a gradient), and after some steps."""
    recipe = StepRecipe(learning_rate=LEARNING_RATE, seed=SETTINGS.seed)
    step = make_step(recipe, inputs.config, LORA)
    _, state = start_run(recipe, inputs.config, params, LORA)
    first = jax.device_get(state.trainable)
    for number in range(TRAINED_STEPS):
        state, _ = step(state, params, inputs.batch_at(number))
    return {"at the start": first, f"after {TRAINED_STEPS} steps": jax.device_get(state.trainable)}


def compare(inputs: BenchInputs, params: Any, adapters: Any) -> dict[str, Any]:
    """For each way: cosine and ratio of norms of every layer's gradient with the exact one, on an unseen row."""
    batch = jax.tree.map(lambda leaf: leaf[0], inputs.batch_at(TRAINED_STEPS))
    exact_loss, exact = gradient_by_layer(inputs, params, adapters, batch, "full", "f32")
    found = {}
    for name, (remat, kind) in {**PROMISED, **TRIED}.items():
        value, ours = gradient_by_layer(inputs, params, adapters, batch, remat, kind)
        norms = np.linalg.norm(ours, axis=1), np.linalg.norm(exact, axis=1)
        cosine = (ours * exact).sum(axis=1) / (norms[0] * norms[1])
        ratio = norms[0] / norms[1]
        found[name] = {
            "cosine": cosine.tolist(),
            "norm_ratio": ratio.tolist(),
            "loss_is_exact": value == exact_loss,
        }
        print(
            f"{name:45} cosine at least {cosine.min():.6f}, norms within {np.abs(ratio - 1).max():.4f}",
            flush=True,
        )
    return found


def stream(inputs: BenchInputs, params: Any, adapters: Any) -> dict[str, list[float]]:
    """What the boundaries are like, layer by layer: sizes, and how much changes to the next."""
    decoder, batch = (
        Decoder(inputs.config, LORA),
        jax.tree.map(lambda leaf: leaf[0], inputs.batch_at(TRAINED_STEPS)),
    )

    @jax.jit
    def layer_inputs(adapters, params, batch):
        rope, h = decoder.rope(batch.positions), decoder.embed(params, batch.tokens)

        def one_layer(h, layer):
            return decoder.block(*layer, h, rope, batch.segment_ids), h

        return jax.lax.scan(one_layer, h, (params["blocks"], adapters["blocks"]))[1]

    h = np.asarray(layer_inputs(adapters, params, batch), np.float64)[:, 0]
    channels = np.abs(h).mean(axis=1)
    change = np.linalg.norm(np.diff(h, axis=0), axis=-1) / np.linalg.norm(h[1:], axis=-1)
    return {
        "median_size": np.median(np.abs(h), axis=(1, 2)).tolist(),
        "largest_size": np.abs(h).max(axis=(1, 2)).tolist(),
        "largest_channel_over_median_channel": (channels.max(axis=1) / np.median(channels, axis=1)).tolist(),
        "change_over_size_median_of_tokens": np.median(change, axis=1).tolist(),
    }


def gradient_by_layer(inputs, params, adapters, batch, remat: str, kind: Any) -> tuple[float, np.ndarray]:
    """(loss, float64 ``[L, ...]``): everything a layer's adapters get."""
    decoder = Decoder(inputs.config, LORA)

    @jax.jit
    @jax.value_and_grad
    def gradient(adapters, params, batch):
        return loss(decoder, params, adapters, batch, remat=remat, boundaries=kind)[0]

    value, tree = jax.device_get(gradient(adapters, params, batch))
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree["blocks"])]
    return float(value), np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def temp_of_steps(settings: BenchSettings) -> dict[str, int]:
    """XLA temp bytes of a whole LoRA training step, compiled from shapes; nothing is run."""
    inputs, found = open_inputs(settings), {}
    for tile in (None, TILE):
        for name, (remat, kind) in PROMISED.items():
            recipe = StepRecipe(remat=remat, boundaries=kind, mlp_tile=tile)
            start = partial(start_run, recipe, inputs.config, lora=LORA)
            frozen, state = jax.eval_shape(start, inputs.abstract_params)
            step = make_step(recipe, inputs.config, LORA)
            compiled = step.lower(state, frozen, inputs.batch_at(0)).compile()
            label = name if tile is None else f"{name}, tile {tile}"
            found[label] = xla_memory(compiled).temp_bytes
            print(f"{settings.model} T{settings.seq} {label:20} {found[label] / 1e6:8.1f} MB", flush=True)
    return found


if __name__ == "__main__":
    main()
