"""What the stand-in converts with: Pillow for images, and a cheap marker for big counts.

Where they are installed, also LibreOffice for documents, Poppler for the pages of a PDF, FFmpeg for films and sound.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pillow_heif
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

SECONDS_FOR_AN_ENGINE = 300  # a bound on what hangs, not a wish: a busy machine may be slow

MEDIA_TYPES = {
    "jpg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "gif": "image/gif",
    "bmp": "image/bmp",
    "tiff": "image/tiff",
    "pdf": "application/pdf",
    "zip": "application/zip",
    "mov": "video/quicktime",
    "mp4": "video/mp4",
    "mkv": "video/x-matroska",
    "webm": "video/webm",
    "avi": "video/x-msvideo",
    "mp3": "audio/mpeg",
    "m4a": "audio/mp4",
    "wav": "audio/x-wav",
    "flac": "audio/flac",
    "ogg": "audio/ogg",
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

# LibreOffice's own names. Told none, it takes a damaged document for plain text and prints its bytes.
OFFICE_FILTERS = {
    "docx": "MS Word 2007 XML",
    "doc": "MS Word 97",
    "odt": "writer8",
    "rtf": "Rich Text Format",
    "html": "HTML (StarWriter)",
    "txt": "Text (encoded):UTF8",
    "xlsx": "Calc MS Excel 2007 XML",
    "xls": "MS Excel 97",
    "ods": "calc8",
    "csv": "Text - txt - csv (StarCalc):44,34,76",  # comma, double quote, UTF-8
    "pptx": "Impress MS PowerPoint 2007 XML",
    "ppt": "MS PowerPoint 97",
    "odp": "impress8",
}

PAGE_FLAGS = {"jpg": "-jpeg", "png": "-png"}
PAGE_DPI = 150

# FFmpeg's own names of what reads a format.
DEMUXERS = {
    "mov": "mov",
    "mp4": "mov",
    "mkv": "matroska",
    "webm": "matroska",
    "avi": "avi",
    "mp3": "mp3",
    "m4a": "mov",
    "wav": "wav",
    "flac": "flac",
    "ogg": "ogg",
}
FILMS = frozenset({"mov", "mp4", "mkv", "webm", "avi"})
SOUNDS = frozenset({"mp3", "m4a", "wav", "flac", "ogg"})

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
    if source_format in OFFICE_FILTERS and target == "pdf" and shutil.which("soffice"):
        return convert_document(conversion.source, source_format)
    if source_format == "pdf" and target in PAGE_FLAGS and shutil.which("pdftoppm"):
        return convert_pages(conversion.source, target, conversion.quality)
    if target in routes_of_film(source_format) and shutil.which("ffmpeg"):
        return convert_film(conversion.source, source_format, target)
    raise UnsupportedRouteError(f"{source_format} to {target}")


# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------


def convert_image(source: bytes, source_format: str, target: str, quality: int | None) -> Converted:
    """Convert a picture. The pages of a TIFF become the pages of a PDF, or a ZIP with one image each."""
    pages = read_pages(source, source_format)
    if target == "pdf":
        return Converted(written_pdf(pages), MEDIA_TYPES["pdf"], "pdf")
    return one_or_zip([written_image(page, target, quality) for page in pages], target)


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


def one_or_zip(pages: list[bytes], extension: str) -> Converted:
    """Answer a single page as it is, and several as an archive."""
    if len(pages) == 1:
        return Converted(pages[0], MEDIA_TYPES[extension], extension)
    return zip_of_pages(pages, extension)


def zip_of_pages(pages: list[bytes], extension: str) -> Converted:
    """Pack one file per page, the way the API answers for a multi-page source."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for number, page in enumerate(pages, start=1):
            archive.writestr(zipfile.ZipInfo(f"page-{number:03}.{extension}"), page)
    return Converted(packed.getvalue(), MEDIA_TYPES["zip"], "zip")


# ----------------------------------------------------------------------------------------------------------------------
# Engines: programs of this machine
# ----------------------------------------------------------------------------------------------------------------------


def convert_document(source: bytes, source_format: str) -> Converted:
    """Convert a document to PDF with LibreOffice."""
    command = ["soffice", "--headless", f"--infilter={OFFICE_FILTERS[source_format]}", "--convert-to", "pdf"]
    with ONE_OFFICE_AT_A_TIME:
        (pdf,) = written_by([*command, "--outdir", "written", f"source.{source_format}"], source, source_format)
    return Converted(pdf, MEDIA_TYPES["pdf"], "pdf")


def convert_pages(source: bytes, target: str, quality: int | None) -> Converted:
    """Draw the pages of a PDF with Poppler."""
    wanted = ["-jpegopt", f"quality={quality}"] if quality is not None and target in LOSSY_TARGETS else []
    command = ["pdftoppm", PAGE_FLAGS[target], *wanted, "-r", str(PAGE_DPI), "source.pdf", "written/page"]
    return one_or_zip(written_by(command, source, "pdf"), target)


def routes_of_film(source_format: str) -> frozenset[str]:
    """The formats to which FFmpeg converts a film, or a sound: a film has a sound, a sound has no film."""
    if source_format not in DEMUXERS:
        return frozenset()
    return FILMS | SOUNDS if source_format in FILMS else SOUNDS


def convert_film(source: bytes, source_format: str, target: str) -> Converted:
    """Convert a film or a sound with FFmpeg, in the codecs that it takes by itself for the target."""
    # Without the first, any error in the middle leaves a shorter film; without the last, most players show none.
    reading = ["-nostdin", "-v", "error", "-xerror", "-f", DEMUXERS[source_format], "-i", f"source.{source_format}"]
    writing = ["-vn"] if target in SOUNDS else ["-pix_fmt", "yuv420p"]
    (film,) = written_by(["ffmpeg", *reading, *writing, f"written/film.{target}"], source, source_format)
    return Converted(film, MEDIA_TYPES[target], target)


def written_by(command: Sequence[str], source: bytes, source_format: str) -> list[bytes]:
    """Run an engine over `source.FORMAT` in a folder of its own, and return what it puts into `written`, by name."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"source.{source_format}").write_bytes(source)
        Path(folder, "written").mkdir()
        exit_code, said = run_engine(command, folder)
        written = sorted(Path(folder, "written").iterdir())
        # LibreOffice exits 0 even when it could not read the document, and FFmpeg leaves half a film when it exits 1.
        if exit_code or not written:
            raise UnconvertibleError(f"not a readable {source_format}: {''.join(said.splitlines()[-1:])}")
        return [path.read_bytes() for path in written]


def run_engine(command: Sequence[str], folder: str) -> tuple[int, str]:
    """Run an engine to its end; return its exit code and what it complained of."""
    # A home of its own, so that the profile of a desktop session is left alone; a session of its own, because what
    # is called soffice is only a script that waits for the true one.
    home = {**os.environ, "HOME": folder, "XDG_CONFIG_HOME": folder}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            said = process.communicate(timeout=SECONDS_FOR_AN_ENGINE)[1]
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, said


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
