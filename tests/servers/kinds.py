"""The kinds of S3 servers, by the names that `pytest --s3` takes."""

from __future__ import annotations

import os

from tests.s3_server import S3Server
from tests.servers.ceph import Ceph
from tests.servers.external import External
from tests.servers.ministack import Ministack

KINDS: dict[str, type[S3Server]] = {kind.name: kind for kind in (S3Server, Ceph, Ministack, External)}


def kind_of(name: str | None) -> type[S3Server]:
    """The kind of a name; without one, the server that the environment names, or Swift."""
    return KINDS[name or ("external" if os.environ.get("S3_TEST_ENDPOINT") else "swift")]
