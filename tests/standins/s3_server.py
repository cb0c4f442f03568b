"""A real S3 server for the tests and the demo: OpenStack Swift with its S3 API, on 127.0.0.1, in one process.

It checks signatures and their expiry, keeps its objects on disk, and needs neither root nor any service beside it.

    with S3Server() as server:
        server.client().create_bucket(Bucket="photos")

    python -m tests.standins.s3_server DIRECTORY [PORT [CERTIFICATE]]    in the foreground, until SIGTERM

CERTIFICATE is a PEM file with the private key in it: then the server speaks TLS. Others are in tests/standins/servers.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import gc
import http.client
import inspect
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn
from urllib.parse import urlsplit

import boto3
import trustme
from botocore.config import Config

from tests.standins.in_process_http import Connection, WsgiApp
from tests.standins.object_tags import teach_tags
from tests.standins.ports import reserved_port

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from typing_extensions import Self

HOST = "127.0.0.1"
REGION = "us-east-1"
ACCOUNT, USER = "test", "tester"
ACCESS_KEY = f"{ACCOUNT}:{USER}"  # Swift's own form; a colon is legal in S3 and shows who forgets to quote
SECRET_KEY = "testsecret12"

START_SECONDS = 60  # it takes one; a busy machine may need many
STOP_SECONDS = 10
BACKLOG = 1024  # connections not yet accepted: a refused one would look like a fault of the program under test
PARALLEL_REQUESTS = 4000  # the limit must never be met
PR_SET_PDEATHSIG = 1

PROJECT = Path(__file__).resolve().parents[2]
STORAGE_SERVERS = ("account", "container", "object")

# Amazon admits 2 KB of metadata in one object and keys of 1,024 bytes; Swift's own limit is 256 bytes for a value.
CONSTRAINTS = {"max_meta_value_length": 2048, "max_meta_overall_size": 4096, "max_object_name_length": 1024}

# The middleware of the proxy, outermost first: the order is the pipeline.
FILTERS: dict[str, dict[str, object]] = {
    "catch_errors": {},
    "gatekeeper": {},
    "healthcheck": {},
    "listing_formats": {},
    "bulk": {},
    "s3api": {"location": REGION, "s3_acl": "false", "min_segment_size": 5 * 1024**2, "max_upload_part_num": 10_000},
    "tempauth": {f"user_{ACCOUNT}_{USER}": f"{SECRET_KEY} .admin"},
    "copy": {},
    "slo": {"max_manifest_segments": 10_000, "max_manifest_size": 16 * 1024**2},
    "dlo": {},
    "versioned_writes": {"allow_versioned_writes": "true", "allow_object_versioning": "true"},
    "symlink": {},
}


########################################################################
# The server as a test sees it
########################################################################


class S3Server:
    """A running S3 server, from `with` or `start()` to `stop()`; its objects outlive a stop and a new start.

    This one is Swift; those in tests/standins/servers are kinds of it, which run another module.
    Call `start()` in a thread that lives as long as the server: Linux ends the server with the thread that started it.
    """

    name = "swift"
    module = "tests.standins.s3_server"  # run with directory, port and certificate; says READY and its address
    region = REGION
    access_key, secret_key = ACCESS_KEY, SECRET_KEY
    start_seconds: float = START_SECONDS
    stop_seconds: float = STOP_SECONDS
    is_external = False
    lacks: ClassVar[Mapping[str, str]] = {}  # what tests may need -> why this server cannot give it

    def __init__(self, directory: Path | None = None, port: int = 0, *, tls: bool = False) -> None:
        """`tls`: with a certificate that only those trust who are told of `ca_bundle`."""
        self.endpoint = ""
        self.ca_bundle = ""
        self._port, self._tls = port, tls
        self._session = boto3.session.Session()  # it keeps what it has read of S3, which takes a tenth of a second
        self._reservation: socket.socket | None = None  # of a port that is not given
        self._process: subprocess.Popen[str] | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if directory is None and not self.is_external:
            self._temporary = tempfile.TemporaryDirectory(prefix="s3-server-", ignore_cleanup_errors=True)
            directory = Path(self._temporary.name)
        self.directory = directory

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        if self._reservation:
            self._reservation.close()
        if self._temporary:
            self._temporary.cleanup()

    @classmethod
    def version(cls) -> str:
        """What it is, and which."""
        return f"OpenStack Swift {metadata.version('swift')}"

    @classmethod
    def missing(cls) -> str:
        """What is to be installed before it can start; empty if all is there."""
        return ""

    def start(self) -> None:
        """Start the server, on the port it had before if there was one, and return when it serves."""
        if self.directory is None or self._process:
            return
        if missing := self.missing():
            raise RuntimeError(missing)
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._port:
            self._reservation = reserved_port(HOST)
            self._port = self._reservation.getsockname()[1]
        log = self.directory / "server.log"  # a file, because a pipe that nobody reads would block the server
        command = [sys.executable, "-m", self.module, str(self.directory.resolve()), str(self._port)]
        if self._tls:
            command.append(str(self._certificate(self.directory.resolve())))
        with log.open("w") as stderr:
            process = subprocess.Popen(
                command, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        self._process = process
        try:
            self.endpoint = endpoint_of(process, log, self.start_seconds)
        except BaseException:
            self.stop()
            raise

    def _certificate(self, directory: Path) -> Path:
        """The server's certificate and key, made with the first start."""
        certificate, bundle = directory / "server.pem", directory / "ca.pem"
        if not certificate.exists():
            authority = trustme.CA()
            authority.cert_pem.write_to_path(str(bundle))
            authority.issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(str(certificate))
        self.ca_bundle = str(bundle)
        return certificate

    def stop(self) -> None:
        """Stop the server if it runs."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.communicate(timeout=self.stop_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()

    def kill(self) -> None:
        """End it as SIGKILL does, with all of its processes."""
        process, self._process = self._process, None
        if process:
            process.kill()
            process.communicate()  # to the end of its output, which is that of its last process

    @property
    def pid(self) -> int | None:
        """The server's process, None when it does not run."""
        return self._process.pid if self._process else None

    def client(self, *, secret_key: str | None = None) -> S3Client:
        """A boto3 client of this server, which threads may share; another `secret_key` makes one to be refused."""
        return self._session.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=secret_key or self.secret_key,
            verify=self.ca_bundle or None,
            config=Config(
                signature_version="s3v4",  # without it boto3 presigns for an endpoint like ours in the old way
                s3={"addressing_style": "path"},
                max_pool_connections=64,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def environment(self) -> dict[str, str]:
        """What a child process needs in its environment so that its boto3 finds this server and no other."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
            **({"AWS_CA_BUNDLE": self.ca_bundle} if self.ca_bundle else {}),
        }

    def connection(self) -> http.client.HTTPConnection:
        """A connection to it, for requests that go exactly as they are written."""
        there = urlsplit(self.endpoint)
        if there.scheme == "http":
            return http.client.HTTPConnection(there.netloc, timeout=30)
        context = ssl.create_default_context(cafile=self.ca_bundle or None)
        return http.client.HTTPSConnection(there.netloc, timeout=30, context=context)

    def new_bucket(self, client: S3Client) -> str:
        """The name of an empty bucket."""
        name = f"test-{uuid.uuid4().hex}"
        client.create_bucket(Bucket=name)
        return name

    def drop_bucket(self, client: S3Client, name: str) -> None:
        """Take a bucket back; nothing to do, because it goes with the server."""


def endpoint_of(process: subprocess.Popen[str], log: Path, seconds: float) -> str:
    """The address a starting server reports; if it ends or stays silent, a RuntimeError with its own words."""
    timer = threading.Timer(seconds, process.kill)  # ends the read below
    timer.start()
    try:
        line = process.stdout.readline() if process.stdout else ""
    finally:
        timer.cancel()
    if not line.startswith("READY "):
        raise RuntimeError(f"the S3 server did not start (it has {seconds} s); it said:\n{log.read_text()}")
    return line.split()[1]


########################################################################
# The server's files
########################################################################


def ini(sections: Mapping[str, Mapping[str, object]]) -> str:
    """The text of a configuration file."""
    lines: list[str] = []
    for name, options in sections.items():
        lines += [f"[{name}]", *(f"{option} = {value}" for option, value in options.items()), ""]
    return "\n".join(lines)


def swift_conf() -> str:
    """The file that all servers share. The hash decides where an object lies, so it must never change."""
    return ini(
        {
            "swift-hash": {"swift_hash_path_prefix": "p1", "swift_hash_path_suffix": "s1"},
            "storage-policy:0": {"name": "one", "default": "yes"},
            "swift-constraints": CONSTRAINTS,
        }
    )


def defaults(etc: Path) -> dict[str, object]:
    """What every server is told. The log's address stops Swift from looking for a syslog; see log_to_stderr."""
    return {"swift_dir": etc, "log_level": "ERROR", "log_udp_host": HOST, "log_udp_port": 9}


def storage_conf(kind: str, etc: Path) -> str:
    """The configuration of the account, container or object server."""
    root = etc.parent
    disk = {
        "devices": root / "data",
        "mount_check": "false",
        "fallocate_reserve": 0,  # an almost full disk is no reason to refuse a test
        "recon_cache_path": root / "run",
        "container_update_timeout": 10,
    }
    return ini(
        {
            "DEFAULT": defaults(etc) | disk,
            "pipeline:main": {"pipeline": f"{kind}-server"},
            f"app:{kind}-server": {"use": f"egg:swift#{kind}", "node_timeout": 30, "log_requests": "false"},
        }
    )


def proxy_conf(etc: Path) -> str:
    """The configuration of the proxy, which speaks S3."""
    proxy: dict[str, object] = {
        "use": "egg:swift#proxy",
        "allow_account_management": "true",
        "account_autocreate": "true",
        "node_timeout": 30,
        "recoverable_node_timeout": 30,
        "conn_timeout": 5,
    }
    filters = {f"filter:{name}": {"use": f"egg:swift#{name}", **options} for name, options in FILTERS.items()}
    return ini(
        {
            "DEFAULT": defaults(etc),
            "pipeline:main": {"pipeline": " ".join([*FILTERS, "proxy-server"])},
            "app:proxy-server": proxy,
            **filters,
        }
    )


def write_files(root: Path) -> Path:
    """Write the configuration below `root`, make the directories and return that of the configuration."""
    etc = root / "etc"
    for directory in (etc, root / "data" / "d1", root / "run"):
        directory.mkdir(parents=True, exist_ok=True)
    (etc / "swift.conf").write_text(swift_conf())
    for kind in STORAGE_SERVERS:
        (etc / f"{kind}-server.conf").write_text(storage_conf(kind, etc))
    (etc / "proxy-server.conf").write_text(proxy_conf(etc))
    return etc


def write_ring(kind: str, port: int, etc: Path) -> None:
    """Tell the proxy the port of a storage server; made anew at every start, because the ports are free ones."""
    builder = import_module("swift.common.ring").RingBuilder(8, 1, 1)
    address = {"ip": HOST, "port": port, "replication_ip": HOST, "replication_port": port}
    builder.add_dev({"region": 1, "zone": 1, "device": "d1", "weight": 100.0, "meta": "", **address})
    builder.rebalance(seed=1)
    builder.get_ring().save(str(etc / f"{kind}.ring.gz"))


########################################################################
# The server's process
########################################################################


class Cache:
    """What Swift asks of memcached. There is one process, so a dictionary is always coherent."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[float, str]] = {}

    def get(self, key: str, **_: object) -> object:
        """The value, or None when there is none or its time is over."""
        expires, text = self._entries.get(key, (0.0, "null"))
        return json.loads(text) if not expires or monotonic() < expires else None

    def set(self, key: str, value: object, time: float = 0, **_: object) -> None:
        """Keep a value for `time` seconds, 0 for ever; as text, because the caller may go on to change his own."""
        self._entries[key] = (monotonic() + time if time else 0.0, json.dumps(value))

    def delete(self, key: str, **_: object) -> None:
        """Forget a value."""
        self._entries.pop(key, None)

    def incr(self, key: str, delta: int = 1, time: float = 0, **_: object) -> int:
        """Add to a number and return it; like memcached it never falls below 0."""
        old = self.get(key)
        number = max(0, (old if isinstance(old, int) else 0) + int(delta))
        self.set(key, number, time)
        return number

    def decr(self, key: str, delta: int = 1, time: float = 0, **_: object) -> int:
        """Take from a number and return it."""
        return self.incr(key, -int(delta), time)


def with_cache(app: WsgiApp) -> WsgiApp:
    """The proxy, finding in every request the cache it cannot do without."""
    cache = Cache()

    def call(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        environ["swift.cache"] = cache
        return app(environ, start_response)

    return call


def refuse_disk_without_attributes(root: Path) -> None:
    """Swift keeps names and metadata in extended attributes: say so here, not in a 507 to the first request."""
    if sys.platform != "linux":
        return  # Python has the call on Linux only; elsewhere the first request will tell
    try:
        os.setxattr(root, "user.s3-server", b"1")
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        raise SystemExit(f"{root}: no extended attributes on this file system; set TMPDIR to another") from error


def end_with_parent() -> None:
    """Have the kernel end this process with its parent, so that a killed test leaves nothing running."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call above
        raise SystemExit("the parent process has ended")


def end_on_signals() -> None:
    """End at once: an object is either renamed into place or absent, so there is nothing to finish."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))


def log_to_stderr() -> None:
    """Send what Swift meant for a syslog to stderr, which the starting process keeps."""
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and logger.handlers:
            logger.handlers[:] = [logging.StreamHandler()]


def serve(root: Path, port: int, certificate: str) -> NoReturn:
    """Run the three storage servers and the proxy as green threads of this process."""
    etc = write_files(root)
    make_threads_green(etc)
    work_names_out_once()
    spare_the_disk()
    teach_tags()
    eventlet = import_module("eventlet")
    listener = eventlet.listen((HOST, port), backlog=BACKLOG, reuse_port=False)
    # What it accepts inherits this: an answer in two pieces would wait 40 ms for the first one to be acknowledged.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    port = listener.getsockname()[1]
    tls: dict[str, object] = {"server_side": True, "certfile": certificate, "keyfile": certificate}
    spawn_proxy(eventlet.wrap_ssl(listener, **tls) if certificate else listener, etc)
    log_to_stderr()
    # A request leaves little garbage, and Python would look through all of Swift for it again and again.
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    print(f"READY {'https' if certificate else 'http'}://{HOST}:{port}", flush=True)
    while True:
        eventlet.sleep(3600)


def make_threads_green(etc: Path) -> None:
    """Prepare the process for Swift, before anything else of Swift is imported: that is why no import is on top.

    Its limits are read while `swift.common.constraints` is imported, and a lock made too early is never green.
    """
    utils = import_module("swift.common.utils")
    utils.set_swift_dir(str(etc))
    utils.monkey_patch()


def work_names_out_once() -> None:
    """Let Swift keep the names of methods and the forms of those of headers, which it works out in each request."""
    swob: Any = import_module("swift.common.swob")
    keys = import_module("swift.common.header_key_dict").HeaderKeyDict
    controller = import_module("swift.proxy.controllers.base").Controller
    swob.header_to_environ_key = cache(swob.header_to_environ_key)
    keys._title = staticmethod(cache(keys._title))
    controller.allowed_methods = property(lambda self: methods_with(self.__class__, "publicly_accessible"))
    controller.private_methods = property(lambda self: methods_with(self.__class__, "privately_accessible"))


@cache
def methods_with(owner: type, mark: str) -> frozenset[str]:
    """The names of a class's methods that have a mark."""
    return frozenset(name for name, method in inspect.getmembers(owner, callable) if getattr(method, mark, False))


def spare_the_disk() -> None:
    """Hand what is written to the kernel and not on to the disk: the end of the process loses nothing of it.

    Then no call takes long enough to be worth another thread.
    """
    for name in ("fsync", "fdatasync"):
        setattr(os, name, lambda _: None)
    threads: Any = import_module("eventlet.tpool")
    threads.execute = lambda call, *given, **named: call(*given, **named)
    databases: Any = import_module("swift.common.db")
    connect = databases.get_db_connection

    def connect_quickly(*given: Any, **named: Any) -> Any:
        connection = connect(*given, **named)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    databases.get_db_connection = connect_quickly


def load_server(kind: str, etc: Path) -> WsgiApp:
    """One of Swift's servers."""
    load = import_module("swift.common.wsgi").loadapp
    return load(str(etc / f"{kind}-server.conf"), global_conf={"log_name": f"{kind}-server"})  # type: ignore[no-any-return]


def spawn_proxy(listener: socket.socket, etc: Path) -> None:
    """Start the proxy on a socket, as a green thread; it finds the storage servers in this process."""
    connections: Any = import_module("swift.common.bufferedhttp")
    connections.BufferedHTTPConnection = Connection
    for port, kind in enumerate(STORAGE_SERVERS, 1):
        write_ring(kind, port, etc)
        Connection.servers[f"{HOST}:{port}"] = load_server(kind, etc)
    eventlet = import_module("eventlet")
    options = {
        "protocol": import_module("swift.common.wsgi").SwiftHttpProtocol,
        "custom_pool": eventlet.GreenPool(PARALLEL_REQUESTS),
        "socket_timeout": 120,
        "log_output": False,
        "capitalize_response_headers": False,  # Swift's are in the case that S3 has
    }
    eventlet.spawn(import_module("eventlet.wsgi").server, listener, with_cache(load_server("proxy", etc)), **options)


def main(arguments: list[str]) -> NoReturn:
    """Serve the directory that the command line names, until a signal comes."""
    parser = argparse.ArgumentParser(
        "python -m tests.standins.s3_server", description="an S3 server for tests, on 127.0.0.1"
    )
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="where it keeps its buckets")
    parser.add_argument("port", metavar="PORT", type=int, nargs="?", default=0, help="default: any free one")
    parser.add_argument("certificate", metavar="CERTIFICATE", nargs="?", default="", help="for TLS, with its key")
    given = parser.parse_args(arguments)
    end_with_parent()
    end_on_signals()
    os.environ.setdefault("EVENTLET_NO_GREENDNS", "yes")  # names are never looked up here; saves a start-up import
    root = given.directory.resolve()
    root.mkdir(parents=True, exist_ok=True)
    refuse_disk_without_attributes(root)
    serve(root, given.port, given.certificate)


if __name__ == "__main__":
    main(sys.argv[1:])
