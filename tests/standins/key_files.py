"""Files that name keys, as people and S3 Inventory write them."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

SOURCE = "bucket"
DATE = "2026-11-24T01:00:00.000Z"
SCHEMA = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag, StorageClass"


def write(path: Path, content: str | bytes) -> Path:
    """Write a file, as gz where its name says so."""
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def inventory_rows(rows: Iterable[Sequence[str]]) -> str:
    """Rows as S3 Inventory writes them: all quoted, keys URL-encoded with + for a space."""
    written = io.StringIO()
    csv.writer(written, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return written.getvalue()


def full_row(key: str, latest: str = "true", deleted: str = "false", storage: str = "STANDARD") -> list[str]:
    """A row with all columns of SCHEMA."""
    return [SOURCE, quote_plus(key, safe="/"), "v1", latest, deleted, "7", DATE, "e1", storage]


def write_manifest(root: Path, rows: Iterable[Sequence[str]], **changes: Any) -> Path:
    """An inventory of one data file below `root` as S3 lays it out."""
    packed = write(root / "inv/bucket/daily/data/1.csv.gz", inventory_rows(rows)).read_bytes()
    part = {
        "key": "inv/bucket/daily/data/1.csv.gz",
        "size": len(packed),
        "MD5checksum": hashlib.md5(packed).hexdigest(),
    }
    manifest = {
        "sourceBucket": SOURCE,
        "destinationBucket": "arn:aws:s3:::inventories",
        "version": "2016-11-30",
        "creationTimestamp": "1790000000000",
        "fileFormat": "CSV",
        "fileSchema": SCHEMA,
        "files": [part],
        **changes,
    }
    return write(root / "inv/bucket/daily/2026-11-24T01-00Z/manifest.json", json.dumps(manifest, indent=2))
