"""--dry-run: what it foresees is what the run then does, and it sends nothing to be converted and leaves nothing."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_looking import DOCUMENTED, kill_with_one_in_flight, left_in, picture
from tests.standins.conversion_api import ConversionApi, Fault, Request
from tests.standins.program import script_with, shard_of

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
JSON = ("--log-format", "json")
# More of these objects fail than the 2 % at which a run would stop.
ANY_RATE = ("--set", "run.max_failure_rate=never")


def put_all(bucket: Any, *names: str) -> None:
    """Put an object of some bytes under each of the names."""
    for name in names:
        bucket.put(name, picture(name))


def is_of(request: Request, name: str) -> bool:
    """Whether a request is for the object of that name."""
    return name in request.fields.get("file_url", "")


def foreseen(run_cli: Cli, *arguments: str, **changes: Any) -> dict[str, Any]:
    """The forecast as JSON."""
    run = run_cli("--dry-run", *JSON, *arguments, **changes)
    assert run.exit_code == 0, run.err
    found: dict[str, Any] = json.loads(run.out)
    assert {*found, *(name for job in found["jobs"].values() for name in job)} <= DOCUMENTED
    return found


def test_a_forecast_is_what_the_run_then_does(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_all(bucket, "done.png", "bad.gif", "flaky.png")
    api.faults.add(Fault.status_reply(422, "unsupported_route")).at(lambda request: is_of(request, "bad.gif"))
    api.faults.add(Fault.status_reply(503, "service_unavailable")).at(lambda request: is_of(request, "flaky.png"))
    run_cli("--workers", "1", "--set", "api.retries=0", *ANY_RATE)
    put_all(bucket, "new.png", "done.heic", "same.jpg", "folder/", "notes.txt")
    bucket.put("empty.png", b"")
    options = ("--set", "convert.exclude=*.txt", *ANY_RATE)
    before, paid = left_in(run_cli("--status")), len(api.paid)
    found = foreseen(run_cli, *options)
    job = found["jobs"]["default"]
    run = run_cli(*options)
    assert (left_in(run_cli("--version")).keys(), len(api.paid) - paid) == (before.keys(), found["conversions"])
    assert (job["convert"], job["resume"], job["retried"], job["failed"]) == (1, 1, 1, {"output_collision": 1})
    assert run.summary["converted"] == job["convert"] + job["resume"]
    assert run.summary["already_done"] == job["already_done"]
    assert run.summary["skipped"] == {**found["skipped"], **job["skipped"]}
    assert run.summary["failed"] == job["failed"]
    assert run.summary["listed"] == found["listed"]


def test_what_was_converted_before_with_other_options_is_said_before_it_is_paid_for_anew(
    run_cli: Cli, bucket: Any
) -> None:
    def anew(*options: str) -> tuple[int, int, list[str]]:
        found = foreseen(run_cli, *options)
        job = found["jobs"]["default"]
        return job["convert"], job["anew"], [said for said in found["warnings"] if "converted before" in said]

    put_all(bucket, "a.png", "b.png", "changed.png")
    assert "converted before" not in run_cli().err
    put_all(bucket, "new.png")
    bucket.put("changed.png", picture("another version"))
    quality, place = ("--set", "convert.quality=90"), ("--set", "s3.output_key=new/{stem}.{target}")
    for options in (quality, place):
        convert, again, (said,) = anew(*options)
        assert (convert, again) == (4, 2)
        assert said.startswith("2 of the objects to convert were converted before with other options or to another key")
        assert "--keys-from" in said
    # The same place in other words, or another target, which is another thing.
    for options in (("--set", "s3.output_key=converted/{dir}{stem}.jpg"), ("--target", "webp")):
        assert anew(*options)[1:] == (0, [])
    alias = run_cli("-q", "--set", "s3.output_key=converted/{dir}{stem}.jpg", "--set", "convert.include=a.png")
    assert (alias.summary["already_done"], alias.err) == (1, "")
    changed = run_cli("-q", *quality)
    said = "2 of the objects listed so far were converted before with other options or to another key, and are paid for"
    assert (changed.summary["converted"], changed.err.count(said)) == (4, 1)
    assert run_cli("-q", *quality).err == ""


def test_a_collision_with_an_object_of_another_page_is_foreseen(run_cli: Cli, bucket: Any) -> None:
    put_all(bucket, "a.heic", "a.png", "b.png")
    one_a_page = script_with("program.PAGE_KEYS = 1")
    found = foreseen(run_cli, "--workers", "1", command=one_a_page)
    assert (found["jobs"]["default"]["convert"], found["jobs"]["default"]["failed"]) == (2, {"output_collision": 1})
    assert found["examples"]["output_collision"]["key"] == "a.png"


def test_without_a_checkpoint_outputs_that_are_there_count_as_done(run_cli: Cli, bucket: Any) -> None:
    put_all(bucket, "a.png")
    run_cli()
    put_all(bucket, "b.png")
    job = foreseen(run_cli, "--set", "run.checkpoint=lost.sqlite3")["jobs"]["default"]
    assert (job["convert"], job["already_done"]) == (1, 1)


def test_nothing_is_sent_to_be_converted_and_nothing_is_written(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_all(bucket, "a.png", "b.png")
    run = run_cli("--dry-run", "--set", "run.metrics=m.prom")
    assert (run.exit_code, run.err) == (0, "")
    assert (left_in(run), bucket.keys(), api.paid) == ({}, ["a.png", "b.png"], [])
    assert {request.path for request in api.requests} == {"/v1/usage"}
    assert "to convert  2, " in run.out
    assert run.out.endswith("nothing was sent to be converted, and nothing was written\n")


def test_a_checkpoint_is_left_as_it_is_to_the_byte(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    put_all(bucket, "a.png", "b.png")
    before = left_in(kill_with_one_in_flight(start, api, release))
    release.set()
    found = foreseen(run_cli, "--set", "run.summary=none")
    assert left_in(run_cli("--version")) == before
    assert found["jobs"]["default"]["resume"] >= 1
    assert found["conversions"] == 2


def test_each_job_has_its_own_forecast(run_cli: Cli, bucket: Any, tmp_path: Path) -> None:
    put_all(bucket, "a.png", "b.png", "c.docx", "d.txt")
    ini = tmp_path / "jobs.ini"
    ini.write_text("[job photos]\ninclude = *.png\ntarget = jpg\n[job documents]\ninclude = *.docx\ntarget = pdf\n")
    found = foreseen(run_cli, "-c", str(ini))
    assert {name: job["convert"] for name, job in found["jobs"].items()} == {"documents": 1, "photos": 2}
    assert (found["skipped"], found["listed"]) == ({"not_matched": 1}, 4)
    said = run_cli("--dry-run", "-c", str(ini)).out
    assert re.search(r"job documents\n  to convert  1, 14 B\n", said), said


def test_keys_from_a_file_are_foreseen_too(run_cli: Cli, bucket: Any, tmp_path: Path) -> None:
    put_all(bucket, "a.png", "b.png")
    keys = tmp_path / "keys.txt"
    keys.write_text("a.png\nno-such.png\n")
    job = foreseen(run_cli, "--keys-from", str(keys), *ANY_RATE)["jobs"]["default"]
    assert (job["convert"], job["failed"]) == (1, {"source_gone": 1})


def test_a_forecast_works_beside_a_run_at_work(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    put_all(bucket, "a.png", "b.png", "c.png")
    fault = api.faults.add(Fault.hang_until(release))
    run = start("--workers", "1")
    assert fault.reached.wait(30)
    job = foreseen(run_cli, "--set", "run.summary=none")["jobs"]["default"]
    assert job["convert"] + job["resume"] == 3
    release.set()
    assert run.wait().exit_code == 0


def test_the_quota_and_the_cap_bound_what_is_foreseen(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_all(bucket, *(f"{number}.png" for number in range(5)))
    api.behaviour.month_quota = 3
    said = run_cli("--dry-run").out
    assert "conversions   5 to pay for at the most; 3 are left of this month's 3\n" in said
    assert "warning       2 conversions more than the month has left are billed as overage; --limit 3 keeps" in said
    found = foreseen(run_cli, "--limit", "2")
    assert (found["conversions"], found["conversions_in_one_run"], found["warnings"]) == (5, 2, [])


def test_a_shard_whose_part_of_the_cap_is_nothing_says_so(run_cli: Cli, bucket: Any) -> None:
    own = [name for name in map("{}.png".format, range(200)) if shard_of(f"converted/{name[:-4]}.jpg", 16) == 5]
    put_all(bucket, *own[:2])
    capped = ("--shard", "5/16", "--limit", "3", "--set", "api.price=1")
    said = run_cli("--dry-run", *capped).out
    assert "conversions   2 to pay for at the most, 0 of them in the next run (" in said
    assert "cost          about 2.00 at the most, about 0.00 of it in the next run, " in said
    found = foreseen(run_cli, *capped)
    assert (found["conversions"], found["conversions_in_one_run"], found["max_conversions"]) == (2, 0, 0)


def test_without_a_key_or_an_api_the_rest_is_foreseen(run_cli: Cli, bucket: Any) -> None:
    put_all(bucket, "a.png")
    without_key = foreseen(run_cli, CTF_API_KEY=None)
    assert (without_key["conversions"], without_key["remaining"]) == (1, None)
    assert "(there is no API key; [api] key is missing: set CTF_API_KEY," in without_key["warnings"][0]
    assert "cannot be reached" in foreseen(run_cli, "--set", "api.url=http://127.0.0.1:1")["warnings"][0]
    refused = foreseen(run_cli, CTF_API_KEY="ctf_sk_wrong")["warnings"][0]
    assert re.search(
        r"not known \(the API refused the key: 401 .*; check CTF_API_KEY, api.key or api.key_file\)", refused
    )


def test_failures_that_cost_nothing_do_not_stop_a_run_and_no_stop_is_foreseen(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    put_all(bucket, *(f"{number:02}.{ext}" for number in range(30) for ext in ("png", "heic")))
    found = foreseen(run_cli)
    assert [warning for warning in found["warnings"] if "max_failure_rate" in warning] == []
    example = found["examples"]["output_collision"]
    assert (example["key"], "belongs to 00.heic" in example["said"]) == ("00.png", True)
    assert "{ext}" in example["remedy"]
    run = run_cli()
    assert (run.exit_code, run.summary["failed"], len(api.paid)) == (1, {"output_collision": 30}, 30)


def test_a_prefix_that_matches_nothing_is_warned_of(run_cli: Cli, bucket: Any) -> None:
    put_all(bucket, "uploads/a.png")
    said = f'no key begins with "/uploads" in s3://{bucket.name}; keys rarely begin with "/": did you mean "uploads"?'
    assert foreseen(run_cli, "--prefix", "/uploads")["warnings"][0] == said
    run = run_cli("-q", "--prefix", "/uploads")
    assert (run.exit_code, run.err.partition(" ")[2]) == (0, f"{said}\n")
    assert re.match(r"\S+ converted 0 in ", run.out)
    assert run_cli("-q", "--prefix", "/uploads", "--shard", "0/2").err == ""
    assert run_cli("-q", "--prefix", "uploads").err == ""


def test_what_was_asked_for_and_matches_nothing_is_named(run_cli: Cli, bucket: Any, work: Path) -> None:
    put_all(bucket, "a.png", "p/b.docx")
    ini = work / "config.ini"
    ini.write_text("[job a]\ninclude = *.heif *.webp\n[job b]\nprefix = q/\n[job c]\nprefix = p/\nexclude = *.docx\n")
    where = f"s3://{bucket.name}"
    said = f'no key begins with "q/" in {where}; job a wants none of the keys in {where}: include = *.heif *.webp; '
    said += f"job c wants none of the keys in {where}: prefix = p/, include = *, exclude = *.docx"
    assert foreseen(run_cli)["warnings"][0] == said
    assert run_cli("-q").err.partition(" ")[2] == f"{said}\n"
    # A key from a file is matched as well.
    (work / "keys").write_text("/p/b.docx\n")
    ini.write_text("[job a]\ninclude = p/*\n")
    assert run_cli("-q", "--keys-from", "keys").err.endswith("job a wants none of the keys in keys: include = p/*\n")
    # What matches is not named, be it new, done, or all gone but for the outputs.
    for _ in range(2):
        assert run_cli("-q", "--target", "pdf").err == ""
    bucket.client.delete_object(Bucket=bucket.name, Key="p/b.docx")
    bucket.client.delete_object(Bucket=bucket.name, Key="a.png")
    assert run_cli("-q", "--target", "pdf").err == ""


def test_a_target_that_nobody_knows_is_asked_about_before_it_is_paid_for(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    put_all(bucket, "a.png")
    said = "docxx is no format that is known here: did you mean docx?"
    assert foreseen(run_cli, "--target", "docxx")["warnings"][0] == said
    assert f"WARN convert.target: {said}\n" in run_cli("-q", "--check", "--target", "docxx").out
    run = run_cli("-q", "--target", "docxx")
    assert (run.err.partition(" ")[2], "correct convert.target" in run.out) == (f"{said}\n", True)
    # What was converted to before is a format, whoever knows it.
    doubting = script_with("program.FileType.doubt_of = lambda target: target + '?'")
    assert [run_cli("-q", command=doubting).err.partition(" ")[2] for _ in range(2)] == ["jpg?\n", ""]
    assert len(api.paid) == 1


def test_a_shard_s_forecast_sets_the_work_of_all_shards_against_the_month(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    put_all(bucket, *(f"{number}.png" for number in range(8)))
    api.behaviour.month_quota = 5
    found = [foreseen(run_cli, "--shard", f"{index}/2") for index in range(2)]
    assert sum(each["conversions"] for each in found) == 8
    for each in found:
        more = 2 * each["conversions"] - 5
        said = f"{more} conversions more than the month has left for all 2 shards, if each needs as many, are billed"
        assert [warning for warning in each["warnings"] if said in warning] or more <= 0
    assert foreseen(run_cli, "--shard", "0/2", "--limit", "4")["warnings"] == []


@pytest.mark.parametrize(
    ("changes", "exit_code", "said"),
    [
        ({"S3_BUCKET": "no-such-bucket"}, 2, "error: the bucket no-such-bucket does not exist\nhint: "),
        pytest.param(
            {"AWS_SECRET_ACCESS_KEY": "not-the-secret"},
            2,
            "error: S3 refused the listing of ",
            marks=pytest.mark.needs("secrets"),
        ),
        ({"TARGET_FORMAT": None}, 2, "error: the configuration has 1 problem\n  - [convert] target is missing"),
    ],
)
def test_what_keeps_a_forecast_from_being_made_is_said(
    changes: dict[str, str | None], exit_code: int, said: str, run_cli: Cli
) -> None:
    run = run_cli("--dry-run", **changes)
    assert (run.exit_code, run.out) == (exit_code, "")
    assert run.err.startswith(said)
