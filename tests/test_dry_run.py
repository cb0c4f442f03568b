"""--dry-run: what it foresees is what the run then does, and it sends nothing to be converted and leaves nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

import s3_bulk_convert as program
from s3_bulk_convert import Event, JournalInMind, Outcome, Usage
from tests.test_feeder import NOW, FakeBucket, pages_of, settings
from tests.test_journal import converted, task


def foresee(bucket: FakeBucket, path: Path) -> list[Outcome]:
    """What a planner tells of a bucket, as --dry-run uses it."""
    told: list[Outcome] = []
    with JournalInMind(path, "bucket", "bucket") as journal:
        forecast = program.Forecast(settings(), journal)
        planner = program.Planner(settings(), bucket, journal, program.StopFlag())
        for page, routes in planner.pages(lambda: 1):
            tasks = planner.tasks_of(page, routes)
            told += planner.settled
            forecast.plan(tasks, planner)
    return told


def test_a_collision_with_an_object_of_another_page_is_foreseen(tmp_path: Path) -> None:
    told = foresee(FakeBucket([*pages_of("a.heic"), *pages_of("b.png"), *pages_of("a.png")]), tmp_path / "none")
    assert [(outcome.task.key, outcome.code) for outcome in told] == [("a.png", "output_collision")]
    assert list(tmp_path.iterdir()) == []


def test_a_collision_is_foreseen_beside_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.sqlite3"
    with program.Journal(path, "bucket", "bucket") as journal:
        journal.end([converted(task("old.png", "converted/old.jpg"))], 1.0)
    before = path.read_bytes()
    told = foresee(FakeBucket([*pages_of("a.heic", "old.heic"), *pages_of("a.png")]), path)
    assert [outcome.task.key for outcome in told] == ["old.heic", "a.png"]
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"checkpoint.sqlite3": before}


def test_without_a_checkpoint_outputs_that_are_there_count_as_done(tmp_path: Path) -> None:
    told = foresee(FakeBucket(pages_of("a.png", "b.png"), {"converted/a.jpg": NOW + 60}), tmp_path / "none")
    assert [(outcome.task.key, outcome.event) for outcome in told] == [("a.png", Event.FOUND)]


@pytest.mark.parametrize(
    ("usage", "options", "warning"),
    [
        (Usage(), [], "what the month has left is not known (the API does not say)"),
        (Usage(remaining=5), [], "5 conversions more than the month has left are billed as overage"),
        (Usage(remaining=5, bills_overage=False), [], "5 conversions more than the month has left are refused"),
        (Usage(remaining=12), ["api.keep_remaining=3"], "the run would stop when 3 conversions are left"),
        (Usage(remaining=10), [], ""),
    ],
)
def test_what_the_quota_means_is_said(usage: Usage, options: list[str], warning: str) -> None:
    found = list(program.quota_warnings(10, usage, "", settings(*options).api))
    assert [said[: len(warning)] for said in found] == ([warning] if warning else [])


@pytest.mark.parametrize(
    ("options", "measured", "seconds"),
    [
        pytest.param([], [], 100 * 0.8 / 2, id="by the workers, at the published latency"),
        pytest.param([], [3.0, 4.0, 90.0], 100 * 4.0 / 2, id="by the workers, at the measured median"),
        pytest.param(["api.requests_per_minute=30"], [], 100 * 2, id="by the rate"),
        pytest.param(["api.requests_per_minute=30", "api.max_conversions=10"], [], 10 * 2, id="of what the cap allows"),
    ],
)
def test_the_time_is_bound_by_the_rate_or_by_the_workers(
    options: list[str], measured: list[float], seconds: float, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.sqlite3"
    with program.Journal(path, "bucket", "bucket") as journal:
        journal.end([converted(task(str(number)), seconds=took) for number, took in enumerate(measured)], 1.0)
        journal.end([replace(converted(task("found")), event=Event.FOUND, seconds=0.001)], 1.0)
    with JournalInMind(path, "bucket", "bucket") as reader:
        forecast = program.Forecast(settings(*options), reader)
        planner = program.Planner(settings(), FakeBucket([]), reader, program.StopFlag())
        forecast.plan([replace(task(str(number)), job="default") for number in range(100)], planner)
        assert forecast.seconds == pytest.approx(seconds)
