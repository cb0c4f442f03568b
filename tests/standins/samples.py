"""Real files for the tests and the demo: pictures, documents, films, so made that an output tells its source.

A picture shows a number that can be read back after a conversion. It stands in the middle of the picture as a grid of
dark and light blocks: large, and told apart by lightness alone, so that it survives JPEG, a palette, and a change of
size. A checksum in it tells a number from a chance.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import zlib
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from xml.sax.saxutils import escape
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import pillow_heif
from PIL import Image, ImageDraw

pillow_heif.register_heif_opener()

SIZE = (640, 480)
SMALLEST = (32, 24)  # below it a block is no longer a block
COLUMNS, ROWS = 8, 5
NUMBER_BITS, CHECK_BITS = 24, 16  # one block each: COLUMNS * ROWS in all
DARK, LIGHT = (24, 24, 96), (255, 244, 200)

PIL_NAMES = {
    "png": "PNG",
    "jpg": "JPEG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tiff": "TIFF",
    "heic": "HEIF",
    "pdf": "PDF",
}
SAVE_OPTIONS: dict[str, dict[str, object]] = {
    "tiff": {"compression": "tiff_adobe_deflate"},  # as scanners do; a third of LZW's size here
    "jpg": {"quality": 85},
    "heic": {"quality": 60, "enc_params": {"preset": "ultrafast"}},  # a fifth of the time; size is no matter here
    "webp": {"quality": 80, "method": 2},
}

SCANNED = ("contract", "invoice", "Überweisung", "letter to Müller & Söhne")
PAGE_POINTS = (360, 540)  # of a document; no paper that a converter would take by itself
FRAMES_PER_SECOND = 25

ALBUMS = ("2023/summer", "2024/Café am See", "2024/Österreich, Tag 1", "2025/50% + more")


########################################################################
# One picture
########################################################################


def photo(number: int, fmt: str, *, size: tuple[int, int] = SIZE) -> bytes:
    """An image file in the format `fmt` (png, heic, webp, tiff, gif, bmp, jpg) that shows `number`."""
    return encoded([picture(number, size)], fmt)


def number_in(image_bytes: bytes) -> int:
    """The number that a picture shows, whatever became of its format, colours and size; ValueError if none."""
    with Image.open(BytesIO(image_bytes)) as image:
        grey = image.convert("L")
    light = [lightness(grey, box) > 128 for box in blocks(grey.size)]
    word = sum(bit << place for place, bit in enumerate(light))
    number, check = word & (1 << NUMBER_BITS) - 1, word >> NUMBER_BITS
    if check != checksum(number):
        raise ValueError("the picture shows no number")
    return number


def picture(number: int, size: tuple[int, int]) -> Image.Image:
    """A sky over a field in the colours of its number, and the number in blocks."""
    if not 0 <= number < 1 << NUMBER_BITS:
        raise ValueError(f"{number} does not fit into {NUMBER_BITS} bits")
    if size[0] < SMALLEST[0] or size[1] < SMALLEST[1]:
        raise ValueError(f"a picture of {size} is too small to show a number")
    image = background(number, size)
    draw = ImageDraw.Draw(image)
    word = checksum(number) << NUMBER_BITS | number
    for place, (left, top, right, bottom) in enumerate(blocks(size)):
        draw.rectangle((left, top, right - 1, bottom - 1), fill=LIGHT if word >> place & 1 else DARK)
    return image


def background(number: int, size: tuple[int, int]) -> Image.Image:
    """Two soft gradients, one down and one round, in a tint that the number chooses."""
    down = Image.linear_gradient("L").resize(size)
    round_ = Image.radial_gradient("L").resize(size)
    tint = Image.new("L", size, number * 53 % 200)
    return Image.merge("RGB", (down, tint, round_))


def blocks(size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """The boxes of the blocks, in the middle half of a picture of this size, row by row."""
    width, height = size
    across = [width // 4 + width * column // (2 * COLUMNS) for column in range(COLUMNS + 1)]
    down = [height // 4 + height * row // (2 * ROWS) for row in range(ROWS + 1)]
    return [
        (left, top, right, bottom)
        for top, bottom in itertools.pairwise(down)
        for left, right in itertools.pairwise(across)
    ]


def lightness(grey: Image.Image, box: tuple[int, int, int, int]) -> float:
    """The mean of the middle of a block: its rim may have taken from its neighbours."""
    left, top, right, bottom = box
    rim_x, rim_y = (right - left) // 4, (bottom - top) // 4
    levels = grey.crop((left + rim_x, top + rim_y, right - rim_x, bottom - rim_y)).tobytes()
    return math.fsum(levels) / max(1, len(levels))


def checksum(number: int) -> int:
    """Sixteen bits that make it unlikely to read a number out of a picture that has none."""
    return zlib.crc32(number.to_bytes(4, "big")) & (1 << CHECK_BITS) - 1


def encoded(pages: list[Image.Image], fmt: str) -> bytes:
    """The bytes of a file with these pages."""
    file = BytesIO()
    more: dict[str, object] = {"save_all": True, "append_images": pages[1:]} if len(pages) > 1 else {}
    pages[0].save(file, PIL_NAMES[fmt], **SAVE_OPTIONS.get(fmt, {}), **more)
    return file.getvalue()


########################################################################
# One document
########################################################################

OOXML = "http://schemas.openxmlformats.org"
DOCX_PARTS = {
    "[Content_Types].xml": f"""\
<Types xmlns="{OOXML}/package/2006/content-types">
  <Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>
  <Override PartName="/word/document.xml"
    ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/>
</Types>""",
    "_rels/.rels": f"""\
<Relationships xmlns="{OOXML}/package/2006/relationships">
  <Relationship Id="r" Type="{OOXML}/officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/>
</Relationships>""",
}
# A point is 20 of Word's units.
DOCX_DOCUMENT = f"""\
<w:document xmlns:w="{OOXML}/wordprocessingml/2006/main"><w:body>{{pages}}
  <w:sectPr><w:pgSz w:w="{PAGE_POINTS[0] * 20}" w:h="{PAGE_POINTS[1] * 20}"/></w:sectPr>
</w:body></w:document>"""
DOCX_PAGE = "<w:p><w:pPr><w:pageBreakBefore/></w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>"

OASIS = "urn:oasis:names:tc:opendocument:xmlns"
ODT_TYPE = "application/vnd.oasis.opendocument.text"
ODT_NAMES = " ".join(
    f'xmlns:{short}="{OASIS}:{name}:1.0"'
    for short, name in {"o": "office", "s": "style", "t": "text", "fo": "xsl-fo-compatible"}.items()
)
ODT_PARTS = {
    "META-INF/manifest.xml": f"""\
<m:manifest xmlns:m="{OASIS}:manifest:1.0" m:version="1.3">
  <m:file-entry m:full-path="/" m:media-type="{ODT_TYPE}"/>
  <m:file-entry m:full-path="content.xml" m:media-type="text/xml"/>
  <m:file-entry m:full-path="styles.xml" m:media-type="text/xml"/>
</m:manifest>""",
    "styles.xml": f"""\
<o:document-styles {ODT_NAMES} o:version="1.3">
  <o:automatic-styles><s:page-layout s:name="paper">
    <s:page-layout-properties fo:page-width="{PAGE_POINTS[0]}pt" fo:page-height="{PAGE_POINTS[1]}pt"/>
  </s:page-layout></o:automatic-styles>
  <o:master-styles><s:master-page s:name="Standard" s:page-layout-name="paper"/></o:master-styles>
</o:document-styles>""",
}
ODT_DOCUMENT = f"""\
<o:document-content {ODT_NAMES} o:version="1.3">
  <o:automatic-styles><s:style s:name="page" s:family="paragraph">
    <s:paragraph-properties fo:break-before="page"/>
  </s:style></o:automatic-styles>
  <o:body><o:text>{{pages}}</o:text></o:body>
</o:document-content>"""
ODT_PAGE = '<t:p t:style-name="page">{text}</t:p>'


def docx(pages: Sequence[str]) -> bytes:
    """A Word document with a line of text on each page."""
    content = DOCX_DOCUMENT.format(pages="".join(DOCX_PAGE.format(text=escape(text)) for text in pages))
    return packed({**DOCX_PARTS, "word/document.xml": content})


def odt(pages: Sequence[str]) -> bytes:
    """An OpenDocument text with a line of text on each page."""
    content = ODT_DOCUMENT.format(pages="".join(ODT_PAGE.format(text=escape(text)) for text in pages))
    return packed({"mimetype": ODT_TYPE, **ODT_PARTS, "content.xml": content})


def packed(parts: Mapping[str, str]) -> bytes:
    """The parts of an office document in a ZIP; one called `mimetype` is not compressed, as OpenDocument has it."""
    file = BytesIO()
    with ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content, ZIP_STORED if name == "mimetype" else ZIP_DEFLATED)
    return file.getvalue()


########################################################################
# One film, one sound
########################################################################


def film(path: Path, size: tuple[int, int], seconds: float) -> bytes:
    """A moving test picture with a tone, made by FFmpeg in the format that the ending of the path names.

    In a MOV, in the codecs of a camera rather than of a player, so that to convert it is more than to pack it anew.
    """
    moving = f"testsrc=size={size[0]}x{size[1]}:rate={FRAMES_PER_SECOND}:duration={seconds}"
    codecs = ["-c:v", "mjpeg", "-c:a", "pcm_s16le"] if path.suffix == ".mov" else []
    return made_by_ffmpeg(path, "-f", "lavfi", "-i", moving, *tone(seconds), *codecs)


def sound(path: Path, seconds: float) -> bytes:
    """A tone, in the format that the ending of the path names."""
    return made_by_ffmpeg(path, *tone(seconds))


def tone(seconds: float) -> list[str]:
    """A tone as one of FFmpeg's inputs."""
    return ["-f", "lavfi", "-i", f"sine=duration={seconds}"]


def made_by_ffmpeg(path: Path, *arguments: str) -> bytes:
    """The bytes of what FFmpeg writes."""
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", *arguments, str(path)], check=True)
    return path.read_bytes()


########################################################################
# A bucket full
########################################################################


def photo_samples(count: int) -> Iterator[tuple[str, bytes]]:
    """Keys and objects as a bucket has them after some years: photos, scans, and what went wrong.

    A good file is numbered in its key, and its picture shows that number. The same `count` gives the same objects.
    """
    odd = list(odd_samples())
    yield from itertools.islice(itertools.chain(odd, good_samples(len(odd))), count)


def odd_samples() -> Iterator[tuple[str, bytes]]:
    """One of each thing that is not a plain picture; only the multi-page scan can be converted."""
    pages = [picture(number, SIZE) for number in (0, 1, 2)]
    yield "scans/three pages 0000.tiff", encoded(pages, "tiff")
    yield "photos/", b""  # what a console leaves behind when somebody makes a folder
    yield "photos/2023/empty.png", b""
    yield "photos/2023/truncated.png", photo(3, "png")[:2000]
    yield "photos/2024/cut short.heic", photo(4, "heic")[:1000]
    yield "photos/2024/notes.heic", "Not a picture: ask Jürgen for the original.\n".encode()
    yield "scans/index.txt", b"not a picture, and not named like one\n"


def good_samples(first: int) -> Iterator[tuple[str, bytes]]:
    """Pictures numbered from `first`, without end: of five, two PNG, two HEIC and one TIFF."""
    for number in itertools.count(first):
        album = ALBUMS[number % len(ALBUMS)]
        fmt = ("png", "heic", "png", "heic", "tiff")[number % 5]
        if fmt == "tiff":
            yield f"scans/{SCANNED[number // 5 % len(SCANNED)]} {number:04}.tiff", photo(number, fmt)
        else:
            # Cameras and telephones disagree about the case of an ending.
            ending = fmt.upper() if number % 3 == 0 else fmt
            yield f"photos/{album}/IMG_{number:04}.{ending}", photo(number, fmt)
