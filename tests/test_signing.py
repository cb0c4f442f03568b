"""Presigned URLs: the same signature as boto3's for any key, and boto3's own where it has another way to sign."""

import urllib.parse
from pathlib import Path
from typing import Any

import hypothesis
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
from hypothesis import given
from hypothesis import strategies as st

import s3_bulk_convert as program
from tests.test_feeder import settings

ENDPOINTS = ("none", "http://127.0.0.1:9000", "https://s3.example.com/below")
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


def bucket(monkeypatch: pytest.MonkeyPatch, *options: str, token: str = "") -> program.Bucket:
    """A bucket in Ireland, and nobody behind it."""
    found = {"AWS_ACCESS_KEY_ID": "key/with:odd", "AWS_SECRET_ACCESS_KEY": "s+/=", "AWS_DEFAULT_REGION": "eu-west-1"}
    for name, value in {**found, "AWS_SESSION_TOKEN": token}.items():
        monkeypatch.setenv(name, value)
    return program.Bucket(settings(*options))


def query_of(url: str) -> dict[str, str]:
    """The parameters of a URL."""
    return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))


def signer_of(of: program.Bucket) -> program.UrlSigner:
    """Who signs for a bucket."""
    signer: Any = of.presign
    found: program.UrlSigner = signer.__self__
    return found


@pytest.mark.parametrize("token", ["", "a/session+token=="])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("name", ["bucket", "a.bucket.with.dots"])
def test_a_url_is_boto3_s_own_to_the_signature(
    endpoint: str, token: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = bucket(monkeypatch, f"s3.endpoint_url={endpoint}", f"s3.bucket={name}", token=token)

    @hypothesis.settings(max_examples=25)  # for each of the twelve
    @given(key=KEYS)
    def holds_for(key: str) -> None:
        theirs = here._presigned_by_boto3(key)
        ours = signer_of(here)._signed(key, query_of(theirs)["X-Amz-Date"])
        assert urllib.parse.urlsplit(ours)[:3] == urllib.parse.urlsplit(theirs)[:3]
        assert query_of(ours) == query_of(theirs)

    holds_for()


def test_who_pays_is_said_in_the_query_where_it_needs_no_header(monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket(monkeypatch, "s3.requester_pays=yes").presign("a b.png")
    asked = query_of(url)
    assert (asked["x-amz-request-payer"], asked["X-Amz-SignedHeaders"]) == ("requester", "host")
    request = AWSRequest("GET", url.partition("?")[0] + "?x-amz-request-payer=requester")
    request.context["timestamp"] = asked["X-Amz-Date"]
    signer = S3SigV4QueryAuth(Credentials("key/with:odd", "s+/="), "s3", "eu-west-1", expires=86_400)
    canonical = signer.canonical_request(AWSRequest("GET", url.rpartition("&X-Amz-Signature")[0]))
    assert signer.signature(signer.string_to_sign(request, canonical), request) == asked["X-Amz-Signature"]


def test_where_boto3_signs_in_another_way_it_signs_them_all() -> None:
    def sign(key: str) -> str:
        return f"https://h/{key}?AWSAccessKeyId=k&Expires=1&Signature=s"

    assert program.UrlSigner(sign, Credentials("k", "s"), {}).sign("a") == sign("a")


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
    config: Any = bucket(monkeypatch).client.meta.config
    assert (config.request_checksum_calculation, config.response_checksum_validation) == (calculation, calculation)
    given: Any = bucket(monkeypatch, f"s3.endpoint_url={endpoint or 'none'}").client.meta.config
    assert given.request_checksum_calculation == calculation
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    asked: Any = bucket(monkeypatch).client.meta.config
    assert asked.request_checksum_calculation == "when_supported"


def test_keys_that_are_renewed_sign_the_next_url(monkeypatch: pytest.MonkeyPatch) -> None:
    here = bucket(monkeypatch, token="old")
    credentials: Any = signer_of(here)._credentials
    credentials.access_key, credentials.token = "renewed", "new"
    asked = query_of(here.presign("a.png"))
    assert (asked["X-Amz-Credential"].split("/")[0], asked["X-Amz-Security-Token"]) == ("renewed", "new")


def test_credentials_that_are_lost_stop_the_run_and_are_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    here = bucket(monkeypatch)

    def lost() -> None:
        raise CredentialRetrievalError(provider="iam-role", error_msg="timed out")

    monkeypatch.setattr(signer_of(here)._credentials, "get_frozen_credentials", lost)
    with pytest.raises(program.RunStopped, match=r"S3 could not be reached for signing a URL: .*timed out"):
        here.presign("a.png")


@pytest.mark.parametrize(
    "error",
    [
        CredentialRetrievalError(provider="p", error_msg="m"),
        MetadataRetrievalError(error_msg="m"),
        TokenRetrievalError(provider="p", error_msg="m"),
        UnauthorizedSSOTokenError(),
    ],
)
def test_credentials_that_cannot_be_had_would_meet_every_object(error: BotoCoreError) -> None:
    assert program.is_refusal(error)


@pytest.mark.parametrize("stop", [None, program.Stop("the disk is full", "free some space")])
def test_what_is_missing_at_the_end_never_hides_why_a_run_was_stopped(stop: program.Stop | None) -> None:
    report = program.Report()
    report.counts[program.LISTED], report.stop = 3, stop
    program.close_accounts(report, is_complete=True)
    assert report.stop
    assert (report.stop == stop) is (stop is not None)
    assert report.counts["left"] == (3 if stop else 0)
