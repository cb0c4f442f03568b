"""The published recipe, written anew as a baseline: asyncio, httpx, and a boto3 client whose calls block the loop.

    python -m tests.bench.recipe convert BUCKET WORKERS API_URL     convert every object of the bucket
    python -m tests.bench.recipe list BUCKET                        boto3's paginator alone
    python -m tests.bench.recipe keep BUCKET                        the same, every key kept in a list

It prints what it did as one line of JSON. Its faults are the recipe's own: it lists everything first, makes a task for
each key, and stores results inside the coroutines; it has neither retries nor a checkpoint that outlives it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

TARGET = "jpg"
TIMEOUT_SECONDS = 120


def make_client() -> S3Client:
    """A boto3 client as most people make it, for the S3 that the environment names."""
    return boto3.client("s3", config=Config(s3={"addressing_style": "path"}))


def keys_of(bucket: str) -> Iterator[str]:
    """The keys of the bucket, as boto3's paginator gives them."""
    for page in make_client().get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for entry in page.get("Contents", []):
            yield entry["Key"]


class Conversions:
    """All conversions of a run."""

    def __init__(self, bucket: str, workers: int, api_url: str, http: Any) -> None:
        self._bucket, self._url, self._http = bucket, f"{api_url}/v1/convert", http
        self._s3 = make_client()
        self._semaphore = asyncio.Semaphore(workers)
        self.done: dict[str, str] = {}  # the checkpoint: source key -> output key

    async def convert(self, key: str) -> None:
        """Convert one object and store the result."""
        async with self._semaphore:
            if key in self.done:
                return
            source = self._s3.generate_presigned_url("get_object", Params={"Bucket": self._bucket, "Key": key})
            form = {"file_url": source, "target": TARGET}
            headers = {
                "Authorization": f"Bearer {os.environ['CTF_API_KEY']}",
                "Idempotency-Key": f"{key}:{TARGET}".replace(" ", "_")[:128],
            }
            response = await self._http.post(self._url, data=form, headers=headers)
            response.raise_for_status()
            output = f"converted/{key.rpartition('.')[0]}.{TARGET}"
            media_type = response.headers["Content-Type"]
            self._s3.put_object(Bucket=self._bucket, Key=output, Body=response.content, ContentType=media_type)
            self.done[key] = output


async def convert_all(bucket: str, workers: int, api_url: str) -> int:
    """Convert every object; the number of those that were converted."""
    httpx = import_module("httpx")
    keys = list(keys_of(bucket))
    limits = httpx.Limits(max_connections=workers, max_keepalive_connections=workers)
    async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS, limits=limits) as http:
        conversions = Conversions(bucket, workers, api_url, http)
        await asyncio.gather(*(conversions.convert(key) for key in keys))
    return len(conversions.done)


def main(arguments: list[str]) -> None:
    """Do what the command line says, and print what it came to."""
    started = time.monotonic()
    what, bucket, *rest = arguments
    if what == "convert":
        count = asyncio.run(convert_all(bucket, int(rest[0]), rest[1]))
    else:
        count = len(list(keys_of(bucket))) if what == "keep" else sum(1 for _ in keys_of(bucket))
    print(json.dumps({"objects": count, "seconds": round(time.monotonic() - started, 3)}))


if __name__ == "__main__":
    main(sys.argv[1:])
