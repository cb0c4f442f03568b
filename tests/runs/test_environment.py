"""What the system, the environment or a connection's set-up refuses: one sentence with its remedy, and nobody's fault.

One trouble of each kind is met by `--check` as well, which is to find it beforehand.
"""

import errno
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from tests.runs.test_progress import Terminal
from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import Conversion, Converted, marking
from tests.standins.program import IS_ROOT, SCRIPT, UNPRIVILEGED, Run, script_with
from tests.standins.relay import Relay
from tests.standins.s3_server import S3Server

Cli = Callable[..., Any]
CHECKPOINT = "s3_bulk_convert.sqlite3"
pytestmark = pytest.mark.usefixtures("cheap_object")
NO_LOCKS = """
import errno, fcntl, os
def flock(*_):
    raise OSError(errno.{0}, os.strerror(errno.{0}))
fcntl.flock = flock"""
FEW_THREADS = """
import threading
start, left = threading.Thread.start, list(range({}))
def limited(self):
    if not left:
        raise RuntimeError("can't start new thread")
    left.pop()
    start(self)
threading.Thread.start = limited"""
NO_TEMPORARY_FOLDER = script_with("import tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc/none']")
IMPATIENT = script_with("""
import sqlite3
connect = sqlite3.connect
sqlite3.connect = lambda *given, **named: connect(*given, **{**named, "timeout": 0.1})""")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """A terminal of 120 columns."""
    opened = Terminal(120)
    yield opened
    opened.close()


def assert_told(run: Run, *words: str) -> None:
    """One sentence with the remedy, which names what is wrong, and no object to blame."""
    said = run.out + run.err
    assert run.exit_code in {2, 3}, said
    assert "Traceback" not in said
    assert not re.search(r"\bbug\b|\w+Error: ", said), said
    assert run.failures == []
    if "--check" in run.command:
        # Its line is "FAIL what: sentence; remedy".
        said = "\n".join(re.findall(r"^FAIL .+", said, re.MULTILINE))
    else:
        assert said.count("hint: ") == 1, said
    assert [word for word in words if word not in said] == [], said


def assert_met(run_cli: Cli, *words: str, given: tuple[str, ...] = (), is_checked: bool = True, **named: Any) -> Run:
    """A run stops and says these words; `is_checked`: so does `--check`, beforehand."""
    for command in [("--check",), ()] if is_checked else [()]:
        run: Run = run_cli(*given, *command, **named)
        assert_told(run, *words)
    return run


########################################################################
# The machine
########################################################################


@pytest.mark.parametrize("code", [pytest.param("ENOSYS", marks=pytest.mark.slow), "ENOLCK"])
def test_a_file_system_without_locks_is_named_and_nothing_is_sent(code: str, run_cli: Cli, api: ConversionApi) -> None:
    command = script_with(NO_LOCKS.format(code))
    words = (os.strerror(getattr(errno, code)), "run.checkpoint", "disk")
    assert_met(run_cli, *words, is_checked=code == "ENOLCK", command=command)
    assert api.paid == []


@pytest.mark.parametrize("allowed", [pytest.param(0, marks=pytest.mark.slow), 5])
def test_a_system_that_starts_no_more_threads_is_named_and_nothing_is_lost(
    allowed: int, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    run = run_cli(command=script_with(FEW_THREADS.format(allowed)))
    assert_told(run, "thread", "run.workers")
    assert run_cli().exit_code == 0
    assert (len(api.paid), api.paid_twice(), len(bucket.outputs())) == (1, [], 1)


@pytest.mark.slow
def test_the_threads_of_a_worker_process_are_as_scarce(run_cli: Cli, api: ConversionApi, work: Path) -> None:
    # Python imports it when it starts: in the processes that the script starts, there are few threads.
    (work / "sitecustomize.py").write_text(
        f"import sys\nif '--multiprocessing-fork' in sys.orig_argv:\n    exec({FEW_THREADS.format(3)!r})\n"
    )
    run = run_cli("--workers", "8", "--processes", "2", PYTHONPATH=f"{SCRIPT.parent}:{work}")
    assert_told(run, "thread", "run.workers")
    assert run.summary["stopped_code"] == "environment"
    assert run_cli().exit_code == 0
    assert (len(api.paid), api.paid_twice()) == (1, [])


def test_check_starts_as_many_threads_as_a_run(run_cli: Cli) -> None:
    run = run_cli("--check", "--workers", "30", command=script_with(FEW_THREADS.format(20)))
    assert_told(run, "thread", "run.workers")


FEW_FILES = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({}, {}))"


def test_a_system_that_opens_too_few_files_is_named(run_cli: Cli, api: ConversionApi) -> None:
    # Of 12 workers, some would find no connection, and say that the network is away.
    given = ("--workers", "12")
    assert_met(run_cli, "open files", "ulimit -n", given=given, command=script_with(FEW_FILES.format(60, 60)))
    assert api.paid == []
    assert run_cli(*given, command=script_with(FEW_FILES.format(60, 100))).exit_code == 0


def test_without_a_temporary_folder_a_large_answer_waits_for_one(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    def large(conversion: Conversion) -> Converted:
        made = marking(conversion)
        return Converted(made.body + bytes(2 << 20), made.media_type, made.extension)

    api.behaviour.convert = large
    run = assert_met(run_cli, "temporary folder", "TMPDIR", command=NO_TEMPORARY_FOLDER)
    assert run.summary["stopped_code"] == "disk"
    assert run_cli().exit_code == 0
    assert (len(api.paid), api.paid_twice(), len(bucket.outputs())) == (1, [], 1)


########################################################################
# Files
########################################################################


def test_a_checkpoint_that_a_backup_has_locked_is_said_to_be_locked(
    run_cli: Cli, bucket: Any, api: ConversionApi, work: Path
) -> None:
    assert run_cli().exit_code == 0
    bucket.put("b.png", b"\x89PNG\r\n\x1a\n" + b"b")
    with sqlite3.connect(work / CHECKPOINT, isolation_level=None) as backup:
        backup.execute("BEGIN EXCLUSIVE")
        run = run_cli(command=IMPATIENT)
        assert_told(run, "locked by another program", "backup")
        assert "writable" not in run.out + run.err
    assert run_cli().exit_code == 0
    assert (len(api.paid), api.paid_twice()) == (2, [])


def unreadable(path: Path) -> None:
    path.touch(mode=0)


def in_a_closed_folder(path: Path) -> None:
    path.parent.chmod(0)


def in_a_read_only_folder(path: Path) -> None:
    path.parent.chmod(0o555)


@pytest.mark.parametrize(
    "made", [unreadable, pytest.param(in_a_closed_folder, marks=pytest.mark.slow), in_a_read_only_folder]
)
def test_a_checkpoint_that_this_user_may_not_use_is_named(
    made: Callable[[Path], None], run_cli: Cli, work: Path, api: ConversionApi
) -> None:
    path = work / "kept" / CHECKPOINT
    path.parent.mkdir()
    made(path)
    given = ("--set", f"run.checkpoint=kept/{CHECKPOINT}")
    words, is_read_only = (f"kept/{CHECKPOINT}", "run.checkpoint"), made is in_a_read_only_folder
    assert_met(run_cli, *words, given=given, is_checked=is_read_only, command=UNPRIVILEGED)
    if not is_read_only:
        assert_told(run_cli(*given, "--status", command=UNPRIVILEGED), f"kept/{CHECKPOINT}")
    assert api.paid == []


@pytest.mark.skipif(not IS_ROOT, reason="only root can give a file to another user")
def test_a_checkpoint_of_another_user_is_named(run_cli: Cli, work: Path) -> None:
    assert run_cli().exit_code == 0
    (work / CHECKPOINT).chmod(0o666)
    shutil.chown(work / CHECKPOINT, 65534)
    assert_met(run_cli, CHECKPOINT, "another user", "run.checkpoint", command=UNPRIVILEGED)


def test_a_configuration_that_may_not_be_read_is_not_to_be_compared_with_the_example(run_cli: Cli, work: Path) -> None:
    (work / "config.ini").touch(mode=0)
    run = run_cli(command=UNPRIVILEGED)
    assert_told(run, "config.ini cannot be read: Permission denied", "chmod")
    assert "example" not in run.err


########################################################################
# Proxies and certificates
########################################################################

NO_PORT, NO_END, NO_HOST = "http://127.0.0.1:port", "http://[::1", "http://"
SOCKS, FTP = "socks5://127.0.0.1:9", "ftp://127.0.0.1:9"


@pytest.mark.parametrize("proxy", [pytest.param(NO_PORT, marks=pytest.mark.slow), NO_END, SOCKS])
def test_a_proxy_that_cannot_be_used_is_named(proxy: str, run_cli: Cli, api: ConversionApi) -> None:
    words = ("proxy", "HTTP_PROXY", "SOCKS") if proxy == SOCKS else ("proxy", "HTTP_PROXY")
    assert_met(run_cli, *words, is_checked=proxy != NO_PORT, HTTP_PROXY=proxy)
    assert api.requests == []


@pytest.mark.parametrize("proxy", [NO_HOST, *(pytest.param(proxy, marks=pytest.mark.slow) for proxy in (SOCKS, FTP))])
def test_a_proxy_on_the_way_to_the_api_alone_blames_no_object(proxy: str, run_cli: Cli, s3: S3Server) -> None:
    around: dict[str, Any] = {
        "AWS_ENDPOINT_URL_S3": s3.endpoint.replace("127.0.0.1", "localhost"),
        "NO_PROXY": "localhost",
    }
    assert_met(run_cli, "proxy", "HTTP_PROXY", is_checked=proxy == NO_HOST, HTTP_PROXY=proxy, **around)


@pytest.mark.parametrize("is_there", [False, True], ids=["absent", "no certificates in it"])
def test_a_ca_bundle_that_cannot_be_used_is_named(
    *, is_there: bool, run_cli: Cli, s3: S3Server, api: ConversionApi, work: Path
) -> None:
    bundle = work / "bundle.pem"
    if is_there:
        bundle.write_text("nothing\n")
    secure = "http:", "https:"
    words = ("bundle.pem", "AWS_CA_BUNDLE")
    address: dict[str, Any] = {"AWS_ENDPOINT_URL_S3": s3.endpoint.replace(*secure)}
    assert_met(run_cli, *words, is_checked=is_there, AWS_CA_BUNDLE=str(bundle), **address)
    words, given = ("bundle.pem", "REQUESTS_CA_BUNDLE"), ("--set", f"api.url={api.url.replace(*secure)}")
    assert_met(run_cli, *words, given=given, is_checked=not is_there, REQUESTS_CA_BUNDLE=str(bundle))


########################################################################
# The AWS configuration, and what S3 says of it
########################################################################

PROFILES = """
[profile base]
aws_access_key_id = nobody
aws_secret_access_key = nothing
[profile with-code]
role_arn = arn:aws:iam::123456789012:role/reader
mfa_serial = arn:aws:iam::123456789012:mfa/somebody
source_profile = base
[profile behind-it]
role_arn = arn:aws:iam::123456789012:role/reader
source_profile = with-code
[profile helper]
credential_process = /nowhere/helper
[profile token]
role_arn = arn:aws:iam::123456789012:role/reader
web_identity_token_file = /nowhere/token
"""


@pytest.mark.parametrize("profile", ["with-code", pytest.param("behind-it", marks=pytest.mark.slow)])
def test_nobody_is_asked_for_an_mfa_code_where_there_is_no_terminal(profile: str, start: Cli, work: Path) -> None:
    (work / "aws").write_text(PROFILES)
    reading, writing = os.pipe()
    # An open pipe that nothing comes out of: who reads from it, waits for ever.
    alone = script_with("import os; os.setsid()")
    given = ("--set", f"s3.profile={profile}")
    try:
        for command in [("--check",), ()] if profile == "behind-it" else [()]:
            run = start(*given, *command, command=alone, stdin=reading, AWS_CONFIG_FILE=str(work / "aws")).wait(20)
            assert_told(run, "MFA", "profile")
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("profile", ["helper", "token"])
def test_credentials_that_a_missing_file_should_give_are_named(profile: str, run_cli: Cli, work: Path) -> None:
    (work / "aws").write_text(PROFILES)
    given = ("--set", f"s3.profile={profile}")
    named: dict[str, Any] = {"given": given, "is_checked": profile == "token", "AWS_CONFIG_FILE": str(work / "aws")}
    assert_met(run_cli, f"/nowhere/{profile}", "profile", **named)


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("RequestTimeTooSkewed", "clock"),
        pytest.param("RequestExpired", "clock", marks=pytest.mark.slow),
        ("AuthorizationHeaderMalformed", "s3.region"),
    ],
)
def test_a_refusal_of_s3_names_what_is_wrong(code: str, word: str, run_cli: Cli, relay: Relay) -> None:
    relay.refuse = lambda *_: True
    relay.refusal = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    assert_met(run_cli, code, word, is_checked=code == "RequestTimeTooSkewed", AWS_ENDPOINT_URL_S3=relay.url)


def test_an_endpoint_that_contains_the_bucket_is_named(run_cli: Cli, bucket: Any, s3: S3Server) -> None:
    assert_met(run_cli, "endpoint", given=("--set", f"s3.endpoint_url={s3.endpoint}/{bucket.name}"))


@pytest.mark.needs("regions")
def test_a_region_that_is_wrong_is_named(run_cli: Cli) -> None:
    given = ("--set", "s3.region=eu-nowhere-9", "--set", "api.transfer=url")
    assert_met(run_cli, "region", given=given)


@pytest.mark.needs("regions")
@pytest.mark.parametrize("processes", ["1", "2"])
def test_urls_are_signed_for_the_region_that_s3_tells_in_whatever_process(
    *, processes: str, run_cli: Cli, bucket: Any, api: ConversionApi, s3: S3Server, relay: Relay
) -> None:
    for number in range(4):
        bucket.put(f"{number}.png", b"\x89PNG\r\n\x1a\n%d" % number)
    relay.added = {"x-amz-bucket-region": s3.region}
    given = ("--processes", processes, "--workers", "2", "--set", "api.transfer=url")
    run = run_cli(*given, AWS_DEFAULT_REGION="eu-nowhere-9", AWS_ENDPOINT_URL_S3=relay.url)
    urls = [request.fields["file_url"] for request in api.requests if request.is_conversion]
    signed = {dict(parse_qsl(urlsplit(url).query))["X-Amz-Credential"].split("/")[2] for url in urls}
    assert (run.exit_code, len(api.paid), signed) == (0, 5, {s3.region}), run.out


def test_a_region_that_does_not_exist_at_amazon_is_named(run_cli: Cli) -> None:
    given = ("--set", "s3.region=eu-nowhere-9")
    assert_met(run_cli, "region", given=given, is_checked=False, AWS_ENDPOINT_URL_S3=None)


def test_a_server_that_hides_the_length_of_objects_is_named(
    run_cli: Cli, relay: Relay, work: Path, api: ConversionApi
) -> None:
    relay.hidden = {"content-length"}
    (work / "keys").write_text("a.png\n")
    run = run_cli("--keys-from", "keys", AWS_ENDPOINT_URL_S3=relay.url)
    assert_told(run, "Content-Length", "proxy")
    assert api.paid == []


########################################################################
# Other people's settings
########################################################################


@pytest.mark.parametrize(
    "named",
    [
        {"TQDM_DISABLE": "1"},
        *(pytest.param(each, marks=pytest.mark.slow) for each in ({"TQDM_NCOLS": "wide"}, {"TQDM_POSITION": "top"})),
    ],
    ids=lambda named: str(*named),
)
def test_a_setting_for_other_programs_bars_does_not_reach_this_one(
    named: dict[str, str], start: Cli, terminal: Terminal
) -> None:
    run = start(**named, terminal=terminal.slave)
    terminal.read_until(r"1 of 1 done \|█+\| 0 failed")
    terminal.read_until(r"converted +1")
    assert run.wait().exit_code == 0


ONCE = """#!/bin/sh
mkdir "{work}/asked" 2>/dev/null || exit 1
cat "{work}/keys"
"""


def test_credentials_that_a_worker_process_does_not_get_are_named(
    run_cli: Cli, api: ConversionApi, s3: S3Server, work: Path
) -> None:
    keys = {"Version": 1, "AccessKeyId": s3.access_key, "SecretAccessKey": s3.secret_key}
    (work / "keys").write_text(json.dumps(keys))
    (work / "once").write_text(ONCE.format(work=work))
    (work / "once").chmod(0o700)
    (work / "aws.ini").write_text(f"[default]\ncredential_process = {work}/once\n")
    named: dict[str, Any] = {"AWS_CONFIG_FILE": str(work / "aws.ini"), "AWS_ACCESS_KEY_ID": None}
    run = run_cli("--processes", "2", "--workers", "2", **named)
    assert_told(run, "credential")
    assert "memory" not in run.out + run.err
    assert api.paid == []


@pytest.mark.slow
def test_credentials_that_a_role_s_service_does_not_give_now_may_be_there_for_the_next_run(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.png", b"\x89PNG\r\n\x1a\n")
    run = run_cli(AWS_ACCESS_KEY_ID=None, AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{api.url}/nothing")
    assert (run.exit_code, "Traceback" in run.err) == (3, False), run.err
    assert "look at the role of this machine, container or task" in run.err
