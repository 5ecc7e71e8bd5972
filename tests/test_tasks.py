"""Tasks and episodes: what is refused, who is support and who query, and what is counted when trajectories are cut."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from numbered import POINTS, SENSORS, SHOTS, TIMES, T, assert_same, make, numbered, tensors
from pyro import poutine
from torch import Tensor
from torch.testing import assert_close

import pyro_hybrid as ph
from pyro_hybrid import Episode, Shots, Tasks
from pyro_hybrid.data.segments import to_segments, truncate

# ----------------------------------------------------------------------------------------------------------- bad input


def spoilt(value: float) -> Tensor:
    values = numbered()
    values[1, 2, 3, 0] = value
    return values


ALL = slice(None)


def holes(task: slice = ALL, shot: slice = ALL, time: slice = ALL) -> Tensor:
    mask = torch.ones(T, SHOTS, POINTS, SENSORS, dtype=torch.bool)
    mask[task, shot, time] = False
    return mask


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "NaN": (
        {"values": spoilt(torch.nan)},
        ValueError,
        r"finite values; got nan at index \(1, 2, 3, 0\) \(1 such entries, in task 1\). Drop them, or pass observed=",
    ),
    "Inf": (
        {"values": spoilt(-torch.inf)},
        ValueError,
        r"finite values; got -inf at index \(1, 2, 3, 0\).*pass observed=",
    ),
    "NaN that the mask doesn't cover": (
        {"values": spoilt(torch.nan), "observed": holes(task=slice(0, 1), shot=slice(0, 1))},
        ValueError,
        r"finite values; got nan at index \(1, 2, 3, 0\)",
    ),
    "an empty support": (
        {"num_support": 0},
        ValueError,
        r"num_support from 1 to 4 \(of 5 shots\); got 0. The support can't be empty",
    ),
    "no query": (
        {"num_support": 5},
        ValueError,
        r"num_support from 1 to 4 .*got 5.* the query needs a shot too",
    ),
    "a single shot": (
        {"values": numbered(shots=1), "num_support": 1},
        ValueError,
        "num_support from 1 to 0",
    ),
    "unsorted times": (
        {"times": TIMES.flip(0)},
        ValueError,
        "strictly increasing times; got unsorted or duplicate times. Sort",
    ),
    "duplicate times": (
        {"times": TIMES.index_fill(0, torch.tensor(3), float(TIMES[2]))},
        ValueError,
        "got unsorted or duplicate times. Sort the times .* and drop duplicates",
    ),
    "NaN among the times": (
        {"times": TIMES.index_fill(0, torch.tensor(3), torch.nan)},
        ValueError,
        "finite times; got NaN or Inf",
    ),
    "an endless time": (
        {"times": TIMES.index_fill(0, torch.tensor(10), torch.inf)},
        ValueError,
        "finite times; got NaN or Inf",
    ),
    "a time too few": (
        {"times": TIMES[1:]},
        ValueError,
        r"11 times, of shape \(11,\), .*; got \(10,\).*swap axes of values if time isn't",
    ),
    "a single time": (
        {"times": TIMES[:1], "values": numbered(points=1)},
        ValueError,
        "two times or more, the first of which is the start; got one. Pass initial=None",
    ),
    "no tasks": (
        {"values": numbered(tasks=0)},
        ValueError,
        r"at least one task, shot, time and sensor; got \(0, 5, 11, 2\)",
    ),
    "no sensors": (
        {"values": numbered(sensors=0)},
        ValueError,
        r"got \(4, 5, 11, 0\). Check how the data were read",
    ),
    "an axis too few": (
        {"values": numbered()[0]},
        ValueError,
        r"axes \(task, shot, time, sensor\); got 3 axes. Add the missing axes",
    ),
    "an axis too many": ({"values": numbered()[None]}, ValueError, "got 5 axes"),
    "sensors before times": (
        {"values": numbered().transpose(2, 3)},
        ValueError,
        r"2 times, of shape \(2,\), .*; got \(11,\)",
    ),
    "integers": (
        {"values": numbered().long()},
        TypeError,
        r"values in float32 or float64; got torch.int64. Convert it: values.float\(\)",
    ),
    "half precision": (
        {"values": numbered().half()},
        TypeError,
        "values in float32 or float64; got torch.float16",
    ),
    "integer times": (
        {"times": torch.arange(POINTS)},
        TypeError,
        "times in float32 or float64; got torch.int64",
    ),
    "mixed dtypes": (
        {"times": TIMES.double()},
        TypeError,
        "one dtype; got torch.float64 and torch.float32. Convert one of them",
    ),
    "numpy arrays": (
        {"values": numbered().numpy()},
        TypeError,
        "values to be a torch tensor; got ndarray. Convert it: torch.as_tensor",
    ),
    "lists": ({"times": TIMES.tolist()}, TypeError, "times to be a torch tensor; got list"),
    "a mask of numbers": (
        {"observed": torch.ones(T, SHOTS, POINTS, SENSORS)},
        ValueError,
        "a boolean tensor of shape .*got torch.float32",
    ),
    "a mask by time": (
        {"observed": torch.ones(T, SHOTS, POINTS, dtype=torch.bool)},
        ValueError,
        r"shape \(4, 5, 11, 2\) as observed; got one of shape \(4, 5, 11\). Pass True where a value was observed",
    ),
    "a mask in numpy": (
        {"observed": np.ones((T, SHOTS, POINTS, SENSORS), dtype=bool)},
        ValueError,
        "a boolean tensor .*got bool",
    ),
    "a task with no observation": (
        {"observed": holes(task=slice(2, 3))},
        ValueError,
        "none in task 2. Drop the task",
    ),
    "initial states of other shots": (
        {"initial": torch.zeros(T, 3, 2)},
        ValueError,
        r"initial states of shape \(4, 5, component\); got \(4, 3, 2\). Give one state for each shot of each task",
    ),
    "initial states of other times": (
        {"initial": torch.zeros(T, SHOTS, 7, 3)},
        ValueError,
        r"shape \(4, 5, 11, component\); got \(4, 5, 7, 3\)",
    ),
    "an initial state for each task": (
        {"initial": torch.zeros(T, 3)},
        ValueError,
        r"shape \(4, 5, component\); got \(4, 3\)",
    ),
    "no components": (
        {"initial": torch.zeros(T, SHOTS, 0)},
        ValueError,
        r"initial states of shape \(4, 5, component\); got \(4, 5, 0\)",
    ),
    "a tuple of components": (
        {"initial": (torch.zeros(T, SHOTS), torch.zeros(T, SHOTS))},
        TypeError,
        r"one tensor \(task, shot, component\); got a tuple of 2. Stack .*torch.stack",
    ),
    "NaN in initial states": (
        {"initial": torch.full((T, SHOTS, 1), torch.nan)},
        ValueError,
        r"finite initial; got nan at index \(0, 0, 0\)",
    ),
    "NaN in initial states, whatever the mask": (
        {"initial": torch.full((T, SHOTS, 1), torch.nan), "observed": holes(time=slice(0, 1))},
        ValueError,
        r"finite initial; got nan at index \(0, 0, 0\)",
    ),
    "integer initial states": (
        {"initial": torch.zeros(T, SHOTS, 1, dtype=torch.int64)},
        TypeError,
        "initial in float32 or float64",
    ),
    "initial states of another dtype": (
        {"initial": torch.zeros(T, SHOTS, 1).double()},
        TypeError,
        "initial in torch.float32, as the values; got torch.float64. Convert one",
    ),
    "truth of other tasks": (
        {"true_latents": {"omega": torch.zeros(3, 1)}},
        ValueError,
        r"true_latents\['omega'\], a tensor of shape \(4, component\); got \(3, 1\). Give one row for each task",
    ),
    "truth without components": (
        {"true_latents": {"omega": torch.zeros(T)}},
        ValueError,
        r"shape \(4, component\); got \(4,\)",
    ),
    "NaN in the truth": (
        {"true_latents": {"omega": torch.tensor([[1.0], [torch.nan], [0.0], [torch.inf]])}},
        ValueError,
        r"true_latents\['omega'\] without NaN or Inf; got some in task 1, 3. Leave out",
    ),
    "a truth without names": (
        {"true_latents": torch.zeros(T, 1)},
        TypeError,
        "a mapping from names to tensors; got Tensor. Name them",
    ),
    "a number of support shots that is no integer": (
        {"num_support": 1.0},
        TypeError,
        r"num_support to be an integer; got 1.0. Convert it with int\(\)",
    ),
    "a truth value for a number of support shots": (
        {"num_support": True},
        TypeError,
        "num_support to be an integer; got True",
    ),
    "truth in numpy": (
        {"true_latents": {"omega": np.zeros((T, 1))}},
        ValueError,
        "a tensor .*; got ndarray",
    ),
}


@pytest.mark.usefixtures("without_jaxtyping")
@pytest.mark.parametrize("case", BAD)
def test_bad_data_are_refused_with_words(case: str) -> None:
    change, error, message = BAD[case]
    arguments = {"times": TIMES, "values": numbered(), "num_support": 2} | change
    with pytest.raises(error, match=message):
        Tasks.from_trajectories(arguments.pop("times"), arguments.pop("values"), **arguments)


@pytest.mark.usefixtures("without_jaxtyping")
def test_an_encoder_built_for_other_sensors_is_refused_before_anything_trains() -> None:
    class Model(ph.HybridModel):
        def __init__(self) -> None:
            super().__init__()
            self.prior = ph.SupportPrior(ph.SetEncoder(3, POINTS, 4), z=ph.families.Normal(1))

        def forward(self, episode: Episode) -> None:
            pytest.fail("the program was run")

    model = Model()
    guide = ph.AmortizedGuide(model, ph.SetEncoder(3, POINTS, 4))
    with pytest.raises(
        ValueError, match=r"\(time, sensor\) = \(11, 3\); got \(11, 2\). Build the SetEncoder with"
    ):
        ph.meta_train(model, guide, make(), num_steps=1, progress=False)


ASKED = {
    "nobody held out": (lambda tasks: tasks.split(0), ValueError, "a split from 1 to 3; got 0"),
    "everybody held out": (
        lambda tasks: tasks.split(T),
        ValueError,
        "a split from 1 to 3; got 4. Simulate more tasks",
    ),
    "an empty support": (
        lambda tasks: tasks.episode(0),
        ValueError,
        "num_support from 1 to 4; got 0. Leave at least one shot",
    ),
    "no query": (lambda tasks: tasks.episode(SHOTS), ValueError, "num_support from 1 to 4; got 5"),
    "empty batches": (
        lambda tasks: next(tasks.batches(0, seed=0)),
        ValueError,
        "a batch of 1 task or more; got 0",
    ),
    "a task by number": (
        lambda tasks: tasks[1],
        TypeError,
        r"a slice or a tensor of rows; got 1.*tasks\[3:4\]",
    ),
    "the last task": (
        lambda tasks: tasks.episode().select_tasks(-1),
        ValueError,
        r"a task from 0 to 3; got \[-1\]",
    ),
    "a task too far": (
        lambda tasks: tasks.episode().select_tasks(T),
        ValueError,
        r"a task from 0 to 3; got \[4\]",
    ),
    "segments of nothing": (
        lambda tasks: to_segments(tasks.shots(), 0),
        ValueError,
        "segments of 1 interval or more; got 0",
    ),
    "no time at all": (
        lambda tasks: truncate(tasks.shots(), 0),
        ValueError,
        "1 interval or more; got 0",
    ),
    "rows by name": (lambda tasks: tasks["a"], TypeError, "a slice or a tensor of rows; got 'a'"),
    "rows by fractions": (
        lambda tasks: tasks[0.5:2.0],
        TypeError,
        r"a slice with integer bounds; got slice\(0.5, 2.0, None\). Convert",
    ),
    "rows in floats": (
        lambda tasks: tasks[torch.tensor([0.0, 1.0])],
        TypeError,
        r"a tensor of row numbers.*; got torch.float32 of shape \(2,\)",
    ),
    "half a batch": (
        lambda tasks: next(tasks.batches(0.5, seed=0)),
        TypeError,
        "the size of a batch to be an integer; got 0.5",
    ),
    "half a task held out": (
        lambda tasks: tasks.split(0.5),
        TypeError,
        "the number of tasks to split off to be an integer; got 0.5",
    ),
    "half a shot of support": (
        lambda tasks: tasks.episode(1.0),
        TypeError,
        "num_support to be an integer; got 1.0",
    ),
    "pieces out of order": (
        lambda tasks: to_segments(tasks.shots(), 3).select_shots(torch.zeros(T, 1).long()),
        ValueError,
        "whole trajectories; got segments. Select shots before you cut",
    ),
}


@pytest.mark.usefixtures("without_jaxtyping")
@pytest.mark.parametrize("case", ASKED)
def test_what_cannot_be_is_refused_with_words(case: str) -> None:
    ask, error, message = ASKED[case]
    with pytest.raises(error, match=message):
        ask(make())


def test_cutting_without_measured_states_is_refused_with_words() -> None:
    tasks = make(initial=torch.zeros(T, SHOTS, 2))
    with pytest.raises(
        ValueError,
        match="measured states at all times, where segments can start; got initial states only. Pass initial=",
    ):
        to_segments(tasks.shots(), 3)


# -------------------------------------------------------------------------------------------- masks and initial states


def test_by_default_the_first_observation_is_the_initial_state_and_no_longer_counts() -> None:
    episode = make().episode()
    assert torch.equal(episode.query.initial, episode.query.values[:, :, 0])
    assert not episode.query.scored[:, :, 0].any() and episode.query.scored[:, :, 1:].all()
    assert episode.query.observed.all()  # an encoder may read it
    assert not episode.support.scored[:, :, 0].any() and episode.support.scored[:, :, 1:].all()


def test_given_initial_states_leave_every_observation_to_count() -> None:
    initial = torch.randn(T, SHOTS, 3)
    episode = make(initial=initial).episode()
    assert episode.query.scored.all() and episode.support.scored.all()
    assert torch.equal(initial[:, 2:], episode.query.initial)


def test_measured_states_of_all_times_give_the_initial_one() -> None:
    states = torch.randn(T, SHOTS, POINTS, 3)
    query = make(initial=states).episode().query
    assert torch.equal(query.initial, states[:, 2:, 0])
    assert not query.scored[:, :, 0].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_whatever_stands_where_the_mask_says_missing_it_comes_in_nowhere(bad: float) -> None:
    mask = torch.rand(T, SHOTS, POINTS, SENSORS) < 0.6
    mask[:, :, 5] = True
    values = torch.randn(mask.shape)
    episodes = [make(values.where(mask, filler), observed=mask).episode() for filler in (bad, 0.0)]
    for name, value in tensors(episodes[0]).items():
        assert value.isfinite().all() and (
            value.dtype == torch.bool or value.abs().max() < 100.0
        ), name
    assert_same(*episodes)
    assert torch.equal(episodes[0].query.observed, mask[:, 2:])
    counts = mask[:, 2:].clone()
    counts[:, :, 0] = False
    assert torch.equal(episodes[0].query.scored, counts)


@pytest.mark.parametrize("form", ["sensors", "given"])
def test_gaps_in_measured_states_are_filled_linearly_in_time(form: str) -> None:
    times = torch.tensor([0.0, 1.0, 3.0, 4.0, 8.0])
    states = (2.0 * times - 1.0).view(1, 1, 5, 1).repeat(1, 3, 1, 1)
    mask = torch.ones(1, 3, 5, 1, dtype=torch.bool)
    mask[0, 0, 1:4] = False  # between: on the line
    mask[0, 1, :2] = False  # before the first: the first
    mask[0, 1, 4] = False  # after the last: the last
    mask[0, 2] = False  # never seen: zero
    gaps = states.where(mask, torch.nan)
    initial = {"sensors": "sensors", "given": gaps}[form]
    tasks = Tasks.from_trajectories(times, gaps, num_support=1, observed=mask, initial=initial)
    assert_close(
        tasks.states[0, :, :, 0],
        torch.tensor([[-1.0, 1.0, 5.0, 7.0, 15.0], [5.0, 5.0, 5.0, 7.0, 7.0], [0.0] * 5]),
    )


def test_a_fully_observed_data_set_is_kept_to_the_last_bit() -> None:
    values = torch.randn(T, SHOTS, POINTS, SENSORS)
    with_mask, without = (
        make(values, observed=torch.ones(values.shape, dtype=torch.bool)),
        make(values),
    )
    assert torch.equal(with_mask.values, values) and torch.equal(without.values, values)
    assert torch.equal(with_mask.states, without.states)
    assert torch.equal(with_mask.scored, without.scored)


# ------------------------------------------------------------------------------------------- rows, splits and roles


def test_split_holds_out_the_last_tasks() -> None:
    truth = {"omega": torch.arange(float(T)).unsqueeze(-1)}
    train, held_out = make(
        true_latents=truth, observed=torch.rand(T, SHOTS, POINTS, SENSORS) < 0.9
    ).split(1)
    assert len(train) == T - 1 and len(held_out) == 1
    assert train.true_latents["omega"][:, 0].tolist() == [0.0, 1.0, 2.0] and held_out.true_latents[
        "omega"
    ].tolist() == [[3.0]]
    assert (
        held_out.scored.shape
        == held_out.observed.shape
        == held_out.values.shape
        == (1, SHOTS, POINTS, SENSORS)
    )


def test_tasks_are_picked_by_slice_and_by_tensor() -> None:
    tasks, rows = make(), torch.tensor([3, 0])
    assert torch.equal(tasks[rows].values, tasks.values[rows]) and torch.equal(
        tasks[1:3].values, tasks.values[1:3]
    )
    assert torch.equal(tasks[rows].states, tasks.states[rows])


@pytest.mark.parametrize("size", [None, 1, 4])
def test_the_first_shots_are_the_support_and_the_others_the_query(size: int | None) -> None:
    tasks, n = make(), size or 2
    episode = tasks.episode(size)
    assert torch.equal(episode.support.values, tasks.values[:, :n]) and torch.equal(
        episode.query.values, tasks.values[:, n:]
    )
    assert episode.query.shape == (T, SHOTS - n) and episode.support.shape == (T, n)


@pytest.mark.parametrize("which", [slice(0, 2), slice(2, 4), slice(1, None, 2), ALL])
def test_shots_are_those_shots_of_everything_with_no_support(which: slice) -> None:
    mask = torch.rand(T, SHOTS, POINTS, SENSORS) < 0.8
    tasks = make(observed=mask)
    shots, everything = tasks.shots(which), tensors(tasks.shots(ALL))
    assert shots.whole is None and shots.uncut is None
    assert {name: value.shape for name, value in tensors(shots).items()}.keys() == everything.keys()
    for name, value in tensors(shots).items():
        assert torch.equal(
            value, everything[name] if name == "times" else everything[name][:, which]
        ), name


def test_support_and_query_are_shots() -> None:
    tasks = make(observed=torch.rand(T, SHOTS, POINTS, SENSORS) < 0.8)
    episode = tasks.episode(3)
    assert_same(episode.support, tasks.shots(slice(0, 3)))
    query, rest = tensors(episode.query), tensors(tasks.shots(slice(3, None)))
    assert all(torch.equal(query[name], rest[name]) for name in rest)


def test_shots_of_tasks_with_given_starts_have_those() -> None:
    start = torch.rand(T, SHOTS, 7)
    shots = make(initial=start).shots(slice(1, 3))
    assert torch.equal(shots.initial, start[:, 1:3]) and shots.states is None


def test_the_plate_is_of_tasks() -> None:
    def program(episode: Episode) -> None:
        with episode.plate:
            pyro.sample("z", pyro.distributions.Normal(0.0, 1.0).expand([2]).to_event(1))

    trace = poutine.trace(program).get_trace(make().episode())
    assert trace.nodes["z"]["value"].shape == (T, 2)
    (plate,) = trace.nodes["z"]["cond_indep_stack"]
    assert (plate.name, plate.size, plate.dim) == ("task", T, -1)


def identity(shots: Shots) -> Tensor:
    """Which task and shot each trajectory was, from its numbered values."""
    return shots.values[:, :, 0, 0] // (POINTS * SENSORS)


def test_batches_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    tasks = make(numbered(tasks=7))
    one, same, other = (list(islice(tasks.batches(3, seed), 6)) for seed in (1, 1, 2))
    for a, b in zip(one, same, strict=True):
        assert_same(a, b)
    assert any(
        not torch.equal(identity(a.query), identity(b.query))
        for a, b in zip(one, other, strict=True)
    )


def test_batches_leave_the_global_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    next(make().batches(2, seed=0))
    assert torch.equal(torch.rand(3), expected)


def test_roles_are_drawn_anew_and_support_and_query_share_no_shot() -> None:
    tasks, roles = make(), set()
    for episode in islice(tasks.batches(T, seed=0), 40):
        support, query = identity(episode.support), identity(episode.query)
        assert support.shape == (T, 2) and query.shape == (T, 3)
        for s, q in zip(support.tolist(), query.tolist(), strict=True):
            assert len({int(shot) // SHOTS for shot in (*s, *q)}) == 1  # of one task
            assert sorted(int(shot) % SHOTS for shot in (*s, *q)) == list(range(SHOTS))
            roles.add(frozenset(int(shot) % SHOTS for shot in s))
    assert len(roles) == 10  # every pair of the five has been support


def test_an_epoch_shows_every_task_once() -> None:
    tasks = make(numbered(tasks=7))
    batches = tasks.batches(2, seed=0)
    for _ in range(3):
        shown = [int(row) for _ in range(3) for row in identity(next(batches).query)[:, 0] // SHOTS]
        assert len(set(shown)) == 6  # the seventh waits for another epoch: batches are of one size


def test_a_batch_is_never_larger_than_the_data_set() -> None:
    assert next(make().batches(1000, seed=0)).query.shape == (T, 3)


def test_a_batch_s_parts_belong_together() -> None:
    values = numbered()
    first, second = values.unbind(-1)
    states = torch.stack([first + 0.25, second + 0.25, first + 0.5], -1)
    mask = values % 3.0 > 0.0
    for episode in islice(make(values, observed=mask, initial=states).batches(3, seed=0), 5):
        for part in (episode.query, episode.support):
            assert not part.values[~part.observed].any() and part.values[part.observed].all()
            known = part.observed[:, :, 0, 0]
            assert torch.equal(part.initial[..., 0][known], (part.values[:, :, 0, 0] + 0.25)[known])
            known = part.observed[..., 0]
            assert torch.equal(part.states[..., 2][known], (part.values[..., 0] + 0.5)[known])


# ---- long recordings -----------------------------------------------------------------------------


@pytest.mark.parametrize("clock", [1, 2, 3])
def test_long_recordings_are_cut_into_shots_that_follow_each_other(clock: int) -> None:
    times = torch.arange(11.0).expand([*(3, 2)[3 - clock :], 11] if clock > 1 else [11])
    values = torch.arange(3 * 2 * 11.0).view(3, 2, 11, 1)
    inputs = -values
    tasks = ph.Tasks.from_trajectories(times, values, num_support=2, inputs=inputs, pieces=3)
    assert tasks.values.shape == (3, 6, 3, 1) and tasks.shots().shape == (3, 6)
    joined = tasks.values.view(3, 2, 9, 1)
    assert torch.equal(joined, values[:, :, :9])
    assert torch.equal(tasks.inputs, -tasks.values)
    assert torch.equal(tasks.shots().expanded_times[1, :3].flatten(), torch.arange(9.0))
    assert torch.equal(tasks.initial, tasks.values[:, :, 0])


def test_one_recording_of_each_system_becomes_support_and_query() -> None:
    tasks = ph.Tasks.from_trajectories(
        torch.arange(40.0), torch.randn(5, 1, 40, 1), num_support=2, initial=None, pieces=4
    )
    assert tasks.episode().query.shape == (5, 2) and tasks.initial is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pieces": 0}, "pieces"),
        ({"pieces": 21}, "pieces from 1 to 20, half the number of times; got 21"),
        ({"pieces": 4, "initial": torch.zeros(5, 1, 1)}, "measured states at all times"),
    ],
)
def test_pieces_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    values = torch.randn(5, 1, 40, 1)
    with pytest.raises(ValueError, match=message):
        ph.Tasks.from_trajectories(torch.arange(40.0), values, num_support=2, **options)
