"""An object in an archive is known by what a HEAD says of it."""

from collections.abc import Mapping
from datetime import datetime, timezone

import pytest
from botocore.stub import Stubber

import s3_bulk_convert as program
from tests.parts.test_looking import settings

RESTORED = 'ongoing-request="false", expiry-date="Fri, 21 Dec 2029 00:00:00 GMT"'


@pytest.mark.parametrize(
    ("said", "archived"),
    [
        ({"StorageClass": "GLACIER"}, True),
        ({"StorageClass": "DEEP_ARCHIVE", "Restore": 'ongoing-request="true"'}, True),
        ({"StorageClass": "GLACIER", "Restore": RESTORED}, False),
        ({"StorageClass": "INTELLIGENT_TIERING", "ArchiveStatus": "ARCHIVE_ACCESS"}, True),
        ({}, False),
    ],
)
def test_an_archived_object_is_known_by_its_head(
    *, said: Mapping[str, str], archived: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    bucket = program.Bucket(settings("s3.region=us-east-1"))
    head = {"ETag": '"e"', "ContentLength": 1, "LastModified": datetime.now(timezone.utc), "Metadata": {}, **said}
    with Stubber(bucket.client) as answers:
        answers.add_response("head_object", head)
        try:
            seen = bucket.look_at_source(program.SourceObject("k"))[0].version
        except program.ObjectSkipped as skipped:
            seen = str(skipped)
    assert seen == ("archived" if archived else "e")
