"""With `--log-format json`, stderr is one JSON object a line with stable keys, and stdout the summary as one."""

import json
import logging

import s3_bulk_convert as program


def test_a_secret_breaks_no_line_and_is_in_none() -> None:
    secret = 'see "https://example.com/a?X-Amz-Signature=0123456789abcdef" and ctf_sk_test_1\nor'
    record = logging.LogRecord("s3_bulk_convert", logging.INFO, "", 0, "%s", (secret,), None)
    record.__dict__.update(event="error", fields={"hint": secret, "exit_code": 2})
    said = program.ConsoleHandler(quiet=False, verbose=False, as_json=True).format(record)
    assert "\n" not in said
    hidden = 'see "https://example.com/a?..." and ctf_...\nor'
    assert (json.loads(said)["message"], json.loads(said)["hint"]) == (hidden, hidden)


def test_a_line_is_json_in_every_locale() -> None:
    # What a terminal cannot show is escaped on its way out, and Python's escapes are not those of JSON.
    record = logging.LogRecord("s3_bulk_convert", logging.INFO, "", 0, "%s", ("Zürich \U0001f30a.png",), None)
    said = program.ConsoleHandler(quiet=False, verbose=False, as_json=True).format(record)
    assert said.isascii()
    assert json.loads(said)["message"] == "Zürich \U0001f30a.png"
