"""What all tests share: one CPU back end, one compile cache, and properties that draw the same cases each time."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled programs are kept between runs and shared by the test workers, outside the repository.
_CACHE_ROOT = Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir())
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE_ROOT / "edgejax-tests-xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# A hub must never be asked for anything by a test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis  # noqa: E402  the settings above must come first

import edgejax  # noqa: E402, F401  before jax starts a back end: the numerics guard sets its flag on import

hypothesis.settings.register_profile(
    "edgejax", deadline=None, derandomize=True, max_examples=30, print_blob=True, database=None
)
hypothesis.settings.load_profile("edgejax")
