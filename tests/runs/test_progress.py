"""What is seen while a run is at work: a bar on a real pseudo-terminal, lines in a pipe, nothing with -q."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi, Fault, Step
from tests.standins.program import script_with

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
SHORT_SILENCE = "program.LINE_SECONDS = program.SILENCE_SECONDS = 0.5"
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d .+")


class Terminal:
    """A pseudo-terminal, and everything that was written to it."""

    def __init__(self, columns: int) -> None:
        self.master, self.slave = pty.openpty()
        self.written = ""
        self.resize(columns)

    def resize(self, columns: int) -> None:
        """Give it another width, as a window does, but for the signal."""
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read_until(self, pattern: str, start: int = 0, seconds: float = 30) -> int:
        """Read until something is written; where it ends. Raises AssertionError if it does not come."""
        while not (found := re.compile(pattern).search(self.written, start)):
            ready, _, _ = select.select([self.master], [], [], seconds)
            assert ready, f"{pattern} did not come: {self.written[-500:]!r}"
            self.written += os.read(self.master, 65536).decode()
        return found.end()

    def close(self) -> None:
        """Take the terminal away."""
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """A terminal of 120 columns."""
    opened = Terminal(120)
    yield opened
    opened.close()


def put_some(bucket: Any, count: int) -> None:
    for number in range(count):
        bucket.put(f"{number:03}.png", b"\x89PNG\r\n\x1a\n" + f"picture {number}".encode())


def drawn(written: str) -> list[str]:
    """The states of a line that was written again and again, without orders to the terminal."""
    return [re.sub(r"\x1b\[[A-Z]", "", part).rstrip("\n") for part in re.split(r"\r\n|[\r\n]", written)]


def test_a_bar_shows_count_total_rate_failures_latency_and_what_the_month_has_left(
    start: Cli, bucket: Any, api: ConversionApi, terminal: Terminal
) -> None:
    put_some(bucket, 12)
    api.behaviour.month_quota = 100
    run = start("--workers", "2", terminal=terminal.slave)
    terminal.read_until(r"12 of 12 done \|█+\| 0 failed, [\d.]+ files/s, .*p95 [\d.]+ s, quota 88")
    terminal.read_until(r"quota +88 conversions left")
    assert run.wait().exit_code == 0


def test_the_total_is_an_estimate_until_the_listing_has_ended(
    start: Cli, bucket: Any, api: ConversionApi, terminal: Terminal, release: threading.Event
) -> None:
    put_some(bucket, 6)
    fault = api.faults.add(Fault.hang_until(release))
    # A quick server's second pass over the listing would be over before the bar has drawn the estimate.
    without = script_with("program.Feeder.count_total = lambda _: None")
    run = start("--workers", "1", terminal=terminal.slave, command=without)
    assert fault.reached.wait(30)
    terminal.read_until(r"0 of ~6 done")
    release.set()
    terminal.read_until(r"6 of 6 done")
    assert run.wait().exit_code == 0


@pytest.mark.slow
def test_a_second_pass_over_the_listing_gives_the_total_while_the_workers_are_busy(
    *, start: Cli, bucket: Any, api: ConversionApi, terminal: Terminal, release: threading.Event, tmp_path: Path
) -> None:
    bucket.put("done before.png", b"\x89PNG\r\n\x1a\n")
    assert start().wait().exit_code == 0
    put_some(bucket, 25)
    # What this run has converted by then belongs to the total, what an earlier one has converted does not.
    api.faults.add(Fault(Step.WORK, hang=release, where=lambda request: request.is_conversion and len(api.paid) == 4))
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    # A quick server's second pass would be over before the bar has drawn the estimate: it waits until that is seen.
    count = f"count = program.Feeder.count_total; gate = {str(gate)!r}"
    late = "program.Feeder.count_total = lambda self: (open(gate).read(), count(self))"
    script = script_with(f"program.PAGE_KEYS = 5; {SHORT_SILENCE}; {count}; {late}")
    known = ("--workers", "1", "--set", "api.requests_per_minute=100000")
    run = start(*known, command=script, terminal=terminal.slave)
    terminal.read_until(r"3 of ~10 done")
    gate.write_text("go on")
    terminal.read_until(r"3 of 25 done")
    release.set()
    assert run.wait().exit_code == 0


def test_a_window_made_smaller_leaves_no_line_longer_than_it_is(
    start: Cli, bucket: Any, api: ConversionApi, terminal: Terminal, release: threading.Event
) -> None:
    put_some(bucket, 3)
    fault = api.faults.add(Fault.hang_until(release))
    run = start("--workers", "1", terminal=terminal.slave)
    assert fault.reached.wait(30)
    before = terminal.read_until(r"0 of 3 done \|.{60,}\| 0 failed, 0.0 files/s[^\r]*\r")
    terminal.resize(40)
    run.process.send_signal(signal.SIGWINCH)
    resized = terminal.read_until(r"\x1b\[J", before)
    end = terminal.read_until(r"0 of 3 done[^\r]*\r[^\r]*\r", resized)
    lines = drawn(terminal.written[resized:end])
    assert max(map(len, lines)) <= 40
    # What does not fit is left out as a whole; the bar stays.
    assert any(re.fullmatch(r"0 of 3 done \| {10,}\| 0 failed", line) for line in lines), lines
    release.set()
    terminal.read_until("converted     3")
    assert run.wait().exit_code == 0


def test_a_message_does_not_tear_the_bar(
    start: Cli, bucket: Any, api: ConversionApi, terminal: Terminal, release: threading.Event
) -> None:
    put_some(bucket, 4)
    fault = api.faults.add(Fault.hang_until(release))
    run = start("--workers", "1", terminal=terminal.slave)
    assert fault.reached.wait(30)
    terminal.read_until("of ~?4 done")
    run.process.send_signal(signal.SIGTERM)
    terminal.read_until("interrupted by SIGTERM; waiting for what is in flight[^\r]*\r\n")
    terminal.read_until(r"0 failed, 0.0 files/s, stopping, 1 in flight")
    release.set()
    terminal.read_until("hint: run it again")
    (line,) = [line for line in drawn(terminal.written) if "waiting for what is in flight" in line]
    assert LINE.fullmatch(line)
    assert run.wait().exit_code == 143


@pytest.mark.parametrize(
    "environment", [pytest.param({"TERM": "dumb"}, marks=pytest.mark.slow), {"CI": "true"}], ids=str
)
def test_a_terminal_that_is_none_gets_lines(
    *, environment: dict[str, str], start: Cli, bucket: Any, terminal: Terminal
) -> None:
    put_some(bucket, 4)
    run = start("--set", "run.log_every=2", terminal=terminal.slave, **environment)
    terminal.read_until("converted     4")
    assert run.wait().exit_code == 0
    assert not re.search(r"\r(?!\n)|\x1b", terminal.written)
    assert "4 of 4 done, 0 failed, " in terminal.written


def test_quiet_draws_no_bar(start: Cli, bucket: Any, terminal: Terminal) -> None:
    put_some(bucket, 4)
    run = start("-q", terminal=terminal.slave)
    terminal.read_until(r"\n")
    assert run.wait().exit_code == 0
    assert re.fullmatch(r"\S+T\S+ converted 4 in [\d.]+ s, .* failed 0, left 0\r\n", terminal.written)


def test_a_pipe_gets_a_line_every_so_many_objects(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    # So far apart that each is committed, and said, by itself.
    api.behaviour.latency = 0.15
    put_some(bucket, 9)
    run = run_cli("--workers", "1", "--set", "run.log_every=3")
    lines = run.err.splitlines()
    assert all(LINE.fullmatch(line) for line in lines)
    assert [re.findall(r" (\d) of ~?9 done, 0 failed, ", line) for line in lines][1:] == [["3"], ["6"], ["9"]]


def test_a_line_comes_even_when_nothing_finishes_and_says_what_is_waited_for(
    start: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    put_some(bucket, 5)
    api.faults.add(Fault.hang_until(release, times=2))
    run = start("--workers", "2", command=script_with(SHORT_SILENCE))
    # On a slow machine, the first such line waits for the listing.
    said = next(line for line in run.process.stderr if "nothing since" in line and "the listing" not in line)
    assert re.search(r"0 of ~?5 done, .*nothing since \d\d:\d\d:\d\d[+-]\d\d:\d\d: waiting for 2 in flight$", said)
    release.set()
    assert run.wait().exit_code == 0
