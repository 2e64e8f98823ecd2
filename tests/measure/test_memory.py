"""Memory figures: the text of /proc, a watcher that sees an allocation, XLA's figures, trees."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgejax.measure import memory
from edgejax.measure.memory import (
    AnonymousPeak,
    MemoryReport,
    memory_report,
    parse_status,
    process_memory,
    xla_memory,
)

pytestmark = pytest.mark.quick
MIB = 1 << 20
on_linux = pytest.mark.skipif(not memory._STATUS.exists(), reason="needs /proc")
STATUS = """Name:\tpython
VmPeak:\t  900000 kB
VmHWM:\t  300 kB
VmRSS:\t  200 kB
RssAnon:\t  120 kB
RssFile:\t   80 kB
RssShmem:\t    0 kB
Threads:\t4
"""


def test_status_text():
    found = parse_status(STATUS)
    assert found.peak_rss_bytes == 300 * 1024
    assert found.rss_bytes == 200 * 1024
    assert found.anonymous_bytes == 120 * 1024
    assert found.file_bytes == 80 * 1024


def test_status_of_an_old_kernel_has_no_split():
    found = parse_status("VmHWM:\t 3 kB\nVmRSS:\t 2 kB\n")
    assert (found.anonymous_bytes, found.file_bytes) == (None, None)


def test_without_proc_the_peak_comes_from_getrusage(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "missing")
    found = process_memory()
    assert found.rss_bytes is None
    assert found.peak_rss_bytes > 10 * MIB


@on_linux
def test_process_memory_follows_an_allocation():
    before = process_memory()
    block = np.ones(64 * MIB, np.uint8)
    after = process_memory()
    assert after.anonymous_bytes - before.anonymous_bytes >= 0.9 * block.nbytes
    assert after.peak_rss_bytes >= after.rss_bytes - MIB  # the kernel counts per thread, in batches


@on_linux
def test_watcher_sees_a_block_that_is_gone_again():
    import time

    before = process_memory().anonymous_bytes
    with AnonymousPeak(interval_s=0.002) as watch:
        block = np.ones(64 * MIB, np.uint8)
        time.sleep(0.05)
        del block
    assert watch.n_samples >= 3
    assert watch.peak_bytes - before >= 50 * MIB
    assert process_memory().anonymous_bytes < watch.peak_bytes


def test_xla_figures_are_those_of_the_program():
    program = jax.jit(lambda x, y: (x + 1, (x @ y).sum()), donate_argnums=0)
    shape = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    found = xla_memory(program.lower(shape, shape).compile())
    assert found.argument_bytes == 2 * 256 * 256 * 4
    assert found.alias_bytes == 256 * 256 * 4
    assert found.output_bytes >= 256 * 256 * 4 + 4
    assert (
        found.peak_bytes == found.argument_bytes + found.output_bytes - found.alias_bytes + found.temp_bytes
    )


def test_report_counts_trees_as_stored():
    report = memory_report(
        frozen={"w": np.zeros((4, 8), np.int8)},
        trainable={"a": np.zeros(8, np.float32)},
        opt_state=(np.zeros(8, np.float32), np.zeros(8, np.float32)),
        runtime_bytes=1000,
    )
    assert report.weights_bytes == 32
    assert report.trainable_bytes == 32
    assert report.optimizer_bytes == 64
    assert report.by_source() == {"weights": 32, "adapters": 32, "optimizer": 64, "runtime": 1000}
    assert (report.step_peak_bytes, report.device_peak_bytes) == (None, None)
    assert report.peak_rss_bytes > MIB


def test_sources_of_nothing_are_left_out():
    report = MemoryReport(
        weights_bytes=0, trainable_bytes=4, optimizer_bytes=0, activations_bytes=None, runtime_bytes=None,
        peak_rss_bytes=9,
    )  # fmt: skip
    assert report.by_source() == {"adapters": 4}


@on_linux
def test_peak_is_of_the_whole_process_life():
    program = (
        "import numpy as np\n"
        "from edgejax.measure.memory import process_memory\n"
        "before = process_memory().peak_rss_bytes\n"
        "np.ones(100 << 20, np.uint8)\n"
        "after = process_memory()\n"
        "assert after.peak_rss_bytes - before > 90 << 20, (before, after)\n"
        "assert after.rss_bytes < after.peak_rss_bytes - (50 << 20), after\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
