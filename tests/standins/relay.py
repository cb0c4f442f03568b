"""An S3 that refuses or says otherwise: it relays everything to a real one, and changes what a test wants changed."""

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.standins.s3_server import S3Server


class Relay(ThreadingHTTPServer):
    """Stands before the S3 server: `refuse` may take a request's method and path, `rewrite` an answer's body.

    `hidden`: headers, in lower case, that no answer to a HEAD has.
    """

    daemon_threads = True

    def __init__(self, s3: S3Server) -> None:
        super().__init__(("127.0.0.1", 0), Relayed)
        self.s3 = s3
        self.refuse: Callable[[str, str], bool] = lambda *_: False
        self.refusal = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
        self.rewrite: Callable[[bytes], bytes] = lambda body: body
        self.hidden: set[str] = set()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Relayed(BaseHTTPRequestHandler):
    """One request on its way. All headers are kept, Host among them, because they are signed."""

    protocol_version = "HTTP/1.1"
    server: Relay

    def relay(self) -> None:
        """Send the request on and the answer back, or refuse as S3 does when permission is missing."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.refuse(self.command, self.path):
            self.answer(403, [], self.server.refusal)
            return
        connection = self.server.s3.connection()
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        reply = connection.getresponse()
        self.answer(reply.status, reply.getheaders(), self.server.rewrite(reply.read()))
        connection.close()

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        """Answer with the true length; that of a HEAD is the object's own."""
        self.send_response(status)
        own = {"connection", "transfer-encoding"}
        own |= self.server.hidden if self.command == "HEAD" else {"content-length"}
        for name, value in headers:
            if name.lower() not in own:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def __getattr__(self, name: str) -> Any:
        """Relay every method: the server asks for do_GET and so on."""
        if not name.startswith("do_"):
            raise AttributeError(name)
        return self.relay

    def log_message(self, *_: object) -> None:
        """Say nothing."""
