"""A network for tests that goes wrong when told to: a TCP proxy on 127.0.0.1 in front of a server.

    with TcpProxy(api.url) as network:
        network.faults.append(Fault(Does.RESET, on=rb"^POST ", way="down"))    # charged, and not a byte of the answer
        ...                                                                    # run a client against network.url
        assert network.faults[0].struck == 1

With `tls` it ends TLS with a certificate of a PrivateCa: the server behind is reached by https://localhost:PORT. The
`Host` header is passed on as the client has sent (and signed) it. A ForwardProxy is what HTTPS_PROXY and HTTP_PROXY
name.

No packet is lost on loopback. An application knows loss by two things only: bursts of delay, each as long as a
retransmission takes (`Weather.loss`), and, when TCP gives up, a connection that is reset or silent (RESET, VANISH).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import ssl
import struct
import threading
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

import trustme

from tests.standins.ports import reserved_port

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = "127.0.0.1"
PIECE_BYTES = 65_536
HEAD_BYTES = 65_536
RETRANSMISSION_SECONDS = 0.2  # Linux' least; it doubles each time
FLUSH_SECONDS = 1
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of no seconds: RST instead of FIN

T = TypeVar("T")
Way = Literal["up", "down"]  # from client to server, and back


class Does(Enum):
    """What a fault does to its connection."""

    RESET = auto()  # RST to both sides
    CLOSE = auto()  # an orderly end, to both sides
    VANISH = auto()  # half-open: everything is swallowed, nothing answered, nothing closed
    STALL = auto()  # nothing more is read or passed on, nothing closed
    NOTHING = auto()  # it is only counted


@dataclass(eq=False)
class Fault:
    """What happens to `times` connections, or always (None).

    It strikes when `after` bytes have passed in its way and another one comes. They are counted from the piece in which
    the client sends `on` (with HTTP, the head of a request); without `on`, from the connection's beginning, and a fault
    with nothing at all to wait for strikes when the connection is made.
    """

    does: Does
    on: bytes = b""
    way: Way = "up"
    after: int = 0
    times: int | None = 1
    armed: int = 0  # connections that it waits for, or has waited for
    struck: int = 0
    reached: threading.Event = field(default_factory=threading.Event)  # set when it first does

    def is_meant_by(self, piece: bytes) -> bool:
        """Whether it is this piece's turn; an empty one is the connection itself."""
        is_left = self.times is None or self.armed < self.times
        return is_left and (re.search(self.on, piece) is not None if self.on else not piece)

    def strike(self) -> None:
        """Count it."""
        self.struck += 1
        self.reached.set()


@dataclass
class Weather:
    """How a way is while nothing strikes. Each piece of at most 64 KB waits, and the next one behind it."""

    delay: float = 0.0  # seconds
    jitter: float = 0.0  # seconds more, at the most
    bytes_per_second: float | None = None
    loss: float = 0.0  # share of pieces that wait for a retransmission

    def seconds_for(self, piece: bytes, chance: random.Random) -> float:
        """How long a piece is on its way."""
        seconds = self.delay + self.jitter * chance.random()
        seconds += len(piece) / self.bytes_per_second if self.bytes_per_second else 0.0
        retransmission = RETRANSMISSION_SECONDS
        while chance.random() < self.loss:
            seconds, retransmission = seconds + retransmission, retransmission * 2
        return seconds


class Stream:
    """One side of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._socket = writer.get_extra_info("socket")  # now, because a transport that is closed has none

    def reset(self) -> None:
        """End it with RST."""
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.writer.transport.abort()

    async def end(self) -> None:
        """End it in good order: what was written arrives."""
        self.writer.close()
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self.writer.wait_closed(), FLUSH_SECONDS)
        self.writer.transport.abort()


class Connection:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, proxy: TcpProxy, client: Stream, server: Stream) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._fault: Fault | None = None
        self._passed: dict[Way, int] = {"up": 0, "down": 0}
        self.has_vanished = False

    async def carry(self) -> None:
        """Pass everything on, until one side ends."""
        self._arm(b"")
        if self._fault and self._fault.way == "up" and not self._fault.after:
            await self._strike(self._fault)
        ways = [
            asyncio.create_task(self._pass_on("up", self._client.reader, self._server.writer)),
            asyncio.create_task(self._pass_on("down", self._server.reader, self._client.writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(self._client.end(), self._server.end())

    def reset(self) -> None:
        """End both sides with RST."""
        self._client.reset()
        self._server.reset()

    async def _pass_on(self, way: Way, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):  # one side is gone, so both are
            while piece := await source.read(PIECE_BYTES):
                if way == "up":
                    self._arm(piece)
                await asyncio.sleep(self._proxy.seconds_for(way, piece))
                passed = self._passing(way, piece)
                if not self.has_vanished:
                    change = self._proxy.rewritten if way == "up" else self._proxy.retold
                    sink.write(change(piece[:passed]))
                    await sink.drain()
                if passed < len(piece) and self._fault:
                    await self._strike(self._fault)

    def _arm(self, piece: bytes) -> None:
        for fault in [fault for fault in self._proxy.faults if fault.is_meant_by(piece)]:
            fault.armed += 1
            if fault.does is not Does.NOTHING:
                self._fault, self._passed = fault, {"up": 0, "down": 0}
                return
            fault.strike()

    def _passing(self, way: Way, piece: bytes) -> int:
        """How many bytes of a piece arrive."""
        if not self._fault or self._fault.way != way:
            return len(piece)
        left = self._fault.after - self._passed[way]
        self._passed[way] += len(piece)
        return min(left, len(piece))

    async def _strike(self, fault: Fault) -> None:
        self._fault = None
        fault.strike()
        if fault.does is Does.RESET:
            self.reset()
        elif fault.does is Does.VANISH:
            self.has_vanished = True
        elif fault.does is Does.STALL:
            await asyncio.Event().wait()  # until the connection ends
        else:
            self._client.writer.close()


class TcpProxy:
    """A network between clients and one server, from `with` to its end. Everything may be changed while it runs."""

    def __init__(self, target: str, tls: ssl.SSLContext | None = None, host: str = HOST) -> None:
        """`target`: the server's URL, of which host and port are used; `host`: the address to listen on."""
        address = urlsplit(target)
        self._server_address = address.hostname or HOST, address.port or 80
        self._tls, self._host = tls, host
        self._reservation = reserved_port(host)
        self.port: int = self._reservation.getsockname()[1]
        self.faults: list[Fault] = []  # the first that is meant strikes
        self.up, self.down = Weather(), Weather()
        self.connections = 0  # that were made, in all
        self._open: set[Connection] = set()
        self._chance = random.Random(1)  # only in the loop's thread
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda *_: None)  # a handshake that fails is the client's to tell
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        """Where clients find the server. The certificate is for the name."""
        return f"https://localhost:{self.port}" if self._tls else f"http://{self._host}:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reservation.close()

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Refuse new connections, as a machine does on which no server listens."""
        self._do(self._stop_listening())
        yield
        self._do(self._listen())

    def reset_all(self) -> None:
        """Reset the connections that are open now."""
        self._do(self._for_all(Connection.reset))

    def vanish_all(self) -> None:
        """Be gone for the connections that are open now: they stay open, and nothing answers any more."""

        def vanish(connection: Connection) -> None:
            connection.has_vanished = True

        self._do(self._for_all(vanish))

    def seconds_for(self, way: Way, piece: bytes) -> float:
        """How long a piece is on its way."""
        return (self.up if way == "up" else self.down).seconds_for(piece, self._chance)

    def rewritten(self, piece: bytes) -> bytes:
        """What the server gets of a piece."""
        return piece

    def retold(self, piece: bytes) -> bytes:
        """What the client gets of a piece."""
        return piece

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _for_all(self, act: Any) -> None:
        for connection in self._open:
            act(connection)

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._accepted, self._host, self.port, ssl=self._tls, backlog=1024)

    async def _stop_listening(self) -> None:
        self._listener.close()

    async def _end(self) -> None:
        await self._stop_listening()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await self._for_all(Connection.reset)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        client = Stream(reader, writer)
        try:
            server = await self._reach_server(client)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            client.reset()
            return
        if server:
            connection = Connection(self, client, server)
            self._open.add(connection)
            try:
                await connection.carry()
            finally:
                self._open.discard(connection)

    async def _reach_server(self, client: Stream) -> Stream | None:
        return Stream(*await asyncio.open_connection(*self._server_address))


class ForwardProxy(TcpProxy):
    """An HTTP proxy: CONNECT for https, absolute URIs for http. One destination for each connection."""

    def __init__(self, refusal: bytes = b"") -> None:
        """`refusal`: a status line to answer everything with, such as b"407 Proxy Authentication Required"."""
        super().__init__("http://proxy")
        self._refusal = refusal
        self.destinations: list[str] = []  # host:port of each connection, and of a refused one too

    def environment(self, *, no_proxy: str = "") -> Mapping[str, str]:
        """The variables that send everything through it, and `no_proxy` around it."""
        names = {"HTTP_PROXY": self.url, "HTTPS_PROXY": self.url, "NO_PROXY": no_proxy}
        return {**names, **{name.lower(): value for name, value in names.items()}}

    def rewritten(self, piece: bytes) -> bytes:
        """A request's head as a server expects it: with a path, not a URL."""
        return re.sub(rb"^([A-Z]+) http://[^/ ]+", rb"\1 ", piece)

    async def _reach_server(self, client: Stream) -> Stream | None:
        head = await client.reader.readuntil(b"\r\n\r\n")
        method, target = head.split(b" ", 2)[:2]
        place = target.decode() if method == b"CONNECT" else urlsplit(target.decode()).netloc
        self.destinations.append(place)
        if self._refusal:
            client.writer.write(b"HTTP/1.1 " + self._refusal + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await client.end()
            return None
        host, _, port = place.rpartition(":")
        server = Stream(*await asyncio.open_connection(host, int(port)))
        if method == b"CONNECT":
            client.writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            server.writer.write(self.rewritten(head))
        return server


class PrivateCa:
    """A certificate authority of a company's own, which nobody trusts who is not told to."""

    def __init__(self, directory: Path) -> None:
        self._authority = trustme.CA()
        self.bundle = directory / "ca.pem"  # for REQUESTS_CA_BUNDLE and AWS_CA_BUNDLE
        self._authority.cert_pem.write_to_path(str(self.bundle))

    def server_context(self, name: str = "localhost", not_after: datetime | None = None) -> ssl.SSLContext:
        """What a server needs that is called so; `not_after` in the past makes an expired certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert(name, not_after=not_after).configure_cert(context)
        return context
