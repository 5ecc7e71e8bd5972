"""Certificate: what follows from single conditions, and what a reader and a file get to see of them."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyro_hybrid as ph
from pyro_hybrid.identifiability.certificate import HEADLINES
from pyro_hybrid.identifiability.variability import judge_too_few_tasks
from pyro_hybrid.scores.check import Check, Status, Threshold

SEEN = Threshold(holds=3.0, fails=1.0)
SPRING = Check(
    "injectivity, local (ii)",
    "fails",
    4.2e-5,
    (1.1e-6, 0.25),
    SEEN,
    "1 of 3 directions moves no observation by the noise: mass (55%), stiffness (45%)",
    "Fix or merge what only counts together (mass (55%), stiffness (45%)), drop what the field ignores, or "
    "observe more.",
)
NOISE = Check("noise (i)", "holds", why="x: Normal, exp(-σ²t²/2) is nowhere zero")
CLOSE = Check.from_interval(
    "fit", 1.234, (1.1, 1.46), Threshold(2.0, 2.0, larger=False), "errors are as large as the noise"
)
SKIPPED = Check.skipped("efficiency", "a direction isn't seen at all", "See (ii).")
WHY, GAP = 53, 2  # the texts start so far behind the names; between columns


def made(*statuses: Status, further: tuple[Status, ...] = ()) -> ph.Certificate:
    return ph.Certificate(
        [Check(f"condition {i}", status) for i, status in enumerate(statuses)],
        [Check(f"more {i}", status) for i, status in enumerate(further)],
    )


def spring(**changes: object) -> ph.Certificate:
    return ph.Certificate(
        **{
            "conditions": [NOISE, CLOSE, SPRING],
            "further": [SKIPPED],
            "systems": 1000,
            "shots": 4,
            "seconds": 12.34,
            **changes,
        }
    )


def rows(text: str) -> dict[str, list[str]]:
    """The lines of each check, by its name: the first one, and those without a name below it."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines()[4:]:
        if line and not line.startswith(" "):
            found[re.split(r"  +", line)[0]] = [line]
        elif line:
            list(found.values())[-1].append(line)
    return found


def said(lines: list[str], name: int) -> str:
    """Everything in the last column, as one text."""
    return " ".join(line[name + WHY :].strip() for line in lines)


# ---- the verdict ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        (("holds", "holds", "holds"), "holds"),
        (("holds", "fails", "holds"), "fails"),
        (("undecided", "fails", "not checked"), "fails"),
        (("holds", "undecided", "holds"), "undecided"),
        (("holds", "holds", "not checked"), "undecided"),
        (("not checked",), "undecided"),
        ((), "undecided"),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value) or "none",
)
def test_all_must_hold_one_may_refuse_and_what_is_not_known_decides_nothing(
    statuses: tuple[Status, ...], verdict: Status
) -> None:
    assert made(*statuses).verdict == verdict


@pytest.mark.parametrize("further", ["holds", "fails", "undecided", "not checked"])
@pytest.mark.parametrize("condition", ["holds", "fails", "undecided"])
def test_what_is_beyond_the_theorem_does_not_decide(condition: Status, further: Status) -> None:
    assert made(condition, further=(further,)).verdict == condition


def test_a_certificate_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        made("fails").conditions = []


# ---- on the screen -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "word"), [("holds", "Certified"), ("fails", "REFUSED"), ("undecided", "Undecided")]
)
def test_the_first_lines_are_the_verdict_and_what_it_rests_on(status: Status, word: str) -> None:
    check = Check("only", status)
    lines = str(ph.Certificate([check], systems=1000, shots=4, seconds=12.34)).splitlines()
    assert lines[:3] == [HEADLINES[status], "(1000 systems, supports of 4 shots; 12 s)", ""]
    assert lines[0].startswith(f"{word}: ") and lines[3].startswith("condition")


def test_one_system_with_one_shot_is_told_in_the_singular() -> None:
    assert "(1 system, supports of 1 shot; 0 s)" in str(ph.Certificate([NOISE], systems=1, shots=1))


def test_every_check_has_a_row_in_order_and_the_further_ones_a_heading() -> None:
    text = str(spring())
    assert list(rows(text)) == [
        "noise (i)",
        "fit",
        "injectivity, local (ii)",
        "beyond the theorem",
        "efficiency",
    ]
    assert re.split(r"  +", text.splitlines()[3]) == [
        "condition",
        "verdict",
        "value [95%]",
        "wanted",
        "why, and what to do",
    ]


def test_without_further_checks_there_is_no_heading_for_them() -> None:
    assert "beyond the theorem" not in str(spring(further=()))
    assert list(rows(str(spring(further=())))) == ["noise (i)", "fit", "injectivity, local (ii)"]


def test_only_what_fails_is_in_capitals() -> None:
    text = str(made("holds", "fails", "undecided", "not checked", further=("fails", "holds")))
    verdicts = {
        name: re.split(r"  +", lines[0])[1]
        for name, lines in rows(text).items()
        if "theorem" not in name
    }
    assert verdicts == {
        "condition 0": "holds",
        "condition 1": "FAILS",
        "condition 2": "undecided",
        "condition 3": "not checked",
        "more 0": "FAILS",
        "more 1": "holds",
    }


def test_a_row_shows_value_interval_threshold_and_why() -> None:
    found, name = rows(str(spring())), len(SPRING.condition)
    assert re.split(r"  +", found["fit"][0]) == [
        "fit",
        "holds",
        "1.23 [1.1, 1.5]",
        "< 2",
        "errors are as large as the noise",
    ]
    assert re.split(r"  +", found[SPRING.condition][0])[:4] == [
        SPRING.condition,
        "FAILS",
        "4.2e-05 [1.1e-06, 0.25]",
        "> 3",
    ]
    assert said(found[SPRING.condition], name).startswith(SPRING.why)
    assert re.split(r"  +", found["noise (i)"][0]) == ["noise (i)", "holds", NOISE.why]


def test_a_remedy_stands_behind_an_arrow_below_the_why() -> None:
    lines, name = rows(str(spring()))[SPRING.condition], len(SPRING.condition)
    arrows = [i for i, line in enumerate(lines) if line[name + WHY :].startswith("-> ")]
    assert len(arrows) == 1 and said(lines[: arrows[0]], name) == SPRING.why
    assert said(lines[arrows[0] :], name) == f"-> {SPRING.remedy}"
    assert len(lines) > arrows[0] + 1
    assert all(line[: name + WHY + 3].isspace() for line in lines[arrows[0] + 1 :])


def test_without_a_remedy_there_is_no_arrow() -> None:
    assert "->" not in str(ph.Certificate([NOISE, CLOSE])) and "->" in str(
        ph.Certificate([NOISE, SKIPPED])
    )


@pytest.mark.parametrize(
    ("value", "interval", "shown"),
    [
        (0.5, (0.5, 0.5), "0.5"),  # known exactly
        (0.5, (math.nan, math.nan), "0.5"),
        (0.124, (0.1201, 0.1199), "0.124"),  # known to more digits than are shown
        (math.inf, (12.0, math.inf), "inf [12, inf]"),
        (1234.5678, (987.6, 20123.0), "1235 [988, 20123]"),
        (3.7e6, (1.2e5, 4.3e7), "3.7e+06 [1.2e+05, 4.3e+07]"),
        (-0.3141, (-0.4, 1.0), "-0.314 [-0.4, 1]"),
    ],
    ids=["exact", "no interval", "narrow", "infinite", "hundreds", "millions", "negative"],
)
def test_numbers_are_as_long_as_they_need_be(
    value: float, interval: tuple[float, float], shown: str
) -> None:
    row = rows(str(ph.Certificate([Check("fit", "undecided", value, interval, SEEN, "why")])))[
        "fit"
    ][0]
    assert re.split(r"  +", row)[2] == shown


def test_what_there_is_to_say_of_too_few_tasks_can_be_printed() -> None:
    text = str(ph.Certificate(judge_too_few_tasks(8, 5)))
    assert re.split(r"  +", rows(text)["variability (iv)"][0])[:4] == [
        "variability (iv)",
        "FAILS",
        "5",
        "> 8",
    ]


@given(
    value=st.floats(-1e300, 1e30),
    low=st.floats(-1e300, 1e30),
    wanted=st.sampled_from([1e-8, 1.23e-108]),
    words=st.lists(
        st.sampled_from(["a", "natural", "unknown[12]: log² z (34%),", "x" * 70]), max_size=30
    ),
    name=st.sampled_from(["fit", "ambiguity against restart 12"]),
)
def test_no_line_is_longer_than_120_characters(
    value: float, low: float, wanted: float, words: list[str], name: str
) -> None:
    text = " ".join(words)
    for verdict in HEADLINES:
        check = Check(name, verdict, value, (low, math.inf), Threshold(wanted, 0.0), text, text)
        shown = str(
            ph.Certificate([check], [check._replace(status="not checked")], {}, 1000, 10, 432.1)
        )
        assert shown.startswith(HEADLINES[verdict]) and max(map(len, shown.splitlines())) <= 120, (
            shown
        )


def test_a_row_that_is_too_full_keeps_its_columns_and_wraps_the_why() -> None:
    full = SPRING._replace(
        value=-1.234e-100, interval=(-1.2e-100, -1.1e-101), threshold=Threshold(-1.23e-100, 0.0)
    )
    lines = rows(str(ph.Certificate([full])))[SPRING.condition]
    start = len(SPRING.condition) + WHY
    assert re.split(r"  +", lines[0])[2:4] == ["-1.23e-100 [-1.2e-100, -1.1e-101]", "> -1.23e-100"]
    assert all(line[:start].isspace() for line in lines[1:])
    assert max(map(len, lines)) <= 118


def test_what_the_checks_looked_at_is_not_printed() -> None:
    numbers = {"reading": "every natural parameter of every task"}
    certificate = ph.Certificate([NOISE], numbers=numbers)
    assert certificate.numbers == numbers
    assert all("natural parameter" not in text for text in (str(certificate), repr(certificate)))


# ---- one by one, and in a file -------------------------------------------------------------------


def test_a_check_is_found_by_the_beginning_of_its_name() -> None:
    certificate = spring()
    assert certificate["injectivity"] is SPRING and certificate["injectivity, local (ii)"] is SPRING
    assert certificate["efficiency"] is SKIPPED  # one of the further ones
    assert (
        spring(conditions=[CLOSE, *judge_too_few_tasks(8, 5)])["variability (iv)"].condition
        == "variability (iv)"
    )


def test_a_name_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(
        KeyError,
        match=r"'local' isn't among \['noise \(i\)', 'fit', 'injectivity, local \(ii\)', "
        r"'efficiency'\]",
    ):
        spring()["local"]


def test_a_file_holds_everything_that_was_judged() -> None:
    found = json.loads(json.dumps(spring().to_dict(), allow_nan=False))
    assert set(found) == {"verdict", "systems", "shots", "seconds", "conditions", "further"}
    assert (found["verdict"], found["systems"], found["shots"], found["seconds"]) == (
        "fails",
        1000,
        4,
        12.3,
    )
    assert [check["condition"] for check in found["conditions"]] == [
        "noise (i)",
        "fit",
        "injectivity, local (ii)",
    ]
    assert found["conditions"][2] == {
        "condition": SPRING.condition,
        "status": "fails",
        "value": 4.2e-5,
        "interval": [1.1e-6, 0.25],
        "threshold": {"holds": 3.0, "fails": 1.0, "larger": True},
        "why": SPRING.why,
        "remedy": SPRING.remedy,
    }
    assert found["further"] == [
        {
            "condition": "efficiency",
            "status": "not checked",
            "value": None,
            "interval": [None, None],
            "threshold": None,
            "why": SKIPPED.why,
            "remedy": "See (ii).",
        }
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64(0.25)])
def test_a_file_holds_any_number_or_nothing_in_its_place(value: float) -> None:
    check = Check("fit", "undecided", value, (value, np.float64(np.inf)), SEEN)
    found = json.loads(json.dumps(ph.Certificate([check]).to_dict(), allow_nan=False))[
        "conditions"
    ][0]
    expected = float(value) if math.isfinite(value) else None
    assert found["value"] == expected and found["interval"] == [expected, None]
