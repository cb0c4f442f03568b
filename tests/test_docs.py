"""README, docs/ and config.example.ini say what is true of the program."""

import ast
import bisect
import dataclasses
import json
import os
import re
import subprocess
import symtable
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import boto3
import botocore.validate
import pytest

import s3_bulk_convert as program
from tests import flow, messages
from tests.documents import (
    BLOCK,
    DOCUMENTS,
    INTERNALS,
    MESSAGES,
    OPERATIONS,
    OPTIONS,
    README,
    ROOT,
    anchors,
    column,
    links,
    section,
)
from tests.standins.program import SCRIPT

EXAMPLE = (ROOT / "config.example.ini").read_text(encoding="utf-8")
DECLARED = [(name, option) for name, options in program.SECTIONS.items() for option in dataclasses.fields(options)]


def test_the_help_is_shown_as_it_is() -> None:
    shown = re.search(r"--help\n(usage: .*?)```", OPTIONS, re.DOTALL)
    environment = {**os.environ, "COLUMNS": "100"}
    said = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True, env=environment
    )
    assert shown is not None
    # Python 3.13 writes "-c, --config FILE" where older ones repeat the FILE.
    assert re.sub(r"\s+", " ", shown[1]) == re.sub(
        r"\s+", " ", said.stdout.replace("-c, --config", "-c FILE, --config")
    )


def test_readme_is_what_a_person_reads_before_the_first_run() -> None:
    assert len(README.splitlines()) <= 300


@pytest.mark.parametrize("text", DOCUMENTS.values(), ids=DOCUMENTS)
def test_each_block_of_code_is_closed_before_the_next_heading(text: str) -> None:
    # A fence that is lost turns text into code, and the next heading into a part of it.
    found = BLOCK.findall(text)
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(found)
    assert [code for language, code in found if language != "sh" and re.search(r"^## ", code, re.MULTILINE)] == []


@pytest.mark.parametrize("path", DOCUMENTS)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(path: str) -> None:
    for link in links(DOCUMENTS[path]):
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = (ROOT / path).parent / name if name else ROOT / path
        assert target.exists(), link
        assert not heading or heading in anchors(target.read_text(encoding="utf-8")), link


def test_readme_leads_to_every_file_of_the_documentation() -> None:
    led_to, found = {"README.md"}, set[str]()
    while new := led_to - found:
        found |= new
        led_to |= {
            str(((ROOT / path).parent / link.partition("#")[0]).resolve().relative_to(ROOT))
            for path in new & DOCUMENTS.keys()
            for link in links(DOCUMENTS[path])
            if not link.startswith(("https://", "#"))
        }
    assert DOCUMENTS.keys() <= found


def test_what_help_refers_to_readme_for_is_there() -> None:
    options = program.build_parser()._option_string_actions.items()
    referred = [name for name, action in options if "see README" in str(action.help)]
    assert referred == ["--keys-from"]
    assert "(`--keys-from`) | [Keys from a file](docs/operations.md#keys-from-a-file) |" in README
    assert section(OPERATIONS, "Keys from a file").startswith("\n`--keys-from FILE` ")


def test_every_target_of_make_that_the_documentation_names_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for text in DOCUMENTS.values() for name in re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)}
    assert {"demo", "test", "lint"} <= named <= targets


def test_every_option_that_the_documentation_names_exists() -> None:
    declared = {f"{name}.{option.name}" for name, option in DECLARED}
    quoted = {name for text in DOCUMENTS.values() for name in re.findall(r"`((?:s3|convert|api|run)\.\w+)", text)}
    assert len(quoted) > 30
    assert quoted <= declared


@pytest.mark.parametrize(("name", "option"), DECLARED, ids=lambda value: str(getattr(value, "name", value)))
def test_there_is_a_row_for_each_option(name: str, option: dataclasses.Field[object]) -> None:
    purpose = re.escape(option.metadata["spec"].purpose)
    row = re.search(rf"^\| {name}\.{option.name} \| (.+?) \| {purpose} \|$", OPTIONS, re.MULTILINE)
    assert row is not None
    shown = row[1].strip("`")
    if shown != "required":
        assert option.metadata["spec"].reader("" if shown == "empty" else shown) == option.default


def test_there_is_no_row_for_an_option_that_does_not_exist() -> None:
    rows = re.findall(r"^\| ((?:s3|convert|api|run)\.\w+) \|", OPTIONS, re.MULTILINE)
    assert sorted(rows) == sorted(f"{name}.{option.name}" for name, option in DECLARED)


@pytest.mark.parametrize("code", program.ExitCode, ids=lambda code: str(int(code)))
def test_readme_and_help_have_each_exit_code(code: program.ExitCode) -> None:
    assert re.search(rf"^\| (\d+, )?{int(code)}(, \d+)? \|", README, re.MULTILINE)
    assert str(int(code)) in str(program.build_parser().epilog)


def test_there_is_a_row_for_each_word_of_why_a_run_stopped() -> None:
    known = [word for words in typing.get_args(program.StopCode) for word in typing.get_args(words)]
    assert sorted(column(OPERATIONS, "stopped_code")) == sorted(known)


def test_there_is_a_row_for_each_metric() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", section(OPERATIONS, "Metrics and alerts"), re.MULTILINE)
    assert rows == [(name, meaning) for name, (_, meaning) in program.METRICS.items()]


def test_there_is_a_row_for_each_event_of_the_log() -> None:
    logged = set(re.findall(r'(?:log_event\(|"event": )"(\w+)"', SCRIPT.read_text(encoding="utf-8")))
    assert logged
    assert set(column(OPERATIONS, "event")) == logged | {"message"}


def test_there_is_a_row_for_each_finding_of_verify() -> None:
    assert column(OPERATIONS, "finding") == list(program.FINDINGS)


def test_each_reason_to_leave_an_object_out_is_named() -> None:
    assert set(program.SKIP_REASONS) <= set(re.findall(r"`(\w+)`", section(OPTIONS, "What is converted")))


def test_what_fails_at_no_charge_is_named_where_the_limit_of_failures_is() -> None:
    named = re.search(r"sent \(([^)]*)\) costs nothing", MESSAGES)
    assert named is not None
    assert set(re.findall(r"`(\w+)`", named[1])) == set(program.FREE_FAILURES) - {program.TOO_MANY_TAGS}


def test_the_alerts_ask_for_metrics_that_there_are() -> None:
    asked = set(re.findall(r"s3_bulk_convert_(\w+)", " ".join(re.findall(r"^ +expr: (.*)$", OPERATIONS, re.MULTILINE))))
    assert asked <= program.METRICS.keys()
    # One fires where there never was a success, and one looks at the exit code.
    assert {"running", "last_success_timestamp_seconds", "last_exit_code"} <= asked
    assert "last_exit_code unless s3_bulk_convert_last_success_timestamp_seconds" in OPERATIONS


def test_the_job_definition_for_aws_batch_is_one() -> None:
    model = boto3.client("batch", region_name="eu-west-1").meta.service_model
    for flag, name in {"container-properties": "containerProperties", "retry-strategy": "retryStrategy"}.items():
        written = re.search(rf"--{flag} '(.*?)'", OPERATIONS, re.DOTALL)
        assert written is not None
        shape = model.operation_model("RegisterJobDefinition").input_shape.members[name]
        assert not botocore.validate.ParamValidator().validate(json.loads(written[1]), shape).has_errors()


def test_the_lifecycle_rule_is_one() -> None:
    written = re.search(r"lifecycle.json <<'EOF'\n(.*?)\nEOF", OPTIONS, re.DOTALL)
    assert written is not None
    model = boto3.client("s3", region_name="eu-west-1").meta.service_model
    shape = model.shape_for("BucketLifecycleConfiguration")
    assert not botocore.validate.ParamValidator().validate(json.loads(written[1]), shape).has_errors()


def test_every_test_that_the_documentation_names_exists() -> None:
    tests = list((ROOT / "tests").rglob("test_*.py"))
    known = {path.name for path in tests}
    known |= set(re.findall(r"def (test_\w+)\(", "".join(path.read_text(encoding="utf-8") for path in tests)))
    named = set(re.findall(r"`(?:tests/\w+/)?(test_\w+(?:\.py)?)`", INTERNALS))
    assert named
    assert named - known == set()


def test_every_name_of_the_program_in_the_documentation_of_its_inside_exists() -> None:
    words = set(re.findall(r"\w+", SCRIPT.read_text(encoding="utf-8")))
    of_program = INTERNALS.replace(section(INTERNALS, "Tests and tools"), "")
    names = {name for name in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)`", of_program) if not name.startswith("test_")}
    assert len(names) > 30
    # Two names are of the tests, in sentences that say so.
    assert {name for name in names if not words.issuperset(name.split("."))} == {"EFFECTS", "NOT_RUN"}


def test_the_rooms_are_named_in_their_order() -> None:
    rows = section(INTERNALS, "Rooms and invariants").partition("| room |")[2].partition("\n\n")[0]
    named = [room for row in re.findall(r"^\| (.*?) \|", rows, re.MULTILINE)[1:] for room in row.split(", ")]
    banners = re.findall(r"^#{120}\n# ([A-Z][\w ]*)[.,]", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    assert named == banners


def test_the_picture_of_the_flow_is_as_drawn_and_its_steps_exist() -> None:
    assert flow.PICTURE.read_text(encoding="utf-8") == flow.drawn()
    methods = set(re.findall(r"def (\w+)\(", SCRIPT.read_text(encoding="utf-8")))
    assert {step.name for lane in flow.LANES for step in lane.steps} <= methods


def globals_used(table: symtable.SymbolTable) -> Iterator[tuple[str, int]]:
    """The global names that a scope and those inside it use, with the line where the scope begins."""
    for inner in table.get_children():
        yield from ((symbol.get_name(), inner.get_lineno()) for symbol in inner.get_symbols() if symbol.is_global())
        yield from globals_used(inner)


def test_each_room_of_the_script_uses_only_rooms_above_it() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    starts = [text[: found.start()].count("\n") for found in re.finditer(r"^#{120}\n# [A-Z]", text, re.MULTILINE)]
    defined: dict[str, int] = {}
    for statement in ast.parse(text).body:
        targets = getattr(statement, "targets", [getattr(statement, "target", ast.Pass())])
        stored = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
        for name in stored | {getattr(statement, "name", "")}:
            defined.setdefault(name, bisect.bisect(starts, statement.lineno))
    used = globals_used(symtable.symtable(text, "script", "exec"))
    upwards = {name for name, line in used if defined.get(name, 0) > bisect.bisect(starts, line)}
    assert len(defined) > 100
    assert upwards == set()


def test_the_example_runs_with_bucket_and_key_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.ini"
    path.write_text(EXAMPLE, encoding="utf-8")
    settings = program.load_settings(path, {"CTF_API_KEY": "k"}, [])
    assert (settings.s3.bucket, settings.jobs[0].target) == ("my-bucket", "jpg")


@pytest.mark.parametrize(("name", "option"), DECLARED, ids=lambda value: str(getattr(value, "name", value)))
def test_the_example_shows_each_option_with_its_default(name: str, option: dataclasses.Field[object]) -> None:
    part = EXAMPLE.split(f"[{name}]\n", 1)[1]
    line = re.search(rf"^(# )?{option.name} =(.*)$", part, re.MULTILINE)
    assert line is not None
    if line[1]:
        assert option.metadata["spec"].reader(line[2].strip()) == option.default


def test_the_example_with_all_defaults_written_out_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "config.ini"
    path.write_text(EXAMPLE, encoding="utf-8")
    sparse = program.load_settings(path, {"CTF_API_KEY": "k"}, [])
    written_out = re.sub(r"^# (\w+ =(?! \*))", r"\1", EXAMPLE.split("# [job photos]")[0], flags=re.MULTILINE)
    path.write_text(written_out, encoding="utf-8")
    path.chmod(0o600)
    assert program.load_settings(path, {"CTF_API_KEY": "k"}, []) == sparse


def test_the_metadata_in_the_script_asks_for_what_requirements_asks_for() -> None:
    required = re.findall(
        r"^([a-z0-9]+>=[\d.]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    declared = re.search(r"^# dependencies = \[(.*)\]$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    assert declared is not None
    assert re.findall(r'"(.*?)"', declared[1]) == required
    assert sorted(f"{name}>={oldest}" for name, oldest in program.OLDEST_PACKAGES.items()) == sorted(required)


def test_the_newest_version_of_the_changelog_is_the_program_s() -> None:
    newest = re.search(r"^## (.+)$", DOCUMENTS["CHANGELOG.md"], re.MULTILINE)
    assert newest is not None
    assert newest[1] == program.__version__


def test_the_project_has_nothing_else_at_its_top_level() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False, cwd=ROOT).stdout.split(
        "\n"
    )
    assert {name.partition("/")[0] for name in listed if name} <= {
        "s3_bulk_convert.py",
        "requirements.txt",
        "config.example.ini",
        "tests",
        "Makefile",
        "README.md",
        "docs",
        "LICENSE",
        "CHANGELOG.md",
        ".gitignore",
        ".ci",
    }


def test_every_message_of_the_script_has_a_row_with_its_remedy() -> None:
    assert messages.tables() in MESSAGES


def test_each_problem_of_the_configuration_says_what_to_do() -> None:
    # The documentation does not repeat them: each has to explain itself.
    found = {problem for problem in messages.read_script().problems if messages.says_something(problem)}
    assert len(found) > 20
    helps = r"expected|missing|\bset |unset|give |is not |take |did you mean|than|lies under|file as well"
    # What is handed on is what a reader of a value says, or the system.
    handed_on = r"…, or …|(--shard|\[api\] key_file|… = \(not shown\)|…) = …: …|… = \(not shown\): …"
    silent = {problem for problem in found if not re.search(helps, problem)}
    assert {each for each in silent if not re.fullmatch(rf"({handed_on})(; comments stand on .*)?", each)} == {
        "[api] key_file = …: not a text file"
    }


def test_no_message_of_the_script_is_overlooked() -> None:
    found = messages.read_script()
    said = {row.text for row in found.errors}
    source = SCRIPT.read_text(encoding="utf-8")
    # Each that is raised with a text of its own; the others hand on what is in the table already.
    assert len(re.findall(r"\b(?:RunError|usage_error|CheckWarning)\(\s*f?\"", source)) <= len(said)
    assert all(
        row.hint for row in found.errors if messages.says_something(row.text) and row.text != "no API key is given"
    )
    assert {"the bucket … does not exist", "the quota is used up: …"} <= said
