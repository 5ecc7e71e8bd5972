"""One condition: when it holds, when it fails, when neither can be said, and what of it JSON can hold."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyro_hybrid.scores.check import Check, Status, Threshold

MORE, LESS = Threshold(holds=2.0, fails=1.0), Threshold(holds=1.0, fails=2.0, larger=False)
NAN, INF = math.nan, math.inf
numbers = st.floats(-10.0, 10.0)


@pytest.mark.parametrize(
    ("threshold", "interval", "status"),
    [
        (MORE, (2.1, 9.0), "holds"),
        (MORE, (2.1, INF), "holds"),
        (MORE, (0.1, 0.9), "fails"),
        (MORE, (-INF, 0.9), "fails"),
        (MORE, (0.1, 9.0), "undecided"),
        (MORE, (1.4, 1.6), "undecided"),  # better than what fails, worse than what holds
        (MORE, (2.0, 9.0), "undecided"),  # a margin means more than the threshold itself
        (MORE, (0.1, 1.0), "undecided"),
        (LESS, (0.1, 0.9), "holds"),
        (LESS, (-INF, 0.9), "holds"),
        (LESS, (2.1, 9.0), "fails"),
        (LESS, (2.1, INF), "fails"),
        (LESS, (0.1, 9.0), "undecided"),
        (LESS, (1.4, 1.6), "undecided"),
        (LESS, (0.1, 1.0), "undecided"),
        (LESS, (2.0, 9.0), "undecided"),
        (MORE, (NAN, 9.0), "undecided"),
        (MORE, (9.0, NAN), "undecided"),
        (LESS, (NAN, 0.1), "undecided"),
        (LESS, (0.1, NAN), "undecided"),
        (MORE, (NAN, NAN), "undecided"),
    ],
)
def test_a_yes_needs_a_margin_and_a_no_needs_evidence(
    threshold: Threshold, interval: tuple[float, float], status: Status
) -> None:
    assert threshold.judge(interval) == status


@given(numbers, numbers, numbers, numbers)
def test_less_of_a_number_is_as_good_as_more_of_its_negative(
    one: float, other: float, low: float, high: float
) -> None:
    fails, holds = sorted((one, other))
    low, high = sorted((low, high))
    more, less = Threshold(holds, fails), Threshold(-holds, -fails, larger=False)
    assert more.judge((low, high)) == less.judge((-high, -low))


@given(numbers, numbers, numbers, numbers, st.booleans())
def test_more_precision_never_turns_a_yes_into_a_no(
    one: float, other: float, low: float, high: float, larger: bool
) -> None:
    worse, better = sorted((one, other), reverse=not larger)
    low, high = sorted((low, high))
    threshold, middle = Threshold(better, worse, larger), 0.5 * (low + high)
    before, after = threshold.judge((low, high)), threshold.judge((middle, middle))
    assert before in (after, "undecided")


def test_a_threshold_says_what_is_wanted() -> None:
    assert (str(MORE), str(LESS), str(Threshold(1e-8, 1e-12))) == ("> 2", "< 1", "> 1e-08")


def test_a_check_that_holds_needs_no_remedy() -> None:
    good, bad, open_ = (
        Check.from_interval("c", x, (x - 0.5, x + 0.5), MORE, "why", "do this")
        for x in (3.0, 0.4, 1.5)
    )
    assert [check.status for check in (good, bad, open_)] == ["holds", "fails", "undecided"]
    assert [check.remedy for check in (good, bad, open_)] == ["", "do this", "do this"]
    assert (good.value, good.interval, good.threshold, good.why) == (3.0, (2.5, 3.5), MORE, "why")


def test_a_value_that_passes_on_its_own_is_not_enough() -> None:
    assert Check.from_interval("c", 3.0, (0.5, 4.0), MORE, "").status == "undecided"


def test_what_was_not_checked_says_why_and_measured_nothing() -> None:
    check = Check.skipped("c", "no data", "record some")
    assert (check.status, check.why, check.remedy, check.threshold) == (
        "not checked",
        "no data",
        "record some",
        None,
    )
    assert math.isnan(check.value) and all(math.isnan(x) for x in check.interval)


@pytest.mark.parametrize("odd", [NAN, INF, -INF])
def test_json_gets_none_for_what_is_no_number(odd: float) -> None:
    found = Check("c", "undecided", odd, (odd, 2.0), MORE, "why", "do this").to_dict()
    assert found["value"] is None and found["interval"] == [None, 2.0]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_json_gets_everything_else_as_it_is() -> None:
    assert Check.from_interval("c", 1.5, (1.0, 2.0), LESS, "why", "do this").to_dict() == {
        "condition": "c",
        "status": "undecided",
        "value": 1.5,
        "interval": [1.0, 2.0],
        "threshold": {"holds": 1.0, "fails": 2.0, "larger": False},
        "why": "why",
        "remedy": "do this",
    }
    assert Check.skipped("c", "why").to_dict()["threshold"] is None
