"""Segments and truncated shots: what is counted when trajectories are cut, and what encoders read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered import (
    POINTS,
    SENSORS,
    SHOTS,
    TIMES,
    T,
    assert_same,
    cut,
    make,
    numbered,
    tensors,
    whole_episode,
    whole_shots,
)
from torch import Tensor
from torch.testing import assert_close
from toys import Line

import pyro_hybrid as ph
from pyro_hybrid import Episode, Shots, Tasks
from pyro_hybrid.data.segments import select_segments, to_segments, truncate


def test_selecting_tasks_selects_them_of_everything() -> None:
    episode = cut(whole_episode(masked=True), 3)
    one = episode.select_tasks(2)
    assert one.query.shape == (1, episode.query.shape[1])
    for name, value in tensors(episode).items():
        expected = value if name.endswith("times") else value[2:3]
        assert torch.equal(tensors(one)[name], expected), name


@pytest.mark.parametrize(
    "change",
    [
        lambda episode: episode.select_tasks(0),
        lambda episode: episode.double(),
        lambda episode: episode.to("cpu"),
    ],
)
def test_a_belief_is_dropped_with_the_support_that_it_was_about(
    change: Callable[[Episode], Episode],
) -> None:
    belief = Line().prior.population()
    episode = replace(whole_episode(), belief=belief)
    assert change(episode).belief is None
    assert episode.simulation().belief is belief


def test_to_moves_everything() -> None:
    whole = whole_episode(masked=True)
    begun = whole.map_shots(lambda shots: to_segments(truncate(shots, 4), 2))
    for part in (whole, cut(whole, 3), begun):
        moved = tensors(part.to("meta"))
        assert moved.keys() == tensors(part).keys()
        assert {value.device.type for value in moved.values()} == {"meta"}
        assert_same(part.to("cpu"), part)


def test_double_is_the_same_in_float64() -> None:
    for part in (whole_episode(masked=True), cut(whole_episode(masked=True), 3)):
        doubled, original = tensors(part.double()), tensors(part)
        assert doubled.keys() == original.keys()
        for name, value in original.items():
            expected = value.double() if value.is_floating_point() else value
            assert torch.equal(doubled[name], expected), name
            assert doubled[name].dtype in (torch.float64, torch.bool), name


def test_simulation_observes_nothing_and_keeps_support_and_starts() -> None:
    episode = whole_episode(masked=True)
    simulation = episode.simulation()
    query = simulation.query
    assert query.values is None and query.scored.all() and simulation.support is episode.support
    assert query.initial is episode.query.initial and query.shape == episode.query.shape
    assert to_segments(query, 3) is query and query.sorted_shots is query


def test_shots_without_values_have_masks_of_one_sensor() -> None:
    shots = Shots.from_tensors(TIMES, initial=torch.zeros(T, 3, 2))
    assert shots.shape == (T, 3)
    assert shots.scored.shape == shots.observed.shape == (T, 3, POINTS, 1)
    with pytest.raises(ValueError, match="values, initial states or inputs; got none of them"):
        Shots.from_tensors(TIMES)


def test_shots_without_measured_starts_say_so() -> None:
    shots = Shots.from_tensors(TIMES, numbered())
    assert shots.initial is None
    with pytest.raises(ValueError, match="measured initial states; got initial=None. Pass"):
        _ = shots.measured_initial


def test_truncation_keeps_the_beginning_of_everything_but_what_encoders_read() -> None:
    original = whole_shots(masked=True)
    begun = truncate(original, 4)
    assert begun.times.shape == (5,) and begun.initial is original.initial
    assert torch.equal(begun.values, original.values[:, :, :5])
    assert torch.equal(begun.scored, original.scored[:, :, :5])
    assert torch.equal(begun.states, original.states[:, :, :5])
    assert begun.whole is original
    assert truncate(original, POINTS - 1) is original


# ------------------------------------------------------------------------------------------------------------------ cut

cuts = pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 9])


def originals(shots: Shots, whole: Shots) -> tuple[Tensor, Tensor]:
    """Shot and time index, in the whole trajectories, of every observation of segments."""
    pieces = shots.shape[1] // whole.shape[1]
    shot = torch.arange(whole.shape[1]).repeat_interleave(pieces).unsqueeze(-1)
    time = torch.searchsorted(whole.times, shots.times.contiguous())
    return shot.expand(-1, shots.times.shape[-1]), time


@cuts
@pytest.mark.parametrize("points", [8, 11, 10])
def test_segments_are_pieces_of_the_trajectories_with_their_own_clocks(
    steps: int, points: int
) -> None:
    original = whole_shots(masked=True, points=points)
    part = to_segments(original, steps)
    if steps >= points - 1:
        assert part is original
        return
    pieces = -(-(points - 1) // steps)
    assert part.shape == (T, original.shape[1] * pieces)
    assert part.times.shape == (part.shape[1], steps + 1)
    shot, time = originals(part, original)
    assert torch.equal(part.values, original.values[:, shot, time])
    assert torch.equal(part.observed, original.observed[:, shot, time])
    assert torch.equal(part.times, original.times[time])
    assert torch.equal(part.initial, original.states[:, shot[:, 0], time[:, 0]])
    assert part.whole is original and part.uncut is original and part.states is None


@cuts
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("points", [8, 11, 10])
def test_every_observation_counts_exactly_once(steps: int, masked: bool, points: int) -> None:
    original = whole_shots(masked, points)
    part = to_segments(original, steps)
    if part is original:
        return
    shot, time = originals(part, original)
    counted = torch.zeros(original.values.shape, dtype=torch.int64)
    for row in range(part.shape[1]):
        counted[:, shot[row, 0], time[row]] += part.scored[:, row]
    assert torch.equal(counted, original.scored.long())
    # A segment's start is the measurement of its initial state.
    assert not part.scored[:, :, 0].any()


def test_the_last_segment_ends_with_the_data_and_repeats_nothing() -> None:
    # Of 10 steps: 0-4, 4-8, and 6-10, of which 6-8 has been seen.
    segments = to_segments(whole_shots(), 4)
    assert_close(
        segments.times[:3],
        TIMES[torch.tensor([[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [6, 7, 8, 9, 10]])],
    )
    assert segments.scored[0, 2, :, 0].tolist() == [False, False, False, True, True]
    assert segments.scored[0, 1, :, 0].tolist() == [False, True, True, True, True]


def test_a_segment_that_starts_in_a_gap_starts_between_its_neighbours() -> None:
    mask = torch.ones(T, SHOTS, POINTS, SENSORS, dtype=torch.bool)
    mask[:, :, 5] = False
    values = torch.randn(mask.shape)
    part = to_segments(make(values.where(mask, torch.nan), observed=mask).episode().query, 5)
    between = 0.5 * (values[:, 2:, 4] + values[:, 2:, 6])
    assert_close(part.initial[:, 1::2], between)


def test_a_cut_is_the_same_whatever_was_cut_before() -> None:
    whole = whole_shots(masked=True)
    segments = to_segments(whole, 4)
    assert_same(to_segments(segments, 3), to_segments(whole, 3))
    assert to_segments(segments, 4) is segments  # they are that short already
    assert to_segments(segments, 7) is segments
    assert to_segments(segments, None) is whole


@pytest.mark.parametrize("num_intervals", [None, POINTS - 1, 99])
def test_a_trajectory_that_is_short_already_is_not_cut(num_intervals: int | None) -> None:
    whole = whole_shots()
    assert to_segments(whole, num_intervals) is whole


def test_a_cut_of_the_first_steps_knows_nothing_of_the_others_but_for_encoders() -> None:
    whole = whole_shots(masked=True)
    begun = truncate(whole, 6)
    part = to_segments(begun, 4)
    assert float(part.times.max()) == float(TIMES[6]) and part.whole is whole
    assert_same(to_segments(part, 2), to_segments(begun, 2))
    shot, time = originals(part, whole)
    counted = torch.zeros(whole.values.shape, dtype=torch.int64)
    for row in range(part.shape[1]):
        counted[:, shot[row, 0], time[row]] += part.scored[:, row]
    expected = whole.scored.long()
    expected[:, :, 7:] = 0
    assert torch.equal(counted, expected)


@settings(max_examples=40, deadline=None)
@given(points=st.integers(2, 30), steps=st.integers(1, 35))
def test_for_any_length_every_observation_counts_once(points: int, steps: int) -> None:
    times, values = torch.arange(float(points)), torch.randn(1, 2, points, 1)
    whole = Tasks.from_trajectories(times, values, num_support=1).episode().query
    part = to_segments(whole, steps)
    counted = part.times.expand(part.shape[1], -1)[part.scored[0, :, :, 0]]
    assert sorted(counted.tolist()) == list(range(1, points))
    assert part.times.shape[-1] == min(steps + 1, points)


# ----------------------------------------------------------------------------------------------------------------- some


@pytest.mark.parametrize("order", [[0], [2, 0], [1, 2, 0]])
def test_selected_segments_are_the_same_of_every_task(order: list[int]) -> None:
    shots, rows = to_segments(whole_shots(masked=True), 4), torch.tensor(order)
    few = select_segments(shots, rows)
    assert few.shape == (T, len(order))
    assert torch.equal(few.times, shots.times[rows])
    for name, value in tensors(shots).items():
        if name.partition(".")[0] not in ("times", "whole", "uncut"):
            assert torch.equal(tensors(few)[name], value[:, rows]), name


def test_segments_of_what_was_not_cut_are_refused() -> None:
    with pytest.raises(
        ValueError, match="shots that were cut into segments; got whole trajectories. Cut them"
    ):
        select_segments(whole_shots(), torch.tensor([0]))


@pytest.mark.parametrize("change", ["cut", "until and cut"])
def test_of_some_segments_encoders_go_on_reading_the_whole_trajectories(change: str) -> None:
    whole = whole_shots(masked=True)
    begun = truncate(whole, 6) if "until" in change else whole
    few = select_segments(to_segments(begun, 3), torch.tensor([1, 0]))
    assert few.whole is whole and few.uncut is None
    encoder = ph.SetEncoder(SENSORS, POINTS, 3)
    assert torch.equal(encoder(few), encoder(whole))


def test_all_segments_in_their_order_are_the_shots() -> None:
    segments = to_segments(whole_shots(masked=True), 4)
    everything = select_segments(segments, torch.arange(segments.shape[1]))
    for name, value in tensors(everything).items():
        assert torch.equal(value, tensors(segments)[name]), name


def test_some_segments_count_what_they_counted_among_all() -> None:
    segments = to_segments(whole_shots(masked=True), 4)
    rows = [torch.arange(k, segments.shape[1], 2) for k in (0, 1)]
    parts = [select_segments(segments, some) for some in rows]
    assert sum(int(part.scored.sum()) for part in parts) == int(segments.scored.sum())


@pytest.mark.parametrize("rows", [[0], [7, 0, 3], [4, 3, 5, 0, 1, 2, 8, 7, 6]])
def test_sorting_some_segments_keeps_them_and_their_clocks(rows: list[int]) -> None:
    shots = make(torch.randn(T, SHOTS, POINTS, SENSORS)).episode().query
    few = select_segments(to_segments(shots, 4), torch.tensor(rows))
    ordered = few.sorted_shots
    assert ordered.shape == few.shape
    for shot in range(few.shape[1]):
        for task in range(T):
            same = [
                k
                for k in range(few.shape[1])
                if torch.equal(few.values[task, k], ordered.values[task, shot])
            ]
            assert any(torch.equal(ordered.times[shot], few.times[k]) for k in same)


# ------------------------------------------------------------------------------------------------------ canonical order


def shuffled(tasks: Tasks, order: list[int]) -> Tasks:
    return Tasks.from_trajectories(
        tasks.times, tasks.values[:, order], num_support=tasks.num_support
    )


def forth_and_back() -> Tensor:
    """The second and fourth shots are the others backwards: their plain sums agree."""
    there = torch.arange(float(POINTS)).view(-1, 1).repeat(T, SHOTS, 1, SENSORS)
    there[:, 1::2] = there[:, 1::2].flip(2)
    return there


DATA: dict[str, Callable[[], Tensor]] = {
    "noise": lambda: torch.randn(T, SHOTS, POINTS, SENSORS),
    "shares that add up to one": lambda: torch.eye(SENSORS)[
        torch.randint(SENSORS, (T, SHOTS, POINTS))
    ],
    "one trajectory, forth and back": forth_and_back,
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("change", ["whole", "cut", "until", "until and cut"])
def test_the_canonical_order_is_the_same_bit_for_bit_whatever_order_shots_came_in(
    change: str, data: str
) -> None:
    tasks = make(DATA[data]())
    steps: dict[str, Callable[[Shots], Shots]] = {
        "whole": lambda shots: shots,
        "cut": lambda shots: to_segments(shots, 3),
        "until": lambda shots: truncate(shots, 6),
        "until and cut": lambda shots: to_segments(truncate(shots, 6), 4),
    }
    expected = steps[change](tasks.shots()).sorted_shots
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        assert_same(steps[change](shuffled(tasks, order).shots()).sorted_shots, expected)


def test_the_canonical_order_keeps_shots_whole() -> None:
    observed = torch.rand(T, SHOTS, POINTS, SENSORS) < 0.9
    shots = make(torch.randn(T, SHOTS, POINTS, SENSORS), observed=observed).episode().query
    ordered = shots.sorted_shots
    for task in range(T):
        same = (ordered.values[task].unsqueeze(1) == shots.values[task]).flatten(2).all(-1)
        rows = same.int().argmax(1).tolist()
        assert same.sum() == 3 and sorted(rows) == [0, 1, 2]
        for name in ("scored", "observed", "initial", "states"):
            assert torch.equal(getattr(ordered, name)[task], getattr(shots, name)[task, rows])
    assert_same(ordered.sorted_shots, ordered)


def test_the_canonical_order_of_segments_is_that_of_their_trajectories() -> None:
    shots = make(torch.randn(T, SHOTS, POINTS, SENSORS)).episode().query
    assert_same(to_segments(shots, 4).sorted_shots, to_segments(shots.sorted_shots, 4))


def test_selecting_shots_selects_them_task_by_task() -> None:
    shots, order = whole_shots(masked=True), torch.tensor([[0, 2], [1, 0], [2, 2], [1, 1]])
    picked = shots.select_shots(order)
    for task, rows in enumerate(order.tolist()):
        for name in ("values", "scored", "observed", "initial", "states"):
            assert torch.equal(getattr(picked, name)[task], getattr(shots, name)[task, rows])
    assert picked.times is shots.times
