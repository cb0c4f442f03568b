"""How S3 is spoken to: presigned URLs, checksums, and credentials that are renewed or lost while a run goes on."""

import os
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import (
    BotoCoreError,
    CredentialRetrievalError,
    MetadataRetrievalError,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)

import s3_bulk_convert as program


def bucket(monkeypatch: pytest.MonkeyPatch, *options: str, token: str = "") -> program.Bucket:
    """A bucket in Ireland, and nobody behind it."""
    found = {"AWS_ACCESS_KEY_ID": "key/with:odd", "AWS_SECRET_ACCESS_KEY": "s+/=", "AWS_DEFAULT_REGION": "eu-west-1"}
    for name, value in {**found, "AWS_SESSION_TOKEN": token}.items():
        monkeypatch.setenv(name, value)
    given = {"S3_BUCKET": "bucket", "TARGET_FORMAT": "jpg", "CTF_API_KEY": "k"}
    flags = [part for option in options for part in ("--set", option)]
    command_line = program.read_flags(program.build_parser().parse_args(flags))
    return program.Bucket(program.load_settings(None, {**os.environ, **given}, command_line))


def query_of(url: str) -> dict[str, str]:
    """The parameters of a URL."""
    return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))


def test_who_pays_is_said_in_the_query_where_it_needs_no_header(monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket(monkeypatch, "s3.requester_pays=yes").presign("a b.png")
    asked = query_of(url)
    assert (asked["x-amz-request-payer"], asked["X-Amz-SignedHeaders"]) == ("requester", "host")
    request = AWSRequest("GET", url.partition("?")[0] + "?x-amz-request-payer=requester")
    request.context["timestamp"] = asked["X-Amz-Date"]
    signer = S3SigV4QueryAuth(Credentials("key/with:odd", "s+/="), "s3", "eu-west-1", expires=86_400)
    canonical = signer.canonical_request(AWSRequest("GET", url.rpartition("&X-Amz-Signature")[0]))
    assert signer.signature(signer.string_to_sign(request, canonical), request) == asked["X-Amz-Signature"]


def test_a_url_lives_as_long_as_the_api_remembers_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = query_of(bucket(monkeypatch).presign("a.png"))
    assert (asked["X-Amz-Expires"], "x-amz-request-payer" in asked) == (str(program.IDEMPOTENCY_WINDOW_SECONDS), False)


@pytest.mark.parametrize(
    ("endpoint", "calculation"),
    [
        ("", "when_supported"),
        ("https://bucket.vpce-1.s3.eu-west-1.vpce.amazonaws.com", "when_supported"),
        ("https://s3.example.com", "when_required"),
        ("https://amazonaws.com.example.com", "when_required"),
    ],
)
def test_checksums_behind_a_body_are_for_amazon_alone_wherever_the_endpoint_is_named(
    endpoint: str, calculation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "aws"
    told.write_text(f"[default]\nendpoint_url = {endpoint}\n" if endpoint else "[default]\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(told))
    here = bucket(monkeypatch)
    config: Any = here.client.meta.config
    assert (config.request_checksum_calculation, config.response_checksum_validation) == (calculation, calculation)
    given: Any = bucket(monkeypatch, f"s3.endpoint_url={endpoint or 'none'}").client.meta.config
    assert given.request_checksum_calculation == calculation
    # A bucket of the same name at another place is another one; Amazon is one place, by whichever address.
    assert here.endpoint == ("aws" if calculation == "when_supported" else endpoint)
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    asked: Any = bucket(monkeypatch).client.meta.config
    assert asked.request_checksum_calculation == "when_supported"


def credentials_of(here: program.Bucket) -> Any:
    """What signs the requests of a bucket's client."""
    return vars(here.client)["_request_signer"]._credentials


def test_keys_that_are_renewed_sign_the_next_url(monkeypatch: pytest.MonkeyPatch) -> None:
    here = bucket(monkeypatch, token="old")
    credentials = credentials_of(here)
    credentials.access_key, credentials.token = "renewed", "new"
    asked = query_of(here.presign("a.png"))
    assert (asked["X-Amz-Credential"].split("/")[0], asked["X-Amz-Security-Token"]) == ("renewed", "new")


@pytest.mark.parametrize(
    "error",
    [
        CredentialRetrievalError(provider="iam-role", error_msg="timed out"),
        MetadataRetrievalError(error_msg="timed out"),
        TokenRetrievalError(provider="p", error_msg="timed out"),
        UnauthorizedSSOTokenError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_credentials_that_are_lost_stop_the_run_and_are_no_bug(
    error: BotoCoreError, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = bucket(monkeypatch)

    def lost() -> None:
        raise error

    monkeypatch.setattr(credentials_of(here), "get_frozen_credentials", lost)
    source = program.SourceObject("a.png", "e", 1)
    for use in (
        lambda: here.presign("a.png"),
        lambda: here.look_at_source(source),
        lambda: here.open_source(source),
    ):
        with pytest.raises(program.RunError, match="S3 could not be reached for ") as stopped:
            use()
        assert str(error) in stopped.value.message
