"""Listings in the smallest of pages, which S3 may send whenever it likes: for a Relay's `instead`."""

import threading
from base64 import b64decode, b64encode
from urllib.parse import urlsplit
from xml.sax.saxutils import escape

from tests.standins.relay import Asked
from tests.standins.s3_server import S3Server

NAMES = {
    "prefix": "Prefix",
    "delimiter": "Delimiter",
    "start-after": "StartAfter",
    "continuation-token": "ContinuationToken",
}
EMPTY_PAGE = (
    '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    "<Name>{bucket}</Name><Prefix>{prefix}</Prefix><MaxKeys>1000</MaxKeys><EncodingType>url</EncodingType>"
    "<KeyCount>0</KeyCount><IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
    "</ListBucketResult>"
)
LATER = "later:"


class SmallPages:
    """Asks the real server for each page again, with `keys` in it at the most, and keeps the reader waiting for it.

    `empty`: so many pages come without a key first, and with a token that leads to the page itself, as S3 does where it
    has to go over many deleted keys.
    """

    def __init__(self, s3: S3Server, keys: int, *, seconds: float = 0.0, empty: int = 0) -> None:
        self._s3, self._client = s3, s3.client()
        self._keys, self._seconds = keys, seconds
        self._empty = iter(range(empty))  # `next` is safe in several threads
        self._never = threading.Event()

    def __call__(self, asked: Asked) -> bytes | None:
        """The body of a page; None for what is no listing."""
        if not asked.is_listing:
            return None
        self._never.wait(self._seconds)
        bucket = urlsplit(asked.path).path.strip("/")
        where = {name: asked.query[told] for told, name in NAMES.items() if asked.query.get(told)}
        place = where.get("ContinuationToken", "")
        if place.startswith(LATER):
            where = self._place_of(place, where)
        elif "Delimiter" not in where and next(self._empty, None) is not None:
            return self._empty_page(bucket, where)
        return self._page(bucket, where)

    def _empty_page(self, bucket: str, where: dict[str, str]) -> bytes:
        kind = "ContinuationToken" if "ContinuationToken" in where else "StartAfter"
        token = LATER + b64encode(f"{kind} {where.get(kind, '')}".encode()).decode()
        return EMPTY_PAGE.format(bucket=bucket, prefix=escape(where.get("Prefix", "")), token=token).encode()

    @staticmethod
    def _place_of(token: str, where: dict[str, str]) -> dict[str, str]:
        kind, _, value = b64decode(token.removeprefix(LATER)).decode().partition(" ")
        place = {kind: value} if value else {}
        return {**{name: where[name] for name in ("Prefix",) if name in where}, **place}

    def _page(self, bucket: str, where: dict[str, str]) -> bytes:
        # Folders, which are few, come in one page.
        request = {"Bucket": bucket, "MaxKeys": 1000 if "Delimiter" in where else self._keys, **where}
        address = urlsplit(self._client.generate_presigned_url("list_objects_v2", Params=request))
        connection = self._s3.connection()
        connection.request("GET", f"{address.path}?{address.query}")
        page = connection.getresponse().read()
        connection.close()
        return page
