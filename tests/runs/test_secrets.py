"""The API key: it goes to the API's own address, by the way that was asked for, and is written nowhere."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conversion_api import DOWNLOAD, JOBS, USAGE, Answer, ConversionApi, Fault, Request, Step
from tests.standins.program import HASTY
from tests.standins.promises import assert_all_promises_are_kept, fill
from tests.standins.tcp_proxy import PrivateCa, TcpProxy

Cli = Callable[..., Any]
ELSEWHERE = "/elsewhere"
BY_JOBS = ("--set", "api.jobs_above=1")


@pytest.fixture(autouse=True)
def _cheap(strict_api: ConversionApi) -> None:
    """Conversions cost nothing, and say what they were made of."""
    strict_api.behaviour.job_states = ("completed",)


def is_download(request: Request) -> bool:
    return request.path.startswith(DOWNLOAD)


def is_poll(request: Request) -> bool:
    return request.path.startswith(JOBS + "/") and not is_download(request)


def is_for(name: str, request: Request) -> bool:
    return f"/{name}.png?" in request.fields.get("file_url", "")


def is_usage(request: Request) -> bool:
    return request.path == USAGE


########################################################################
# Where it goes
########################################################################


@pytest.mark.parametrize(
    ("arguments", "redirected"),
    [
        pytest.param(BY_JOBS, is_poll, id="poll"),
        pytest.param(BY_JOBS, is_download, id="download"),
        pytest.param(("--check",), is_usage, id="check"),
        pytest.param(("--dry-run",), is_usage, id="usage"),
    ],
)
def test_a_redirect_is_not_followed(
    arguments: tuple[str, ...], redirected: Callable[[Request], bool], run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    # To the same host, where a client that follows it takes the key along.
    expected = fill(bucket, 1)
    fault = api.faults.add(Fault.redirect(api.url + ELSEWHERE, 302).at(redirected))
    run = run_cli(*arguments, command=HASTY)
    assert fault.struck == 1
    assert [request.path for request in api.requests if request.path == ELSEWHERE] == []
    if arguments == BY_JOBS:
        assert_all_promises_are_kept(run, api, bucket, expected)


def test_the_key_does_not_go_to_the_own_host_by_plain_http(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    expected = fill(bucket, 1)
    authority = PrivateCa(tmp_path)
    with TcpProxy(api.url, authority.server_context()) as network:

        def with_plain_link(answer: Answer) -> Answer:
            plain = network.url.replace("https:", "http:")
            return replace(answer, body=answer.body.replace(api.url.encode(), plain.encode()))

        api.faults.add(Fault.json_envelope())
        api.faults.add(Fault(Step.DELIVERY, reshape=with_plain_link))
        # One port speaks https or http. What goes out by plain http reaches the API by a proxy, as it might anywhere.
        proxied = {"HTTP_PROXY": api.url, "http_proxy": api.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        trusted = {"REQUESTS_CA_BUNDLE": str(authority.bundle)}
        run = run_cli("--set", f"api.url={network.url}", **proxied, **trusted)
    assert_all_promises_are_kept(run, api, bucket, expected)
    (download,) = filter(is_download, api.requests)
    assert "Authorization" not in download.headers


########################################################################
# Where it is written
########################################################################

# Nothing about its form says that it is a key.
KEY = "0123456789-a-key-of-another-form"
SAID = f"what is {KEY} doing here"


def refusal(status: int) -> Fault:
    """The API repeats the key, in the code of an error and in its words."""
    return Fault(status=status, code=f"refused_{KEY}", message=SAID, times=None)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        pytest.param(("--set", "api.transfer=upload"), refusal(422), id="an object's failure"),
        # The API's word on its key ends the run at once; a single 403 is a failure of its object.
        pytest.param((), refusal(401), id="the reason to stop"),
        pytest.param(("--log-format", "json"), refusal(401), id="the reason to stop in JSON"),
        pytest.param((*BY_JOBS, "--set", "api.retries=0"), refusal(400).at(is_poll), id="a job"),
        pytest.param(BY_JOBS, refusal(404).at(is_download), id="a download"),
        pytest.param(("--check",), refusal(403).at(is_usage), id="check"),
        pytest.param(("--check", "--log-format", "json"), refusal(403).at(is_usage), id="check in JSON"),
        pytest.param(("--dry-run", "--log-format", "json"), refusal(403).at(is_usage), id="dry run"),
    ],
)
def test_a_key_that_the_api_repeats_is_written_nowhere(
    *, arguments: tuple[str, ...], fault: Fault, run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    api.api_key = KEY
    fill(bucket, 1)
    api.faults.add(replace(fault))
    run = run_cli("-v", *arguments, command=HASTY)
    written = {path.name: path.read_bytes() for path in (tmp_path / "work").iterdir()}
    assert [name for name, content in written.items() if KEY.encode() in content] == []
    assert KEY not in run.out + run.err
    # What the API has said is there, but for the key.
    told = run.out + run.err + b"".join(written.values()).decode("utf-8", "replace")
    assert "what is ... doing here" in told


LINKS = {
    "http": "http://127.0.0.1:99999/x?token=SESAME",
    "ftp": "ftp://me:SESAME@127.0.0.1/x?sig=SESAME",
    "sftp": "sftp://127.0.0.1?token=SESAME",
    "data": "data:image/jpeg;base64,SESAME",
    "quotes": "DATA:'SESAME'",
}


def test_what_is_secret_in_a_link_of_the_api_is_written_nowhere_whatever_its_scheme(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    for name, link in LINKS.items():
        fill(bucket, 1, name=name)
        api.faults.add(Fault.json_in_200({"file_url": link}, times=None).at(partial(is_for, name)))
    run = run_cli("-v", "--set", "api.retries=0", command=HASTY)
    assert {line["key"]: line["code"] for line in run.failures} == dict.fromkeys(
        [f"{name}.png" for name in LINKS], "stale_link"
    )
    assert "SESAME" not in run.out + run.err + str(run.failures)
    assert "'ftp://...@127.0.0.1/x?...'" in str(run.failures)


@pytest.mark.parametrize("command", [(), ("--check",)], ids=["run", "check"])
@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"AWS_SESSION_TOKEN": "SESAME\nSESAME"}, id="token"),
        pytest.param({"AWS_ACCESS_KEY_ID": "SESAME\n"}, id="id"),
        pytest.param({"AWS_SECRET_ACCESS_KEY": "SESAME\udcff"}, id="no text"),
        pytest.param({"AWS_DEFAULT_REGION": "us-east-1\n"}, id="region"),
    ],
)
def test_what_aws_is_told_and_cannot_be_sent_is_refused_by_its_name_and_not_shown(
    given: dict[str, str], command: tuple[str, ...], run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    fill(bucket, 1)
    run = run_cli("-v", *command, **given)
    assert run.exit_code == 2
    assert f"{next(iter(given))} has a line break or another character that cannot be sent" in run.out + run.err
    assert "SESAME" not in run.out + run.err
    assert api.paid == []


def test_a_profile_whose_keys_cannot_be_sent_is_refused(run_cli: Cli, work: Path) -> None:
    (work / "keys").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = OPEN\n  SESAME\n")
    run = run_cli(AWS_SHARED_CREDENTIALS_FILE=str(work / "keys"), AWS_ACCESS_KEY_ID=None)
    assert run.exit_code == 2
    assert "error: a value of the profile has a line break" in run.err
    assert "SESAME" not in run.err
