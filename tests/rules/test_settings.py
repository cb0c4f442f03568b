"""The configuration: every reader, who overrides whom, and the exact words of what is wrong with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import s3_bulk_convert as program

NO_SECTION = "is not a section; there are s3, convert, api, run, job NAME"
SAME_KEY = "every output would get the same key; expected {stem}, {name} or {key}"
NOT_UTF_8 = "'utf-8' codec can't decode byte 0xff in position 14: invalid start byte"
AN_EXTENSION = "expected a file extension such as jpg or pdf"
HINT = "see --help and config.example.ini; nothing was listed or converted"
SPACES = "separate globs by spaces alone"
ONE_EACH = "give a glob of its own for each, as in *.jpg *.png"
NO_SPACES = "expected printable ASCII without spaces"
SECRET = "ctf_sk_live_abcdefgh"
COMPLETE = "[s3]\nbucket = b\n[convert]\ntarget = jpg\n[api]\nkey = ctf_sk_1\n[run]\nworkers = 3\n"


@pytest.fixture(autouse=True)
def ini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of an INI file that is not there yet, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "some.ini"


def load(
    path: Path, content: str | bytes = COMPLETE, environ: Mapping[str, str] | None = None, *flags: str
) -> program.Settings:
    """The settings from a file with this content, an environment, and a command line."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(0o600)
    return program.load_settings(path, environ or {}, program.read_flags(program.build_parser().parse_args(flags)))


def complaint(
    path: Path, content: str | bytes = COMPLETE, environ: Mapping[str, str] | None = None, *flags: str
) -> str:
    """What is said about a configuration that is refused, in place of the path the words `the file`."""
    with pytest.raises(program.RunError) as refused:
        load(path, content, environ, *flags)
    assert refused.value.exit_code == program.ExitCode.USAGE
    return refused.value.message.replace(str(path), "the file")


def problems(path: Path, content: str | bytes = COMPLETE, *flags: str) -> list[str]:
    """What is listed as wrong with a configuration."""
    return complaint(path, content, None, *flags).split("\n  - ")[1:]


########################################################################
# Readers
########################################################################


@pytest.mark.parametrize(
    ("option", "given", "expected"),
    [
        ("s3.prefix", "100%/a b", "100%/a b"),
        ("s3.prefix", "%(x)s", "%(x)s"),
        ("s3.prefix", "", ""),
        ("s3.endpoint_url", "http://localhost:9000/", "http://localhost:9000"),
        ("s3.endpoint_url", "none", None),
        ("s3.region", "", None),
        ("s3.requester_pays", "yes", True),
        ("s3.requester_pays", "OFF", False),
        ("s3.requester_pays", "1", True),
        ("convert.target", "JPG", "jpg"),
        ("convert.target", ".pdf", "pdf"),
        ("convert.include", "*.heic  *.png", ("*.heic", "*.png")),
        ("convert.include", "a,b{c}.png", ("a,b{c}.png",)),
        ("convert.include", "photos/README [R]EADME", ("photos/README", "[R]EADME")),
        ("s3.prefix", "uploads", "uploads"),
        (
            "s3.bucket",
            "arn:aws:s3:eu-west-1:111122223333:accesspoint/mine",
            "arn:aws:s3:eu-west-1:111122223333:accesspoint/mine",
        ),
        ("convert.exclude", "", ()),
        ("convert.min_size", "500", 500),
        ("convert.min_size", "0", 0),
        ("convert.min_size", "1kb", 1000),
        ("convert.min_size", "1 KiB", 1024),
        ("convert.max_size", "100MB", 100_000_000),
        ("convert.max_size", "1.5GB", 1_500_000_000),
        ("convert.max_size", "2 MiB", 2 << 20),
        ("convert.max_size", "5GiB", 5 << 30),
        ("convert.max_size", "None", math.inf),
        ("convert.newer_than", "150s", 150.0),
        ("convert.newer_than", "10m", 600.0),
        ("convert.older_than", "2 h", 7200.0),
        ("convert.older_than", "1.5d", 129_600.0),
        ("convert.quality", "1", 1),
        ("convert.quality", "100", 100),
        ("convert.quality", "none", None),
        ("convert.same_format", "Copy", "copy"),
        ("api.url", "https://example.com/base/", "https://example.com/base"),
        ("api.transfer", "UPLOAD", "upload"),
        ("api.requests_per_minute", "auto", None),
        ("api.requests_per_minute", "60", 60),
        ("api.max_conversions", "none", None),
        ("api.keep_remaining", "0", 0),
        ("api.retries", "0", 0),
        ("s3.tags", "a=b%20c&d=&e+f=x=y", (("a", "b c"), ("d", ""), ("e f", "x=y"))),
        ("s3.tags", "Straße=日本", (("Straße", "日本"),)),
        (
            "s3.tags",
            "&".join(f"{number}={'v' * 256}" for number in range(10)),
            tuple((str(n), "v" * 256) for n in range(10)),
        ),
        ("s3.tags", "none", ()),
        ("s3.tag_source", "converted=yes", (("converted", "yes"),)),
        ("api.jobs_above", "never", None),
        ("api.price", "0.004", 0.004),
        ("api.price", "none", None),
        ("run.workers", "1000", 1000),
        ("run.max_failure_rate", "2%", 0.02),
        ("run.max_failure_rate", "0.5 %", 0.005),
        ("run.max_failure_rate", "100%", 1.0),
        ("run.max_failure_rate", "never", math.inf),
        ("run.skip_existing", "no", False),
        ("run.max_runtime", "none", math.inf),
    ],
)
def test_a_good_value_is_read(ini: Path, option: str, given: str, expected: object) -> None:
    section, _, name = option.partition(".")
    settings = load(ini, COMPLETE, None, "--set", f"{option}={given}")
    part: Any = settings.jobs[0] if section == "convert" else getattr(settings, section)
    assert getattr(part, name) == expected


TEN_TAGS = "expected 1 to 10 tags such as a=b&c=d, URL-encoded, or none"
FIT_TAGS = "expected keys of 1 to 128 and values of up to 256 characters: "
FIT_TAGS += "letters, digits, spaces and + - = . _ : / @, URL-encoded, or none"


@pytest.mark.parametrize(
    ("option", "given", "expected"),
    [
        ("s3.requester_pays", "maybe", "expected yes or no"),
        ("s3.cache_control", "max-age=60\nacl = private", "expected one line, or none"),
        ("s3.requester_pays", "", "expected yes or no"),
        ("convert.target", "j p g", AN_EXTENSION),
        ("convert.target", "jpg/png", AN_EXTENSION),
        ("convert.min_size", "10 apples", "expected a size such as 500, 100MB or 5GiB, or none"),
        ("convert.min_size", "-1", "expected a size such as 500, 100MB or 5GiB, or none"),
        ("convert.min_size", "1e6", "expected a size such as 500, 100MB or 5GiB, or none"),
        ("convert.max_size", "MB", "expected a size such as 500, 100MB or 5GiB, or none"),
        ("convert.newer_than", "10", "expected a duration such as 150s, 10m, 2h or 7d, or none"),
        ("convert.older_than", "2 weeks", "expected a duration such as 150s, 10m, 2h or 7d, or none"),
        ("convert.quality", "0", "expected a whole number from 1 to 100, or none"),
        ("convert.quality", "101", "expected a whole number from 1 to 100, or none"),
        ("convert.same_format", "move", "expected one of skip, copy, convert"),
        ("api.url", "changethisfile.com", "expected an address such as https://changethisfile.com"),
        ("api.url", "ftp://example.com", "expected an address such as https://changethisfile.com"),
        ("api.url", "https://", "expected an address such as https://changethisfile.com"),
        ("api.url", "https://example.com/?a=b", "expected an address such as https://changethisfile.com"),
        ("api.url", "https://[::1", "expected an address such as https://changethisfile.com"),
        ("api.url", "https://example.com:99999", "expected an address such as https://changethisfile.com"),
        ("api.url", "https://ex ample.com", "expected an address such as https://changethisfile.com"),
        ("api.url", "https://changethisfile..com", "expected an address such as https://changethisfile.com"),
        ("api.url", f"https://{64 * 'x'}.com", "expected an address such as https://changethisfile.com"),
        ("api.transfer", "ftp", "expected one of auto, url, upload"),
        ("api.requests_per_minute", "0", "expected a whole number of 1 or more, or auto"),
        ("api.max_conversions", "-3", "expected a whole number of 1 or more, or none"),
        ("api.keep_remaining", "1.5", "expected a whole number of 0 or more"),
        ("api.timeout", "", "expected a duration of more than 0, such as 150s, 10m, 2h or 7d"),
        ("api.timeout", "0.0h", "expected a duration of more than 0, such as 150s, 10m, 2h or 7d"),
        ("run.shutdown_grace", "30", "expected a duration such as 150s, 10m, 2h or 7d"),
        ("run.shutdown_grace", "99999d", "expected a duration such as 150s, 10m, 2h or 7d"),
        ("api.timeout", "9999999999s", "expected a duration of more than 0, such as 150s, 10m, 2h or 7d"),
        ("convert.max_size", "9" * 400, "expected a size such as 500, 100MB or 5GiB, or none"),
        ("api.retries", "21", "expected a whole number from 0 to 20"),
        ("api.jobs_above", "always", "expected a size such as 500, 100MB or 5GiB, or never"),
        ("api.price", "$0.004", "expected a plain number such as 0.004, without a currency, or none"),
        ("api.price", "0,004", "expected a plain number such as 0.004, without a currency, or none"),
        ("api.price", "-1", "expected a plain number such as 0.004, without a currency, or none"),
        ("s3.tags", "a", TEN_TAGS),
        ("s3.tags", "a=b&&c=d", TEN_TAGS),
        ("s3.tags", "a=%FF", TEN_TAGS),
        ("s3.tags", "&".join(f"{number}=" for number in range(11)), TEN_TAGS),
        ("s3.tags", "=b", FIT_TAGS),
        ("s3.tags", "a=b;c=d", FIT_TAGS),
        ("s3.tags", "k" * 129 + "=", FIT_TAGS),
        ("s3.tags", "k=" + "\U00020000" * 129, FIT_TAGS),
        ("s3.tags", "a=b&a=c", "expected each key once, and none that begins with aws:, or none"),
        ("s3.tags", "Aws:a=b", "expected each key once, and none that begins with aws:, or none"),
        ("s3.tag_source", "a=b&c=d", "expected one tag such as converted=yes, URL-encoded, or none"),
        ("run.workers", "ten", "expected a whole number from 1 to 1000"),
        ("run.workers", "0", "expected a whole number from 1 to 1000"),
        ("run.workers", "9" * 13, "expected a whole number from 1 to 1000"),
        ("run.max_failure_rate", "2", "expected a rate such as 2%, or never"),
        ("run.max_failure_rate", "101%", "expected a rate such as 2%, or never"),
        ("run.max_runtime", "soon", "expected a duration such as 150s, 10m, 2h or 7d, or none"),
        ("run.log_every", "0", "expected a whole number of 1 or more"),
        (
            "s3.bucket",
            "s3://my-bucket/uploads",
            "expected a bucket's name; did you mean bucket = my-bucket and prefix = uploads/?",
        ),
        ("s3.bucket", "s3://my-bucket/", "expected a bucket's name; did you mean bucket = my-bucket?"),
        ("s3.bucket", '"my-bucket"', "expected a bucket's name; take the quotes away"),
        ("s3.bucket", "my-bucket/uploads", "expected a bucket's name"),
        ("s3.output_bucket", "s3://b/x", "expected a bucket's name; did you mean output_bucket = b?"),
        ("s3.prefix", "s3://my-bucket/uploads/", "give only what follows the bucket"),
        ("s3.prefix", "'uploads/'", "expected the beginning of a key; take the quotes away"),
        ("convert.include", "*.png, *.tiff", SPACES),
        ("convert.include", "*.png,*.tiff", SPACES),
        ("convert.include", "*.png,", SPACES),
        ("convert.include", "*.png;*.tiff", SPACES),
        ("convert.include", "*.png|*.tiff", SPACES),
        ("convert.include", "*.{png,tiff}", ONE_EACH),
        ("convert.include", "*.{png}", ONE_EACH),
        ("convert.include", "*.(png|tiff)", ONE_EACH),
        ("convert.include", "*.(png)", ONE_EACH),
        ("convert.exclude", "/uploads/*", "keys do not begin with /, ./ or ../"),
        ("convert.include", "./a.png", "keys do not begin with /, ./ or ../"),
        ("convert.include", "s3://my-bucket/uploads/*", "give only what follows the bucket"),
        (
            "convert.exclude",
            "!keep/*",
            "expected globs without !; include says what to convert, exclude what to leave out",
        ),
        ("convert.include", r".*\.png$", "expected globs such as *.png, and no regular expressions"),
        ("convert.include", '"*.png"', "expected globs such as *.png; take the quotes away"),
        ("convert.include", "png", "did you mean *.png?"),
        ("convert.exclude", "*.png thumbnails/", "did you mean thumbnails/*?"),
        ("convert.include", "*.png ; photos", f"{SPACES}; comments stand on lines of their own"),
        ("convert.target", "jpg ; the usual", f"{AN_EXTENSION}; comments stand on lines of their own"),
        ("run.workers", '"4"', "expected a whole number from 1 to 1000; take the quotes away"),
    ],
)
def test_a_bad_value_is_named_with_what_is_accepted(ini: Path, option: str, given: str, expected: str) -> None:
    assert problems(ini, COMPLETE, "--set", f"{option}={given}") == [f"--set {option} = {given}: {expected}"]


TAKES_ANY_TEXT = {
    *("s3.prefix", "s3.region", "s3.profile", "s3.storage_class", "s3.sse"),
    *("s3.sse_kms_key_id", "s3.acl", "s3.cache_control", "convert.include", "convert.exclude", "run.checkpoint"),
    *("run.failures", "run.summary", "run.metrics"),
}
ALL_OPTIONS = [f"{section}.{name}" for section in program.SECTIONS for name in program.SPECS[section]]


@pytest.mark.parametrize("option", sorted(set(ALL_OPTIONS) - TAKES_ANY_TEXT))
def test_a_wrong_value_of_any_option_is_named_once(ini: Path, option: str) -> None:
    # A space is wrong in a key, an unknown field in a template, and both in all that is not text.
    content = COMPLETE.replace("key =", "#")
    said = [line for line in problems(ini, content, "--set", f"{option}={{wrong}} {{stem}}") if "missing" not in line]
    assert len(said) == 1
    assert option.partition(".")[2] in said[0]
    assert ": " in said[0]


def test_what_is_to_tell_sources_apart_is_no_tag_of_outputs_in_their_bucket(ini: Path) -> None:
    both = ("--set", "s3.tags=a=b&c=d", "--set", "s3.tag_source=c=d")
    (said,) = problems(ini, COMPLETE, *both)
    assert said.startswith("--set s3.tag_source = c=d: outputs in this bucket have it as well (s3.tags): give ")
    assert load(ini, COMPLETE, None, *both, "--set", "s3.output_bucket=elsewhere").s3.tags == (("a", "b"), ("c", "d"))


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("s3.prefix", ""),
        ("s3.output_key", "converted/{dir}{stem}.{target}"),
        ("s3.requester_pays", False),
        ("s3.tags", ()),
        ("s3.tag_source", ()),
        ("convert.include", ("*",)),
        ("convert.exclude", (".DS_Store", "Thumbs.db", "desktop.ini", "._*", "*.aae")),
        ("convert.same_format", "skip"),
        ("api.url", "https://changethisfile.com"),
        ("api.transfer", "auto"),
        ("api.requests_per_minute", None),
        ("api.max_conversions", None),
        ("api.keep_remaining", 0),
        ("api.timeout", 150.0),
        ("api.retries", 5),
        ("api.jobs_above", 100_000_000),
        ("api.max_size", 5_000_000_000),
        ("api.price", None),
        ("run.workers", 10),
        ("run.checkpoint", "s3_bulk_convert.sqlite3"),
        ("run.failures", "conversion_failures.jsonl"),
        ("run.max_failure_rate", 0.02),
        ("run.skip_existing", True),
        ("run.shutdown_grace", 30.0),
        ("run.max_runtime", math.inf),
        ("run.summary", None),
        ("run.log_every", 100),
    ],
)
def test_an_option_that_is_not_given_has_its_default(option: str, expected: object) -> None:
    section, _, name = option.partition(".")
    defaults = {part.name: part.default for part in dataclasses.fields(program.SECTIONS[section])}
    assert defaults.get(name, "there is no such option") == expected


########################################################################
# Who overrides whom
########################################################################


@pytest.mark.parametrize(
    ("content", "environ", "flags", "workers"),
    [
        pytest.param(COMPLETE.replace("workers", "#"), {}, [], 10, id="default"),
        pytest.param(COMPLETE, {}, [], 3, id="file over default"),
        pytest.param(COMPLETE, {"CONCURRENCY": "4"}, [], 4, id="environment over file"),
        pytest.param(COMPLETE, {"CONCURRENCY": "4"}, ["--workers", "5"], 5, id="command line over environment"),
        pytest.param(COMPLETE, {}, ["--set", "run.workers=6"], 6, id="set over file"),
        pytest.param(COMPLETE, {"CONCURRENCY": ""}, [], 3, id="an empty variable is none"),
        pytest.param(
            COMPLETE.replace("= 3", "= x"), {"CONCURRENCY": "4"}, [], 4, id="what is overridden is not judged"
        ),
    ],
)
def test_the_nearest_value_counts(
    ini: Path, content: str, environ: dict[str, str], flags: list[str], workers: int
) -> None:
    assert load(ini, content, environ, *flags).run.workers == workers


def test_the_environment_alone_is_enough() -> None:
    environ = {"CTF_API_KEY": SECRET, "S3_BUCKET": "my-bucket", "SOURCE_PREFIX": "uploads/", "TARGET_FORMAT": "jpg"}
    settings = program.load_settings(None, {**environ, "CONCURRENCY": "10"}, [])
    assert (settings.s3.bucket, settings.s3.prefix, settings.s3.output_bucket) == (
        "my-bucket",
        "uploads/",
        "my-bucket",
    )
    assert (settings.api.key, settings.run.workers) == (SECRET, 10)
    assert [(job.name, job.prefix, job.target) for job in settings.jobs] == [("default", "uploads/", "jpg")]


def test_config_ini_in_the_working_directory_is_read_without_being_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.ini").write_text("[s3]\nbucket = from-file\n[convert]\ntarget = png\n", encoding="utf-8")
    assert program.load_settings(None, {"CTF_API_KEY": SECRET}, []).s3.bucket == "from-file"


def test_the_short_flags_set_the_options_that_people_change_most(ini: Path) -> None:
    flags = ["--bucket", "B", "--prefix", "P/", "--target", "png", "--limit", "7"]
    settings = load(ini, COMPLETE, None, *flags)
    assert (settings.s3.bucket, settings.s3.prefix, settings.api.max_conversions) == ("B", "P/", 7)
    assert settings.jobs[0].target == "png"


@pytest.mark.parametrize("assignment", ["workers=3", "run.workers", "run workers=3", "=", ".x=1", "run.=1"])
def test_a_set_without_section_option_and_value_is_refused(ini: Path, assignment: str) -> None:
    expected = f"--set {assignment}: expected SECTION.OPTION=VALUE"
    assert complaint(ini, COMPLETE, None, "--set", assignment) == expected


def test_a_set_may_have_any_character_in_its_value(ini: Path) -> None:
    assert load(ini, COMPLETE, None, "--set", "s3.prefix=a=b.c\n%").s3.prefix == "a=b.c\n%"


########################################################################
# What is said
########################################################################


def test_all_problems_are_named_together(ini: Path) -> None:
    content = (
        "[s3]\nbuket = b\n[rnu]\nworkers = 3\n[convert]\ntarget = .j p g\n[run]\nworkers = ten\nwokers = 3\n"
        "[job a]\nworkers = 1\n"
    )
    assert complaint(ini, content) == (
        "the file has 8 problems\n"
        "  - [s3] buket is not an option; did you mean bucket?\n"
        "  - [rnu] is not a section; did you mean run?\n"
        "  - [convert] target = .j p g: expected a file extension such as jpg or pdf\n"
        "  - [run] workers = ten: expected a whole number from 1 to 1000\n"
        "  - [run] wokers is not an option; did you mean workers?\n"
        "  - [job a] workers is not an option; did you mean [run] workers?\n"
        "  - [s3] bucket is missing\n"
        "  - [api] key is missing: set CTF_API_KEY, or api.key or api.key_file"
    )


def test_nothing_at_all_names_what_is_required() -> None:
    with pytest.raises(program.RunError) as refused:
        program.load_settings(None, {}, [])
    assert refused.value.hint == HINT
    assert refused.value.message == (
        "the configuration has 3 problems\n"
        "  - [s3] bucket is missing\n"
        "  - [convert] target is missing\n"
        "  - [api] key is missing: set CTF_API_KEY, or api.key or api.key_file"
    )


@pytest.mark.parametrize(
    ("environ", "flags", "expected"),
    [
        ({"CONCURRENCY": "ten"}, [], "CONCURRENCY ([run] workers) = ten: expected a whole number from 1 to 1000"),
        ({}, ["--workers", "0"], "--workers ([run] workers) = 0: expected a whole number from 1 to 1000"),
        ({"TARGET_FORMAT": "a b"}, [], f"TARGET_FORMAT ([convert] target) = a b: {AN_EXTENSION}"),
        ({}, ["--limit", "0"], "--limit ([api] max_conversions) = 0: expected a whole number of 1 or more, or none"),
        ({}, ["--set", "run.wokers=1"], "--set run.wokers is not an option; did you mean workers?"),
        ({}, ["--set", "s3.output_key=x"], f"--set s3.output_key = x: {SAME_KEY}"),
        ({"CTF_API_KEY": "two words"}, [], f"CTF_API_KEY ([api] key) = (not shown): {NO_SPACES}"),
    ],
)
def test_a_problem_names_the_place_where_the_value_was_given(
    ini: Path, environ: dict[str, str], flags: list[str], expected: str
) -> None:
    # The file is not to blame, and not named.
    assert complaint(ini, COMPLETE, environ, *flags) == f"the configuration has 1 problem\n  - {expected}"


def test_the_file_is_named_if_one_of_the_problems_is_in_it(ini: Path) -> None:
    said = complaint(ini, COMPLETE.replace("= 3", "= three"), {"TARGET_FORMAT": "a b"})
    assert said.startswith("the file has 2 problems\n")


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        pytest.param("[aip]\nx = 1\n", "[aip] is not a section; did you mean api?", id="section"),
        pytest.param("[zzz]\nx = 1\n", f"[zzz] {NO_SECTION}", id="far"),
        pytest.param("[job]\nx = 1\n", f"[job] {NO_SECTION}", id="job"),
        pytest.param("[DEFAULT]\nx = 1\n", f"[DEFAULT] {NO_SECTION}", id="default"),
        pytest.param("[aip]\n", "[aip] is not a section; did you mean api?", id="an empty section"),
        pytest.param("[API]\nurl = x\n", "[API] is not a section; did you mean api?", id="another case"),
        pytest.param("timeout = 9s\n", "[run] timeout is not an option; did you mean [api] timeout?", id="elsewhere"),
        pytest.param("chekpoint = x\n", "[run] chekpoint is not an option; did you mean checkpoint?", id="option"),
        pytest.param("[job a]\nprefixx = x\n", "[job a] prefixx is not an option; did you mean prefix?", id="in a job"),
    ],
)
def test_an_unknown_name_is_an_error_that_says_what_was_probably_meant(ini: Path, added: str, expected: str) -> None:
    assert problems(ini, COMPLETE + added) == [expected]


def test_an_unknown_section_with_many_options_is_named_once(ini: Path) -> None:
    assert len(problems(ini, COMPLETE + "[aip]\nx = 1\ny = 2\nz = 3\n")) == 1


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "out/{stm}{name}",
            ["--set s3.output_key = out/{stm}{name}: {stm} is not a field; did you mean stem?"],
        ),
        (
            "out/{dir}x.{target}",
            [f"--set s3.output_key = out/{{dir}}x.{{target}}: {SAME_KEY}"],
        ),
    ],
)
def test_a_template_that_cannot_work_is_refused(ini: Path, template: str, expected: list[str]) -> None:
    assert problems(ini, COMPLETE, "--set", f"s3.output_key={template}") == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("/out/{key}", "expected a key such as converted/{dir}{stem}.{target}"),
        ("out/{stem}.{target", "expected a key such as converted/{dir}{stem}.{target}"),
        ("out/{{stem}}", "expected a key such as converted/{dir}{stem}.{target}"),
        ("s3://b/{key}", "give only what follows the bucket"),
        ("'{key}'", "expected the beginning of a key; take the quotes away"),
    ],
)
def test_a_template_that_is_meant_for_another_program_is_refused(ini: Path, template: str, expected: str) -> None:
    jobs = f"[job a]\noutput_key = {template}\n"
    assert problems(ini, COMPLETE + jobs) == [f"[job a] output_key = {template}: {expected}"]


def test_ages_that_no_object_can_have_are_refused(ini: Path) -> None:
    (said,) = problems(ini, COMPLETE + "[job a]\nnewer_than = 1h\nolder_than = 2h\n")
    assert (said[:8], "newer_than" in said, "older_than" in said) == ("[job a] ", True, True)
    assert load(ini, COMPLETE + "[job a]\nnewer_than = 2h\nolder_than = 1h\n").jobs


def test_a_prefix_under_the_outputs_is_refused_in_the_same_bucket_only(ini: Path) -> None:
    expected = (
        "--prefix ([s3] prefix) = converted/a: lies under the outputs (converted/), and outputs are never converted"
    )
    assert problems(ini, COMPLETE, "--prefix", "converted/a") == [expected]
    assert load(ini, COMPLETE, None, "--prefix", "converted/a", "--set", "s3.output_bucket=other").jobs


def test_a_prefix_under_another_job_s_outputs_is_refused_with_both_their_names(ini: Path) -> None:
    jobs = "[job a]\noutput_key = small/{stem}.{target}\n[job b]\nprefix = small/in/\n"
    expected = "[job b] prefix = small/in/: lies under the outputs of [job a] (small/), and outputs are never converted"
    assert problems(ini, COMPLETE + jobs) == [expected]
    assert load(ini, COMPLETE + jobs, None, "--set", "s3.output_bucket=other").jobs


def test_a_prefix_is_named_where_it_was_given(ini: Path) -> None:
    lies = "lies under the outputs (converted/), and outputs are never converted"
    shared = COMPLETE.replace("[convert]", "prefix = converted/\n[convert]")
    assert problems(ini, shared + "[job a]\n[job b]\n") == [f"[s3] prefix = converted/: {lies}"]
    own = "[job a]\n[job b]\nprefix = converted/\n"
    assert problems(ini, COMPLETE + own) == [f"[job b] prefix = converted/: {lies}"]


@pytest.mark.parametrize("flags", [("--bucket", ""), ("--set", "s3.bucket=")])
def test_a_bucket_that_is_taken_away_is_missing(ini: Path, flags: tuple[str, str]) -> None:
    assert problems(ini, COMPLETE, *flags) == ["[s3] bucket is missing"]


@pytest.mark.parametrize("name", ["", ".", "/", "/dev", "/dev/null"])
def test_a_checkpoint_is_a_file(ini: Path, name: str) -> None:
    expected = f"--set run.checkpoint = {name}: expected the path of a file"
    assert problems(ini, COMPLETE, "--set", f"run.checkpoint={name}") == [expected]


def test_no_checkpoint_is_made_of_a_file_that_is_read(ini: Path) -> None:
    (said,) = problems(ini, COMPLETE, "--set", f"run.checkpoint={ini}")
    assert said.endswith("is the configuration file as well; give it another path")


def test_a_job_s_name_is_text(ini: Path) -> None:
    (said,) = problems(ini, COMPLETE, "--set", "job \udcff.target=jpg")
    assert said.endswith("expected a name in UTF-8; check the terminal's locale")


@pytest.mark.parametrize("option", ["run.failures", "run.summary", "run.metrics"])
def test_no_file_is_written_over_the_checkpoint_under_another_name(ini: Path, option: str) -> None:
    (ini.parent / "link").symlink_to("kept.sqlite3")
    told = "is the checkpoint file as well; give it another path"
    for name in (ini.parent / "link", ini.parent / "x" / ".." / "kept.sqlite3"):
        flags = ("--set", f"run.checkpoint={ini.parent}/kept.sqlite3", "--set", f"{option}={name}")
        assert problems(ini, COMPLETE, *flags) == [f"--set {option} = {name}: {told}"]


@pytest.mark.parametrize("flags", [("--prefix", "2024 "), ("--set", "s3.prefix=2024 "), ("--prefix", "2024 \n")])
def test_a_space_at_the_end_of_a_prefix_on_the_command_line_is_a_part_of_it(ini: Path, flags: tuple[str, str]) -> None:
    assert load(ini, COMPLETE, None, *flags).s3.prefix == "2024 "


########################################################################
# The file
########################################################################


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param("[s3]\nbucket = a\nbucket = b\n", ", line 3: [s3] bucket is given twice", id="option twice"),
        pytest.param("[s3]\nbucket = a\n[s3]\nprefix = b\n", ", line 3: [s3] is there twice", id="section twice"),
        pytest.param("[s3]\nbucket\n", ", line 2: expected NAME = VALUE", id="no equals sign"),
        pytest.param("bucket = b\n", ", line 1: no [section] above it; begin with [s3]", id="no section"),
        pytest.param(b"[s3]\nbucket = \xff\n", f" cannot be read: {NOT_UTF_8}", id="latin-1"),
        pytest.param("[s3]\nbucket = b\n".encode("utf-16-le"), " cannot be read: it is no text in UTF-8", id="utf-16"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_line(ini: Path, content: str | bytes, expected: str) -> None:
    assert complaint(ini, content) == f"the file{expected}"


def test_a_file_that_is_asked_for_must_exist(ini: Path) -> None:
    with pytest.raises(program.RunError) as refused:
        program.load_settings(ini, {}, [])
    assert refused.value.message == f"{ini} does not exist"
    assert refused.value.hint == "give the INI file with -c, or copy config.example.ini"


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(program.RunError, match="is a directory"):
        program.load_settings(tmp_path, {}, [])


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(ini: Path) -> None:
    content = b"\xef\xbb\xbf" + COMPLETE.replace("\n", "\r\n").encode()
    assert load(ini, content).s3.bucket == "b"


def test_a_value_may_go_on_over_several_lines(ini: Path) -> None:
    content = COMPLETE.replace("target = jpg\n", "target = jpg\ninclude =\n    *.heic\n    *.png\n")
    assert load(ini, content).jobs[0].include == ("*.heic", "*.png")


########################################################################
# Jobs
########################################################################

TWO_JOBS = COMPLETE + "[job photos]\ninclude = *.heic\nprefix = p/\n[job documents]\ntarget = pdf\nquality = 50\n"


def test_each_job_overrides_what_all_share(ini: Path) -> None:
    documents, photos = load(ini, TWO_JOBS.replace("jpg\n", "jpg\nmin_size = 1KB\n")).jobs
    assert (documents.name, documents.prefix, documents.target) == ("documents", "", "pdf")
    assert (documents.include, documents.quality) == (("*",), 50)
    assert (photos.name, photos.prefix, photos.target) == ("photos", "p/", "jpg")
    assert (photos.include, photos.quality) == (("*.heic",), None)
    assert photos.min_size == documents.min_size == 1000


def test_a_job_that_overrides_nothing_is_a_job_all_the_same(ini: Path) -> None:
    assert [job.name for job in load(ini, TWO_JOBS + "[job rest]\n").jobs] == ["documents", "photos", "rest"]


def test_a_job_without_any_target_is_named(ini: Path) -> None:
    content = TWO_JOBS.replace("target = jpg", "")
    assert problems(ini, content) == ["[job photos] target is missing"]


@pytest.mark.parametrize("sections", [("photos", "photos "), ("photos", " photos"), ("", "")], ids=repr)
def test_two_jobs_have_two_names_and_each_has_one(ini: Path, sections: tuple[str, str]) -> None:
    first, second = (f"[job {name}]" for name in sections)
    (said,) = problems(ini, COMPLETE + "".join(f"{each}\ntarget = jpg\n" for each in sorted({first, second})))
    again, nameless = "there is a job of this name already", "a job needs a name, such as [job photos]"
    assert said.startswith((f"{first}: {again}", f"{second}: {again}") if any(sections) else f"{first}: {nameless}")


def test_a_job_on_the_command_line_has_no_other_s_name(ini: Path) -> None:
    (said,) = problems(ini, TWO_JOBS, "--set", "job photos .target=png")
    assert "there is a job of this name already" in said


def test_a_wrong_value_in_a_job_is_named_with_the_job(ini: Path) -> None:
    expected = "[job photos] quality = 0: expected a whole number from 1 to 100, or none"
    assert problems(ini, TWO_JOBS.replace("prefix", "quality = 0\nprefix")) == [expected]


def test_a_job_can_be_changed_from_the_command_line(ini: Path) -> None:
    photos = load(ini, TWO_JOBS, None, "--set", "job photos.target=png").jobs[1]
    assert (photos.name, photos.target, photos.include) == ("photos", "png", ("*.heic",))


def test_the_fingerprint_of_a_job_is_of_what_it_makes_not_of_its_name_nor_of_where_that_lies(ini: Path) -> None:
    usual = load(ini, COMPLETE).jobs[0]
    named = load(ini, COMPLETE + "[job x]\ninclude = *.png\n").jobs[0]
    assert (named.fingerprint, named.place) == (usual.fingerprint, usual.place)
    for flag in ("convert.target=png", "convert.quality=5"):
        assert load(ini, COMPLETE, None, "--set", flag).jobs[0].fingerprint != usual.fingerprint
    for flag in ("s3.output_key={key}", "s3.output_key={job}/{key}"):
        moved = load(ini, COMPLETE, None, "--set", flag).jobs[0]
        assert (moved.fingerprint, moved.place != usual.place) == (usual.fingerprint, True)


def test_the_name_of_a_job_is_a_part_of_its_place_only_where_the_template_has_it(ini: Path) -> None:
    template = "[s3]\nbucket = b\noutput_key = {job}/{key}.{target}\n"
    jobs = load(ini, COMPLETE.replace("[s3]\nbucket = b\n", template) + "[job x]\n[job y]\n").jobs
    assert [job.place for job in jobs] == ["x/{key}.{target}", "y/{key}.{target}"]


########################################################################
# Secrets
########################################################################


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(f"[api]\nkey = two words {SECRET}\n", id="a bad key"),
        pytest.param(f"[api]\nkey = {SECRET}é\n", id="not ascii"),
        pytest.param(f"[api]\nkey {SECRET}\n", id="no equals sign"),
        pytest.param(f"key = {SECRET}\n", id="no section"),
        pytest.param(f"[api]\nkey = {SECRET}\nkey = {SECRET}\n", id="twice"),
        pytest.param(f"[api]\nkeey = {SECRET}\n", id="a misspelt name"),
        pytest.param(f"[apy]\nkey = {SECRET}\n", id="a misspelt section"),
    ],
)
def test_a_key_is_never_in_a_message(ini: Path, content: str) -> None:
    assert SECRET not in complaint(ini, content)


def test_a_bad_key_from_the_command_line_or_environment_is_not_shown(ini: Path) -> None:
    expected = "--set api.key = (not shown): expected printable ASCII without spaces"
    assert problems(ini, COMPLETE, "--set", f"api.key={SECRET} x") == [expected]
    assert SECRET not in complaint(ini, COMPLETE, {"CTF_API_KEY": f"{SECRET} x"})


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_file_with_a_key_that_others_can_read_is_refused(ini: Path, mode: int) -> None:
    ini.write_text(COMPLETE, encoding="utf-8")
    ini.chmod(mode)
    with pytest.raises(program.RunError) as refused:
        program.load_settings(ini, {}, [])
    assert refused.value.message == f"{ini} holds the API key and others can read it (mode {mode:04o})"
    assert refused.value.hint == f"run: chmod 600 {ini}"


def test_a_file_without_a_key_may_be_read_by_others(ini: Path) -> None:
    ini.write_text(COMPLETE.replace("key =", "#"), encoding="utf-8")
    ini.chmod(0o644)
    assert program.load_settings(ini, {"CTF_API_KEY": SECRET}, []).api.key == SECRET


WITH_KEY_FILE = COMPLETE.replace("key = ctf_sk_1", "key_file = secret.txt")


def test_a_key_is_read_from_its_file(ini: Path) -> None:
    Path("secret.txt").write_text(f"{SECRET}\n", encoding="ascii")
    assert load(ini, WITH_KEY_FILE).api.key == SECRET
    assert load(ini, WITH_KEY_FILE, {"CTF_API_KEY": "nearer"}).api.key == "nearer"


def test_a_key_file_may_be_in_the_home_directory(ini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(ini.parent))
    Path("secret.txt").write_text(SECRET, encoding="ascii")
    assert load(ini, WITH_KEY_FILE.replace("secret", "~/secret")).api.key == SECRET


def test_a_key_file_that_is_not_there_is_named(ini: Path) -> None:
    assert problems(ini, WITH_KEY_FILE) == ["[api] key_file = secret.txt: No such file or directory"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "[api] key_file = secret.txt: the file is empty"),
        (b"\n \n", "[api] key_file = secret.txt: the file is empty"),
        (b"ctf_sk_1\nctf_sk_2\n", "[api] key_file = secret.txt: expected the key and nothing else"),
        (b"\x89PNG", "[api] key_file = secret.txt: not a text file"),
    ],
)
def test_a_key_file_that_holds_no_key_is_refused(ini: Path, content: bytes, expected: str) -> None:
    Path("secret.txt").write_bytes(content)
    assert problems(ini, WITH_KEY_FILE) == [expected]
