"""Where edgejax keeps what it can make or fetch again: model files and compiled programs."""

import gc
import os
import tempfile
import warnings
from pathlib import Path

from edgejax.core.allocator import release_freed_memory


class CompileCacheWarning(UserWarning):
    """Compiled programs cannot be kept; everything works, compiling is repeated in each process."""


def cache_dir() -> Path:
    """``EDGEJAX_CACHE``, else ``~/.cache/edgejax``. It need not exist."""
    named = os.environ.get("EDGEJAX_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "edgejax"


def enable_compile_cache(directory: str | os.PathLike | None = None) -> Path | None:
    """Keep every program XLA compiles from now on, and use those that were kept.

    Args:
      directory: where to keep them; ``None``: what ``JAX_COMPILATION_CACHE_DIR`` or JAX's configuration already
        names, else ``xla`` in ``cache_dir()``.

    Returns:
      The folder in use, or ``None`` when it cannot be made or written (training goes on without it).

    Warns:
      CompileCacheWarning: the folder cannot be used.

    Example:
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     enable_compile_cache(folder).name == Path(folder).name
      True
    """
    import jax  # here, so that cache_dir() costs nothing

    path = Path(directory or _folder_in_use() or cache_dir() / "xla").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        warnings.warn(
            f"compiled programs cannot be kept in {path}: {error}. Name a writable folder in EDGEJAX_CACHE.",
            CompileCacheWarning,
            stacklevel=2,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)  # -1: not even a file system's default
    return path


def compile_cache_state() -> dict[str, str | int]:
    """Folder of the compile cache, in use or by default, and the entries and bytes in it."""
    folder = _folder_in_use() or str(cache_dir() / "xla")
    entries = [p for p in Path(folder).glob("*-cache") if p.is_file()] if Path(folder).is_dir() else []
    return {
        "directory": folder,
        "entries": len(entries),
        "size_bytes": sum(p.stat().st_size for p in entries),
    }


def forget_traces() -> None:
    """Drop what JAX keeps of functions it has traced, and give freed memory back; compiled programs in use stay.

    A program that has compiled all it needs has no use for them (measured for a SmolLM2-135M step: 20 MB). Functions
    under ``jit`` are traced anew when they are called again.
    """
    import jax

    jax.clear_caches()
    gc.collect()
    release_freed_memory()


def _folder_in_use() -> str | None:
    import jax

    return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # made at run time
