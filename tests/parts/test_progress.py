"""What is seen while a run is at work: lines by a clock of the test's own, and the total that they speak of."""

import gc
from pathlib import Path
from typing import Any

import pytest

import s3_bulk_convert as program

INI = "[s3]\nbucket = b\n[convert]\ntarget = jpg\n[run]\nworkers = 1\nlog_every = 1000000\n"


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        """The time, in seconds."""
        return self.now


class Shown:
    """What a run without a terminal shows."""

    def __init__(self, settings: program.Settings) -> None:
        self.clock, self.report = Clock(), program.Report(settings)
        self.progress = program.Progress(settings, self.report, self.clock)

    def list(self, **counts: int) -> None:
        """Count what the feeder has counted on a page."""
        self.report.apply(program.FeederUpdate({("default", name): count for name, count in counts.items()}))

    def over(self, seconds: int, each: int) -> None:
        """Let time pass, and so many objects be converted each second."""
        for _ in range(seconds * 5):
            self.clock.now += 0.2
            if each and round(self.clock.now * 5) % 5 == 0:
                self.report.counts["converted"] += each
            self.progress.show()


@pytest.fixture
def shown(tmp_path: Path, caplog: Any) -> Shown:
    """A run with one worker."""
    path = tmp_path / "config.ini"
    path.write_text(INI)
    caplog.set_level("INFO", "s3_bulk_convert")
    # A run looks for garbage now and then, and what the tests keep is more than a run ever has.
    gc.freeze()
    return Shown(program.load_settings(path, {"CTF_API_KEY": "k"}, []))


def test_silence_of_ten_minutes_is_ten_lines(shown: Shown, caplog: Any) -> None:
    shown.list(listed=7)
    shown.over(605, each=0)
    lines = [record.fields for record in caplog.records]
    assert len(lines) == 10
    assert {(line["done"], line["total"], line["in_flight"], line["eta_seconds"]) for line in lines} == {
        (0, 7, 1, None)
    }
    assert all(line["silent_since"] for line in lines)


def test_rate_and_eta_are_those_of_the_last_minute(shown: Shown, caplog: Any) -> None:
    shown.list(listed=10_000)
    shown.over(121, each=10)
    # Before all is listed or counted, nobody knows how much is left.
    assert {record.fields["eta_seconds"] for record in caplog.records} == {None}
    shown.report.apply(program.FeederUpdate(total=10_000))
    shown.over(120, each=2)
    fast, slow = caplog.records[1].fields, caplog.records[-1].fields
    assert (fast["per_second"], slow["per_second"]) == (pytest.approx(10, rel=0.05), pytest.approx(2, rel=0.05))
    assert slow["eta_seconds"] == pytest.approx((10_000 - slow["done"]) / 2, rel=0.05)
    assert slow["silent_since"] is None


def test_a_counted_total_takes_the_place_of_the_estimate(shown: Shown) -> None:
    shown.list(listed=10, already_done=4)
    assert shown.report.expected == 6
    shown.report.apply(program.FeederUpdate(total=50))
    assert shown.report.expected == 50
    shown.report.apply(program.FeederUpdate(is_complete=True))
    assert shown.report.expected == 6
