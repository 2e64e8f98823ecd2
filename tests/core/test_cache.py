"""The compile cache: a second process finds the program; a folder that cannot be used gives a warning only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from edgejax.core.cache import CompileCacheWarning, cache_dir, compile_cache_state, enable_compile_cache

PROGRAM = """
import json, sys
import edgejax
from edgejax.core.cache import compile_cache_state, enable_compile_cache
enable_compile_cache(sys.argv[1])
import jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if "cache_hits" in name else None)
value = float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.arange(17.0)))
print(json.dumps([value, len(hits), compile_cache_state()]))
"""


@pytest.fixture
def _restore_jax_settings():
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_second_process_uses_what_the_first_compiled(tmp_path):
    def run():
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "new" / "xla")],
            env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    first_value, first_hits, state = run()
    second_value, second_hits, _ = run()
    assert first_value == second_value
    assert first_hits == 0
    assert second_hits > 0
    assert state["entries"] > 0
    assert state["size_bytes"] > 0


@pytest.mark.quick
@pytest.mark.usefixtures("_restore_jax_settings")
def test_a_bad_folder_gives_a_warning_only(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(CompileCacheWarning, match="EDGEJAX_CACHE"):
        assert enable_compile_cache(tmp_path / "file" / "xla") is None


@pytest.mark.quick
@pytest.mark.usefixtures("_restore_jax_settings")
def test_default_folder(monkeypatch, tmp_path):
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("EDGEJAX_CACHE", str(tmp_path / "here"))
    assert enable_compile_cache() == tmp_path / "here" / "xla"
    assert compile_cache_state()["directory"] == str(tmp_path / "here" / "xla")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "chosen"))
    assert enable_compile_cache() == tmp_path / "chosen"


@pytest.mark.quick
def test_cache_folder_from_the_environment(monkeypatch):
    monkeypatch.setenv("EDGEJAX_CACHE", "~/models")
    assert cache_dir() == Path.home() / "models"
    monkeypatch.delenv("EDGEJAX_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "edgejax"
