"""An S3 that refuses or says otherwise: it relays everything to a real one, and changes what a test wants changed."""

import socket
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from requests.structures import CaseInsensitiveDict

from tests.standins.s3_server import S3Server

RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of no seconds: RST instead of FIN


@dataclass(frozen=True)
class Spoilt:
    """What becomes of one answer. All but `status` leave it as it is, up to where the connection ends."""

    status: int = 0  # an error with this status comes in its place
    is_cut: bool = False  # the connection ends in the middle of the body
    is_reset: bool = False  # the connection is reset before a byte of it
    is_unmeasured: bool = False  # no length is told: the end of the connection is the end of the body


@dataclass(frozen=True)
class Asked:
    """One request as it came in."""

    method: str
    path: str  # with its query
    headers: Mapping[str, str]  # names in whatever case

    @property
    def query(self) -> dict[str, str]:
        """What stands behind the `?`."""
        return dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))

    @property
    def key(self) -> str:
        """The key of the object that it is about; empty if it is about a bucket."""
        return unquote(urlsplit(self.path).path).removeprefix("/").partition("/")[2]

    @property
    def is_listing(self) -> bool:
        """Whether it asks for a page of keys."""
        return self.method == "GET" and self.query.get("list-type") == "2"


class Relay(ThreadingHTTPServer):
    """Stands before the S3 server, and keeps what it was `asked`.

    `refuse` may take a request's method and path, `rewrite` an answer's body; `instead` gives the body of a 200 that
    takes the place of S3's answer, or None; `spoil` says what becomes of the answer to a request, by method and path.
    `hidden`: headers, in lower case, that no answer to a HEAD has; `added`: headers that each answer to one has.
    """

    daemon_threads = True

    def __init__(self, s3: S3Server) -> None:
        super().__init__(("127.0.0.1", 0), Relayed)
        self.s3 = s3
        self.asked: list[Asked] = []
        self.refuse: Callable[[str, str], bool] = lambda *_: False
        self.refusal_status = 403
        self.refusal = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
        self.instead: Callable[[Asked], bytes | None] = lambda _: None
        self.rewrite: Callable[[bytes], bytes] = lambda body: body
        self.spoil: Callable[[str, str], Spoilt] = lambda *_: Spoilt()
        self.hidden: set[str] = set()
        self.added: dict[str, str] = {}

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def tell_one_time(self) -> None:
        """Let each answer to a HEAD say that its object was written in one and the same second."""
        self.hidden, self.added = {"last-modified"}, {"Last-Modified": "Fri, 02 Jan 2026 03:04:05 GMT"}

    def handle_error(self, *about: Any) -> None:
        """Say nothing of a connection that one side has broken."""
        if not isinstance(sys.exc_info()[1], OSError | ValueError):
            super().handle_error(*about)


class Relayed(BaseHTTPRequestHandler):
    """One request on its way. All headers are kept, Host among them, because they are signed."""

    protocol_version = "HTTP/1.1"
    server: Relay

    def relay(self) -> None:
        """Send the request on and the answer back, or refuse as S3 does when permission is missing."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = Asked(self.command, self.path, CaseInsensitiveDict(self.headers.items()))
        self.server.asked.append(asked)
        if self.server.refuse(self.command, self.path):
            self.answer(self.server.refusal_status, [], self.server.refusal)
            return
        instead = self.server.instead(asked)
        if instead is not None:
            self.answer(200, [("ETag", '"made-up"')], instead)
            return
        spoilt = self.server.spoil(self.command, self.path)
        if spoilt.status:
            self.answer(spoilt.status, [], b"<Error><Code>ServiceUnavailable</Code><Message>no</Message></Error>")
            return
        connection = self.server.s3.connection()
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        reply = connection.getresponse()
        self.answer(reply.status, reply.getheaders(), self.server.rewrite(reply.read()), spoilt)
        connection.close()

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, spoilt: Spoilt = Spoilt()) -> None:
        """Answer with the true length; that of a HEAD is the object's own."""
        self.close_connection |= spoilt.is_cut or spoilt.is_reset or spoilt.is_unmeasured
        if spoilt.is_reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            self.connection.close()
            return
        self.send_response(status)
        own = {"connection", "transfer-encoding"}
        own |= self.server.hidden if self.command == "HEAD" else {"content-length"}
        for name, value in headers:
            if name.lower() not in own:
                self.send_header(name, value)
        for name, value in self.server.added.items() if self.command == "HEAD" else ():
            self.send_header(name, value)
        if self.command != "HEAD" and not spoilt.is_unmeasured:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body[: len(body) // 2] if spoilt.is_cut else body)

    def __getattr__(self, name: str) -> Any:
        """Relay every method: the server asks for do_GET and so on."""
        if not name.startswith("do_"):
            raise AttributeError(name)
        return self.relay

    def log_message(self, *_: object) -> None:
        """Say nothing."""
