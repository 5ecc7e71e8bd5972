"""Shots: clocks and lengths of their own, inputs, unmeasured starts, and data that don't move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from toys import Line, in_float32, make_tasks

import pyro_hybrid as ph
from pyro_hybrid import Episode, Shots, Tasks
from pyro_hybrid.data.segments import select_segments, to_segments, truncate
from pyro_hybrid.data.validate_episode import check_episode
from pyro_hybrid.inference.intervals import measure_interval_scale

T, SHOTS, POINTS = 3, 4, 9
COMMON = torch.linspace(0.0, 2.0, POINTS)
BY_SHOT = COMMON + torch.arange(float(SHOTS)).unsqueeze(-1)
BY_TASK = BY_SHOT * torch.tensor([1.0, 2.0, 3.0]).view(-1, 1, 1)
CLOCKS = {"common": COMMON, "by shot": BY_SHOT, "by task and shot": BY_TASK}
every_clock = pytest.mark.parametrize("clock", CLOCKS)
own_clocks = pytest.mark.parametrize("clock", ["by shot", "by task and shot"])


def values_of(times: Tensor) -> Tensor:
    """Values that tell the time, in tasks and shots that differ."""
    clocks = times.expand(T, SHOTS, -1)
    number = torch.arange(float(T * SHOTS)).view(T, SHOTS, 1)
    return torch.stack([clocks, 100.0 * number + clocks], -1)


def make(clock: str = "by task and shot", **options: Any) -> Tasks:
    times = CLOCKS[clock]
    return Tasks.from_trajectories(times, values_of(times), **{"num_support": 2} | options)


def assert_times_fit(shots: Shots) -> None:
    """The first sensor shows the time."""
    assert torch.equal(shots.expanded_times, shots.values[..., 0])


# ------------------------------------------------------------------------------------------------ clocks


@every_clock
def test_times_follow_their_trajectories_through_tasks_and_episodes(clock: str) -> None:
    tasks = make(clock)
    episode = tasks.episode()
    parts = [tasks.shots(), tasks.shots(slice(1, 3)), episode.support, episode.query]
    parts += [tasks[1:].shots(), tasks[torch.tensor([2, 0])].shots()]
    for batch in islice(tasks.batches(2, seed=0), 5):
        parts += [batch.support, batch.query, batch.select_tasks(1).query, batch.double().query]
    for shots in parts:
        assert_times_fit(shots)
        assert_times_fit(shots.sorted_shots)


@every_clock
@pytest.mark.parametrize("num_intervals", [1, 3, 4])
def test_times_follow_their_trajectories_through_segments(clock: str, num_intervals: int) -> None:
    shots = make(clock).episode().query
    segments = to_segments(shots, num_intervals)
    parts = [segments, segments.sorted_shots, truncate(shots, num_intervals)]
    parts.append(select_segments(segments, torch.tensor([1, 0])))
    parts.append(to_segments(truncate(shots, 6), num_intervals))
    for part in parts:
        assert_times_fit(part)
        assert part.expanded_times.shape[:2] == part.shape


@own_clocks
def test_sorting_does_not_depend_on_the_order_of_shots(clock: str) -> None:
    shots = make(clock).shots()
    order = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3], [2, 3, 1, 0]])
    one, other = shots.sorted_shots, shots.select_shots(order).sorted_shots
    for name in ("times", "values", "scored", "initial", "states"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_equal_values_with_different_clocks_are_sorted_by_their_clocks() -> None:
    clocks = BY_SHOT.flip(0)
    shots = Shots.from_tensors(clocks, torch.zeros(T, SHOTS, POINTS, 1))
    assert torch.equal(shots.sorted_shots.times, BY_SHOT.expand(T, SHOTS, POINTS))


def test_equal_clocks_give_what_a_common_clock_gives() -> None:
    values = torch.randn(T, SHOTS, POINTS, 2)
    one, other = (
        Tasks.from_trajectories(times, values, num_support=2)
        for times in (COMMON, COMMON.expand(T, SHOTS, POINTS))
    )
    pairs = zip(islice(one.batches(2, 0), 4), islice(other.batches(2, 0), 4), strict=True)
    for a, b in pairs:
        for name in ("values", "scored", "initial", "states"):
            assert torch.equal(getattr(a.query, name), getattr(b.query, name)), name
        assert torch.equal(a.query.expanded_times, b.query.times)


def test_gaps_are_filled_by_the_clock_of_their_own_trajectory() -> None:
    times = torch.tensor([[0.0, 1.0, 4.0], [0.0, 3.0, 4.0]])
    values = times.view(1, 2, 3, 1).clone()
    observed = torch.ones(1, 2, 3, 1, dtype=torch.bool)
    observed[:, :, 1] = False
    tasks = Tasks.from_trajectories(
        times, values.where(observed, torch.nan), num_support=1, observed=observed
    )
    assert_close(tasks.states, values)


@pytest.mark.usefixtures("without_jaxtyping")
@pytest.mark.parametrize(
    "times",
    [BY_SHOT[:2], BY_TASK[:2], BY_TASK[:, :2], BY_TASK[:, :1], COMMON[1:], BY_TASK.unsqueeze(0)],
    ids=lambda times: str(tuple(times.shape)),
)
def test_clocks_of_other_shots_are_refused(times: Tensor) -> None:
    with pytest.raises(
        ValueError,
        match=r"9 times, of shape \(9,\), \(4, 9\) or \(3, 4, 9\); got \(.*Give all shots one clock",
    ):
        Tasks.from_trajectories(times, values_of(COMMON), num_support=1)


def test_a_clock_that_stands_still_is_refused() -> None:
    times = BY_TASK.clone()
    times[1, 2, 3:] = times[1, 2, 3]
    with pytest.raises(ValueError, match="strictly increasing times; got unsorted or duplicate"):
        Tasks.from_trajectories(times, values_of(times), num_support=1)


# ----------------------------------------------------------------------------------------------- padding


def padded(filler: float) -> Tasks:
    """Trajectories of two to nine times, with a number where there is nothing."""
    lengths = torch.arange(T * SHOTS).view(T, SHOTS, 1, 1) % 8 + 2
    observed = (torch.arange(POINTS).view(-1, 1) < lengths).expand(T, SHOTS, POINTS, 2)
    values = values_of(BY_TASK).where(observed, filler)
    return Tasks.from_trajectories(BY_TASK, values, num_support=2, observed=observed)


@pytest.mark.parametrize("filler", [torch.nan, 1e30, -7.0])
def test_padding_comes_in_nowhere(filler: float) -> None:
    encoder = ph.SetEncoder(2, POINTS, 3)
    for one, other in zip(
        islice(padded(filler).batches(2, 0), 3), islice(padded(0.0).batches(2, 0), 3), strict=True
    ):
        changes: list[Callable[[Shots], Shots]] = [
            lambda shots: shots,
            lambda shots: to_segments(shots, 3),
            lambda shots: truncate(shots, 4),
        ]
        for change in changes:
            a, b = change(one.query).sorted_shots, change(other.query).sorted_shots
            for name in ("values", "observed", "scored", "initial", "times"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
            assert not (a.scored & ~a.observed).any()
            assert torch.equal(encoder(a), encoder(b))


def test_every_observed_value_is_scored_once_in_segments_of_padded_trajectories() -> None:
    shots = padded(0.0).shots()
    segments = to_segments(shots, 3)
    assert int(segments.scored.sum()) == int(shots.scored.sum())


# ------------------------------------------------------------------------------------------------ inputs


def test_inputs_follow_their_trajectories() -> None:
    values = values_of(BY_TASK)
    tasks = make(inputs=values)
    parts = [tasks.shots(), tasks.episode().support, tasks[1:].shots(slice(1, 3))]
    for batch in islice(tasks.batches(2, seed=0), 3):
        parts += [batch.query.sorted_shots, batch.select_tasks(1).query, batch.double().query]
        parts += [to_segments(batch.query, 3), truncate(batch.query, 4)]
    for shots in parts:
        assert torch.equal(shots.inputs, shots.values)
    assert parts[0].simulation().inputs is parts[0].inputs
    assert parts[0].to("meta").inputs.device.type == "meta"


BAD_INPUTS: dict[str, tuple[object, type[Exception], str]] = {
    "of other times": (
        torch.zeros(T, SHOTS, 7, 1),
        ValueError,
        r"\(3, 4, 9, input\); got \(3, 4, 7",
    ),
    "without an axis": (torch.zeros(T, SHOTS, POINTS), ValueError, r"input\); got \(3, 4, 9\)"),
    "of nothing": (torch.zeros(T, SHOTS, POINTS, 0), ValueError, r"got \(3, 4, 9, 0\)"),
    "with gaps": (
        torch.full((T, SHOTS, POINTS, 1), torch.nan),
        ValueError,
        r"finite inputs; got nan at index \(0, 0, 0, 0\)",
    ),
    "of another dtype": (
        torch.zeros(T, SHOTS, POINTS, 1).double(),
        TypeError,
        "values and inputs of one dtype; got torch.float32 and torch.float64",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_inputs_that_do_not_fit_are_refused(case: str) -> None:
    inputs, error, message = BAD_INPUTS[case]
    with pytest.raises(error, match=message):
        make(inputs=inputs)


def test_inputs_of_an_episode_are_checked() -> None:
    shots = make(inputs=values_of(BY_TASK)).shots()
    assert check_episode(Episode(None, shots)).query is shots
    spoiled = shots.inputs.clone()
    spoiled[1, 2, 3, 1] = torch.inf
    with pytest.raises(ValueError, match=r"finite inputs; got inf at index \(1, 2, 3, 1\)"):
        check_episode(Episode(None, replace(shots, inputs=spoiled)))


# ----------------------------------------------------------------------- unmeasured starts, static data


def test_where_starts_are_unmeasured_every_observation_is_scored() -> None:
    tasks = make(initial=None)
    query = tasks.episode().query
    assert query.initial is None and query.states is None and query.scored.all()
    assert next(tasks.batches(2, 0)).query.initial is None
    assert check_episode(tasks.episode()).query is not None
    with pytest.raises(ValueError, match="measured states at all times, where segments can start"):
        to_segments(query, 3)
    assert truncate(query, 3).values.shape[2] == 4
    with pytest.raises(ValueError, match="measured initial states; got initial=None"):
        _ = query.measured_initial


@pytest.mark.usefixtures("without_jaxtyping")
def test_an_unknown_word_for_the_starts_is_refused() -> None:
    with pytest.raises(ValueError, match="initial='sensors', a tensor or None; got 'first'"):
        make(initial="first")


def test_a_single_time_is_legal_where_nothing_moves() -> None:
    tasks = Tasks.from_trajectories(
        torch.zeros(1), torch.randn(T, SHOTS, 1, 2), num_support=2, initial=None
    )
    episode = check_episode(next(tasks.batches(2, 0)))
    assert episode.query.values.shape == (2, 2, 1, 2) and episode.query.scored.all()
    assert ph.SetEncoder(2, 1, 3)(episode.support).shape == (2, 3)


def test_a_task_that_never_changes_is_named_whatever_its_padding_holds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    values = values_of(BY_TASK)
    values[1] = 0.5
    observed = torch.ones_like(values, dtype=torch.bool)
    observed[:, :, 5:] = False
    values[:, :, 5:] = 7.0
    Tasks.from_trajectories(BY_TASK, values, num_support=2, observed=observed)
    assert "Nothing ever changes in task 1." in caplog.text


# ----------------------------------------------------------------------------------------- wrong objects


LINE = Line()
GUIDE = ph.AmortizedGuide(LINE, ph.SetEncoder(1, 6, 8))
LINES = in_float32(make_tasks(4, 4))
EPISODE = LINES.episode()
TABLE = pd.DataFrame({"x": [0.0]})
AN_EPISODE = r"expected an Episode; got {}\. Pass tasks.episode\(\), or ph.Episode\(None, shots\)"
SOME_TASKS = r"expected (tasks|held_out) to be a data set \(ph\.Tasks\); got {}\. Make one with .*ph.Tasks.from_frame"
SOME_SHOTS = r"expected .* of class Shots; got {}\. Pass episode.query or episode.support"

WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "draws of a data set": (
        lambda: ph.draws(LINE, GUIDE, LINES, 2),
        AN_EPISODE.format("Tasks"),
    ),
    "predictions for shots": (
        lambda: ph.predict(LINE, EPISODE.query, 2),
        AN_EPISODE.format("Shots"),
    ),
    "ArviZ data of a table": (
        lambda: ph.to_arviz(LINE, GUIDE, TABLE, 2),
        AN_EPISODE.format("DataFrame"),
    ),
    "weights for a data set": (
        lambda: ph.pareto_k(LINE, GUIDE, LINES, 9),
        AN_EPISODE.format("Tasks"),
    ),
    "the step error on a data set": (
        lambda: ph.step_error(LINE, LINES),
        AN_EPISODE.format("Tasks"),
    ),
    "training on a table": (
        lambda: ph.meta_train(LINE, GUIDE, TABLE, num_steps=1, progress=False),
        SOME_TASKS.format("DataFrame"),
    ),
    "training on an episode": (
        lambda: ph.meta_train(LINE, GUIDE, EPISODE, num_steps=1, progress=False),
        SOME_TASKS.format("Episode"),
    ),
    "held-out shots": (
        lambda: ph.meta_train(
            LINE, GUIDE, LINES, num_steps=1, progress=False, held_out=EPISODE.query
        ),
        SOME_TASKS.replace("tasks,", "held_out,").format("Shots"),
    ),
    "intervals from an episode": (
        lambda: measure_interval_scale(LINE, EPISODE),
        SOME_TASKS.format("Episode"),
    ),
    "an encoder of an episode": (
        lambda: ph.SetEncoder(1, 6, 8)(EPISODE),
        SOME_SHOTS.format("Episode"),
    ),
    "a belief given an episode": (
        lambda: LINE.prior.belief(EPISODE),
        SOME_SHOTS.format("Episode"),
    ),
    "a bound from an episode": (
        lambda: ph.systems.Pendulum().cramer_rao(EPISODE, {}),
        SOME_SHOTS.format("Episode"),
    ),
    "a tensor as the query": (
        lambda: check_episode(Episode(None, torch.zeros(3))),  # type: ignore[arg-type]
        "the query of an episode of class Shots; got Tensor",
    ),
    "an episode as the support": (
        lambda: check_episode(Episode(make().episode(), make().shots())),  # type: ignore[arg-type]
        "the support of an episode of class Shots; got Episode",
    ),
}


@pytest.mark.usefixtures("without_jaxtyping")
@pytest.mark.parametrize("case", WRONG)
def test_wrong_objects_are_refused_with_how_to_make_the_right_one(case: str) -> None:
    make_it, message = WRONG[case]
    with pytest.raises(TypeError, match=message):
        make_it()


def test_doubled_names_of_components_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"different names along axis 'bend_component'; got \['a'\] twice. Rename"
    ):
        ph.to_arviz(LINE, GUIDE, EPISODE, 2, names={"bend": ["a", "a"]})


# ------------------------------------------------------------------------------------------------ episodes


def test_a_changed_episode_remains_a_step_of_a_training_and_a_simulation_is_none() -> None:
    episode = make().episode()
    assert not episode.is_training
    training = replace(episode, is_training=True)
    changed = [
        training.select_tasks(1),
        training.to("cpu"),
        training.double(),
        training.map_shots(lambda shots: truncate(shots, 2)),
        check_episode(training),
    ]
    assert all(other.is_training for other in changed)
    assert not training.simulation().is_training
