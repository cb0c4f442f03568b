"""Every command that README shows runs, as it stands there, on real servers."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import marking
from tests.standins.key_files import full_row, write_manifest
from tests.standins.program import SCRIPT
from tests.standins.s3_server import S3Server

README = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if not block.startswith("make ")]
# What stands for the commands of others: that GNU parallel and Slurm do as is said here, test_array_jobs.py proves.
OTHERS = {
    "python3": 'if [ "$*" != "-m venv venv" ]; then exec {python} "$@"; fi',
    "pip": '[ "$*" = "install boto3 requests tqdm urllib3" ]',
    "parallel": 'shift; exec xargs -I{{}} "$@"',
    "sbatch": "export SLURM_ARRAY_TASK_COUNT=4 SLURM_ARRAY_TASK_MIN=0 SLURM_ARRAY_TASK_MAX=3; "
    'for task in $(seq 0 3); do SLURM_ARRAY_TASK_ID=$task sh -euc "$3"; done',
    "aws": "exit 0",
}


@pytest.fixture
def directory(tmp_path: Path, api: ConversionApi, bucket: Any) -> Path:
    """What a user has who has followed README so far: the files, a bucket, keys and an inventory."""
    api.behaviour.convert = marking
    for name in ("photos/a.heic", "photos/b.png", "uploads/c.heic"):
        bucket.put(name, b"\x89PNG\r\n\x1a\n" + name.encode())
    shutil.copy(SCRIPT, tmp_path)
    example = (SCRIPT.parent / "config.example.ini").read_text(encoding="utf-8")
    example = example.replace("my-bucket", bucket.name).replace(
        "# url = https://changethisfile.com", f"url = {api.url}"
    )
    for name in ("config.example.ini", "config.ini"):
        (tmp_path / name).write_text(example, encoding="utf-8")
    (tmp_path / "keys.txt").write_text("photos/a.heic\nphotos/b.png\n")
    (tmp_path / "key").write_text(api.api_key)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    row = [bucket.name, *full_row("photos/b.png")[1:]]
    manifest = write_manifest(tmp_path / "whole", [row], sourceBucket=bucket.name)
    shutil.copytree(manifest.parents[1], tmp_path / "inventory")
    return tmp_path


def run_as_shown(command: str, directory: Path, s3: S3Server, api: ConversionApi, bucket: Any) -> str:
    """What a shell says to a command of README's, with the reader's own names in it; it must succeed."""
    tools = directory / "tools"
    tools.mkdir()
    # Making an environment takes half a minute and the network: what is in it stands there already.
    in_venv = {f"../venv/bin/{name}": OTHERS[tool] for name, tool in (("python", "python3"), ("pip", "pip"))}
    for name, does in {**OTHERS, **in_venv}.items():
        (tools / name).write_text(f"#!/bin/bash\n{does.format(python=sys.executable)}\n")
        (tools / name).chmod(0o755)
    command = command.replace("CTF_API_KEY=...", f"CTF_API_KEY={api.api_key}").replace("my-bucket", bucket.name)
    command = command.replace("/var/tmp", str(directory))
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(directory), "TMPDIR": str(directory)}
    environment |= {**s3.environment(), "CTF_API_KEY": api.api_key}
    # What cron finds, which knows nothing of the environment.
    (directory / ".aws").mkdir()
    lines = [f"{name.lower()} = {value}" for name, value in s3.environment().items() if "KEY" in name]
    (directory / ".aws" / "credentials").write_text("\n".join(["[default]", *lines]))
    place = f"[default]\nregion = us-east-1\nendpoint_url = {s3.environment()['AWS_ENDPOINT_URL_S3']}\n"
    (directory / ".aws" / "config").write_text(place)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:40])
def test_every_command_that_readme_shows_runs(
    block: str, directory: Path, s3: S3Server, api: ConversionApi, bucket: Any
) -> None:
    # Four shards tell as much as sixteen, and start four programs.
    fewer = re.sub(r"\b0([ -])15\b", r"0\g<1>3", block).replace("/16", "/4").replace("-j16", "-j4")
    run_as_shown(fewer, directory, s3, api, bucket)
    converts = "s3_bulk_convert.py" in block and not block.endswith("--check\n")
    assert len(api.paid) == len(bucket.keys("converted/")) > (0 if converts else -1)


def test_the_line_for_cron_runs_and_says_one_line(
    directory: Path, s3: S3Server, api: ConversionApi, bucket: Any
) -> None:
    line = re.search(r"```cron\n(?:\S+ ){4}\S+\s+(.*)\n```", README)
    assert line is not None
    run_as_shown(line[1].replace("/srv/convert", str(directory)), directory, s3, api, bucket)
    assert re.fullmatch(r"\S+T\S+ converted 3 in .*, failed 0, left 0\n", (directory / "convert.log").read_text())


@pytest.mark.real
def test_the_units_for_systemd_are_good_ones(tmp_path: Path) -> None:
    units = re.findall(r"```ini\n# /etc/systemd/system/(\S+)\n(.*?)```", README, re.DOTALL)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name in ("s3_bulk_convert.py", "venv/bin/python"):
        (tmp_path / name).touch(stat.S_IRWXU)
    for name, text in units:
        here = text.replace("/srv/convert", str(tmp_path)).replace("User=convert\n", "")
        (tmp_path / name).write_text(here, encoding="utf-8")
    names = [str(tmp_path / name) for name, _ in units]
    done = subprocess.run(["systemd-analyze", "verify", *names], capture_output=True, text=True, check=False)
    assert (len(names), done.returncode, done.stderr) == (2, 0, "")


@pytest.mark.real
def test_prometheus_takes_the_alerts(tmp_path: Path) -> None:
    rules = re.search(r"```yaml\n(groups:.*?)```", README, re.DOTALL)
    assert rules is not None
    (tmp_path / "rules.yml").write_text(rules[1], encoding="utf-8")
    done = subprocess.run(
        ["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "2 rules found" in done.stdout) == (0, True), done.stdout + done.stderr


@pytest.mark.real
def test_logrotate_takes_its_lines(tmp_path: Path) -> None:
    lines = re.search(r"```text\n(/srv/convert/conversion_failures\.jsonl \{.*?)```", README, re.DOTALL)
    assert lines is not None
    (tmp_path / "conversion_failures.jsonl").write_text("{}\n")
    (tmp_path / "rotate").write_text(lines[1].replace("/srv/convert", str(tmp_path)), encoding="utf-8")
    (tmp_path / "rotate").chmod(0o644)
    command = ["logrotate", "--force", "--state", str(tmp_path / "state"), str(tmp_path / "rotate")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "conversion_failures.jsonl.1.gz").exists()
