"""Listings and files of keys: no key is lost or taken twice, wherever a page ends and wherever a listing is cut.

A page may hold fewer keys than were asked for, or none at all, and S3 says so without being asked.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import marking
from tests.standins.pages import SmallPages
from tests.standins.program import lose_checkpoint
from tests.standins.promises import PNG, fill
from tests.standins.relay import Relay
from tests.standins.s3_server import S3Server

Cli = Callable[..., Any]
FOLDERS = 8
KEYS_IN_A_PAGE = 2
# Longer than a page takes that a reader need not wait for: then several are read at a time.
SECONDS_FOR_A_PAGE = 0.04


def put_folders(bucket: Any) -> int:
    """Folders with as many files as go into a page, and empty objects called as the folders are, but the first.

    A listing is cut first between the first folder and the next: there one key lies at the very cut, and the page
    before it ends just there. The files have the target format already: to list them is all that there is to do.
    How many objects.
    """
    for folder in range(FOLDERS):
        for number in range(KEYS_IN_A_PAGE):
            bucket.put(f"{folder:02}/{number}.jpg", b"a picture")
        if folder:
            bucket.put(f"{folder:02}", b"")
    return FOLDERS * (KEYS_IN_A_PAGE + 1) - 1


@pytest.mark.needs("pages")
@pytest.mark.parametrize("empty", [0, 3], ids=["full pages", "empty pages among them"])
def test_every_key_is_listed_once_though_many_pages_are_read_at_a_time(
    empty: int, run_cli: Cli, bucket: Any, relay: Relay, s3: S3Server
) -> None:
    count = put_folders(bucket)
    relay.instead = SmallPages(s3, KEYS_IN_A_PAGE, seconds=SECONDS_FOR_A_PAGE, empty=empty)
    run = run_cli("-q", AWS_ENDPOINT_URL_S3=relay.url)
    expected = {"empty": FOLDERS - 1, "same_format": FOLDERS * KEYS_IN_A_PAGE}
    assert (run.exit_code, run.summary["listed"], run.summary["skipped"]) == (0, count, expected)


@pytest.mark.needs("pages")
def test_an_output_at_the_very_end_of_a_page_is_found(
    *, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, s3: S3Server, tmp_path: Path
) -> None:
    api.behaviour.convert = marking
    expected = fill(bucket, 2 * KEYS_IN_A_PAGE)
    relay.instead = SmallPages(s3, KEYS_IN_A_PAGE)
    assert run_cli(AWS_ENDPOINT_URL_S3=relay.url).summary["converted"] == len(expected)
    lose_checkpoint(tmp_path / "work")
    run = run_cli(AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["already_done"], run.summary["converted"]) == (0, len(expected), 0)
    assert (len(api.paid), api.paid_twice()) == (len(expected), [])


def test_a_key_that_a_file_names_again_and_again_is_taken_once(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    api.behaviour.convert = marking
    bucket.put("a.png", PNG)
    (tmp_path / "keys").write_text("a.png\n" * 2_500)  # more lines than are read at once
    run = run_cli("--keys-from", str(tmp_path / "keys"))
    assert (run.exit_code, run.summary["listed"], run.summary["converted"]) == (0, 1, 1)
    assert len(api.paid) == len(api.requests) == 1
