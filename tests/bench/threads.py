"""A peer such as people write: boto3's paginator, a bounded pool of threads, a Session each, put_object; no journal.

python -m tests.bench.threads BUCKET WORKERS API_URL [--skip-existing]     the last looks for the output first (HEAD)
"""

import json
import os
import sys
import threading
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import boto3
import requests
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from requests.adapters import HTTPAdapter
from urllib3 import Retry

BUCKET, WORKERS, API_URL = sys.argv[1], int(sys.argv[2]), sys.argv[3]
S3 = boto3.client("s3", config=Config(s3={"addressing_style": "path"}, max_pool_connections=WORKERS))
RETRY = Retry(5, backoff_factor=1, status_forcelist=(429, 502, 503, 504), allowed_methods=None)
LOCAL = threading.local()


def make_session() -> None:
    """Give this thread its Session."""
    LOCAL.session = requests.Session()
    LOCAL.session.mount(API_URL, HTTPAdapter(max_retries=RETRY))
    LOCAL.session.headers["Authorization"] = f"Bearer {os.environ['CTF_API_KEY']}"


def convert(key: str, etag: str) -> str:
    """Convert one object and store the result; what became of it."""
    output = f"converted/{key.rpartition('.')[0]}.jpg"
    try:
        if "--skip-existing" in sys.argv and is_there(output):
            return "skipped"
        url = S3.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key})
        headers, form = {"Idempotency-Key": f"{etag.strip(chr(34))}-jpg"}, {"file_url": url, "target": "jpg"}
        reply = LOCAL.session.post(f"{API_URL}/v1/convert", data=form, headers=headers, timeout=120)
        reply.raise_for_status()
        S3.put_object(Bucket=BUCKET, Key=output, Body=reply.content, ContentType=reply.headers["Content-Type"])
    except (requests.RequestException, BotoCoreError, ClientError) as error:
        print(f"{key}: {error}", file=sys.stderr)
        return "failed"
    return "converted"


def is_there(key: str) -> bool:
    """Whether the bucket has the object. Raises ClientError if S3 does not say."""
    try:
        return bool(S3.head_object(Bucket=BUCKET, Key=key))
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
        return False


def convert_all() -> Counter[str]:
    """Convert every object of the bucket, with two futures for each worker at the most."""
    counts, pending = Counter[str](), set[Future[str]]()
    with ThreadPoolExecutor(WORKERS, initializer=make_session) as pool:
        pages = S3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        for entry in (entry for page in pages for entry in page.get("Contents", [])):
            pending.add(pool.submit(convert, entry["Key"], entry["ETag"]))
            if len(pending) == 2 * WORKERS:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                counts.update(future.result() for future in done)
        counts.update(future.result() for future in pending)
    return counts


if __name__ == "__main__":
    found = convert_all()
    print(json.dumps(found))
    raise SystemExit(1 if found["failed"] else 0)
