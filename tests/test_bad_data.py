"""Whatever is wrong with data is said, or masked as documented, and no parameter becomes NaN."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jaxtyping
import pytest
import torch
from conftest import Note
from test_training import SHORT, TASKS, pair, state
from torch import Tensor
from toys import Line, with_query

import pyro_hybrid as ph
from pyro_hybrid.programs.module import local_parameters

GOOD = TASKS.episode()
TIMES, VALUES = TASKS.times, TASKS.values


def spoilt(value: float) -> Tensor:
    values = VALUES.clone()
    values[3, 1, 2] = value
    return values


def still() -> Tensor:
    values = VALUES.clone()
    values[3] = 0.5
    return values


def hidden() -> Tensor:
    mask = torch.ones_like(VALUES, dtype=torch.bool)
    mask[3] = False
    return mask


# What is wrong, and the words that must come back from a data set; and, where they differ, from an episode.
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "NaN": (
        {"values": spoilt(torch.nan)},
        r"expected finite values; got nan at index .* in task 3\)",
        "",
    ),
    "Inf": (
        {"values": spoilt(-torch.inf)},
        r"expected finite values; got -inf at index .* in task 3\)",
        "",
    ),
    "1e30": (
        {"values": spoilt(1e30)},
        r"at most 1e\+15, to be squared; got 1e\+30 at .* in task 3\)",
        "",
    ),
    "an empty support": (
        {"num_support": 0},
        r"num_support from 1 to 3 .*The support can't be empty",
        "one task and one shot or more; got 20 and 0. Pass at least one",
    ),
    "an empty query": (
        {"num_support": 4},
        r"num_support from 1 to 3 .*the query needs a shot too",
        "one task and one shot or more; got 20 and 0. Pass at least one",
    ),
    "one time point": (
        {"times": TIMES[:1], "values": VALUES[:, :, :1]},
        "two times or more, .*; got one",
        r"\(6, 1\); got \(1, 1\)",
    ),
    "unsorted times": (
        {"times": TIMES.flip(0)},
        "strictly increasing times; got unsorted .* Sort the times",
        "",
    ),
    "duplicate times": (
        {"times": TIMES[[0, 1, 1, 2, 3, 4]]},
        "increasing times; got .* drop duplicates",
        "",
    ),
    "times of another length": (
        {"times": TIMES[:-1]},
        r"6 times, of shape \(6,\), .*; got \(5,\)",
        r"of 5 times; got \(20, 2, 6, 1\). Give one value for each time",
    ),
    "integers": (
        {"values": (10 * VALUES).long()},
        r"in float32 or float64; got torch.int64. Convert it",
        "",
    ),
    "mixed dtypes": (
        {"values": VALUES.double()},
        r"of one dtype; got torch.float32 and torch.float64. Convert",
        "",
    ),
    "another device": (
        {"values": VALUES.to("meta")},
        "on one device; got cpu and meta. Move one of them",
        "",
    ),
    "all masked": (
        {"observed": hidden()},
        "an observation in every task; got none in task 3. Drop the task",
        "",
    ),
    "sensors that change": (
        {"values": VALUES.expand(-1, -1, -1, 2).contiguous()},
        r"trajectories of \(time, sensor\) = \(6, 1\); got \(6, 2\). Build the SetEncoder",
        "",
    ),
    "a task with no variation": ({"values": still()}, "", ""),
}
MASKED = ("all masked", "a task with no variation")  # of an episode: inferred from as it is


@pytest.fixture(scope="module")
def trained() -> tuple[Line, ph.AmortizedGuide]:
    both = pair()
    ph.meta_train(*both, TASKS, **SHORT)
    return both


@pytest.fixture(autouse=True)
def as_users_meet_it() -> Iterator[None]:
    """Without the checks of shapes and types that pytest adds."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def no_parameter_becomes_nan(trained: tuple[Line, ph.AmortizedGuide]) -> Iterator[None]:
    before = state(*trained)
    yield
    assert all(torch.equal(one, other) for one, other in zip(before, state(*trained), strict=True))
    assert all(torch.isfinite(value).all() for value in before)


def tasks(**changes: Any) -> ph.Tasks:
    return ph.Tasks.from_trajectories(
        **{"times": TIMES, "values": VALUES, "num_support": 2, **changes}
    )


def episode(
    times: Tensor = TIMES,
    values: Tensor = VALUES,
    num_support: int = 2,
    observed: Tensor | None = None,
) -> ph.Episode:
    """Put together by hand, past the checks of Tasks."""

    def part(which: slice) -> ph.Shots:
        counts = None if observed is None else observed[:, which]
        return ph.Shots.from_tensors(times, values[:, which], values[:, which, 0], observed=counts)

    return ph.Episode(part(slice(0, num_support)), part(slice(num_support, None)))


@pytest.mark.parametrize("kind", BAD)
def test_bad_data_are_not_trained_on(
    kind: str, caplog: pytest.LogCaptureFixture, figure: Note
) -> None:
    changes, words, _ = BAD[kind]
    both = pair()
    if words:
        with pytest.raises((ValueError, TypeError), match=words):
            ph.meta_train(*both, tasks(**changes), **SHORT)
    else:
        fit = ph.meta_train(*both, tasks(**changes), **SHORT)
        assert (
            fit.skipped == 0
            and "Nothing ever changes in task 3. Such a task says little" in caplog.text
        )
    assert all(torch.isfinite(value).all() for value in state(*both))
    figure("bad data", **{"errors" if words else "masks": 1}, poisoned=0)


DOORS: dict[str, Callable[..., Any]] = {
    "infer": lambda both, bad: ph.draws(*both, bad, 5)["slope"],
    "export": lambda both, bad: torch.tensor(
        ph.to_arviz(*both, bad, 5)["posterior"]["slope"].values
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", BAD)
def test_bad_data_are_not_inferred_from_and_not_exported(
    kind: str, door: str, trained: Any, figure: Note
) -> None:
    changes, words, for_episodes = BAD[kind]
    bad = episode(**changes)
    if kind in MASKED:
        found = DOORS[door](trained, bad)
        assert torch.isfinite(found).all() and found.shape[-2] == len(VALUES)
    else:
        with pytest.raises(
            (ValueError, TypeError),
            match=for_episodes or words.replace("values", "(query|support)"),
        ):
            DOORS[door](trained, bad)
    figure("bad data", **{"masks" if kind in MASKED else "errors": 1}, poisoned=0)


@pytest.mark.parametrize("evidence", [None, ph.GaussNewton(1)], ids=["learned", "computed"])
def test_where_no_observation_of_a_task_counts_its_posterior_is_its_prior(
    evidence: ph.GaussNewton | None,
) -> None:
    model, guide = pair(evidence)
    mask = torch.ones_like(GOOD.query.values, dtype=torch.bool)
    mask[3] = False
    with torch.no_grad(), local_parameters():
        posterior = guide.belief(with_query(GOOD, scored=mask)).factorized().natural["slope"]
        prior = model.with_belief(GOOD).belief.factorized().natural["slope"]
    assert torch.allclose(posterior[3], prior[3], rtol=1e-5)
    assert not torch.isclose(posterior, prior).all(-1)[:3].any()


@pytest.mark.parametrize("evidence", [None, ph.GaussNewton(1)], ids=["learned", "computed"])
@pytest.mark.parametrize("door", DOORS)
def test_whatever_stands_where_nothing_was_seen_is_not_looked_at(
    door: str, evidence: ph.GaussNewton | None
) -> None:
    both, gone = pair(evidence), torch.zeros_like(GOOD.query.values, dtype=torch.bool)
    gone[:, :, 2] = True
    clean = with_query(GOOD, scored=GOOD.query.scored & ~gone, observed=~gone)
    found = []
    for value in (0.0, torch.nan):
        torch.manual_seed(0)
        found.append(
            DOORS[door](both, with_query(clean, values=GOOD.query.values.masked_fill(gone, value)))
        )
    assert torch.isfinite(found[0]).all() and torch.equal(*found)


@pytest.mark.parametrize("door", DOORS)
def test_a_support_of_other_tasks_is_noticed(door: str, trained: Any) -> None:
    with pytest.raises(ValueError, match="a support of the same 20 tasks; got one of 5"):
        DOORS[door](trained, replace(GOOD, support=GOOD.support.select_tasks(torch.arange(5))))


def test_good_data_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        tasks()
    assert caplog.text == ""
