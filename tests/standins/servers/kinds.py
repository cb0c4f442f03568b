"""The kinds of S3 servers, by the names that `pytest --s3` takes."""

from __future__ import annotations

from tests.standins.s3_server import S3Server
from tests.standins.servers.ceph import Ceph
from tests.standins.servers.external import External
from tests.standins.servers.localstack import Localstack
from tests.standins.servers.ministack import Ministack
from tests.standins.servers.moto import Moto
from tests.standins.servers.s3rver import S3rver

KINDS: dict[str, type[S3Server]] = {
    kind.name: kind for kind in (S3Server, Ceph, Ministack, Moto, Localstack, S3rver, External)
}
