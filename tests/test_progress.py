"""What is seen while a run is at work: a bar on a real pseudo-terminal, lines in a pipe, nothing with -q."""

import queue
from pathlib import Path
from typing import Any

import pytest

import s3_bulk_convert as program
from tests.test_feeder import FakeBucket, Fed, feed, feeder, pages_of, settings, settle


def test_what_this_run_has_converted_by_then_belongs_to_the_total(tmp_path: Path) -> None:
    fed = Fed()
    with program.Journal(tmp_path / "checkpoint.sqlite3", "bucket", "bucket") as journal:
        settle(journal, feed(FakeBucket(pages_of("done before.png")), journal).tasks, program.Event.CONVERTED)
        bucket = FakeBucket(pages_of("done before.png", "b.png", "c.png", "d.jpg"))
        feeding = feeder(bucket, journal, settings(), queue.Queue(), fed)
        counting = program.TotalCount(feeding)
        settle(journal, feed(FakeBucket(pages_of("b.png")), journal).tasks, program.Event.CONVERTED)
        feeding.is_ahead.set()
        counting.run()
    assert fed.notes == [program.TotalKnown(2)]


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        """The time, in seconds."""
        return self.now


def shown_over(seconds: int, clock: Clock, progress: program.Progress, report: program.Report, each: int) -> None:
    """Let time pass, and so many objects be converted each second."""
    for _ in range(seconds * 5):
        clock.now += 0.2
        if each and round(clock.now * 5) % 5 == 0:
            report.counts["converted"] += each
        progress.show(report)


@pytest.fixture
def clocked(tmp_path: Path, caplog: Any) -> tuple[Clock, program.Progress]:
    """What a run with one worker and no terminal shows, by a clock of the test's own."""
    path, clock = tmp_path / "config.ini", Clock()
    path.write_text("[s3]\nbucket = b\n[convert]\ntarget = jpg\n[run]\nworkers = 1\nlog_every = 1000000\n")
    caplog.set_level("INFO", "s3_bulk_convert")
    return clock, program.Progress(program.load_settings(path, {"CTF_API_KEY": "k"}, []), clock)


def test_silence_of_ten_minutes_is_ten_lines(clocked: tuple[Clock, program.Progress], caplog: Any) -> None:
    report = program.Report()
    report.add_counts({("", "listed"): 7})
    shown_over(605, *clocked, report, each=0)
    lines = [record.fields for record in caplog.records]
    assert len(lines) == 10
    assert {(line["done"], line["total"], line["in_flight"], line["eta_seconds"]) for line in lines} == {
        (0, 7, 1, None)
    }
    assert all(line["silent_since"] for line in lines)


def test_rate_and_eta_are_those_of_the_last_minute(clocked: tuple[Clock, program.Progress], caplog: Any) -> None:
    report = program.Report()
    report.add_counts({("", "listed"): 10_000})
    shown_over(121, *clocked, report, each=10)
    shown_over(120, *clocked, report, each=2)
    fast, slow = caplog.records[1].fields, caplog.records[-1].fields
    assert (fast["per_second"], slow["per_second"]) == (pytest.approx(10, rel=0.05), pytest.approx(2, rel=0.05))
    assert slow["eta_seconds"] == pytest.approx((10_000 - slow["done"]) / 2, rel=0.05)
    assert slow["silent_since"] is None


def test_a_counted_total_takes_the_place_of_the_estimate() -> None:
    report = program.Report()
    report.add_counts({("", "listed"): 10, ("", "already_done"): 4})
    assert report.expected == 6
    report.total = 50
    assert report.expected == 50
    report.is_whole = True
    assert report.expected == 6
