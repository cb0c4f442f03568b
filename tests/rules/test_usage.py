"""What the API says of the plan and the month is read whatever its fields are called: they are documented nowhere."""

from typing import Any

import pytest

import s3_bulk_convert as program
from s3_bulk_convert import Usage


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        ({"plan": "test", "conversions": {"limit": 5, "used": 1, "remaining": 4}}, Usage("test", 5, 4)),
        ({"plan": "hobby", "conversions_used": 10, "conversions_limit": 50}, Usage("hobby", 50, 40)),
        ({"plan": "free", "conversions": 12, "limit": 1000}, Usage("free", 1000, 988)),
        ({"plan": "free", "conversions": 12, "limit": 10}, Usage("free", 10, 0)),
        (
            {"plan": {"name": "p", "monthly_limit": 50, "requests_per_minute": 30}, "conversions_this_month": 2},
            Usage("p", 50, 48, 30),
        ),
        ({"data": {"plan": "x", "conversionsRemaining": "7", "rateLimit": {"limit": 30}}}, Usage("x", None, 7, 30)),
        (
            {
                "limits": {"conversions": 9, "max_file_size": 25},
                "usage": {"conversions": 1},
                "overage": {"enabled": True},
            },
            Usage(None, 9, 8, None, bills_overage=True),
        ),
        ({"plan": "s", "overage_allowed": False, "overage_price": 0.005}, Usage("s", bills_overage=False)),
        ({"requests": {"limit": 60, "remaining": 59}, "daily_limit": 3}, Usage()),
        ({"plan": 7, "conversions": [1], "limit": -1, "remaining": None, "used": True}, Usage()),
        ({}, Usage()),
    ],
)
def test_usage_is_read_under_any_name(body: dict[str, Any], usage: Usage) -> None:
    assert program.Usage.read(body) == usage
