"""Files that hold secrets: presigned URLs are in the checkpoint, and an INI file may have the API key."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi, Request
from tests.standins.converters import marking
from tests.standins.program import script_with
from tests.standins.promises import PNG

Cli = Callable[..., Any]
# So that it is the program, and not whoever runs the tests, who keeps others out.
OPEN_TO_ALL = script_with("import os\nos.umask(0)")


def test_nobody_else_can_read_a_checkpoint(run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path) -> None:
    api.behaviour.convert = marking
    modes: dict[str, int] = {}

    def look(_: Request) -> None:
        for path in (tmp_path / "work").glob("s3_bulk_convert.sqlite3*"):
            if path.suffix != ".lock":
                modes[path.name] = stat.S_IMODE(path.stat().st_mode)

    api.on("request_received", look)
    for checkpoint in ("a new one", "one that was put back from a backup"):
        modes.clear()
        bucket.put(f"{checkpoint}.png", PNG)
        assert run_cli(command=OPEN_TO_ALL).exit_code == 0
        assert "s3_bulk_convert.sqlite3" in modes
        assert set(modes.values()) == {0o600}
        (tmp_path / "work" / "s3_bulk_convert.sqlite3").chmod(0o644)


@pytest.mark.parametrize(("mode", "exit_code"), [(0o640, 2), (0o604, 2), (0o600, 0)], ids=oct)
def test_an_ini_with_the_key_is_its_owner_s_alone(mode: int, exit_code: int, run_cli: Cli, tmp_path: Path) -> None:
    ini = tmp_path / "some.ini"
    ini.write_text("[api]\nkey = ctf_sk_in_a_file\n")
    ini.chmod(mode)
    run = run_cli("-c", str(ini), CTF_API_KEY=None)
    assert run.exit_code == exit_code
    assert (f"run: chmod 600 {ini}" in run.err) is bool(exit_code)
    assert "ctf_sk_in_a_file" not in run.err + run.out
