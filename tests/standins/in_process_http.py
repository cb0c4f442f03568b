"""Requests from one Swift server to another of the same process, without sockets: half of what a request costs.

What Swift sends and receives is the same: the proxy calls the storage servers by `http_connect`, which makes a
connection of this kind; a storage server finds eventlet's own input, so that it answers `100 Continue` as over HTTP.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any, ClassVar
from urllib.parse import unquote

WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

WAITING_PARTS = 16  # of a body, sent and not yet read: the sender of more waits


class Parts(io.RawIOBase):
    """A file that reads some parts one after the other."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts, self._part = iter(parts), b""
        self._close: Callable[[], object] = getattr(parts, "close", lambda: None)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what fits of the next part that is not empty; 0 is the end."""
        while not self._part:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._part = part
        size = min(len(buffer), len(self._part))
        buffer[:size], self._part = self._part[:size], self._part[size:]
        return size

    def close(self) -> None:
        """Let go of what makes the parts."""
        self._close()
        super().close()


class Response:
    """What Swift uses of `http.client.HTTPResponse`."""

    def __init__(self, status: str, headers: Iterable[tuple[str, str]], parts: Iterable[bytes]) -> None:
        number, _, self.reason = status.partition(" ")
        self.status = int(number)
        self._headers = [(name, str(value)) for name, value in headers]
        self._body = io.BufferedReader(Parts(parts))
        self.read, self.readline = self._body.read, self._body.readline
        self.close = self.nuke_from_orbit = self._body.close

    def getheaders(self) -> list[tuple[str, str]]:
        """All of them."""
        return self._headers

    def getheader(self, wanted: str, default: object = None) -> object:
        """The value of one."""
        return next((value for name, value in self._headers if name.lower() == wanted.lower()), default)


class Connection:
    """What Swift uses of `http.client.HTTPConnection`; the request is served in a green thread of its own."""

    servers: ClassVar[dict[str, WsgiApp]] = {}  # by the address that the ring has

    def __init__(self, address: str) -> None:
        queue = import_module("eventlet.queue").LightQueue
        self._address, self._sent, self._responses = address, queue(WAITING_PARTS), queue()
        self._environ: dict[str, Any] = {}
        self._is_over = False

    def putrequest(self, method: str, url: str, **_: object) -> None:
        """Begin a request."""
        path, query = url.partition("?")[::2]
        host, port = self._address.split(":")
        self._environ = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "RAW_PATH_INFO": path,
            "PATH_INFO": unquote(path, encoding="latin-1"),
            "QUERY_STRING": query,
            "CONTENT_TYPE": "",
            "SERVER_PROTOCOL": "HTTP/1.0",
            "SERVER_NAME": host,
            "SERVER_PORT": port,
            "REMOTE_ADDR": host,
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }

    def putheader(self, name: str, value: str) -> None:
        """Give the request a header."""
        key = name.upper().replace("-", "_")
        self._environ[key if key in {"CONTENT_TYPE", "CONTENT_LENGTH"} else f"HTTP_{key}"] = value.strip(" \t\r\n")

    def endheaders(self) -> None:
        """Let it be served."""
        environ, is_chunked = self._environ, self._environ.get("HTTP_TRANSFER_ENCODING", "").lower() == "chunked"
        length = None if is_chunked else environ.get("CONTENT_LENGTH") or "0"
        waiter = self if environ.get("HTTP_EXPECT", "").lower() == "100-continue" else None
        environ["wsgi.input"] = import_module("eventlet.wsgi").Input(
            io.BufferedReader(Parts(self._received())), length, None, waiter, b"100 Continue\r\n", is_chunked
        )
        import_module("eventlet").spawn_n(self._serve)

    def send(self, part: bytes) -> None:
        """Send a part of the body."""
        if self._is_over:
            raise BrokenPipeError("the request is answered, or closed")
        self._sent.put(part)

    def getexpect(self) -> Response:
        """The next response, which may be a 100."""
        return self._responses.get()  # type: ignore[no-any-return]

    def getresponse(self) -> Response:
        """The response."""
        while (response := self.getexpect()).status == 100:
            pass
        return response

    def close(self) -> None:
        """Send nothing more."""
        if not self._is_over:
            self._is_over = True
            self._sent.resize(None)
            self._sent.put(b"")

    def writelines(self, lines: list[bytes]) -> None:
        """As the file to which eventlet's input writes a 100: the status, headers and an empty line."""
        status, *headers = [line.decode("latin-1").strip() for line in lines[:-1]]
        split = [header.partition(":") for header in headers]
        self._responses.put(Response(status, [(name, value.strip()) for name, _, value in split], ()))

    def flush(self) -> None:
        """Nothing is kept back."""

    def _received(self) -> Iterator[bytes]:
        while part := self._sent.get():
            yield part

    def _serve(self) -> None:
        started: list[Any] = []
        try:
            parts = self.servers[self._address](self._environ, lambda *given: started.extend(given))
            self._responses.put(Response(started[0], started[1], parts))
        except Exception:
            self._responses.put(Response("500 Internal Server Error", (), ()))
            raise
        finally:
            self.close()
