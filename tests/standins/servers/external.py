"""An S3 that somebody has an account of, for the tests: S3_TEST_ENDPOINT, S3_TEST_KEY and S3_TEST_SECRET name it.

The tests make buckets and delete them again. With S3_TEST_BUCKET they use that one, and EMPTY it before each test.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tests.standins.s3_server import REGION, S3Server

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NEEDED = ("S3_TEST_ENDPOINT", "S3_TEST_KEY", "S3_TEST_SECRET")


class External(S3Server):
    """A server that runs already and goes on running; it has all the names and keys from the environment."""

    name = "external"
    is_external = True
    lacks: ClassVar = {
        "restart": "it is not ours to stop",
        **({"other_bucket": "S3_TEST_BUCKET names only one"} if os.environ.get("S3_TEST_BUCKET") else {}),
    }

    def __init__(self, directory: Path | None = None, port: int = 0, *, tls: bool = False) -> None:
        super().__init__(directory, port, tls=tls)
        self.endpoint, self.access_key, self.secret_key = (os.environ.get(name, "") for name in NEEDED)
        self.region = os.environ.get("S3_TEST_REGION", REGION)
        self.only_bucket = os.environ.get("S3_TEST_BUCKET", "")

    @classmethod
    def version(cls) -> str:
        """Its address is all that is known of it."""
        return os.environ.get("S3_TEST_ENDPOINT", "")

    @classmethod
    def missing(cls) -> str:
        """What is to be set."""
        missing = [name for name in NEEDED if not os.environ.get(name)]
        return f"{', '.join(missing)}: not set; see docs/internals.md" if missing else ""

    def start(self) -> None:
        """Nothing: it runs."""
        if missing := self.missing():
            raise RuntimeError(missing)

    def new_bucket(self, client: S3Client) -> str:
        """The name of an empty bucket: of a new one, or of the only one that may be used, which is emptied."""
        if not self.only_bucket:
            return super().new_bucket(client)
        empty(client, self.only_bucket)
        return self.only_bucket

    def drop_bucket(self, client: S3Client, name: str) -> None:
        """Leave nothing behind."""
        empty(client, name)
        if not self.only_bucket:
            client.delete_bucket(Bucket=name)


def empty(client: S3Client, bucket: str) -> None:
    """Delete all objects of a bucket."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for found in page.get("Contents", []):
            client.delete_object(Bucket=bucket, Key=found["Key"])
