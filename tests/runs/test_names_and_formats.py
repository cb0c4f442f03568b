"""What a name says of an object and what the first bytes say of an answer, where a guess went wrong."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import Conversion, Converted, marking

Cli = Callable[..., Any]
PNG = b"\x89PNG\r\n\x1a\n"
# The beginnings of true files: the major brand, and those that the file is compatible with besides.
IMAGES = {
    "avif": {"miaf": "avif mif1", "mif1": "avif miaf", "MA1B": "avif mif1 miaf", "msf1": "avis iso8", "avif": "mif1"},
    "heic": {"miaf": "heic mif1", "mif1": "heic", "msf1": "hevc iso8", "heix": "mif1"},
    "mp4": {"isom": "iso2 avc1 mp41", "mp42": "isom", "iso5": "avif"},
}
OTHERS = {
    "avif": {"mif1": "heic miaf", "isom": "mp41", "heic": "mif1"},
    "heic": {"mif1": "avif miaf", "msf1": "avis iso8", "isom": "mp41"},
    "mp4": {"mif1": "heic", "miaf": "avif", "avif": "mif1"},
}


def put_pngs(bucket: Any, *keys: str) -> None:
    for key in keys:
        bucket.put(key, PNG + key.encode())


@pytest.mark.parametrize("transfer", ["url", "upload"])
def test_a_number_behind_the_last_dot_is_no_extension(
    transfer: str, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = marking
    put_pngs(bucket, "scan 12.05.2023", "scan 12.05.2024", "v1.10", "a.7z", "b.mp4", "c.3gp", "d.x3d", "dv1.mov01")
    run = run_cli("--set", f"api.transfer={transfer}")
    assert (run.exit_code, run.summary["failed"]) == (0, {}), run.out
    names = ["a", "b", "c", "d", "dv1", "scan 12.05.2023", "scan 12.05.2024", "v1.10"]
    assert sorted(bucket.outputs()) == [f"converted/{name}.jpg" for name in names]
    # What names no format is known by its first bytes.
    formats = ["3gp", "7z", "mov01", "mp4", "png", "png", "png", "x3d"]
    assert sorted(charge.source_format for charge in api.paid) == formats


@pytest.mark.parametrize("target", list(IMAGES))
def test_all_brands_of_a_file_say_what_it_is(target: str, run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    def branded(conversion: Conversion) -> Converted:
        major, *compatible = conversion.source.removeprefix(PNG).decode().split()
        brands = "".join([major, "\0\0\0\0", *compatible]).encode()
        box = (8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands
        return Converted(box + b"\0\0\0\x08mdat", "application/octet-stream", target)

    api.behaviour.convert = branded
    for verdict, files in (("right", IMAGES[target]), ("wrong", OTHERS[target])):
        for major, compatible in files.items():
            bucket.put(f"{verdict}/{major}.png", PNG + f"{major} {compatible}".encode())
    run = run_cli("--target", target)
    assert sorted(bucket.outputs()) == sorted(f"converted/right/{major}.{target}" for major in IMAGES[target])
    assert run.summary["failed"] == {"wrong_type": len(OTHERS[target])}


def test_what_other_systems_leave_behind_is_left_out_unless_it_is_wanted(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = marking
    dropped = ["photos/.DS_Store", "Thumbs.db", "a/Desktop.ini", "a/._x.heic", "IMG_1.aae", "IMG_2.AAE"]
    put_pngs(bucket, "a/x.heic", *dropped)
    run = run_cli()
    assert (run.exit_code, run.summary["converted"]) == (0, 1)
    assert run.summary["skipped"]["not_matched"] == len(dropped)
    assert run_cli("--set", "convert.exclude=").summary["converted"] == len(dropped)
    assert len(api.paid) == 1 + len(dropped)
