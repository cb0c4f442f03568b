"""Every command that README and docs/ show runs, as it stands there, on real servers."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.documents import README, ROOT, blocks
from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import marking
from tests.standins.key_files import full_row, write_manifest
from tests.standins.program import SCRIPT
from tests.standins.s3_server import S3Server

# What is not run here -> why.
NOT_RUN = {
    "make demo\nmake test\n": "the one is run by a test of its own, the other is this",
    "docker build": "there is no container engine on the machine of the tests",
}
SHOWN = [*blocks("sh"), *blocks("bash")]
PLAYING = next(block for block in SHOWN if "/tmp/play" in block)  # has servers of its own: see below
BLOCKS = [block for block in SHOWN if not block.startswith((PLAYING, *NOT_RUN))]
# What stands for the commands of others: that GNU parallel and Slurm do as is said here, test_array_jobs.py proves.
OTHERS = {
    "python3": 'if [ "$*" != "-m venv venv" ]; then exec {python} "$@"; fi',
    "pip": '[ "$*" = "install boto3 requests tqdm urllib3" ]',
    "parallel": 'shift; exec xargs -I{{}} "$@"',
    "sbatch": "export SLURM_ARRAY_TASK_COUNT=2 SLURM_ARRAY_TASK_MIN=0 SLURM_ARRAY_TASK_MAX=1; "
    'for task in $(seq 0 1); do SLURM_ARRAY_TASK_ID=$task sh -euc "$3"; done',
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
    """What a shell says to a command that is shown, with the reader's own names in it; it must succeed."""
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
def test_every_command_that_is_shown_runs(
    block: str, directory: Path, s3: S3Server, api: ConversionApi, bucket: Any
) -> None:
    # Two shards tell as much as sixteen, and start two programs.
    fewer = re.sub(r"\b0([ -])15\b", r"0\g<1>1", block).replace("/16", "/2").replace("-j16", "-j2")
    run_as_shown(fewer, directory, s3, api, bucket)
    converts = "s3_bulk_convert.py" in block and not block.endswith("--check\n")
    assert len(api.paid) == len(bucket.keys("converted/")) > (0 if converts else -1)


def masked(output: str) -> list[str]:
    """Lines without what differs from run to run: numbers, times, the plan; those about versions and places go."""
    kept = [line for line in output.strip().splitlines() if not re.match("OK   (versions|space)", line)]
    return [re.sub(r"\d[\d.,:T+-]*( [KMG]?B\b)?|my-bucket", "N", line) for line in kept]


def test_what_readme_shows_of_the_first_five_minutes_is_what_is_said(
    directory: Path, s3: S3Server, api: ConversionApi, bucket: Any
) -> None:
    for key in bucket.keys(""):
        bucket.client.delete_object(Bucket=bucket.name, Key=key)
    for number in range(1, 62):
        bucket.put(f"photos/IMG_{number:04}.png", b"\x89PNG\r\n\x1a\n" + str(number).encode() * 2000)
    bucket.put("photos/", b"")
    api.behaviour.month_quota = 1000
    shown = re.findall(r"```text\n\$ venv/bin/python s3_bulk_convert\.py ?(.*)\n((?:.+\n)*)```", README)
    assert [flags for flags, _ in shown] == ["--check", "--dry-run", "--limit 10", ""]
    script = "venv/bin/python s3_bulk_convert.py"
    commands = [f"{script} {flags} > {number} 2>&1 || true" for number, (flags, _) in enumerate(shown)]
    run_as_shown("\n".join(commands), directory, s3, api, bucket)
    for number, (_, output) in enumerate(shown):
        said = (directory / str(number)).read_text().replace(bucket.name, "my-bucket")
        assert masked(said) == masked(output)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_who_wants_to_play_with_it_can(tmp_path: Path) -> None:
    play = PLAYING.replace("/tmp/play", str(tmp_path)).replace(".venv/bin/python", sys.executable)
    for port in ("9000", "9001"):
        play = play.replace(port, str(free_port()))
    options = f" --set run.checkpoint={tmp_path}/c.sqlite3 --set run.failures={tmp_path}/f.jsonl"
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", play.rstrip() + options],
            cwd=ROOT,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            code = process.wait(60)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the servers stay, and are in its group
        said.seek(0)
        output = said.read()
    assert (code, "converted     1\n" in output) == (0, True), output


@pytest.mark.slow
def test_what_make_demo_runs_shows_what_it_promises() -> None:
    recipe = re.search(r"^demo:.*\n\t(.*)\n(?!\t)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe is not None
    assert recipe[1] == "$(BIN)/python -m tests.demo"
    done = subprocess.run([sys.executable, "-m", "tests.demo"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_line_for_cron_runs_and_says_one_line(
    directory: Path, s3: S3Server, api: ConversionApi, bucket: Any
) -> None:
    (line,) = blocks("cron")
    run_as_shown(
        re.sub(r"^(\S+ ){4}\S+\s+", "", line).replace("/srv/convert", str(directory)), directory, s3, api, bucket
    )
    assert re.fullmatch(r"\S+T\S+ converted 3 in .*, failed 0, left 0\n", (directory / "convert.log").read_text())


@pytest.mark.real
def test_the_units_for_systemd_are_good_ones(tmp_path: Path) -> None:
    shown = (re.fullmatch(r"# /etc/systemd/system/(\S+)\n(.*)", block, re.DOTALL) for block in blocks("ini"))
    units = [found.groups() for found in shown if found]
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
    (rules,) = (block for block in blocks("yaml") if block.startswith("groups:"))
    (tmp_path / "rules.yml").write_text(rules, encoding="utf-8")
    done = subprocess.run(
        ["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True, check=False
    )
    found = f"{rules.count('- alert:')} rules found"
    assert (done.returncode, found in done.stdout) == (0, True), done.stdout + done.stderr


@pytest.mark.real
def test_logrotate_takes_its_lines(tmp_path: Path) -> None:
    (lines,) = (block for block in blocks("text") if block.startswith("/srv/convert/conversion_failures.jsonl {"))
    (tmp_path / "conversion_failures.jsonl").write_text("{}\n")
    (tmp_path / "rotate").write_text(lines.replace("/srv/convert", str(tmp_path)), encoding="utf-8")
    (tmp_path / "rotate").chmod(0o644)
    command = ["logrotate", "--force", "--state", str(tmp_path / "state"), str(tmp_path / "rotate")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "conversion_failures.jsonl.1.gz").exists()
