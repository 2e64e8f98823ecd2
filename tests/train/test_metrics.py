"""metrics.jsonl: appended, flushed, cut back on resume."""

import errno
import os

import pytest

from edgejax.core.errors import RunError
from edgejax.train import MetricsLog, read_metrics

pytestmark = pytest.mark.quick


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_every_append_can_be_read_at_once(path):
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.append("train", step=step, loss=1.0 / step)
            assert [r["step"] for r in read_metrics(path)] == list(range(1, step + 1))
    assert read_metrics(path)[2] == {"kind": "train", "step": 3, "loss": 1 / 3}


def test_resume_drops_later_steps_and_the_torn_line(path):
    with MetricsLog(path) as log:
        log.append("eval", step=0, loss=4.0)
        for step in (1, 2, 3, 4):
            log.append("train", step=step, loss=1.0)
        log.append("eval", step=4, loss=3.0)
    with open(path, "a") as file:
        file.write('{"kind": "train", "st')
    with MetricsLog(path, keep_to_step=2) as log:
        assert log.evaluations == {0: {"kind": "eval", "step": 0, "loss": 4.0}}
        log.append("train", step=3, loss=0.5)
    assert [(r["kind"], r["step"]) for r in read_metrics(path)] == [
        ("eval", 0), ("train", 1), ("train", 2), ("train", 3),
    ]  # fmt: skip


def test_appending_without_a_step_keeps_whole_lines(path):
    path.write_text('{"kind": "train", "step": 9}\n{"kind"')
    with MetricsLog(path):
        pass
    assert path.read_text() == '{"kind": "train", "step": 9}\n'


def test_damaged_line_is_named(path):
    path.write_text('{"kind": "train", "step": 1}\nnot json\n{"kind": "train", "step": 2}\n')
    with pytest.raises(RunError, match="line 2 is not JSON"):
        MetricsLog(path)


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_full_disk_is_named(path):
    with MetricsLog(path) as log:
        log._file.close()
        log._file = open("/dev/full", "w")  # noqa: SIM115  # closed below
        with pytest.raises(RunError, match=os.strerror(errno.ENOSPC)):
            log.append("train", step=1, loss=1.0)
        with pytest.raises(RunError, match=os.strerror(errno.ENOSPC)):
            log.close()
