"""The kinds of S3 servers, by the names that `pytest --s3` takes."""

from __future__ import annotations

from tests.s3_server import S3Server
from tests.servers.ceph import Ceph
from tests.servers.external import External
from tests.servers.ministack import Ministack

KINDS: dict[str, type[S3Server]] = {kind.name: kind for kind in (S3Server, Ceph, Ministack, External)}
