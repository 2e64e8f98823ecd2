"""Footprints on a card that is not here: compiled for it in a process of its own, without a driver or a GPU.

This needs JAX's CUDA plugin and NVIDIA's ``ptxas``: the extra ``gpu-aot``, or better a folder of their own (``install_command``),
for JAX complains at every start about a plugin that finds no driver.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax

from edgejax.core.cache import cache_dir
from edgejax.core.errors import ConfigError
from edgejax.devices import DeviceProfile
from edgejax.plan.candidate import Candidate, abstract_model
from edgejax.plan.cuda_target import RESERVE_BYTES, check_card
from edgejax.plan.footprint import Footprint
from edgejax.plan.search import Plan, candidates_for, find_options, make_plan
from edgejax.plan.store import FootprintStore

PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_force_compilation_parallelism=2"  # there is no card to tune on


def install_command() -> str:
    """What to run so that plans for cards can be made with this JAX."""
    cuda, ptxas = (
        ("12", "nvidia-cuda-nvcc-cu12==12.9.86") if sys.version_info < (3, 12) else ("13", "nvidia-cuda-nvcc")
    )
    names = [f"jax-cuda{cuda}-{part}=={jax.__version__}" for part in ("plugin", "pjrt")]
    return f"pip install --no-deps --target {aot_folder()} {' '.join(names)} {ptxas}"


def aot_folder() -> Path:
    """Where ``install_command`` puts them: a folder for each version of JAX."""
    return cache_dir() / f"gpu-aot-{jax.__version__}"


def find_plugin() -> tuple[str, str]:
    """Name and version of the plugin, in ``aot_folder()`` or else in the environment.

    Raises:
      ConfigError: there is none, or one of another version than JAX; says what to install.
    """
    found = [
        (name, distribution.version)
        for name in PLUGINS
        for distribution in importlib.metadata.distributions(name=name, path=[str(aot_folder()), *sys.path])
    ]
    found.sort(key=lambda one: one[1] != jax.__version__)  # one that fits, if there is any
    if not found:
        raise ConfigError(
            f"plans for a graphics card need JAX's CUDA compiler; install it with\n  {install_command()}"
        )
    name, version = found[0]
    if version != jax.__version__:
        raise ConfigError(
            f"{name} is {version} and JAX is {jax.__version__}: they must be of one version; install it with\n  "
            f"{install_command()}"
        )
    return name, version


def plan_for_card(
    card: DeviceProfile,
    model: str,
    *,
    mode: str = "lora",
    base: str = "int4",
    rank: int = 8,
    seq: int = 512,
    batch: int = 1,
    accumulate: int = 1,
    note: Callable[[str], object] = lambda text: None,
) -> Plan:
    """The settings whose step fits on an NVIDIA card that need not be here.

    Args:
      card: of the table (``devices.find_device``).
      model: a path, a preset or a name of ``models.shapes``.
      mode: ``lora`` or ``full``.
      base: how a frozen base is held.
      rank: of adapters.
      seq: positions of a row.
      batch: rows of a micro-step.
      accumulate: micro-steps of an optimizer step.
      note: told of each program that is compiled, and of kept ones that cannot be read.

    Raises:
      ConfigError: a card that cannot be compiled for, no compiler, an unknown model, settings that do not go together.
    """
    check_card(card)
    assert card.memory_bytes is not None  # the table has it for each card
    plugin = find_plugin()
    store = FootprintStore([dataclasses.asdict(card), plugin, os.environ.get("XLA_FLAGS", "")], note=note)
    candidates = candidates_for(mode, base=base, rank=rank, seq=seq, batch=batch, accumulate=accumulate)
    config, _ = abstract_model(model, candidates[0].held_base)

    def find(candidates: Sequence[Candidate]):
        return find_options(model, candidates, partial(card_footprints, card), store, note)

    return make_plan(
        model,
        candidates,
        config.max_position,
        find,
        device=card.name,
        memory_bytes=card.memory_bytes,
        reserve_bytes=RESERVE_BYTES,
        evidence=f"compiled for {card.name} (buffer assignment)",
    )


def card_footprints(
    card: DeviceProfile, model: str, candidates: Sequence[Candidate]
) -> Iterator[Footprint | str]:
    """For each candidate its footprint on the card, or why it could not be compiled, as soon as it is known.

    Args:
      card: an NVIDIA card of the table.
      model: see ``candidate.abstract_model``.
      candidates: what to compile.

    Raises:
      ConfigError: a card that cannot be compiled for, or no compiler.
    """
    check_card(card)
    find_plugin()
    left = list(candidates)
    while left:  # the compiler may take its process down; then the next one goes on without that candidate
        for answer in _answers(card, model, list(left)):
            del left[0]
            yield answer


def _answers(card: DeviceProfile, model: str, candidates: Sequence[Candidate]) -> Iterator[Footprint | str]:
    """Those of one process; the last one says how it ended, where it ended too early."""
    texts = [candidate.to_json() for candidate in candidates]
    request = json.dumps({"card": card.name, "model": model, "candidates": texts})
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "edgejax.plan.card_process"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=compiling_environment(),
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(request)
            n_left = len(candidates)
            for line in process.stdout:
                if not line.startswith("{"):
                    continue  # of a library
                answer = json.loads(line)
                yield answer["error"] if "error" in answer else Footprint.from_json(answer["footprint"])
                n_left -= 1
            if n_left:
                said.seek(0)
                last = [line for line in said.read().splitlines() if line.strip()][-1:]
                code = process.wait()
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                yield f"the compiler ended with {how}: {''.join(last) or 'it said nothing'}"
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def compiling_environment() -> dict[str, str]:
    """Of a process that compiles for a card: no GPU is looked for, and ptxas is found."""
    flags = [os.environ.get("XLA_FLAGS", ""), _FLAGS]
    paths = [str(aot_folder()), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    for folder in (aot_folder(), *map(Path, sys.path)):
        tools = [folder / "nvidia" / name for name in ("cuda_nvcc", "cu13")]
        found = next((tool for tool in tools if (tool / "bin" / "ptxas").exists()), None)
        if found is not None:
            flags.append(f"--xla_gpu_cuda_data_dir={found}")
            break
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(filter(None, flags)),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
