"""Two jobs that want one output key for the same source: the one that has it keeps it, and one output is paid for."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_processes import has_paid, wait_until
from tests.runs.test_resume import until_next_second
from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.converters import Conversion, Converted, wrapped
from tests.standins.program import script_with
from tests.standins.samples import photo

Cli = Callable[..., Any]
PNG = b"\x89PNG\r\n\x1a\n"
KEYS = [f"in/{number}.png" for number in range(4)]
PHOTOS = ("[job photos]", "quality = 80")
HQ = ("[job hq]", "include = in/0.png in/1.png", "quality = 95")


def with_its_quality(conversion: Conversion) -> Converted:
    """Convert nothing, but let the output say with which quality it was made."""
    return Converted(wrapped(b"quality %d" % (conversion.quality or 0), "jpg"), "image/jpeg", "jpg")


@pytest.fixture(autouse=True)
def _four_sources(api: ConversionApi, bucket: Any) -> None:
    api.behaviour.convert = with_its_quality
    for key in KEYS:
        bucket.put(key, PNG + key.encode())


@pytest.fixture
def run_jobs(run_cli: Cli, tmp_path: Path) -> Cli:
    """Run with these jobs, and bear with any number of failures."""

    def run_jobs(*lines: str, options: tuple[str, ...] = ()) -> Any:
        ini = tmp_path / "jobs.ini"
        ini.write_text("\n".join(lines), encoding="utf-8")
        return run_cli("-c", str(ini), "--set", "run.max_failure_rate=never", *options)

    return run_jobs


def qualities(bucket: Any) -> dict[str, int]:
    """The number in each key of an output -> the quality that it was made with."""
    return {
        key.rpartition("/")[2].removesuffix(".jpg"): int(body.partition(b"quality ")[2].partition(b"\xff")[0])
        for key, (body, *_) in bucket.outputs().items()
    }


def foreseen(run_jobs: Cli, *lines: str) -> dict[str, Any]:
    """What a dry run says of each job."""
    run = run_jobs(*lines, options=("--dry-run", "--log-format", "json"))
    assert run.exit_code == 0, run.err
    jobs: dict[str, Any] = json.loads(run.out)["jobs"]
    return jobs


def test_a_new_job_takes_no_key_from_the_one_that_has_it(run_jobs: Cli, bucket: Any, api: ConversionApi) -> None:
    assert run_jobs(*PHOTOS).exit_code == 0
    jobs = foreseen(run_jobs, *PHOTOS, *HQ)
    assert (jobs["hq"]["convert"], jobs["hq"]["failed"]) == (0, {"output_collision": 2})
    assert (jobs["photos"]["convert"], jobs["photos"]["already_done"]) == (0, 4)
    said = run_jobs(*PHOTOS, *HQ, options=("--why", KEYS[0])).out.splitlines()[-1]
    assert "fail: output_collision" in said
    assert "(job hq)" in said
    told = run_jobs(*PHOTOS, *HQ)
    assert (told.exit_code, told.summary["failed"]) == (1, {"output_collision": 2})
    assert {(line["job"], line["key"]) for line in told.failures} == {("hq", KEYS[0]), ("hq", KEYS[1])}
    assert "job photos" in told.failures[0]["message"]
    for again in (run_jobs(*PHOTOS, *HQ), run_jobs(*PHOTOS, *HQ, options=("--retry-failed",))):
        assert (again.summary["converted"], again.summary["requests"]) == (0, 0)
    assert (len(api.paid), api.paid_twice()) == (4, [])
    assert qualities(bucket) == dict.fromkeys("0123", 80)


def test_jobs_that_took_a_key_from_each_other_pay_no_more(run_jobs: Cli, bucket: Any, api: ConversionApi) -> None:
    # One after the other, each alone in its configuration: so does the last one have the keys.
    run_jobs(*PHOTOS)
    run_jobs("[job hq]", "include = in/0.png in/1.png", "quality = 95")
    assert len(api.paid) == 4 + 2
    for _ in range(2):
        assert run_jobs(*PHOTOS, *HQ).summary["converted"] == 0
    assert len(api.paid) == 4 + 2
    assert qualities(bucket) == {"0": 95, "1": 95, "2": 80, "3": 80}


def test_a_job_replaces_what_it_made_with_older_options(run_jobs: Cli, bucket: Any, api: ConversionApi) -> None:
    other = ("[job other]", "include = *.gif", "quality = 10")
    for quality in (80, 90):
        run = run_jobs("[job photos]", f"quality = {quality}", *other)
        assert (run.exit_code, run.summary["converted"]) == (0, 4)
    assert run_jobs("[job photos]", "quality = 90", *other).summary["already_done"] == 4
    assert (len(api.paid), qualities(bucket)) == (8, dict.fromkeys("0123", 90))


def test_a_key_that_a_job_wants_no_more_goes_to_the_one_that_does(
    run_jobs: Cli, bucket: Any, api: ConversionApi
) -> None:
    run_jobs(*PHOTOS)
    without = (*PHOTOS, "exclude = in/0.png in/1.png", *HQ)
    assert foreseen(run_jobs, *without)["hq"]["convert"] == 2
    assert (run_jobs(*without).exit_code, len(api.paid)) == (0, 6)
    assert (run_jobs(*without).summary["requests"], len(api.paid)) == (0, 6)
    assert qualities(bucket) == {"0": 95, "1": 95, "2": 80, "3": 80}


def test_jobs_with_listings_of_their_own_pay_once_for_what_both_list(
    run_jobs: Cli, bucket: Any, api: ConversionApi
) -> None:
    jobs = (
        "[job first]",
        "prefix = in/",
        "include = in/0.png in/1.png",
        "quality = 95",
        "[job second]",
        "quality = 80",
    )
    told = foreseen(run_jobs, *jobs)
    assert (told["first"]["convert"], told["second"]["convert"]) == (2, 2)
    assert told["second"]["failed"] == {"output_collision": 2}
    run = run_jobs(*jobs)
    assert (run.exit_code, run.summary["converted"], run.summary["failed"]) == (1, 4, {"output_collision": 2})
    assert qualities(bucket) == {"0": 95, "1": 95, "2": 80, "3": 80}
    assert len(api.paid) == 4


def test_check_warns_of_two_jobs_that_want_one_key(run_jobs: Cli) -> None:
    said = run_jobs(*PHOTOS, *HQ, options=("--check",)).out
    assert "WARN output keys: job hq and job photos both want converted/in/0.jpg" in said
    apart = run_jobs(*PHOTOS, *HQ, "output_key = hq/{stem}.{target}", options=("--check",)).out
    assert "OK   output keys: " in apart


@pytest.mark.parametrize("copier", ["a", "c"], ids=["before it", "after it"])
def test_a_job_that_copies_is_not_left_out_for_one_that_skips(copier: str, run_jobs: Cli, bucket: Any) -> None:
    bucket.put("in/b.jpg", photo(1, "jpg"))
    both = ("[job b]", f"[job {copier}]", "include = *.jpg", "same_format = copy")
    said = [run_jobs(*both, options=command).out for command in (("--check",), ("--why", "in/b.jpg"))]
    assert "OK   output keys: " in said[0]
    assert f"copy it, at no charge (job {copier})" in said[1]
    assert "see convert.same_format (job b)" in said[1]
    assert (foreseen(run_jobs, *both)[copier]["copy"], foreseen(run_jobs, *both)["b"]["convert"]) == (1, 4)
    run = run_jobs(*both)
    assert (run.exit_code, run.summary["converted"], run.summary["skipped"]) == (0, 5, {"same_format": 1})
    assert bucket.read("converted/in/b.jpg") == bucket.read("in/b.jpg")


def test_check_does_not_warn_of_two_jobs_that_make_the_very_same_output(run_jobs: Cli) -> None:
    assert "OK   output keys: " in run_jobs("[job a]", "[job b]", "include = in/0.png", options=("--check",)).out


JPG = "in/b.jpg"
# A job that may not have a key looks when the request of the one that has it is on its way.
LOSER_COMES_LATER = script_with("""
import os, time
look = program.look
def look_later(task, *given):
    while task.holder and not os.path.exists("sent"):
        time.sleep(0.01)
    return look(task, *given)
program.look = look_later""")
# Jobs whose outputs have the same target, quality and place: only what becomes of the answer or the source differs.
ALIKE = {
    "pages": ("[job a]", f"include = {KEYS[0]}", "[job b]", f"include = {KEYS[0]}", "pages = unpack"),
    "same_format": (
        *("[job a]", f"include = {JPG}", "same_format = convert"),
        *("[job b]", f"include = {JPG}", "same_format = copy"),
    ),
}


@pytest.mark.parametrize("option", ["pages", pytest.param("same_format", marks=pytest.mark.slow)])
def test_a_job_that_may_not_have_a_key_settles_no_request_of_the_one_that_has_it(
    *, option: str, start: Cli, bucket: Any, api: ConversionApi, release: threading.Event, work: Path
) -> None:
    bucket.put(JPG, photo(1, "jpg"))
    held = api.faults.add(Fault.hang_until(release))
    api.on("request_received", lambda _: (work / "sent").touch())
    (work / "jobs.ini").write_text("\n".join(ALIKE[option]), encoding="utf-8")
    options = ("-c", "jobs.ini", "--workers", "2", "--set", "run.max_failure_rate=never")
    run = start(*options, command=LOSER_COMES_LATER)
    wait_until(lambda: held.reached.is_set() and run.failures)
    assert [(line["job"], line["code"]) for line in run.failures] == [("b", "output_collision")]
    (row,) = run.rows("in_flight")
    assert row["key"] in {KEYS[0], JPG}
    run.process.kill()
    release.set()
    wait_until(lambda: has_paid(api, 1))
    until_next_second()  # in which a presigned URL is another one
    again = start(*options).wait()
    assert (again.exit_code, again.summary["failed"]) == (1, {"output_collision": 1})
    assert (again.summary["replays"], again.summary["possible_double_charges"], len(api.paid)) == (1, 0, 1)


@pytest.mark.parametrize("skip_existing", ["yes", "no"])
@pytest.mark.parametrize("option", ["pages", pytest.param("same_format", marks=pytest.mark.slow)])
def test_what_a_job_fails_with_is_no_word_on_the_one_that_has_its_key(
    *, option: str, skip_existing: str, run_jobs: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put(JPG, photo(1, "jpg"))
    options = ("--workers", "1", "--set", f"run.skip_existing={skip_existing}")
    for number in range(3):
        run = run_jobs(*ALIKE[option], options=options)
        assert (run.exit_code, run.summary["failed"]) == (1, {"output_collision": 1})
        assert (run.failures[-1]["job"], len(run.failures)) == ("b", number + 1)
        assert (run.summary["converted"], run.summary["already_done"]) == ((0, 1) if number else (1, 0))
    assert len(api.paid) == 1
