"""Fixtures: the real S3 server, a bucket in it, and the strict stand-in of the API. Tools only, no assertions."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.conversion_api import ConversionApi
from tests.s3_server import S3Server

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

NUMBERS = itertools.count(1)


@dataclass(frozen=True)
class TestBucket:
    """A bucket of a test's own."""

    __test__ = False
    name: str
    client: "S3Client"

    def put(self, key: str, body: bytes) -> None:
        """Put one object."""
        self.client.put_object(Bucket=self.name, Key=key, Body=body)

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin so."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def outputs(self, prefix: str = "converted/") -> dict[str, tuple[bytes, str, dict[str, str]]]:
        """Key -> body, media type and metadata of what lies below the output prefix."""
        found = {}
        for key in self.keys(prefix):
            reply = self.client.get_object(Bucket=self.name, Key=key)
            found[key] = (reply["Body"].read(), reply["ContentType"], reply["Metadata"])
        return found


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 server."""
    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server) -> TestBucket:
    """An empty bucket."""
    created = TestBucket(f"test-{next(NUMBERS)}", s3.client())
    created.client.create_bucket(Bucket=created.name)
    return created


@pytest.fixture
def api() -> Iterator[ConversionApi]:
    """A fresh stand-in of the API."""
    with ConversionApi() as server:
        yield server
