"""Real documents, films and scans through real engines, and what independent readers say of the outputs.

The stand-in converts with LibreOffice, FFmpeg and Poppler; pypdf, Pillow and ffprobe read what the program has stored.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pypdf
import pytest
from PIL import Image

from tests.standins import converters
from tests.standins.conversion_api import CONVERT, JOBS, ConversionApi
from tests.standins.converters import FILMS, MEDIA_TYPES, PAGE_DPI, SOUNDS, Conversion
from tests.standins.samples import FRAMES_PER_SECOND, PAGE_POINTS, docx, encoded, film, number_in, odt, picture, sound

# LibreOffice alone takes seconds for a document, one at a time, and the machine may be busy.
RUN_SECONDS = 600
pytestmark = [pytest.mark.real, pytest.mark.timeout(2 * RUN_SECONDS)]
Cli = Callable[..., Any]
Outputs = dict[str, tuple[bytes, str, dict[str, str]]]

# What must be there, and the package of Debian that has it. LibreOffice's own command is there without Writer, too.
PROGRAMS = {
    "lowriter": "libreoffice-writer",
    "localc": "libreoffice-calc",
    "ffmpeg": "ffmpeg",
    "ffprobe": "ffmpeg",
    "pdftoppm": "poppler-utils",
}
ROUTES = """
[job documents]
include = *.docx *.odt *.rtf *.html *.txt *.csv
target = pdf

[job films]
include = *.mov
target = mp4

[job soundtracks]
include = *.mov
target = mp3

[job scans]
include = *.pdf
target = jpg

[job drawings]
include = *.pdf
target = png
"""
LETTER = ("Angebot für Müller & Söhne, 1.200 €", "second page", "the end")
POINTS_PER_INCH = 72
FRAME = 1 / FRAMES_PER_SECOND
SCAN_SIZES = {1: (480, 360), 2: (240, 360), 3: (480, 360)}  # number on the page -> points


@pytest.fixture(scope="module", autouse=True)
def _engines() -> None:
    """All engines are there: a test that is left out because one is missing would prove nothing, unnoticed."""
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if missing:
        pytest.fail(f"type: apt-get install -y --no-install-recommends {' '.join(missing)}")


@pytest.fixture
def convert(start: Cli, tmp_path: Path) -> Cli:
    """Run the program over the bucket with some routes, to its end."""
    ini = tmp_path / "routes.ini"

    def convert(routes: str, *arguments: str) -> Any:
        ini.write_text(routes, encoding="utf-8")
        patient = ("--set", f"api.timeout={RUN_SECONDS}s", *arguments)
        return start("-c", str(ini), *patient, TARGET_FORMAT=None).wait(RUN_SECONDS)

    return convert


########################################################################
# Samples
########################################################################


def scan(*numbers: int) -> bytes:
    """A PDF with a picture on each page."""
    return encoded([picture(number, SCAN_SIZES[number]) for number in numbers], "pdf")


def locked(pdf: bytes) -> bytes:
    """The same PDF behind a password."""
    writer = pypdf.PdfWriter(io.BytesIO(pdf))
    writer.encrypt("a password", algorithm="AES-256")
    return written(writer)


def written(writer: pypdf.PdfWriter) -> bytes:
    """The bytes of a PDF."""
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


DOCUMENTS = {
    "letters/Angebot.docx": docx(LETTER),
    "letters/Überweisung.odt": odt(LETTER[:2]),
    "letters/note.rtf": b"{\\rtf1 a note}",
    "letters/page.html": "<title>t</title><p>Grüße".encode(),
    "letters/plain.txt": "größer\n".encode(),
    "letters/table.csv": "name,cost\nMüller,12.50\n".encode(),
    "scans/three.pdf": scan(1, 2, 3),
    "scans/one.pdf": scan(2),
}
FILM_SHAPES = {"clips/walk": ((320, 240), 2.0), "clips/zoo, 2": ((160, 120), 1.2)}  # key -> pixels, seconds
STORED = {
    "converted/letters/Angebot.pdf": "application/pdf",
    "converted/letters/Überweisung.pdf": "application/pdf",
    "converted/letters/note.pdf": "application/pdf",
    "converted/letters/page.pdf": "application/pdf",
    "converted/letters/plain.pdf": "application/pdf",
    "converted/letters/table.pdf": "application/pdf",
    "converted/scans/three.jpg.zip": "application/zip",
    "converted/scans/three.png.zip": "application/zip",
    "converted/scans/one.jpg": "image/jpeg",
    "converted/scans/one.png": "image/png",
    "converted/clips/walk.mp4": "video/mp4",
    "converted/clips/walk.mp3": "audio/mpeg",
    "converted/clips/zoo, 2.mp4": "video/mp4",
    "converted/clips/zoo, 2.mp3": "audio/mpeg",
}
CONTAINERS = {"mkv": "matroska"}  # what ffprobe calls it, if not by its ending
TABLE_FIRST = ("-c", "copy", "-movflags", "faststart")  # a MOV whose table stands before its pictures and sound


########################################################################
# Independent readers
########################################################################


def pages_of(pdf: bytes) -> list[tuple[float, float, str]]:
    """Width and height in points, and text, of each page."""
    pages = pypdf.PdfReader(io.BytesIO(pdf)).pages
    return [(float(page.mediabox.width), float(page.mediabox.height), page.extract_text().strip()) for page in pages]


def picture_of(image: bytes) -> tuple[str | None, tuple[int, int], int]:
    """Format, size in pixels, and the number that it shows."""
    with Image.open(io.BytesIO(image)) as opened:
        return opened.format, opened.size, number_in(image)


def pictures_in(archive: bytes) -> list[tuple[str | None, tuple[int, int], int]]:
    """The same of each picture in a ZIP, in the order of names."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return [picture_of(opened.read(name)) for name in sorted(opened.namelist())]


def probed(path: Path, body: bytes) -> tuple[str, float, list[dict[str, Any]]]:
    """FFmpeg's name of the container, its seconds, and its streams with their frames counted."""
    path.write_bytes(body)
    asked = ["-count_frames", "-show_streams", "-show_format", "-of", "json"]
    said = subprocess.run(["ffprobe", "-v", "error", *asked, str(path)], capture_output=True, check=True).stdout
    told = json.loads(said)
    return told["format"]["format_name"], float(told["format"]["duration"]), told["streams"]


def assert_film(path: Path, body: bytes, size: tuple[int, int], seconds: float) -> None:
    """It is an MP4 that any player shows, with every frame and all of the sound."""
    container, total, streams = probed(path, body)
    video, audio = sorted(streams, key=lambda stream: str(stream["codec_type"]), reverse=True)
    assert ("mp4" in container.split(","), video["codec_name"], audio["codec_name"]) == (True, "h264", "aac")
    assert (video["width"], video["height"], video["pix_fmt"]) == (*size, "yuv420p")
    assert int(video["nb_read_frames"]) == round(seconds * FRAMES_PER_SECOND)
    lengths = [total, float(video["duration"]), float(audio["duration"])]
    assert lengths == pytest.approx([seconds] * 3, abs=2 * FRAME)


def assert_sound(path: Path, body: bytes, seconds: float) -> None:
    """It is an MP3 of that length, without a picture."""
    container, total, streams = probed(path, body)
    assert (container, [stream["codec_name"] for stream in streams]) == ("mp3", ["mp3"])
    assert total == pytest.approx(seconds, abs=2 * FRAME)


def assert_documents(outputs: Outputs) -> None:
    """The pages of the documents that say their page size, and the text of the others."""
    width, height = PAGE_POINTS
    for key, lines in (("Angebot", LETTER), ("Überweisung", LETTER[:2])):
        pages = pages_of(outputs[f"converted/letters/{key}.pdf"][0])
        assert [text for _, _, text in pages] == list(lines)
        assert [page[:2] for page in pages] == [pytest.approx((width, height), abs=0.5)] * len(lines)
    for key, words in {"note": "a note", "page": "Grüße", "plain": "größer", "table": "Müller"}.items():
        ((_, _, text),) = pages_of(outputs[f"converted/letters/{key}.pdf"][0])
        assert words in text


def assert_scans(outputs: Outputs) -> None:
    """Every page in its place, in its size, showing its own number."""
    for target, name in (("jpg", "JPEG"), ("png", "PNG")):
        three = [(name, drawn_size(number), number) for number in (1, 2, 3)]
        assert pictures_in(outputs[f"converted/scans/three.{target}.zip"][0]) == three
        assert picture_of(outputs[f"converted/scans/one.{target}"][0]) == three[1]


def drawn_size(number: int) -> tuple[int, int]:
    """The pixels of a page."""
    width, height = SCAN_SIZES[number]
    return width * PAGE_DPI // POINTS_PER_INCH, height * PAGE_DPI // POINTS_PER_INCH


########################################################################
# One run
########################################################################


@pytest.mark.parametrize("transfer", ["url", "upload"])
def test_one_run_converts_documents_films_and_scans(
    transfer: str, convert: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    for key, body in DOCUMENTS.items():
        bucket.put(key, body)
    for number, (key, (size, seconds)) in enumerate(FILM_SHAPES.items()):
        bucket.put(f"{key}.mov", film(tmp_path / f"{number}.mov", size, seconds))
    run = convert(ROUTES, "--set", f"api.transfer={transfer}")
    outputs = bucket.outputs()
    assert (run.exit_code, run.failures) == (0, []), run.err
    assert {key: media_type for key, (_, media_type, _) in outputs.items()} == STORED
    assert_documents(outputs)
    assert_scans(outputs)
    for key, (size, seconds) in FILM_SHAPES.items():
        assert_film(tmp_path / "film", outputs[f"converted/{key}.mp4"][0], size, seconds)
        assert_sound(tmp_path / "sound", outputs[f"converted/{key}.mp3"][0], seconds)
    assert (len(api.paid), api.paid_twice()) == (len(STORED), [])
    assert {"file_url" in request.fields for request in api.requests if request.is_conversion} == {transfer == "url"}
    sent = len(api.requests)
    again = convert(ROUTES, "--set", f"api.transfer={transfer}")
    assert (again.exit_code, again.summary["already_done"], len(api.requests)) == (0, len(STORED), sent)


def test_a_large_film_goes_through_a_job(convert: Cli, bucket: Any, api: ConversionApi, tmp_path: Path) -> None:
    size, seconds = (640, 480), 3.0
    bucket.put("large.mov", film(tmp_path / "large.mov", size, seconds))
    bucket.put("small.mov", film(tmp_path / "small.mov", (160, 120), 1.0))
    run = convert("[job films]\ntarget = mp4\n", "--set", "api.jobs_above=1MB")
    assert (run.exit_code, run.summary["converted"], len(api.paid)) == (0, 2, 2), run.err
    sources = {request.path: request.fields["file_url"] for request in api.requests if request.is_conversion}
    assert ("/small.mov?" in sources[CONVERT], "/large.mov?" in sources[JOBS], len(sources)) == (True, True, 2)
    assert_film(tmp_path / "film", bucket.outputs()["converted/large.mp4"][0], size, seconds)


def test_every_container_becomes_every_other(convert: Cli, bucket: Any, tmp_path: Path) -> None:
    for kind in FILMS:
        bucket.put(f"a.{kind}", film(tmp_path / f"a.{kind}", (64, 48), 1.0))
    for kind in SOUNDS:
        bucket.put(f"a.{kind}", sound(tmp_path / f"a.{kind}", 1.0))
    films = [f"[job {kind}]\ninclude = {' '.join(f'*.{film}' for film in FILMS)}\ntarget = {kind}\n" for kind in FILMS]
    sounds = [f"[job {kind}]\ntarget = {kind}\n" for kind in SOUNDS]
    run = convert("\n".join(films + sounds), "--set", "s3.output_key=converted/{name}.{target}")
    assert (run.exit_code, run.failures) == (0, []), run.err
    outputs = bucket.outputs()
    assert sorted(outputs) == sorted(
        f"converted/a.{source}.{target}"
        for source in (*FILMS, *SOUNDS)
        for target in (FILMS | SOUNDS if source in FILMS else SOUNDS)
        if source != target
    )
    for key, (body, media_type, _) in outputs.items():
        kind = key.rpartition(".")[2]
        container, seconds, streams = probed(tmp_path / f"output.{kind}", body)
        assert (media_type, len(streams)) == (MEDIA_TYPES[kind], 2 if kind in FILMS else 1), key
        assert CONTAINERS.get(kind, kind) in container.split(","), key
        # Codecs of sound pad to whole frames of their own, of up to 1,152 samples, and say what they put before.
        assert seconds == pytest.approx(1.0, abs=3 * FRAME), key


def test_the_quality_of_drawn_pages_is_the_one_asked_for() -> None:
    page = Conversion(scan(1), "pdf", "jpg")
    sizes = [len(converters.convert(replace(page, quality=quality)).body) for quality in (5, 50, 100)]
    assert sizes == sorted(set(sizes))


########################################################################
# What cannot be read
########################################################################


def test_what_is_damaged_or_locked_fails_for_good_and_nothing_is_stored(
    convert: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    whole = film(tmp_path / "whole.mov", (320, 240), 2.0)
    streamed = tmp_path / "streamed.mov"
    subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "whole.mov", *TABLE_FIRST, streamed], check=True)
    broken = {
        "cut letter.docx": docx(LETTER)[:600],
        "words.docx": b"these words are no document\n" * 40,
        "cut note.odt": odt(LETTER)[:600],
        "cut film.mov": whole[: len(whole) // 2],
        "stopped film.mov": streamed.read_bytes()[: len(whole) // 2],
        "words.mov": b"these words are no film\n" * 40,
        "cut scan.pdf": scan(1, 2, 3)[:10_000],
        "locked scan.pdf": locked(scan(1, 2)),
    }
    for key, body in broken.items():
        bucket.put(key, body)
    bucket.put("good.pdf", scan(1))
    run = convert(ROUTES, "--set", "api.transfer=upload")
    assert (run.exit_code, run.summary["converted"]) == (1, 2), run.err  # the good one, to both targets
    assert {(line["key"], line["code"], line["permanent"]) for line in run.failures} == {
        (key, "conversion_failed", True) for key in broken
    }
    assert sorted(bucket.outputs()) == ["converted/good.jpg", "converted/good.png"]
    assert (len(api.paid), len(api.requests)) == (2, 2 + len(run.failures))
    sent = len(api.requests)
    again = convert(ROUTES, "--set", "api.transfer=upload")
    assert (again.summary["skipped"]["failed_before"], len(api.requests)) == (len(run.failures), sent)
