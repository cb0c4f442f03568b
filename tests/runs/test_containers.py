"""docs/containers.md: what it shows for images and schedulers is true of the program, and does what it says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.program import PYTHON, SCRIPT
from tests.standins.s3_server import S3Server

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
ROOT = SCRIPT.parent
TEXT = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")
(DOCKERFILE,) = re.findall(r"```dockerfile\n(.*?)```", TEXT, re.DOTALL)
JOB, CRON_JOB = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
(AIRFLOW,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
STEPS = [line.partition(" ")[::2] for line in DOCKERFILE.splitlines()]
ENTRY_POINT = json.loads(dict(STEPS)["ENTRYPOINT"])


def test_the_image_gets_the_script_and_what_it_requires_and_is_not_root() -> None:
    copied = dict(STEPS)["COPY"].split()[:-1]
    assert copied == ["requirements.txt", "s3_bulk_convert.py"]
    assert ("RUN", "pip install --no-cache-dir -r requirements.txt") in STEPS
    assert (dict(STEPS)["FROM"], dict(STEPS)["USER"]) == ("python:3.12-slim", "10001")
    assert " ".join(ENTRY_POINT) == f"python3 {STEPS[1][1]}/{SCRIPT.name}"


@pytest.mark.slow
def test_the_steps_of_the_image_make_a_program_that_starts(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    app = tmp_path / "app"
    app.mkdir()
    for name in dict(STEPS)["COPY"].split()[:-1]:
        shutil.copy(ROOT / name, app)
    (install,) = (shlex.split(step) for name, step in STEPS if name == "RUN" and step.startswith("pip "))
    subprocess.run([tmp_path / "venv" / "bin" / install[0], *install[1:]], cwd=app, check=True)
    script = ENTRY_POINT[1].replace("/app/", f"{app}/")
    started = [tmp_path / "venv" / "bin" / ENTRY_POINT[0], script, "--version"]
    said = subprocess.run(started, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert said.stdout.startswith("s3_bulk_convert.py ")


def test_the_job_has_as_many_shards_as_completions_and_repeats_what_another_run_may_cure() -> None:
    (completions,) = re.findall(r"^  completions: (\d+)$", JOB, re.MULTILINE)
    assert re.findall(r'\{name: SHARD_COUNT, value: "(\d+)"\}', JOB) == [completions]
    rules = re.findall(r"- action: (\w+)\n +onExitCodes: \{.* values: (\[.*\])\}", JOB)
    assert rules == [("FailIndex", "[1]"), ("FailJob", "[2]"), ("Ignore", "[4]")]
    for manifest in (JOB, CRON_JOB):
        assert "restartPolicy: Never" in manifest
        assert int(re.findall(r"terminationGracePeriodSeconds: (\d+)", manifest)[0]) > 30


@pytest.mark.real  # it needs `pip install kubernetes-validate`, which has 140 MB
@pytest.mark.parametrize("manifest", [JOB, CRON_JOB], ids=["Job", "CronJob"])
def test_kubernetes_takes_the_manifests(manifest: str) -> None:
    schemas, yaml = import_module("kubernetes_validate"), import_module("yaml")
    schemas.validate(yaml.safe_load(manifest), schemas.latest_version(), strict=True)


def test_with_the_arguments_of_the_job_the_log_is_json_and_has_each_failure(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    for name in ("a.png", "b.png"):
        bucket.put(name, b"\x89PNG\r\n\x1a\n" + name.encode())
    api.faults.add(Fault.status_reply(422, "conversion_failed", times=2))
    (arguments,) = re.findall(r"args: \[(.*)\]", JOB)
    run = run_cli(*arguments.split(", "), JOB_COMPLETION_INDEX="0", SHARD_COUNT="1")
    lines = [json.loads(line) for line in run.err.splitlines()]
    assert {line["key"] for line in lines if "etag" in line} == {"a.png", "b.png"}
    assert (run.exit_code, json.loads(run.out)["failed"]) == (1, {"conversion_failed": 2})
    assert not (run.workdir / "conversion_failures.jsonl").exists()


class SkipError(Exception):
    """Airflow's AirflowSkipException."""


class FailError(Exception):
    """Airflow's AirflowFailException: the task is not tried again."""


class RetryError(Exception):
    """Airflow's AirflowException: the task is tried again."""


@pytest.fixture
def task(work: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """The task that is shown, with the program in the working directory."""
    decorators, exceptions = ModuleType("decorators"), ModuleType("exceptions")
    decorators.__dict__["task"] = lambda **_: lambda function: function
    names = {"AirflowSkipException": SkipError, "AirflowFailException": FailError, "AirflowException": RetryError}
    exceptions.__dict__.update(names)
    for name, module in {"": ModuleType("airflow"), ".decorators": decorators, ".exceptions": exceptions}.items():
        monkeypatch.setitem(sys.modules, f"airflow{name}", module)
    python = work / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(PYTHON)} "$@"\n')
    python.chmod(0o755)
    shown: dict[str, Any] = {}
    exec(AIRFLOW, shown)
    shown["HOME"] = work
    convert: Callable[[], dict[str, Any]] = shown["convert"]
    return convert


@pytest.mark.slow
def test_the_task_for_airflow_hands_on_the_summary_of_the_run(
    *,
    task: Callable[[], dict[str, Any]],
    work: Path,
    bucket: Any,
    api: ConversionApi,
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket.put("a.png", b"\x89PNG\r\n\x1a\n")
    shutil.copy(SCRIPT, work)
    (work / "config.ini").write_text(f"[api]\nurl = {api.url}\n")
    given = {**s3.environment(), "CTF_API_KEY": api.api_key, "S3_BUCKET": bucket.name, "TARGET_FORMAT": "jpg"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert task()["converted"] == 1
    # The summary of the run before is not taken for that of one that could not start.
    monkeypatch.delenv("TARGET_FORMAT")
    with pytest.raises(FailError, match="failed: None"):
        task()


@pytest.mark.parametrize(("code", "error"), [(1, FailError), (2, FailError), (3, RetryError), (4, SkipError)])
def test_the_task_for_airflow_is_tried_again_where_another_run_may_go_on(
    code: int, error: type[Exception], task: Callable[[], dict[str, Any]], work: Path
) -> None:
    (work / SCRIPT.name).write_text(f"raise SystemExit({code})\n")
    with pytest.raises(error):
        task()
