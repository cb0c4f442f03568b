"""What the stand-in converts with: Pillow for images, LibreOffice for documents, and a cheap marker for big counts."""

from __future__ import annotations

import functools
import hashlib
import io
import shutil
import subprocess
import tempfile
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pillow_heif
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

SECONDS_FOR_A_DOCUMENT = 120

MEDIA_TYPES = {
    "jpg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "gif": "image/gif",
    "bmp": "image/bmp",
    "tiff": "image/tiff",
    "pdf": "application/pdf",
    "zip": "application/zip",
}

# Spellings of one format. Both sides of a route are looked up here, in lower case.
OTHER_SPELLINGS = {"jpeg": "jpg", "tif": "tiff", "heif": "heic", "htm": "html"}

# Pillow's own names. A source is opened as what it is said to be: a HEIC called .png is not convertible here.
READABLE_IMAGES = {
    "png": "PNG",
    "heic": "HEIF",
    "webp": "WEBP",
    "tiff": "TIFF",
    "gif": "GIF",
    "bmp": "BMP",
    "jpg": "JPEG",
}
WRITABLE_IMAGES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "pdf": "PDF"}
LOSSY_TARGETS = frozenset({"jpg", "webp"})

DOCUMENTS = frozenset({"docx", "doc", "odt", "rtf", "xlsx", "xls", "ods", "csv", "pptx", "ppt", "odp", "txt", "html"})

# Two LibreOffice processes with a profile each work side by side, but a test machine has no memory for ten of them.
ONE_OFFICE_AT_A_TIME = threading.Lock()


class UnsupportedRouteError(Exception):
    """No converter leads from this source format to this target."""


class UnconvertibleError(Exception):
    """There is a converter, but it cannot read this content."""


@dataclass(frozen=True)
class Conversion:
    """What one request asks for."""

    source: bytes
    source_format: str
    target: str
    quality: int | None = None


@dataclass(frozen=True)
class Converted:
    """What comes out. The extension is the true one: "zip" for the pages of a multi-page image."""

    body: bytes
    media_type: str
    extension: str


Convert = Callable[[Conversion], Converted]


def format_name(extension: str) -> str:
    """Return the one spelling under which a format is known here."""
    name = extension.lower().lstrip(".")
    return OTHER_SPELLINGS.get(name, name)


def sniffed_format(source: bytes) -> str | None:
    """Tell a format by its first bytes, or not at all: text formats and office archives have none of their own."""
    if source[:4] == b"RIFF" and source[8:12] == b"WEBP":
        return "webp"
    if source[4:8] == b"ftyp" and source[8:12] in {b"heic", b"heix", b"mif1", b"msf1", b"hevc"}:
        return "heic"
    signatures = {
        b"\x89PNG\r\n\x1a\n": "png",
        b"\xff\xd8\xff": "jpg",
        b"GIF8": "gif",
        b"II*\x00": "tiff",
        b"MM\x00*": "tiff",
        b"BM": "bmp",
        b"%PDF-": "pdf",
    }
    return next((name for signature, name in signatures.items() if source.startswith(signature)), None)


def convert(conversion: Conversion) -> Converted:
    """Convert for real."""
    source_format, target = format_name(conversion.source_format), format_name(conversion.target)
    if source_format in READABLE_IMAGES and target in WRITABLE_IMAGES:
        return convert_image(conversion.source, source_format, target, conversion.quality)
    if source_format in DOCUMENTS and target == "pdf" and shutil.which("soffice"):
        return convert_document(conversion.source, source_format)
    raise UnsupportedRouteError(f"{source_format} to {target}")


# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------


def convert_image(source: bytes, source_format: str, target: str, quality: int | None) -> Converted:
    """Convert a picture. The pages of a TIFF become the pages of a PDF, or a ZIP with one image each."""
    pages = read_pages(source, source_format)
    if target == "pdf":
        return Converted(written_pdf(pages), MEDIA_TYPES["pdf"], "pdf")
    images = [written_image(page, target, quality) for page in pages]
    if len(images) == 1:
        return Converted(images[0], MEDIA_TYPES[target], target)
    return zip_of_pages(images, target)


def read_pages(source: bytes, source_format: str) -> list[Image.Image]:
    """Read every page of a TIFF, and the first picture of anything else (an animation has frames, not pages)."""
    learn_heif()
    try:
        with Image.open(io.BytesIO(source), formats=[READABLE_IMAGES[source_format]]) as image:
            frames = ImageSequence.Iterator(image) if source_format == "tiff" else iter([image])
            # A frame is only valid until the next one is read, so each is copied (exif_transpose always copies).
            return [ImageOps.exif_transpose(frame) for frame in frames]
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError) as problem:
        raise UnconvertibleError(f"not a readable {source_format}: {problem}") from problem


@functools.cache
def learn_heif() -> None:
    """Teach Pillow HEIC, once, and not at import."""
    pillow_heif.register_heif_opener()


def written_image(image: Image.Image, target: str, quality: int | None) -> bytes:
    """Write one picture, with the quality where the format has one."""
    written = io.BytesIO()
    picture = without_transparency(image) if target == "jpg" else with_plain_mode(image)
    if quality is not None and target in LOSSY_TARGETS:
        picture.save(written, WRITABLE_IMAGES[target], quality=quality)
    else:
        picture.save(written, WRITABLE_IMAGES[target])
    return written.getvalue()


def written_pdf(pages: list[Image.Image]) -> bytes:
    """Write the pages as one PDF."""
    written = io.BytesIO()
    first, *others = [without_transparency(page) for page in pages]
    first.save(written, "PDF", save_all=True, append_images=others)
    return written.getvalue()


def without_transparency(image: Image.Image) -> Image.Image:
    """Lay a picture on white, for formats that cannot be transparent."""
    opaque = Image.new("RGB", image.size, "white")
    with_alpha = image.convert("RGBA")
    opaque.paste(with_alpha, mask=with_alpha.getchannel("A"))
    return opaque


def with_plain_mode(image: Image.Image) -> Image.Image:
    """Bring palettes, CMYK and the like to a mode that PNG and WebP both know."""
    if image.mode in {"RGB", "RGBA"}:
        return image
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def zip_of_pages(pages: list[bytes], extension: str) -> Converted:
    """Pack one file per page, the way the API answers for a multi-page source."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for number, page in enumerate(pages, start=1):
            archive.writestr(zipfile.ZipInfo(f"page-{number:03}.{extension}"), page)
    return Converted(packed.getvalue(), MEDIA_TYPES["zip"], "zip")


# ----------------------------------------------------------------------------------------------------------------------
# Documents
# ----------------------------------------------------------------------------------------------------------------------


def convert_document(source: bytes, source_format: str) -> Converted:
    """Convert a document to PDF with LibreOffice, in a profile of its own so that a desktop session is left alone."""
    with ONE_OFFICE_AT_A_TIME, tempfile.TemporaryDirectory() as folder:
        document = Path(folder, f"document.{source_format}")
        document.write_bytes(source)
        profile = f"-env:UserInstallation={Path(folder, 'profile').as_uri()}"
        command = ["soffice", profile, "--headless", "--convert-to", "pdf", "--outdir", folder, str(document)]
        subprocess.run(command, capture_output=True, check=False, timeout=SECONDS_FOR_A_DOCUMENT)
        written = document.with_suffix(".pdf")
        # LibreOffice exits 0 even when it could not read the document: only the file tells.
        if not written.exists():
            raise UnconvertibleError(f"not a readable {source_format}")
        return Converted(written.read_bytes(), MEDIA_TYPES["pdf"], "pdf")


# ----------------------------------------------------------------------------------------------------------------------
# The marker
# ----------------------------------------------------------------------------------------------------------------------


def marking(conversion: Conversion) -> Converted:
    """Convert nothing, but say what was asked for: for tests that count a hundred thousand objects.

    The answer holds `converted:TARGET:SHA256-OF-SOURCE` and the source, between the first and last bytes of a true file
    of the target format, so that a client that judges by them accepts it.
    """
    target = format_name(conversion.target)
    if target not in WRITABLE_IMAGES:
        raise UnsupportedRouteError(f"{conversion.source_format} to {target}")
    mark = f"converted:{target}:{hashlib.sha256(conversion.source).hexdigest()}".encode()
    return Converted(wrapped(mark + conversion.source, target), MEDIA_TYPES[target], target)


def wrapped(content: bytes, target: str) -> bytes:
    """Put the first and last bytes of a format around any content."""
    if target == "webp":
        return b"RIFF" + (len(content) + 4).to_bytes(4, "little") + b"WEBP" + content
    first, last = {
        "jpg": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00", b"\xff\xd9"),
        "png": (b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"),
        "pdf": (b"%PDF-1.4\n", b"\n%%EOF\n"),
    }[target]
    return first + content + last
