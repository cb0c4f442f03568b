"""A worker process and the pipe to it: what its parent tells it is not told back."""

from __future__ import annotations

import pytest

import s3_bulk_convert as program
from tests.standins.s3_server import S3Server


def test_a_stop_that_comes_from_the_parent_is_not_told_back(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    given = {"S3_BUCKET": "bucket", "TARGET_FORMAT": "jpg", "CTF_API_KEY": "ctf_sk_1"}
    settings = program.load_settings(None, given, [])
    with program.running_process(settings, 1) as (_, connection):
        connection.send(program.RunError("enough", ""))
        connection.send(None)
        # Until it has left, it says how many requests it has sent and how long nobody may send.
        told = list(iter(connection.recv, None))
    assert {type(message) for message in told} <= {program.Pace}
