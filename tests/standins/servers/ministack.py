"""ministack's S3 for the tests, on 127.0.0.1.

    python -m tests.standins.servers.ministack DIRECTORY [PORT [CERTIFICATE]]    in the foreground, until SIGTERM

It has a virtual environment of its own, because it insists on another botocore.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

from tests.standins.s3_server import HOST, SECRET_KEY
from tests.standins.servers.packaged import ACCESS_KEY, Command, Packaged, serve


class Ministack(Packaged):
    """A running ministack, with its objects on the disk."""

    name = package = "ministack"
    module = "tests.standins.servers.ministack"
    lacks: ClassVar = {
        "secrets": "it checks the signatures of presigned URLs only",
        "strict tags": "its limits of tags were not compared with Amazon's",
        "tags of copies": "it drops those of a copy in parts",
        "regions": "it takes signatures for any region",
        "aws-chunked": "it takes the body of a PUT apart wherever its coding says so",
        "whole puts": "what is being put when it is killed is there without its metadata",
    }


def command(root: Path, port: int, certificate: str) -> Command:
    """What starts it."""
    environment = {
        "GATEWAY_PORT": str(port),
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "S3_PERSIST": "1",
        "S3_DATA_DIR": str(root / "data"),
        "TMPDIR": str(root),
        "LOG_LEVEL": "WARNING",
    }
    served = ["ministack.app:app", "--bind", f"{HOST}:{port}", "--keep-alive", "75", "--workers", "0"]
    tls = ["--certfile", certificate, "--keyfile", certificate] if certificate else []
    return Command([Ministack.installed(), "-m", "hypercorn", *served, *tls], environment)


if __name__ == "__main__":
    serve(Ministack.name, command, sys.argv[1:])
