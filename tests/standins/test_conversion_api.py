"""The stand-in keeps the API's rules, breaks them only when told to, and counts truly what it charged."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

import pillow_heif
import pytest
import requests
from PIL import Image, ImageDraw

from tests.standins import converters
from tests.standins.conversion_api import ConversionApi, Fault, Request
from tests.standins.converters import Conversion, Converted

PICTURE = b"a picture, as far as the marker is concerned"
ROOT = Path(__file__).parents[2]
Parts = dict[str, tuple[str | None, str | bytes]]
PATIENCE = 10  # seconds after which a test that waits has failed


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def read(self) -> float:
        """Tell the time."""
        return self.now


class Customer:
    """A client with no cleverness at all: one request, one reply."""

    def __init__(self, api: ConversionApi) -> None:
        self.api = api
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {api.api_key}"

    def send(
        self,
        source: bytes | None = PICTURE,
        *,
        key: str | None = None,
        path: str = "/v1/convert",
        headers: dict[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """Send one conversion request."""
        text = {"target": "jpg", "source": "png", **(fields or {})}
        parts: Parts = {name: (None, value) for name, value in text.items()}
        if source is not None:
            parts["file"] = ("photo.png", source)
        all_headers = {**({} if key is None else {"Idempotency-Key": key}), **(headers or {})}
        url = self.api.url + path
        return self.session.post(url, files=parts, headers=all_headers, timeout=PATIENCE, allow_redirects=False)

    def get(self, path: str) -> requests.Response:
        """Look something up."""
        return self.session.get(self.api.url + path, timeout=PATIENCE)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def api(clock: Clock) -> Iterator[ConversionApi]:
    with ConversionApi(convert=converters.marking, clock=clock.read) as running:
        yield running


@pytest.fixture
def customer(api: ConversionApi) -> Customer:
    return Customer(api)


def marked(source: bytes = PICTURE, target: str = "jpg") -> bytes:
    return converters.marking(Conversion(source, "png", target)).body


def problem(reply: requests.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


# ----------------------------------------------------------------------------------------------------------------------
# A good answer
# ----------------------------------------------------------------------------------------------------------------------


def test_an_upload_is_answered_with_the_file_and_its_headers(customer: Customer) -> None:
    reply = customer.send()
    assert (reply.status_code, reply.content) == (200, marked())
    assert reply.headers["Content-Type"] == "image/jpeg"
    assert reply.headers["Content-Disposition"] == 'attachment; filename="photo.jpg"'
    assert reply.headers["X-Conversion-Time"].endswith("ms")


def test_a_request_is_kept_with_its_fields_and_digests(api: ConversionApi, customer: Customer) -> None:
    customer.send(key="k1", fields={"quality": "80"})
    (request,) = api.requests
    assert request.fields == {"target": "jpg", "source": "png", "quality": "80"}
    assert (request.method, request.path, request.status) == ("POST", "/v1/convert", 200)
    assert (request.filename, request.idempotency_key) == ("photo.png", "k1")
    assert request.file_sha256 == api.paid[0].source_sha256 != request.raw_sha256
    assert request.finished is not None
    assert request.finished >= request.started


def test_a_connection_serves_many_requests(api: ConversionApi, customer: Customer) -> None:
    ports = set()
    api.on("request_received", lambda request: ports.add(request.headers["X-Test"]))
    for number in range(3):
        reply = customer.send(headers={"X-Test": str(number)})
        assert reply.raw.version == 11
        assert "Connection" not in reply.headers
    assert ports == {"0", "1", "2"}


def test_a_chunked_upload_is_read_to_its_end(api: ConversionApi, customer: Customer) -> None:
    prepared = requests.Request("POST", api.url, files={"file": ("a.png", PICTURE), "target": (None, "jpg")}).prepare()
    assert isinstance(prepared.body, bytes)
    pieces = iter([prepared.body[:50], prepared.body[50:]])
    media_type = {"Content-Type": prepared.headers["Content-Type"]}
    for body in (pieces, prepared.body):
        reply = customer.session.post(f"{api.url}/v1/convert", data=body, headers=media_type, timeout=PATIENCE)
        assert reply.content == marked()
    first, second = api.requests
    assert first.headers["Transfer-Encoding"] == "chunked"
    assert first.raw_sha256 == second.raw_sha256


def test_a_client_that_leaves_halfway_is_noted_and_not_served(api: ConversionApi) -> None:
    with socket.create_connection(("127.0.0.1", int(api.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(b"POST /v1/convert HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    assert [request.status for request in api.requests] == [None]


def test_the_source_format_is_told_by_field_then_filename_then_first_bytes(
    api: ConversionApi, customer: Customer
) -> None:
    customer.send(fields={"source": "heic"})
    customer.send(fields={"source": ""})
    assert [charge.source_format for charge in api.paid] == ["heic", "png"]
    unnamed: Parts = {"file": ("photo", b"GIF89a..."), "target": (None, "jpg")}
    customer.session.post(f"{api.url}/v1/convert", files=unnamed, timeout=PATIENCE)
    assert api.paid[2].source_format == "gif"
    unknown: Parts = {"file": ("table", b"a,b,c"), "target": (None, "jpg")}
    reply = customer.session.post(f"{api.url}/v1/convert", files=unknown, timeout=PATIENCE)
    assert problem(reply) == (400, "bad_request")


# ----------------------------------------------------------------------------------------------------------------------
# Refusals
# ----------------------------------------------------------------------------------------------------------------------


def test_a_wrong_api_key_is_refused(api: ConversionApi, customer: Customer) -> None:
    assert problem(customer.send(headers={"Authorization": "Bearer wrong"})) == (401, "invalid_api_key")
    assert api.paid == []


@pytest.mark.parametrize("fields", [{"target": ""}, {"quality": "0"}, {"quality": "101"}, {"quality": "best"}])
def test_a_bad_field_is_a_bad_request(customer: Customer, fields: dict[str, str]) -> None:
    assert problem(customer.send(fields=fields)) == (400, "bad_request")


def test_a_body_that_is_not_multipart_is_a_bad_request(api: ConversionApi, customer: Customer) -> None:
    reply = customer.session.post(f"{api.url}/v1/convert", data={"target": "jpg"}, timeout=PATIENCE)
    assert problem(reply) == (400, "bad_request")


def test_a_pair_without_a_converter_is_an_unsupported_route(api: ConversionApi, customer: Customer) -> None:
    assert problem(customer.send(fields={"target": "mp3"})) == (422, "unsupported_route")
    assert api.paid == []


def test_unreadable_content_is_not_charged(api: ConversionApi, customer: Customer) -> None:
    api.behaviour.convert = converters.convert
    assert problem(customer.send(b"no png")) == (422, "conversion_failed")
    assert api.paid == []


def test_a_file_over_the_plans_size_is_too_large(api: ConversionApi, customer: Customer) -> None:
    api.behaviour.max_size = len(PICTURE)
    assert customer.send().status_code == 200
    assert problem(customer.send(PICTURE + b"!")) == (413, "file_too_large")


def test_an_unknown_place_is_not_found(customer: Customer) -> None:
    assert problem(customer.get("/v1/nothing")) == (404, "not_found")


# ----------------------------------------------------------------------------------------------------------------------
# file_url
# ----------------------------------------------------------------------------------------------------------------------


def test_a_file_url_is_fetched(api: ConversionApi, customer: Customer) -> None:
    url = customer.send(headers={"Accept": "application/json"}).json()["file_url"]
    assert customer.send(None, fields={"file_url": url}).content == marked(marked())
    assert api.requests[-1].listener == "api"
    assert [request.path for request in api.requests].count("/v1/convert") == 2


def test_a_file_url_that_cannot_be_fetched_is_told(api: ConversionApi, customer: Customer) -> None:
    expired = f"{api.download_url}/v1/jobs/download/expired"
    assert problem(customer.send(None, fields={"file_url": expired})) == (422, "fetch_failed")
    assert problem(customer.send(None, fields={"file_url": "no url"})) == (422, "fetch_failed")
    api.behaviour.fetch_failure_status = 502
    assert problem(customer.send(None, fields={"file_url": expired})) == (502, "fetch_failed")


def test_a_file_url_is_refused_where_only_uploads_are_taken(api: ConversionApi, customer: Customer) -> None:
    api.behaviour.accept_file_url = False
    assert problem(customer.send(None, fields={"file_url": f"{api.url}/x"})) == (400, "bad_request")


# ----------------------------------------------------------------------------------------------------------------------
# Idempotency
# ----------------------------------------------------------------------------------------------------------------------


def test_a_retry_gets_the_same_bytes_and_headers_and_is_free(
    api: ConversionApi, customer: Customer, clock: Clock
) -> None:
    first = customer.send(key="k")
    clock.now += 3600
    second = customer.send(key="k")
    assert "Date" in first.headers
    assert (second.content, second.headers) == (first.content, first.headers)
    assert (len(api.paid), api.replays, api.requests[1].replayed) == (1, 1, True)


def test_a_key_is_forgotten_after_a_day(api: ConversionApi, customer: Customer, clock: Clock) -> None:
    customer.send(key="k")
    clock.now += 86_400
    customer.send(key="k")
    assert (len(api.paid), api.replays) == (2, 0)
    assert len(api.paid_twice()) == 1


def test_without_a_key_the_same_file_is_paid_twice(api: ConversionApi, customer: Customer) -> None:
    customer.send()
    assert api.paid_twice() == []
    customer.send(fields={"quality": "50"})
    assert api.paid_twice() == []
    customer.send()
    assert api.paid_twice() == [(api.paid[0].source_sha256, "jpg", None)]


@pytest.mark.parametrize("key", ["", "with space", "k" * 129, "ümlaut".encode().decode("latin-1"), "a=b"])
def test_a_malformed_key_is_refused(customer: Customer, key: str) -> None:
    assert problem(customer.send(key=key)) == (400, "bad_request")


def test_every_lawful_character_is_taken(customer: Customer) -> None:
    assert customer.send(key="aZ09._-:+/" + "x" * 118).status_code == 200


def test_a_key_with_another_body_is_refused(api: ConversionApi, customer: Customer) -> None:
    customer.send(key="k")
    assert problem(customer.send(b"other", key="k")) == (422, "bad_request")
    assert problem(customer.send(key="k", fields={"quality": "5"})) == (422, "bad_request")
    assert len(api.paid) == 1


def test_another_boundary_is_another_body_only_when_raw_bytes_count(api: ConversionApi, customer: Customer) -> None:
    customer.send(key="k")
    assert customer.send(key="k").status_code == 200
    api.behaviour.compare_raw_body = True
    customer.send(key="raw")
    assert problem(customer.send(key="raw")) == (422, "bad_request")


@pytest.mark.parametrize("failure", [Fault.status_reply, Fault.work_lost])
def test_the_body_of_a_failure_is_forgotten(
    api: ConversionApi, customer: Customer, failure: Callable[[int], Fault]
) -> None:
    api.faults.add(failure(502))
    assert customer.send(key="k").status_code == 502
    assert customer.send(b"other", key="k").content == marked(b"other")


@pytest.mark.parametrize("failure", [Fault.status_reply, Fault.work_lost])
def test_the_body_of_a_failure_is_remembered_on_demand(
    api: ConversionApi, customer: Customer, failure: Callable[[int], Fault]
) -> None:
    api.behaviour.remember_failed_bodies = True
    api.faults.add(failure(502))
    assert customer.send(key="k").status_code == 502
    assert problem(customer.send(b"other", key="k")) == (422, "bad_request")
    assert customer.send(key="k").content == marked()


def test_a_key_in_flight_is_a_conflict(api: ConversionApi, customer: Customer) -> None:
    go_on = threading.Event()
    hanging = api.faults.add(Fault.hang_until(go_on))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(Customer(api).send, key="k")
        assert hanging.reached.wait(PATIENCE)
        second = customer.send(key="k")
        assert problem(second) == (409, "bad_request")
        assert second.headers["Retry-After"] == "1"
        assert problem(customer.send(b"other", key="k")) == (422, "bad_request")
        go_on.set()
        assert first.result(PATIENCE).status_code == 200
    assert customer.send(key="k").status_code == 200
    assert (len(api.paid), api.replays) == (1, 1)


def test_endpoints_share_keys_only_on_demand(api: ConversionApi, customer: Customer) -> None:
    customer.send(key="k")
    assert customer.send(key="k", path="/v1/jobs").status_code == 202
    api.behaviour.keys_shared_by_endpoints = True
    customer.send(key="shared")
    assert problem(customer.send(key="shared", path="/v1/jobs")) == (422, "bad_request")


# ----------------------------------------------------------------------------------------------------------------------
# Limits
# ----------------------------------------------------------------------------------------------------------------------


def test_the_minute_limit_holds_and_ends_with_its_window(api: ConversionApi, customer: Customer, clock: Clock) -> None:
    api.behaviour.per_minute = 2
    assert [customer.send().headers["X-RateLimit-Remaining"] for _ in range(2)] == ["1", "0"]
    clock.now += 15
    refused = customer.send()
    assert problem(refused) == (429, "rate_limited")
    assert (refused.headers["Retry-After"], refused.json()["error"]["details"]["retry_after"]) == ("45", 45)
    assert refused.headers["X-RateLimit-Reset"] == "1000060"
    clock.now += 45
    assert customer.send().status_code == 200
    assert len(api.paid) == 3


def test_retry_after_may_be_a_date(api: ConversionApi, customer: Customer) -> None:
    api.behaviour.per_minute, api.behaviour.retry_after_as_date = 0, True
    retry_after = parsedate_to_datetime(customer.send().headers["Retry-After"])
    assert retry_after.timestamp() == 1_000_060


def test_a_used_up_month_has_no_retry_after(api: ConversionApi, customer: Customer) -> None:
    api.behaviour.month_quota = 1
    assert customer.send(key="k").headers["X-CTF-Remaining"] == "0"
    refused = customer.send(b"other")
    assert problem(refused) == (429, "quota_exceeded")
    assert refused.json()["error"]["details"] == {"limit": 1, "used": 1}
    assert "Retry-After" not in refused.headers
    assert customer.send(key="k").status_code == 200


def test_usage_tells_the_months_numbers(api: ConversionApi, customer: Customer) -> None:
    api.behaviour.month_quota = 5
    customer.send()
    usage = {"plan": "test", "conversions": {"limit": 5, "used": 1, "remaining": 4}}
    assert customer.get("/v1/usage").json() == usage


def test_rate_headers_may_be_stale_or_missing(api: ConversionApi, customer: Customer, clock: Clock) -> None:
    assert customer.send().headers["X-RateLimit-Limit"] == "100000"
    api.behaviour.stale_rate_headers = True
    assert int(customer.send().headers["X-RateLimit-Reset"]) < clock.now
    api.behaviour.rate_headers = False
    assert not [name for name in customer.send().headers if name.startswith(("X-RateLimit", "X-CTF"))]


# ----------------------------------------------------------------------------------------------------------------------
# Faults
# ----------------------------------------------------------------------------------------------------------------------


def test_a_status_comes_as_often_as_asked(api: ConversionApi, customer: Customer) -> None:
    fault = api.faults.add(Fault.status_reply(502, "service_unavailable", times=2, retry_after="7"))
    replies = [customer.send() for _ in range(3)]
    assert [reply.status_code for reply in replies] == [502, 502, 200]
    assert problem(replies[0]) == (502, "service_unavailable")
    assert replies[0].headers["Retry-After"] == "7"
    assert (fault.struck, len(api.paid)) == (2, 1)


def test_a_fault_strikes_only_where_it_is_meant(api: ConversionApi, customer: Customer) -> None:
    api.faults.add(Fault.status_reply(503, times=None, where=lambda request: request.fields.get("target") == "png"))
    api.faults.add(Fault.status_reply(500, times=None).at(lambda request: request.path == "/v1/usage"))
    assert [customer.send(fields={"target": target}).status_code for target in ("png", "jpg", "png")] == [503, 200, 503]
    assert customer.get("/v1/usage").status_code == 500
    api.faults.clear()
    assert customer.send(fields={"target": "png"}).status_code == 200


def test_faults_leave_look_ups_alone_unless_told(api: ConversionApi, customer: Customer) -> None:
    api.faults.add(Fault.status_reply(503))
    assert customer.get("/v1/usage").status_code == 200
    assert customer.send().status_code == 503


def test_gateways_answer_pages_json_and_redirects_for_nothing(api: ConversionApi, customer: Customer) -> None:
    for fault in (Fault.html_page(), Fault.json_in_200(), Fault.redirect("http://127.0.0.1:9/elsewhere")):
        api.faults.add(fault)
    page, told, redirect = (customer.send(key="k") for _ in range(3))
    assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert problem(told) == (200, "service_unavailable")
    assert (redirect.status_code, redirect.headers["Location"]) == (307, "http://127.0.0.1:9/elsewhere")
    assert api.paid == []
    assert customer.send(key="k").content == marked()


def test_a_cut_before_the_work_is_not_charged(api: ConversionApi, customer: Customer) -> None:
    api.faults.add(Fault.cut_before_work())
    with pytest.raises(requests.ConnectionError):
        customer.send(key="k")
    assert api.paid == []
    assert customer.send(key="k").content == marked()
    assert [request.delivered for request in api.requests] == [False, True]


@pytest.mark.parametrize(
    "fault", [Fault.cut_after_work(), Fault.truncated_answer(), Fault.truncated_answer(chunked=True)]
)
def test_an_answer_lost_on_its_way_is_charged_once_and_replayed(
    api: ConversionApi, customer: Customer, fault: Fault
) -> None:
    api.faults.add(fault)
    with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
        customer.send(key="k")
    assert len(api.paid) == 1
    assert customer.send(key="k").content == marked()
    assert (len(api.paid), api.replays) == (1, 1)


def test_a_truncated_answer_announces_more_than_it_sends(api: ConversionApi) -> None:
    api.faults.add(Fault.truncated_answer().at(lambda request: request.path == "/v1/usage"))
    with socket.create_connection(("127.0.0.1", int(api.url.rsplit(":", 1)[1]))) as connection:
        head = f"GET /v1/usage HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.api_key}\r\n\r\n"
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    sent, body = answer.split(b"\r\n\r\n")
    assert int(sent.lower().split(b"content-length: ")[1].split(b"\r\n")[0]) > len(body) > 0


@pytest.mark.parametrize(
    ("fault", "body"),
    [
        (Fault.empty_answer(), b""),
        (Fault.shortened_answer(), marked()[: len(marked()) // 2]),
        (Fault.other_file(b"<html>", "text/html"), b"<html>"),
    ],
)
def test_a_wrong_body_is_charged_and_the_retry_gets_the_right_one(
    api: ConversionApi, customer: Customer, fault: Fault, body: bytes
) -> None:
    api.faults.add(fault)
    assert customer.send(key="k").content == body
    assert customer.send(key="k").content == marked()
    assert len(api.paid) == 1


@pytest.mark.parametrize("fault", [Fault.empty_answer(kept=True), Fault.other_file(b"", "image/jpeg", kept=True)])
def test_a_wrong_body_may_be_kept_for_the_retries_too(api: ConversionApi, customer: Customer, fault: Fault) -> None:
    api.faults.add(fault)
    assert [customer.send(key=key).content for key in ("k", "k", "new")] == [b"", b"", marked()]
    assert len(api.paid) == 2


def test_a_stalled_answer_ends_after_its_event(api: ConversionApi, customer: Customer) -> None:
    half_sent, go_on = threading.Event(), threading.Event()
    api.on("half_answer_sent", lambda _: half_sent.set())
    api.faults.add(Fault.stalled_answer(go_on))
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(customer.send)
        assert half_sent.wait(PATIENCE)
        assert not api.requests[0].delivered
        go_on.set()
        assert reply.result(PATIENCE).content == marked()


def test_headers_may_be_changed_and_taken_away(api: ConversionApi, customer: Customer) -> None:
    api.faults.add(Fault.changed_headers({"Content-Type": None, "Content-Disposition": "inline"}))
    reply = customer.send()
    assert "Content-Type" not in reply.headers
    assert reply.headers["Content-Disposition"] == "inline"


def test_a_zip_of_pages_is_charged_once_and_says_what_it_is(api: ConversionApi, customer: Customer) -> None:
    api.faults.add(Fault.zip_of_pages(3))
    reply = customer.send(key="k")
    assert reply.headers["Content-Type"] == "application/zip"
    assert reply.headers["Content-Disposition"] == 'attachment; filename="photo.zip"'
    with zipfile.ZipFile(io.BytesIO(reply.content)) as archive:
        assert archive.namelist() == ["page-001.jpg", "page-002.jpg", "page-003.jpg"]
        assert archive.read("page-002.jpg") == marked()
    assert customer.send(key="k").content == reply.content
    assert len(api.paid) == 1


@pytest.mark.parametrize("form", ["file_url", "download_url", "result.file_url"])
def test_an_envelope_has_its_link_where_the_behaviour_says(
    api: ConversionApi, customer: Customer, form: Literal["file_url", "download_url", "result.file_url"]
) -> None:
    api.behaviour.envelope_link = form
    api.faults.add(Fault.json_envelope())
    told = customer.send().json()
    for name in form.split("."):
        told = told[name]
    assert requests.get(told, timeout=PATIENCE).content == marked()
    assert len(api.paid) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Jobs
# ----------------------------------------------------------------------------------------------------------------------


def test_a_job_goes_through_its_script_one_state_per_poll(api: ConversionApi, customer: Customer) -> None:
    api.behaviour.job_states = ("queued", "resting", "completed")
    accepted = customer.send(path="/v1/jobs")
    told = accepted.json()
    assert (accepted.status_code, told["status"]) == (202, "queued")
    assert accepted.headers["Location"] == told["status_url"] == f"{api.url}/v1/jobs/{told['job_id']}"
    polls = [customer.get(f"/v1/jobs/{told['job_id']}").json() for _ in range(4)]
    assert [poll["status"] for poll in polls] == ["queued", "resting", "completed", "completed"]
    assert polls[2]["result"]["size"] == len(marked())
    assert requests.get(polls[2]["result"]["file_url"], timeout=PATIENCE).content == marked()


def test_a_job_is_submitted_and_charged_once_per_key(api: ConversionApi, customer: Customer) -> None:
    first, second = (customer.send(path="/v1/jobs", key="k").json() for _ in range(2))
    assert first == second
    assert len(api.paid) == 1
    assert [job["job_id"] for job in customer.get("/v1/jobs").json()["jobs"]] == [first["job_id"]]


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ("object", {"code": "conversion_failed", "message": "the engine gave up"}),
        ("string", "the engine gave up"),
        ("absent", None),
    ],
)
def test_a_job_fails_in_three_shapes_and_is_not_charged(
    api: ConversionApi, customer: Customer, shape: Literal["object", "string", "absent"], error: object
) -> None:
    api.behaviour.job_error = shape
    api.behaviour.job_states = ("failed",)
    told = customer.get("/v1/jobs/" + customer.send(path="/v1/jobs").json()["job_id"]).json()
    assert (told["status"], told.get("error")) == ("failed", error)
    assert api.paid == []


def test_a_job_that_cannot_be_converted_fails_in_the_end(api: ConversionApi, customer: Customer) -> None:
    api.behaviour.convert, api.behaviour.job_states = converters.convert, ("completed",)
    told = customer.get("/v1/jobs/" + customer.send(path="/v1/jobs").json()["job_id"]).json()
    assert (told["status"], told["error"]["code"]) == ("failed", "conversion_failed")


def test_a_stale_link_is_refused_until_the_job_is_asked_again(api: ConversionApi, customer: Customer) -> None:
    api.behaviour.stale_links, api.behaviour.job_states = 1, ("completed",)
    job = customer.send(path="/v1/jobs").json()["job_id"]
    links = [customer.get(f"/v1/jobs/{job}").json()["result"]["file_url"] for _ in range(2)]
    statuses = [requests.get(link, timeout=PATIENCE).status_code for link in links]
    assert statuses == [403, 200]


def test_an_unknown_job_is_not_found(customer: Customer) -> None:
    assert problem(customer.get("/v1/jobs/nobody")) == (404, "not_found")


def test_convert_may_answer_with_a_job(api: ConversionApi, customer: Customer) -> None:
    api.faults.add(Fault.accepted_as_job())
    first, second = (customer.send(key="k") for _ in range(2))
    assert (first.status_code, first.json()) == (202, second.json())
    assert customer.get("/v1/jobs/" + first.json()["job_id"]).status_code == 200
    assert len(api.paid) == 1


def test_the_download_host_sees_what_it_is_sent_and_serves_files_only(api: ConversionApi, customer: Customer) -> None:
    api.behaviour.separate_download_host, api.behaviour.answer_form = True, "envelope"
    link = customer.send().json()["file_url"]
    assert link.startswith(api.download_url)
    assert customer.session.get(link, timeout=PATIENCE).content == marked()
    assert [request.listener for request in api.requests] == ["api", "download"]
    assert api.requests[1].headers["authorization"] == f"Bearer {api.api_key}"
    assert customer.session.get(f"{api.download_url}/v1/usage", timeout=PATIENCE).status_code == 404


# ----------------------------------------------------------------------------------------------------------------------
# Counts and moments
# ----------------------------------------------------------------------------------------------------------------------


def test_conversions_in_flight_are_counted(api: ConversionApi) -> None:
    barrier = threading.Barrier(4, timeout=PATIENCE)

    def together(conversion: Conversion) -> Converted:
        barrier.wait()
        return converters.marking(conversion)

    api.behaviour.convert = together
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: Customer(api).send(str(number).encode()), range(4)))
    assert (api.max_in_flight, sorted(api.in_flight_samples)) == (4, [1, 2, 3, 4])


def test_one_after_the_other_is_never_two_in_flight(api: ConversionApi, customer: Customer) -> None:
    for number in range(50):
        customer.send(str(number).encode())
    assert api.in_flight_samples == [1] * 50


def test_counts_are_forgotten_but_keys_are_not(api: ConversionApi, customer: Customer) -> None:
    customer.send(key="k")
    api.forget_counts()
    assert (api.paid, api.requests, api.max_in_flight, api.replays) == ([], [], 0, 0)
    customer.send(key="k")
    assert (api.paid, api.replays) == ([], 1)


def test_the_moments_of_a_request_come_in_order(api: ConversionApi, customer: Customer) -> None:
    moments: list[tuple[str, int, bool]] = []
    answered = threading.Event()

    def noting(name: str) -> Callable[[Request], None]:
        return lambda request: moments.append((name, len(api.paid), request.delivered))

    api.on("request_received", noting("request_received"))
    api.on("work_done", noting("work_done"))
    api.on("half_answer_sent", noting("half_answer_sent"))
    api.on("answered", noting("answered"))
    api.on("answered", lambda _: answered.set())
    assert customer.send().content == marked()
    assert answered.wait(PATIENCE)
    assert moments == [
        ("request_received", 0, False),
        ("work_done", 1, False),
        ("half_answer_sent", 1, False),
        ("answered", 1, True),
    ]


def test_at_work_done_the_key_is_remembered_already(api: ConversionApi, customer: Customer) -> None:
    statuses: list[int] = []

    def crash_and_rerun(request: Request) -> None:
        if not statuses:
            statuses.append(0)
            statuses.append(Customer(api).send(key=request.idempotency_key).status_code)

    api.on("work_done", crash_and_rerun)
    customer.send(key="k")
    assert (statuses, len(api.paid)) == ([0, 200], 1)


def test_a_bug_in_a_callback_is_not_mistaken_for_a_network_failure() -> None:
    def failing(_: Request) -> None:
        raise LookupError("a bug in the test")

    def session() -> None:
        with ConversionApi() as api:
            api.on("request_received", failing)
            with pytest.raises(requests.ConnectionError):
                Customer(api).send()

    with pytest.raises(AssertionError, match="the stand-in itself failed"):
        session()


def test_a_misspelt_behaviour_is_an_error(api: ConversionApi) -> None:
    misspelt = "latancy"
    with pytest.raises(TypeError, match=misspelt):
        ConversionApi(latancy=1.0)
    with pytest.raises(AttributeError):
        setattr(api.behaviour, misspelt, 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# The real converters
# ----------------------------------------------------------------------------------------------------------------------


def drawn(image_format: str, mode: str = "RGB", pages: int = 1) -> bytes:
    """Draw a small picture, so uneven that the quality shows in its size."""
    pillow_heif.register_heif_opener()
    images = []
    for page in range(pages):
        image = Image.radial_gradient("L").resize((64, 48)).convert(mode)
        ImageDraw.Draw(image).line((0, page, 63, 47), fill=0)
        images.append(image)
    written = io.BytesIO()
    more = {"save_all": True, "append_images": images[1:]} if pages > 1 else {}
    images[0].save(written, image_format, **more)
    return written.getvalue()


SOURCES = {"png": "PNG", "heic": "HEIF", "webp": "WEBP", "tiff": "TIFF", "gif": "GIF", "bmp": "BMP", "jpg": "JPEG"}


@pytest.mark.parametrize("target", ["jpg", "png", "webp", "pdf"])
@pytest.mark.parametrize("source_format", SOURCES)
def test_every_image_becomes_every_target(source_format: str, target: str) -> None:
    source = drawn(SOURCES[source_format])
    assert converters.sniffed_format(source) == source_format
    converted = converters.convert(Conversion(source, source_format.upper(), target))
    assert converted.media_type == converters.MEDIA_TYPES[target]
    assert converters.sniffed_format(converted.body) == converted.extension == target
    if target != "pdf":
        with Image.open(io.BytesIO(converted.body)) as image:
            assert image.size == (64, 48)


@pytest.mark.parametrize("target", ["jpg", "webp"])
def test_quality_is_honoured(target: str) -> None:
    source = drawn("PNG")
    sizes = [len(converters.convert(Conversion(source, "png", target, quality)).body) for quality in (5, 50, 100)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
@pytest.mark.parametrize("target", ["jpg", "webp", "pdf"])
def test_every_mode_can_be_written(mode: str, target: str) -> None:
    assert converters.convert(Conversion(drawn("PNG", mode), "png", target)).extension == target


def test_pages_become_a_zip_of_images_or_the_pages_of_a_pdf() -> None:
    source = drawn("TIFF", pages=3)
    zipped = converters.convert(Conversion(source, "tif", "png"))
    assert (zipped.media_type, zipped.extension) == ("application/zip", "zip")
    with zipfile.ZipFile(io.BytesIO(zipped.body)) as archive:
        pages = [archive.read(name) for name in archive.namelist()]
    assert len(set(pages)) == 3
    assert {converters.sniffed_format(page) for page in pages} == {"png"}
    assert b"/Count 3" in converters.convert(Conversion(source, "tiff", "pdf")).body


@pytest.mark.parametrize("source", [b"", b"no image", drawn("PNG")[:60], drawn("GIF")])
def test_what_is_not_a_png_is_unconvertible_as_one(source: bytes) -> None:
    with pytest.raises(converters.UnconvertibleError):
        converters.convert(Conversion(source, "png", "jpg"))


@pytest.fixture
def office(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a LibreOffice on the path that knows one document."""
    program = tmp_path / "soffice"
    program.write_text(
        '#!/bin/sh\nfor last; do :; done\ngrep -q readable "$last" && printf %%PDF-1.7 > written/source.pdf\nexit 0\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("office")
def test_documents_go_through_libreoffice() -> None:
    assert converters.convert(Conversion(b"readable", "docx", "pdf")).body == b"%PDF-1.7"
    with pytest.raises(converters.UnconvertibleError):
        converters.convert(Conversion(b"broken", "docx", "pdf"))


@pytest.mark.parametrize(("source_format", "target"), [("docx", "pdf"), ("pdf", "jpg"), ("mov", "mp4"), ("wav", "mp3")])
def test_without_its_engine_there_is_no_route(source_format: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(converters.UnsupportedRouteError):
        converters.convert(Conversion(b"readable", source_format, target))


@pytest.mark.parametrize("target", ["jpg", "png", "webp", "pdf"])
def test_the_marker_looks_like_its_target(target: str) -> None:
    body = marked(target=target)
    assert converters.sniffed_format(body) == target
    assert PICTURE in body
    assert marked(b"other", target) != body


# ----------------------------------------------------------------------------------------------------------------------
# In the foreground
# ----------------------------------------------------------------------------------------------------------------------


def test_it_runs_in_the_foreground_and_counts_at_the_end() -> None:
    command = [sys.executable, "-m", "tests.standins.conversion_api", "--marking", "--latency", "0.01"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready, url, key = server.stdout.readline().split()
        headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "k"}
        for _ in range(2):
            parts: Parts = {"file": ("a.png", PICTURE), "target": (None, "jpg")}
            requests.post(f"{url}/v1/convert", files=parts, headers=headers, timeout=PATIENCE)
        server.send_signal(signal.SIGTERM)
        counts = json.loads(server.stdout.readline())
    assert ready == "READY"
    assert (counts["paid"], counts["requests"], counts["replays"], server.returncode) == (1, 2, 1, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_it_dies_with_its_parent() -> None:
    parent = (
        "import subprocess, sys, os, signal\n"
        "server = subprocess.Popen([sys.executable, '-m', 'tests.standins.conversion_api'], stdout=subprocess.PIPE)\n"
        "print(server.stdout.readline().split()[1].decode(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ran = subprocess.run([sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True, check=False)
    url = ran.stdout.strip()
    assert url.startswith("http://127.0.0.1:")
    # The kernel ends the server a moment after its parent: ask until nobody answers (pytest-timeout is the limit).
    with suppress(requests.ConnectionError):
        while requests.get(url, timeout=PATIENCE).status_code:
            pass
