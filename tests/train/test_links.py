"""Connections between processes, tried with threads: who is refused, and how soon a loss is known."""

import json
import socket
import threading
import time

import pytest

from edgejax.core.errors import RunError
from edgejax.train import links
from edgejax.train.links import Address, free_port, meet, parse_address

pytestmark = pytest.mark.quick


class Meeting:
    """Some processes that meet, each in a thread of its own."""

    def __init__(self, *hellos: tuple[int, int], timeout_s: float = 10.0):
        self.address = Address("127.0.0.1", free_port())
        self.found: dict[int, object] = {}
        self.lost: dict[int, list[str]] = {}
        threads = [
            threading.Thread(target=self._come, args=(n, *hello, timeout_s)) for n, hello in enumerate(hellos)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)

    def _come(self, number: int, index: int, n_processes: int, timeout_s: float) -> None:
        try:
            self.found[number] = meet(
                self.address, index, n_processes, welcome=lambda: {"port": 7}, timeout_s=timeout_s
            )
        except RunError as error:
            self.found[number] = error

    def watch(self) -> list[links.Links]:
        together = [self.found[number][0] for number in sorted(self.found)]
        for number, link in enumerate(together):
            self.lost[number] = []
            link.watch(self.lost[number].append)
        return together


def wait_until(condition) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < 10
        time.sleep(0.002)
    return time.monotonic() - started


def break_off(link: links.Links) -> None:
    """What the system does when a process dies."""
    link._ending.set()  # its own watch must not speak
    for one in link._links.values():
        one.socket.shutdown(socket.SHUT_RDWR)


def test_all_are_welcomed_and_leave_in_peace():
    meeting = Meeting((0, 3), (1, 3), (2, 3))
    assert [welcome for _, welcome in meeting.found.values()] == [{"port": 7}] * 3
    first, *others = meeting.watch()
    for link in others:
        link.close()
    first.close()
    time.sleep(0.05)
    assert meeting.lost == {0: [], 1: [], 2: []}


@pytest.mark.parametrize("dying", [0, 1, 2])
def test_a_death_is_known_to_all_at_once(dying):
    meeting = Meeting((0, 3), (1, 3), (2, 3))
    together = meeting.watch()
    break_off(together[dying])
    left = [number for number in range(3) if number != dying]
    assert wait_until(lambda: all(meeting.lost[number] for number in left)) < 1
    for number in left:
        assert meeting.lost[number] == [f"process {dying} is gone: its connection was closed"]


def test_silence_counts_as_a_death(monkeypatch):
    monkeypatch.setattr(links, "SILENCE_S", 0.3)
    monkeypatch.setattr(links, "BEAT_S", 60)
    meeting = Meeting((0, 2), (1, 2))
    together = meeting.watch()
    wait_until(lambda: meeting.lost[0])
    assert "process 1 is gone, or its machine: nothing was heard of it for 0 s" in meeting.lost[0][0]
    for link in together:
        link.close()


def test_beats_keep_quiet_processes_alive(monkeypatch):
    monkeypatch.setattr(links, "SILENCE_S", 0.5)
    monkeypatch.setattr(links, "BEAT_S", 0.05)
    meeting = Meeting((0, 2), (1, 2))
    together = meeting.watch()
    time.sleep(1.2)
    assert meeting.lost == {0: [], 1: []}
    for link in reversed(together):
        link.close()


def test_an_error_is_told_with_its_reason_unless_all_have_it(monkeypatch):
    monkeypatch.setattr(links, "GRACE_S", 0.3)
    meeting = Meeting((0, 3), (1, 3), (2, 3))
    first, failing, other = meeting.watch()
    failing.close("the disk is full")
    other.close("the disk is full")  # it met the same error
    wait_until(lambda: meeting.lost[0])
    assert meeting.lost[0][0].endswith("stopped: the disk is full")
    assert meeting.lost[1] == meeting.lost[2] == []
    first.close()


def test_one_that_does_not_come():
    meeting = Meeting((0, 3), (2, 3), timeout_s=0.5)
    assert "waited 0 s" in str(meeting.found[0])
    assert "for process 1 of 3; start every process" in str(meeting.found[0])
    assert "process 2 cannot join the run: process 0 " in str(
        meeting.found[1]
    )  # gave up, or had waited as long


def test_no_first_process():
    meeting = Meeting((1, 2), timeout_s=0.5)
    assert "process 1 could not reach process 0" in str(meeting.found[0])


def test_processes_that_were_told_different_things():
    for hellos, message in (
        (((0, 2), (1, 3)), "process 1 was started with --processes 3, process 0 with 2"),
        (((0, 3), (1, 3), (1, 3)), "two processes were started with --process-index 1"),
    ):
        meeting = Meeting(*hellos)
        assert all(message in str(error) for error in meeting.found.values())


def test_a_port_in_use_and_another_program_at_the_door():
    with (
        socket.create_server(("", 0)) as server,
        pytest.raises(RunError, match=r"cannot listen on port .* another port"),
    ):
        meet(Address("127.0.0.1", server.getsockname()[1]), 0, 2, timeout_s=1)
    address = Address("127.0.0.1", free_port())
    knock = threading.Thread(target=_knock, args=(address,))
    knock.start()
    with pytest.raises(RunError, match="for process 1 of 2"):
        meet(address, 0, 2, timeout_s=1)
    knock.join()


def _knock(address: Address) -> None:
    time.sleep(0.2)
    for text in (b"GET / HTTP/1.1\r\n\r\n", json.dumps([1]).encode() + b"\n", b'{"process": 1}\n'):
        with socket.create_connection(address, timeout=5) as stranger:
            stranger.sendall(text)


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:x", "host:0", "host:70000"])
def test_no_addresses(text):
    with pytest.raises(ValueError, match="host:port"):
        parse_address(text)
