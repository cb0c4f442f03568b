"""Bad input of every kind: one clear message, the documented exit code, no traceback, nothing started."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.program import SCRIPT
from tests.standins.samples import photo

Cli = Callable[..., Any]
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d"  # that a line for cron's log begins with
DOES_NOT_CONVERT = "the API does not convert from this format to that: correct convert.target, or leave it out with "
DOES_NOT_CONVERT += "convert.exclude"


def assert_refused(run: Any, exit_code: int, *said: str) -> None:
    assert run.exit_code == exit_code, run.out + run.err
    for words in said:
        assert words in run.err + run.out
    assert "Traceback" not in run.err
    assert "hint: " in run.err + run.out


@pytest.mark.parametrize(
    ("changes", "exit_code", "said"),
    [
        pytest.param({"S3_BUCKET": "no-such-bucket"}, 2, "the bucket no-such-bucket does not exist", id="wrong bucket"),
        pytest.param({"CTF_API_KEY": "ctf_sk_wrong_1"}, 2, "the API refused the key: 401", id="wrong key"),
        pytest.param(
            {"AWS_SECRET_ACCESS_KEY": "wrong-secret"},
            2,
            "hint: AWS_SECRET_ACCESS_KEY is wrong",
            id="wrong secret",
            marks=pytest.mark.needs("secrets"),
        ),
        pytest.param({"S3_BUCKET": None}, 2, "[s3] bucket is missing", id="no bucket"),
        pytest.param({"TARGET_FORMAT": None}, 2, "[convert] target is missing", id="no target"),
        pytest.param({"CTF_API_KEY": None}, 2, "[api] key is missing", id="no key"),
        pytest.param({"CONCURRENCY": "ten"}, 2, "CONCURRENCY ([run] workers) = ten", id="workers"),
        pytest.param({"AWS_ACCESS_KEY_ID": None}, 2, "there are no AWS credentials", id="no credentials"),
        pytest.param({"S3_BUCKET": "s3://b/up"}, 2, "did you mean bucket = b and prefix = up/?", id="an address"),
        pytest.param({"AWS_PROFILE": "nobody"}, 2, "nobody", id="no such profile"),
        pytest.param({"SSLKEYLOGFILE": "/nowhere/x"}, 2, "SSLKEYLOGFILE = /nowhere/x cannot be used", id="key log"),
    ],
)
def test_a_wrong_environment_is_named_and_nothing_is_started(
    *, changes: dict[str, str | None], exit_code: int, said: str, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.png", photo(1, "png"))
    assert_refused(run_cli(**changes), exit_code, said)
    assert bucket.outputs() == {}
    assert api.paid == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "api.key_file=/dev/zero"), "api.key_file = /dev/zero: it has more than 1.0 MB"),
        (("-c", "/dev/zero"), "/dev/zero cannot be read: it has more than 1.0 MB"),
        (("--keys-from", "s3://a b/c"), 'reading s3://a b/c: Invalid bucket name "a b"\nhint: '),
    ],
)
def test_what_leads_nowhere_is_named_at_once(arguments: tuple[str, ...], said: str, run_cli: Cli) -> None:
    assert_refused(run_cli(*arguments, CTF_API_KEY=None if "api.key_file" in said else "ctf_sk_1"), 2, said)


def test_a_wrong_key_blames_no_object_and_the_right_one_goes_on(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    bucket.put("a.png", photo(1, "png"))
    refused = run_cli(CTF_API_KEY="ctf_sk_wrong_1")
    assert (refused.failures, refused.rows(), refused.summary["left"]) == ([], [], 1)
    assert refused.summary["stopped_code"] == "api_key"
    assert run_cli().exit_code == 0
    assert len(api.paid) == 1


def test_all_problems_come_at_once(run_cli: Cli, tmp_path: Path) -> None:
    ini = tmp_path / "bad.ini"
    ini.write_text("[s3]\nbuckett = b\n[run]\nworkers = ten\n[convrt]\ntarget = jpg\n")
    run = run_cli("-c", str(ini), S3_BUCKET=None, TARGET_FORMAT=None)
    assert_refused(
        run,
        2,
        f"{ini} has 5 problems",
        "[s3] bucket is missing",
        "[s3] buckett is not an option; did you mean bucket?",
        "[run] workers = ten: expected a whole number from 1 to 1000",
        "[convrt] is not a section; did you mean convert?",
        "[convert] target is missing",
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"bucket = b\n", ", line 1: no [section] above it; begin with [s3]"),
        (b"[s3]\nbucket\n", ", line 2: expected NAME = VALUE"),
        (b"[s3]\nbucket = a\nbucket = b\n", ", line 3: [s3] bucket is given twice"),
        (b"[s3]\nbucket = \xff\n", " cannot be read: "),
    ],
)
def test_an_unreadable_ini_is_named(content: bytes, said: str, run_cli: Cli, tmp_path: Path) -> None:
    ini = tmp_path / "bad.ini"
    ini.write_bytes(content)
    assert_refused(run_cli("-c", str(ini)), 2, f"{ini}{said}", "compare it with config.example.ini")


def test_an_ini_that_does_not_exist_is_named(run_cli: Cli) -> None:
    assert_refused(run_cli("-c", "nowhere.ini"), 2, "nowhere.ini does not exist")


def test_an_ini_with_the_key_that_others_can_read_is_refused(run_cli: Cli, tmp_path: Path) -> None:
    ini = tmp_path / "open.ini"
    ini.write_text("[api]\nkey = ctf_sk_in_the_open\n")
    ini.chmod(0o644)
    run = run_cli("-c", str(ini))
    assert_refused(run, 2, "others can read it (mode 0644)", f"run: chmod 600 {ini}")
    assert "in_the_open" not in run.err


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("run.checkpoint=/dev/null/x.sqlite3", "cannot be written: Not a directory"),
        ("run.failures=/dev/null/x.jsonl", "run.failures = /dev/null/x.jsonl cannot be written: Not a directory"),
        ("s3.output_key=out/{nmae}", "{nmae} is not a field; did you mean name?"),
        ("s3.output_key=out/all.jpg", "every output would get the same key"),
        ("s3.prefix=converted/a/", "lies under the outputs (converted/)"),
        ("workers", "expected SECTION.OPTION=VALUE"),
        ("s3.region=not a region", "region"),
    ],
)
def test_a_wrong_option_is_named_with_what_to_do(option: str, said: str, run_cli: Cli) -> None:
    assert_refused(run_cli("--set", option), 2, said)


@pytest.mark.parametrize(
    ("content", "exit_code", "said"),
    [
        (b"not a database, but longer than a header of one would be: " * 20, 2, "is damaged: file is not a database"),
    ],
)
def test_a_damaged_checkpoint_is_left_as_it_is(
    *, content: bytes, exit_code: int, said: str, run_cli: Cli, tmp_path: Path, api: ConversionApi
) -> None:
    checkpoint = tmp_path / "work" / "s3_bulk_convert.sqlite3"
    checkpoint.write_bytes(content)
    assert_refused(run_cli(), exit_code, said)
    assert checkpoint.read_bytes() == content
    assert api.requests == []


def test_a_second_run_ends_at_once_while_one_is_at_work(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: Any
) -> None:
    bucket.put("a.png", photo(1, "png"))
    fault = api.faults.add(Fault.hang_until(release))
    first = start()
    assert fault.reached.wait(30)
    assert_refused(run_cli(), 4, f"process {first.process.pid}, for ", "wait for it to end")
    refused = json.loads(run_cli("--log-format", "json").err)
    assert (refused["exit_code"], refused["code"]) == (4, "locked")
    release.set()
    assert first.wait().exit_code == 0


def test_an_older_python_gets_one_sentence(tmp_path: Path) -> None:
    script = SCRIPT.read_text().replace("if sys.version_info < (3, 10):", "if sys.version_info < (99,):", 1)
    copy = tmp_path / "copy.py"
    copy.write_text(script)
    run = subprocess.run([sys.executable, str(copy)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr.count("\n"), run.stdout) == (2, 1, "")
    assert "needs Python 3.10 or newer" in run.stderr


def test_a_missing_package_is_named_with_what_to_type() -> None:
    run = subprocess.run([sys.executable, "-S", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == (
        f"error: the package boto3 is missing\nhint: run: {sys.executable} -m pip install boto3 requests tqdm urllib3\n"
    )


def test_where_pip_is_refused_the_hint_names_a_virtual_environment(tmp_path: Path) -> None:
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    managed = (
        f"import runpy, sys, sysconfig; sysconfig.get_path = lambda _: {str(tmp_path)!r}; "
        f"sys.base_prefix = sys.prefix; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-S", "-c", managed], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == (
        "error: the package boto3 is missing\n"
        "hint: run: python3 -m venv venv && venv/bin/pip install boto3 requests tqdm urllib3\n"
        "then start this program with venv/bin/python\n"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--taget", "--taget is not an option; did you mean --target?"),
        ("--TARGET=jpg", "--TARGET is not an option; did you mean --target?"),
        ("check", "check is not an option; did you mean --check?"),
        ("zzz", "zzz is not an option"),
    ],
)
def test_an_unknown_flag_is_named_with_what_was_probably_meant(given: str, said: str, run_cli: Cli) -> None:
    run = run_cli(given)
    assert (run.exit_code, run.out) == (2, "")
    usage = "usage: s3_bulk_convert.py [-c FILE] [options], which --help names\n"
    assert run.err == f"{usage}s3_bulk_convert.py: error: {said}\n"


def test_quiet_says_one_line_when_all_is_well(run_cli: Cli, bucket: Any) -> None:
    bucket.put("a.png", photo(1, "png"))
    run = run_cli("-q")
    assert (run.exit_code, run.err) == (0, "")
    assert run.out.count("\n") == 1


def test_what_is_quiet_is_read_in_a_log_and_begins_with_the_time(run_cli: Cli, bucket: Any) -> None:
    for name in ("a.heic", "a.png"):
        bucket.put(name, photo(1, "png"))
    assert re.match(TIME + r" ended with exit code 1\nconverted +\d\n", run_cli("-q").out)
    refused = run_cli("-q", "--workers", "none")
    assert (refused.exit_code, refused.out) == (2, "")
    assert re.match(TIME + r" error: the configuration has 1 problem\n", refused.err)


def test_quiet_says_how_many_failed_for_good_before_and_does_not_count_outputs(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    for name in ("a.png", "b.png", "same.jpg"):
        bucket.put(name, photo(1, "png"))
    api.faults.add(Fault.status_reply(422, "conversion_failed"))
    run_cli("--set", "api.transfer=upload")
    run = run_cli("-q")
    assert (run.exit_code, run.summary["skipped"]["own_output"]) == (0, 1)
    assert re.fullmatch(
        TIME + r" converted 0 in \S+ s, already done 1, skipped 1, failed before 1, failed 0, left 0\n", run.out
    )
    said = "next: 1 failed for good in an earlier run; --status counts them, --retry-failed tries them again\n"
    assert said in run_cli().out


def test_a_key_that_the_terminal_has_no_letters_for_is_said_all_the_same(run_cli: Cli, bucket: Any) -> None:
    bucket.put("\u0141.heic", photo(1, "png"))
    bucket.put("\u0141.png", photo(1, "png"))
    run = run_cli(PYTHONIOENCODING="latin-1")
    assert run.exit_code == 1
    assert r"for example \u0141.png: converted/\u0141.jpg: belongs to \u0141.heic" in run.out


def test_a_failures_file_that_is_full_is_named_with_its_option(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    bucket.put("a.png", photo(1, "png"))
    api.faults.add(Fault.status_reply(422, "unsupported_route"))
    run = run_cli("--set", "run.failures=/dev/full")
    assert (run.exit_code, run.summary["stopped_code"]) == (3, "disk")
    assert "stopped: run.failures = /dev/full cannot be written: No space left on device\nhint: free some" in run.out


def test_what_is_gone_is_not_promised_to_be_tried_again(run_cli: Cli, bucket: Any, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text(f"s3://{bucket.name}/a.png\n/a.png\n")
    run = run_cli("--keys-from", str(tmp_path / "keys.txt"))
    assert run.summary["failed"] == {"source_gone": 2}
    assert 'give keys without s3://BUCKET/ and without a leading "/"\n' in run.out
    assert "next: " not in run.out


def test_quiet_says_all_when_something_went_wrong(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    bucket.put("a.png", photo(1, "png"))
    api.faults.add(Fault.status_reply(422, "unsupported_route"))
    run = run_cli("-q")
    assert (run.exit_code, run.err) == (1, "")
    assert "failed        1 unsupported_route\n" in run.out


def test_failures_are_grouped_with_an_example_and_what_to_do(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    for number in range(3):
        bucket.put(f"{number}.png", photo(number, "png"))
    api.faults.add(Fault(status=422, code="conversion_failed", message="no way\n\x1b[2Jfrom png", times=2))
    api.faults.add(Fault.status_reply(502, "service_unavailable", times=None, retry_after="0"))
    out = run_cli("--workers", "1", "--set", "api.retries=0", "--set", "api.transfer=upload").out
    assert (
        "failed        2 conversion_failed\n"
        '              for example 0.png: "no way\\n\\u001b[2Jfrom png"\n'
        "              remedy: open one of the files: it may be damaged or protected by a password; "
        "its message says more\n"
        "failed        1 service_unavailable\n"
        "              for example 2.png: a scripted fault\n"
        "              remedy: the API's converter was down: run it again later\n"
    ) in out
    assert "next: the next run tries 1 of the failures again\n" in out
    assert "next: 2 failed for good; when the cause is removed, run it with --retry-failed\n" in out


def test_a_failure_rate_over_the_limit_says_what_failed_and_what_to_do(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    for number in range(120):
        bucket.put(f"{number:02}.png", b"\x89PNG\r\n\x1a\n" + str(number).encode())
    api.faults.add(Fault.status_reply(422, "unsupported_route", times=None))
    run = run_cli("--workers", "1")
    assert run.exit_code == 3
    assert f"remedy: {DOES_NOT_CONVERT}" in run.out
    said = TIME + r" stopped: (\d+) of \1 failed \(unsupported_route \1\), more than run.max_failure_rate = 2%\n"
    assert re.search(said, run.out)


def test_retry_failed_says_first_how_many_it_tries_again(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    for number in range(3):
        bucket.put(f"{number}.png", photo(number, "png"))
    api.faults.add(Fault.status_reply(422, "conversion_failed", times=2))
    assert run_cli("--workers", "1", "--set", "api.transfer=upload").summary["failed"] == {"conversion_failed": 2}
    assert "--retry-failed" not in run_cli().err
    assert "--retry-failed: 2 objects that failed for good will be tried again" in run_cli("--retry-failed").err
    # What has been converted since is none of them.
    assert "--retry-failed: 0 objects that" in run_cli("--retry-failed").err
