"""Tags of objects, which Swift's S3 API does not have, as strict as Amazon's; see `teach_tags`.

They live as long as the server's process. The limits and the errors are those of Amazon's documentation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes
from xml.etree import ElementTree
from xml.sax.saxutils import escape

MOST_TAGS = 10
NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
HEADER, DIRECTIVE = "x-amz-tagging", "x-amz-tagging-directive"
CHECKSUMS = re.compile("content-md5|x-amz-checksum-(crc32|crc32c|crc64nvme|sha1|sha256)", re.IGNORECASE)

Tags = dict[str, str]
Place = tuple[str, str, str]  # bucket, key, version
Handler = Any  # of a controller and a request


def problem_of(pairs: list[tuple[str, str]]) -> tuple[str, str]:
    """Code and message of Amazon's refusal of some tags; empty if it takes them."""
    if len(pairs) > MOST_TAGS:
        return "BadRequest", "Object tags cannot be greater than 10"
    if len(dict(pairs)) < len(pairs):
        return "InvalidTag", "Cannot provide multiple Tags with the same key"
    for key, value in pairs:
        for what, text, least, most in (("Key", key, 1, 128), ("Value", value, 0, 256)):
            length = len(text.encode("utf-16-le")) // 2
            if not (least <= length <= most and re.fullmatch(r"[\w .:/=+\-@]*", text)):
                return "InvalidTag", f"The Tag{what} you have provided is invalid"
        if key.lower().startswith("aws:"):
            return "InvalidTag", "System tags cannot be added/updated by requester"
    return "", ""


def pairs_of_document(body: bytes) -> list[tuple[str, str]] | None:
    """The tags in the body of PutObjectTagging; None if it is not one."""
    try:
        root = ElementTree.fromstring(body)
        (tag_set,) = root
        found = [[(part.tag.rpartition("}")[2], part.text or "") for part in tag] for tag in tag_set]
    except (ElementTree.ParseError, ValueError):
        return None
    names = [root.tag, tag_set.tag, *(tag.tag for tag in tag_set)]
    is_one = [name.rpartition("}")[2] for name in names] == ["Tagging", "TagSet", *["Tag"] * len(found)]
    pairs = [dict(parts) for parts in found]
    if not is_one or any(sorted(dict(parts)) != ["Key", "Value"] or len(parts) != 2 for parts in found):
        return None
    return [(each["Key"], each["Value"]) for each in pairs]


def document_of(tags: Mapping[str, str]) -> bytes:
    """The body of an answer to GetObjectTagging."""
    rows = (f"<Tag><Key>{escape(key)}</Key><Value>{escape(value)}</Value></Tag>" for key, value in tags.items())
    return f'<Tagging xmlns="{NAMESPACE}"><TagSet>{"".join(rows)}</TagSet></Tagging>'.encode()


class Shelf:
    """The tags of all objects, and what stands in for the handlers of Swift's S3 API."""

    def __init__(self) -> None:
        package = "swift.common.middleware.s3api"
        self._answers: Any = import_module(f"{package}.s3response")
        self._public: Any = import_module("swift.common.utils").public
        self._tags: dict[Place, Tags] = {}
        self._uploads: dict[str, Tags] = {}  # upload id -> tags of what it is to become

    def refusal(self, code: str, message: str) -> Exception:
        """An error reply with a code that Swift may not know."""
        error: Any = type(code, (self._answers.ErrorResponse,), {"_status": "400 Bad Request", "_msg": message})
        return error()  # type: ignore[no-any-return]

    def require_valid(self, pairs: list[tuple[str, str]]) -> Tags:
        """The tags, if Amazon would take them."""
        code, message = problem_of(pairs)
        if code:
            raise self.refusal(code, message)
        return dict(pairs)

    def named_in_header(self, request: Any) -> Tags:
        """The tags that a request gives to what it writes."""
        given = request.headers.get(HEADER, "")
        try:
            pairs = parse_qsl(given, keep_blank_values=True, strict_parsing=True, errors="strict") if given else []
        except ValueError:
            pairs = [("", "")]
        if ("", "") in pairs or len(dict(pairs)) < len(pairs):
            said = f"The header '{HEADER}' shall be encoded as UTF-8 then URLEncoded URL query parameters"
            raise self.refusal("InvalidArgument", f"{said} without tag name duplicates.")
        return self.require_valid(pairs)

    def place(self, request: Any, version: str | None) -> Place:
        """Where the tags of a request's object stand."""
        return (request.container_name, request.object_name, version or "null")

    def look(self, controller: Any, request: Any) -> Place:
        """The place of an object that is there, and may be touched; the request's own checks refuse the others."""
        wanted = request.params.get("versionId")
        found = request.get_response(
            controller.app, method="HEAD", body="", query={"version-id": wanted} if wanted else {}
        )
        return self.place(request, found.headers.get("x-amz-version-id"))

    def answer(self, place: Place, body: bytes = b"") -> Any:
        """A 200, with the version where there are any."""
        headers = {} if place[2] == "null" else {"x-amz-version-id": place[2]}
        return self._answers.HTTPOk(body=body, headers=headers, content_type="application/xml" if body else None)

    def get(self, controller: Any, request: Any) -> Any:
        """GetObjectTagging."""
        place = self.look(controller, request)
        return self.answer(place, document_of(self._tags.get(place, {})))

    def put(self, controller: Any, request: Any) -> Any:
        """PutObjectTagging: these tags and no others."""
        if not any(CHECKSUMS.fullmatch(name) for name in request.headers):
            said = "Missing required header for this request: Content-MD5 OR x-amz-checksum-*"
            raise self.refusal("InvalidRequest", said)
        body = request.xml(16_384) or b""
        request.check_md5(body)
        place, pairs = self.look(controller, request), pairs_of_document(body)
        if pairs is None:
            raise self._answers.MalformedXML()
        self._tags[place] = self.require_valid(pairs)
        return self.answer(place)

    def write(self, original: Handler) -> Handler:
        """PutObject and CopyObject: what is written has the tags in the header, or those of what it is a copy of."""

        @self._public  # type: ignore[untyped-decorator]
        def handler(controller: Any, request: Any) -> Any:
            tags, source = self.named_in_header(request), request.headers.get("X-Amz-Copy-Source")
            directive = request.headers.get(DIRECTIVE, "COPY")
            if directive not in {"COPY", "REPLACE"} or (DIRECTIVE in request.headers and not source):
                raise self.refusal("InvalidArgument", "Unknown tagging directive.")
            if source and directive == "COPY":
                # As WSGI has names: bytes of UTF-8, each as a character.
                path = unquote_to_bytes(source.partition("?")[0]).decode("latin-1")
                bucket, _, key = path.lstrip("/").partition("/")
                tags = dict(self._tags.get((bucket, key, "null"), {}))
            reply = original(controller, request)
            self._tags[self.place(request, reply.headers.get("x-amz-version-id"))] = tags
            return reply

        return handler

    def begin(self, original: Handler) -> Handler:
        """CreateMultipartUpload: what the upload becomes has the tags in the header."""

        @self._public  # type: ignore[untyped-decorator]
        def handler(controller: Any, request: Any) -> Any:
            tags = self.named_in_header(request)
            reply = original(controller, request)
            (upload,) = re.findall(rb"<UploadId>(.*?)</UploadId>", reply.body)
            self._uploads[upload.decode()] = tags
            return reply

        return handler

    def complete(self, original: Handler) -> Handler:
        """CompleteMultipartUpload."""

        @self._public  # type: ignore[untyped-decorator]
        def handler(controller: Any, request: Any) -> Any:
            reply = original(controller, request)
            tags = self._uploads.pop(request.params["uploadId"], {})
            self._tags[self.place(request, reply.headers.get("x-amz-version-id"))] = tags
            return reply

        return handler


def teach_tags() -> None:
    """Let the Swift of this process know tags of objects: in requests of their own, and in those that write.

    Call it before the S3 API is loaded into a server.
    """
    package = "swift.common.middleware.s3api"
    shelf, public = Shelf(), import_module("swift.common.utils").public
    requests, controllers = import_module(f"{package}.s3request"), f"{package}.controllers"
    tagging = import_module(f"{controllers}.tagging").TaggingController
    objects = import_module(f"{controllers}.obj").ObjectController
    parts: Any = import_module(f"{controllers}.multi_upload")

    @public  # type: ignore[untyped-decorator]
    def get(controller: Any, request: Any) -> Any:
        return shelf.get(controller, request)

    @public  # type: ignore[untyped-decorator]
    def put(controller: Any, request: Any) -> Any:
        return shelf.put(controller, request)

    tagging.GET, tagging.PUT, objects.PUT = get, put, shelf.write(objects.PUT)
    parts.UploadsController.POST = shelf.begin(parts.UploadsController.POST)
    parts.UploadController.POST = shelf.complete(parts.UploadController.POST)
    validate = requests.S3Request._validate_headers

    def validate_other_headers(request: Any) -> None:
        # Swift refuses the header in whatever request; it stays there, because it is signed.
        given = request.headers.pop(HEADER, None)
        validate(request)
        if given is not None:
            request.headers[HEADER] = given

    requests.S3Request._validate_headers = validate_other_headers
