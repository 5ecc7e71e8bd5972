"""Tasks and episodes: what is refused, who is support and who query, and what is counted when trajectories are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import islice
from typing import Any

import jaxtyping
import numpy as np
import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor
from torch.testing import assert_close

import pyro_hybrid as ph
from pyro_hybrid import Episode, Tasks

T, SHOTS, POINTS, SENSORS = 4, 5, 11, 2
TIMES = torch.linspace(0.0, 2.0, POINTS)


def numbered(
    tasks: int = T, shots: int = SHOTS, points: int = POINTS, sensors: int = SENSORS
) -> Tensor:
    """Values that say where they came from."""
    return torch.arange(float(tasks * shots * points * sensors)).view(tasks, shots, points, sensors)


def make(values: Tensor | None = None, **options: Any) -> Tasks:
    values = numbered() if values is None else values
    return Tasks.from_trajectories(TIMES[: values.shape[2]], values, **{"num_support": 2} | options)


def tensors(episode: Episode | None) -> dict[str, Tensor]:
    """Everything in an episode, by path."""
    if episode is None:
        return {}
    out: dict[str, Tensor] = {}
    for f in fields(episode):
        value = getattr(episode, f.name)
        if isinstance(value, Episode):
            out |= {f"{f.name}.{name}": inner for name, inner in tensors(value).items()}
        elif isinstance(value, tuple):
            out |= {f"{f.name}.{i}": part for i, part in enumerate(value)}
        elif isinstance(value, Tensor):
            out[f.name] = value
    return out


def assert_same(a: Episode, b: Episode) -> None:
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def without_jaxtyping() -> Iterator[None]:
    """As users run it: shapes and dtypes are checked by the library's own words alone."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


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
        r"finite values; got nan at index \(1, 2, 3, 0\) \(1 such entries, in task 1\). Drop them, or pass mask=",
    ),
    "Inf": (
        {"values": spoilt(-torch.inf)},
        ValueError,
        r"finite values; got -inf at index \(1, 2, 3, 0\).*pass mask=",
    ),
    "NaN that the mask doesn't cover": (
        {"values": spoilt(torch.nan), "mask": holes(task=slice(0, 1), shot=slice(0, 1))},
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
        r"11 times, as many as values has; got \(10,\).*swap axes if time isn't",
    ),
    "a clock for each shot": (
        {"times": TIMES.expand(SHOTS, POINTS)},
        ValueError,
        r"11 times.*got \(5, 11\). Pass times of shape \(time,\)",
    ),
    "a single time": (
        {"times": TIMES[:1], "values": numbered(points=1)},
        ValueError,
        "two times; got 1. One time",
    ),
    "no tasks": (
        {"values": numbered(tasks=0)},
        ValueError,
        r"at least one task, shot, sensor and two times; got \(0, 5, 11, 2\)",
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
        r"2 times, as many as values has; got \(11,\)",
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
        {"mask": torch.ones(T, SHOTS, POINTS, SENSORS)},
        ValueError,
        "a boolean tensor of shape .*got torch.float32",
    ),
    "a mask by time": (
        {"mask": torch.ones(T, SHOTS, POINTS, dtype=torch.bool)},
        ValueError,
        r"shape \(4, 5, 11, 2\) as mask; got torch.bool of shape \(4, 5, 11\). True where an observation counts",
    ),
    "a mask in numpy": (
        {"mask": np.ones((T, SHOTS, POINTS, SENSORS), dtype=bool)},
        ValueError,
        "a boolean tensor .*got bool of shape",
    ),
    "a task with no observation": (
        {"mask": holes(task=slice(2, 3))},
        ValueError,
        "none in task 2, which is masked entirely. Drop the task",
    ),
    "initial states of other shots": (
        {"initial": (torch.zeros(T, 3), torch.zeros(T, 3))},
        ValueError,
        r"initial states of shape \(4, 5\); got \(4, 3\). Give one state for each shot of each task",
    ),
    "initial states of other times": (
        {"initial": (torch.zeros(T, SHOTS, 7),)},
        ValueError,
        r"shape \(4, 5, 11\); got \(4, 5, 7\)",
    ),
    "initial states, one with times": (
        {"initial": (torch.zeros(T, SHOTS), torch.zeros(T, SHOTS, POINTS))},
        ValueError,
        r"shape \(4, 5\); got \(4, 5, 11\)",
    ),
    "initial states on a grid of other times": (
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
        {"initial": ()},
        ValueError,
        "a component or more in initial; got an empty tuple",
    ),
    "NaN in initial states": (
        {"initial": (torch.full((T, SHOTS), torch.nan),)},
        ValueError,
        r"finite initial; got nan at index \(0, 0\)",
    ),
    "NaN in initial states, whatever the mask": (
        {"initial": (torch.full((T, SHOTS), torch.nan),), "mask": holes(time=slice(0, 1))},
        ValueError,
        r"finite initial; got nan at index \(0, 0\)",
    ),
    "integer initial states": (
        {"initial": (torch.zeros(T, SHOTS, dtype=torch.int64),)},
        TypeError,
        "initial in float32 or float64",
    ),
    "initial states of another dtype": (
        {"initial": (torch.zeros(T, SHOTS).double(),)},
        TypeError,
        "initial in torch.float32, as the values; got torch.float64. Convert one",
    ),
    "truth of other tasks": (
        {"truth": {"omega": torch.zeros(3, 1)}},
        ValueError,
        r"truth\['omega'\], a tensor of shape \(4, component\); got \(3, 1\). Give one row for each task",
    ),
    "truth without components": (
        {"truth": {"omega": torch.zeros(T)}},
        ValueError,
        r"shape \(4, component\); got \(4,\)",
    ),
    "truth in numpy": (
        {"truth": {"omega": np.zeros((T, 1))}},
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
            self.prior = ph.SupportPrior(
                ph.SetEncoder(sensors=3, steps=POINTS, features=4), z=ph.families.Normal(1)
            )

        def forward(self, episode: Episode) -> None:
            pytest.fail("the program was run")

    model = Model()
    guide = ph.AmortizedGuide(model.prior, ph.SetEncoder(sensors=3, steps=POINTS, features=4))
    with pytest.raises(
        ValueError, match=r"\(time, sensor\) = \(11, 3\); got \(11, 2\). Build the SetEncoder with"
    ):
        ph.meta_train(model, guide, make(), steps=1, progress=False)


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
        lambda tasks: tasks.episode().only(-1),
        ValueError,
        "a task from 0 to 3; got -1",
    ),
    "a task too far": (
        lambda tasks: tasks.episode().only(T),
        ValueError,
        "a task from 0 to 3; got 4",
    ),
    "segments of nothing": (
        lambda tasks: tasks.episode().cut(0),
        ValueError,
        "segments of 1 step or more; got 0",
    ),
    "no time at all": (lambda tasks: tasks.episode().until(0), ValueError, "1 step or more; got 0"),
    "pieces out of order": (
        lambda tasks: tasks.episode().cut(3).pick(torch.zeros(T, 1).long()),
        ValueError,
        "one clock for all shots; got a clock for each shot. Pick shots before cutting",
    ),
}


@pytest.mark.usefixtures("without_jaxtyping")
@pytest.mark.parametrize("case", ASKED)
def test_what_cannot_be_is_refused_with_words(case: str) -> None:
    ask, error, message = ASKED[case]
    with pytest.raises(error, match=message):
        ask(make())


def test_cutting_without_measured_states_is_refused_with_words() -> None:
    tasks = make(initial=(torch.zeros(T, SHOTS), torch.zeros(T, SHOTS)))
    with pytest.raises(
        ValueError,
        match="measured states at all times, to restart from; got initial states alone. Pass initial=",
    ):
        tasks.episode().cut(3)


# -------------------------------------------------------------------------------------------- masks and initial states


def test_by_default_the_first_observation_is_the_initial_state_and_no_longer_counts() -> None:
    episode = make().episode()
    assert torch.equal(torch.stack(episode.query.initial, -1), episode.query.values[:, :, 0])
    assert not episode.query.scored[:, :, 0].any() and episode.query.scored[:, :, 1:].all()
    assert episode.query.observed is True  # an encoder may read it
    assert not episode.support.mask[:, :, 0].any() and episode.support.mask[:, :, 1:].all()


def test_given_initial_states_leave_every_observation_to_count() -> None:
    initial = (torch.randn(T, SHOTS), torch.randn(T, SHOTS), torch.randn(T, SHOTS))
    episode = make(initial=initial).episode()
    assert episode.query.scored is True and episode.support.mask is True
    for part, shots in zip(initial, episode.query.initial, strict=True):
        assert torch.equal(part[:, 2:], shots)


@pytest.mark.parametrize("form", ["tuple", "grid"])
def test_measured_states_of_all_times_give_the_initial_one(form: str) -> None:
    states = torch.randn(T, SHOTS, POINTS, 3)
    tasks = make(initial=states if form == "grid" else states.unbind(-1))
    first = tasks.episode().initial
    assert torch.equal(first if form == "grid" else torch.stack(first, -1), states[:, 2:, 0])
    assert torch.equal(tasks.episode().measured, states[:, 2:, 0])
    assert not tasks.episode().mask[:, :, 0].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_whatever_stands_where_the_mask_says_missing_it_comes_in_nowhere(bad: float) -> None:
    mask = torch.rand(T, SHOTS, POINTS, SENSORS) < 0.6
    mask[:, :, 5] = True
    values = torch.randn(mask.shape)
    episodes = [make(values.where(mask, filler), mask=mask).episode() for filler in (bad, 0.0)]
    for name, value in tensors(episodes[0]).items():
        assert value.isfinite().all() and (
            value.dtype == torch.bool or value.abs().max() < 100.0
        ), name
    assert_same(*episodes)
    assert torch.equal(episodes[0].seen, mask[:, 2:])
    counts = mask[:, 2:].clone()
    counts[:, :, 0] = False
    assert torch.equal(episodes[0].mask, counts)


@pytest.mark.parametrize("form", ["sensors", "tuple", "grid"])
def test_gaps_in_measured_states_are_filled_linearly_in_time(form: str) -> None:
    times = torch.tensor([0.0, 1.0, 3.0, 4.0, 8.0])
    states = (2.0 * times - 1.0).view(1, 1, 5, 1).repeat(1, 3, 1, 1)
    mask = torch.ones(1, 3, 5, 1, dtype=torch.bool)
    mask[0, 0, 1:4] = False  # between: on the line
    mask[0, 1, :2] = False  # before the first: the first
    mask[0, 1, 4] = False  # after the last: the last
    mask[0, 2] = False  # never seen: zero
    gaps = states.where(mask, torch.nan)
    initial = {"sensors": None, "tuple": gaps.unbind(-1), "grid": gaps}[form]
    tasks = Tasks.from_trajectories(times, gaps, num_support=1, mask=mask, initial=initial)
    filled = tasks.states if form == "grid" else torch.stack(tasks.states, -1)
    assert_close(
        filled[0, :, :, 0],
        torch.tensor([[-1.0, 1.0, 5.0, 7.0, 15.0], [5.0, 5.0, 5.0, 7.0, 7.0], [0.0] * 5]),
    )


def test_a_fully_observed_data_set_is_kept_to_the_last_bit() -> None:
    values = torch.randn(T, SHOTS, POINTS, SENSORS)
    with_mask, without = make(values, mask=torch.ones(values.shape, dtype=torch.bool)), make(values)
    assert torch.equal(with_mask.values, values) and torch.equal(without.values, values)
    for a, b in zip(with_mask.states, without.states, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(with_mask.mask, without.mask)


# ------------------------------------------------------------------------------------------- rows, splits and roles


def test_split_holds_out_the_last_tasks() -> None:
    truth = {"omega": torch.arange(float(T)).unsqueeze(-1)}
    train, held_out = make(truth=truth, mask=torch.rand(T, SHOTS, POINTS, SENSORS) < 0.9).split(1)
    assert len(train) == T - 1 and len(held_out) == 1
    assert train.true_latents["omega"][:, 0].tolist() == [0.0, 1.0, 2.0] and held_out.true_latents[
        "omega"
    ].tolist() == [[3.0]]
    assert (
        held_out.mask.shape
        == held_out.seen.shape
        == held_out.values.shape
        == (1, SHOTS, POINTS, SENSORS)
    )


def test_tasks_are_picked_by_slice_and_by_tensor() -> None:
    tasks, rows = make(), torch.tensor([3, 0])
    assert torch.equal(tasks[rows].values, tasks.values[rows]) and torch.equal(
        tasks[1:3].values, tasks.values[1:3]
    )
    assert torch.equal(tasks[rows].states[1], tasks.states[1][rows])


@pytest.mark.parametrize("size", [None, 1, 4])
def test_the_first_shots_are_the_support_and_the_others_the_query(size: int | None) -> None:
    tasks, n = make(), size or 2
    episode = tasks.episode(size)
    assert torch.equal(episode.support.values, tasks.values[:, :n]) and torch.equal(
        episode.query.values, tasks.values[:, n:]
    )
    assert episode.query.shape == (T, SHOTS - n) and episode.support.shape == (T, n)
    assert episode.support.support is None


@pytest.mark.parametrize("which", [slice(0, 2), slice(2, 4), slice(1, None, 2), ALL])
def test_shots_are_those_shots_of_everything_with_no_support(which: slice) -> None:
    mask = torch.rand(T, SHOTS, POINTS, SENSORS) < 0.8
    tasks = make(mask=mask)
    shots, everything = tasks.shots(which), tensors(tasks.shots(ALL))
    assert shots.support is None and shots.whole is None and shots.uncut is None
    assert {name: value.shape for name, value in tensors(shots).items()}.keys() == everything.keys()
    for name, value in tensors(shots).items():
        assert torch.equal(
            value, everything[name] if name == "times" else everything[name][:, which]
        ), name


def test_support_and_query_are_shots() -> None:
    tasks = make(mask=torch.rand(T, SHOTS, POINTS, SENSORS) < 0.8)
    episode = tasks.episode(3)
    assert_same(episode.support, tasks.shots(slice(0, 3)))
    query, rest = tensors(episode), tensors(tasks.shots(slice(3, None)))
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


def identity(episode: Episode) -> Tensor:
    """Which task and shot each trajectory was, from its numbered values."""
    return episode.query.values[:, :, 0, 0] // (POINTS * SENSORS)


def test_batches_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    tasks = make(numbered(tasks=7))
    one, same, other = (list(islice(tasks.batches(3, seed), 6)) for seed in (1, 1, 2))
    for a, b in zip(one, same, strict=True):
        assert_same(a, b)
    assert any(not torch.equal(identity(a), identity(b)) for a, b in zip(one, other, strict=True))


def test_batches_leave_the_global_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    next(make().batches(2, seed=0))
    assert torch.equal(torch.rand(3), expected)


def test_roles_are_drawn_anew_and_support_and_query_share_no_shot() -> None:
    tasks, roles = make(), set()
    for episode in islice(tasks.batches(T, seed=0), 40):
        support, query = identity(episode.support), identity(episode)
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
        shown = [int(row) for _ in range(3) for row in identity(next(batches))[:, 0] // SHOTS]
        assert len(set(shown)) == 6  # the seventh waits for another epoch: batches are of one size


def test_a_batch_is_never_larger_than_the_data_set() -> None:
    assert next(make().batches(1000, seed=0)).shape == (T, 3)


def test_a_batch_s_parts_belong_together() -> None:
    values = numbered()
    states = (values[..., 0] + 0.25, values[..., 1] + 0.25, values[..., 0] + 0.5)
    mask = values % 3.0 > 0.0
    for episode in islice(make(values, mask=mask, initial=states).batches(3, seed=0), 5):
        for part in (episode, episode.support):
            assert not part.query.values[~part.seen].any() and part.query.values[part.seen].all()
            known = part.seen[:, :, 0, 0]
            assert torch.equal(
                part.initial[0][known], (part.query.values[:, :, 0, 0] + 0.25)[known]
            )
            known = part.seen[..., 0]
            assert torch.equal(part.states[2][known], (part.query.values[..., 0] + 0.5)[known])


# ---------------------------------------------------------------------------------------------- changing episodes


def whole_episode(masked: bool = False, points: int = POINTS) -> Episode:
    values = numbered(points=points)
    return make(values, mask=torch.rand(values.shape) < 0.8 if masked else None).episode()


def test_only_gives_one_task_of_everything() -> None:
    episode = whole_episode(masked=True).cut(3)
    one = episode.only(2)
    assert one.shape == (1, episode.query.shape[1])
    for name, value in tensors(episode).items():
        expected = value if name.endswith("times") else value[2:3]
        assert torch.equal(tensors(one)[name], expected), name


def test_to_moves_everything() -> None:
    for part in (
        whole_episode(masked=True),
        whole_episode(masked=True).cut(3),
        whole_episode().until(4).cut(2),
    ):
        moved = tensors(part.to("meta"))
        assert moved.keys() == tensors(part).keys()
        assert {value.device.type for value in moved.values()} == {"meta"}
        assert_same(part.to("cpu"), part)


def test_double_is_the_same_in_float64() -> None:
    for part in (whole_episode(masked=True), whole_episode(masked=True).cut(3)):
        doubled, original = tensors(part.double()), tensors(part)
        assert doubled.keys() == original.keys()
        for name, value in original.items():
            assert torch.equal(
                doubled[name], value.double() if value.is_floating_point() else value
            ), name
            assert doubled[name].dtype in (torch.float64, torch.bool), name


def test_simulation_observes_nothing_and_keeps_support_and_starts() -> None:
    episode = whole_episode(masked=True)
    simulation = episode.simulation()
    assert (
        simulation.query.values is None
        and simulation.mask is True
        and simulation.support is episode.support
    )
    assert simulation.initial is episode.query.initial and simulation.shape == episode.query.shape
    assert simulation.cut(3) is simulation and simulation.sorted_shots is simulation


def test_until_keeps_the_first_steps_of_everything_but_what_encoders_read() -> None:
    episode = whole_episode(masked=True)
    begun = episode.until(4)
    for part, original in ((begun, episode), (begun.support, episode.support)):
        assert part.times.shape == (5,) and part.initial == original.initial
        assert torch.equal(part.query.values, original.query.values[:, :, :5]) and torch.equal(
            part.mask, original.mask[:, :, :5]
        )
        assert torch.equal(part.states[1], original.states[1][:, :, :5])
        assert part.whole is original
    assert episode.until(POINTS - 1) is episode


def test_until_keeps_initial_states_on_a_grid() -> None:
    episode = make(initial=torch.randn(T, SHOTS, POINTS, 7)).episode()
    begun = episode.until(2)
    assert torch.equal(begun.initial, episode.query.initial) and begun.states.shape == (T, 3, 3, 7)


# ------------------------------------------------------------------------------------------------------------------ cut

cuts = pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 9])


def originals(episode: Episode, whole: Episode) -> tuple[Tensor, Tensor]:
    """Shot and time index, in the whole trajectories, of every observation of a cut episode."""
    pieces = episode.query.shape[1] // whole.shape[1]
    shot = (
        torch.arange(whole.shape[1])
        .repeat_interleave(pieces)
        .unsqueeze(-1)
        .expand_as(episode.query.times)
    )
    return shot, torch.searchsorted(whole.times, episode.query.times.contiguous())


@cuts
@pytest.mark.parametrize("points", [8, 11, 10])
def test_segments_are_pieces_of_the_trajectories_with_their_own_clocks(
    steps: int, points: int
) -> None:
    whole = whole_episode(masked=True, points=points)
    for part, original in ((whole.cut(steps), whole), (whole.cut(steps).support, whole.support)):
        if steps >= points - 1:
            assert part is original
            continue
        pieces = -(-(points - 1) // steps)
        assert part.shape == (T, original.shape[1] * pieces) and part.times.shape == (
            part.shape[1],
            steps + 1,
        )
        shot, time = originals(part, original)
        assert torch.equal(part.query.values, original.query.values[:, shot, time])
        assert torch.equal(part.times, original.times[time])
        for start, states in zip(part.initial, original.states, strict=True):
            assert torch.equal(start, states[:, shot[:, 0], time[:, 0]])
        assert part.whole is original and part.uncut is original and part.states is None


@cuts
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("points", [8, 11, 10])
def test_every_observation_counts_exactly_once(steps: int, masked: bool, points: int) -> None:
    whole = whole_episode(masked, points)
    for part, original in ((whole.cut(steps), whole), (whole.cut(steps).support, whole.support)):
        if part is original:
            continue
        shot, time = originals(part, original)
        counted = torch.zeros(original.query.shape, dtype=torch.int64)
        for row in range(part.shape[1]):
            counted[:, shot[row, 0], time[row]] += part.mask[:, row]
        assert torch.equal(counted, original.mask.long())
        assert not part.mask[
            :, :, 0
        ].any()  # a segment's start is the measurement of its initial state


def test_the_last_segment_ends_with_the_data_and_repeats_nothing() -> None:
    whole = whole_episode()
    segments = whole.cut(4)  # of 10 steps: 0-4, 4-8, and 6-10, of which 6-8 has been seen
    assert_close(
        segments.times[:3],
        TIMES[torch.tensor([[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [6, 7, 8, 9, 10]])],
    )
    assert segments.mask[0, 2, :, 0].tolist() == [False, False, False, True, True]
    assert segments.mask[0, 1, :, 0].tolist() == [False, True, True, True, True]


def test_a_segment_that_starts_in_a_gap_starts_between_its_neighbours() -> None:
    mask = torch.ones(T, SHOTS, POINTS, SENSORS, dtype=torch.bool)
    mask[:, :, 5] = False
    values = torch.randn(mask.shape)
    part = make(values.where(mask, torch.nan), mask=mask).episode().cut(5)
    between = 0.5 * (values[:, 2:, 4] + values[:, 2:, 6])
    assert_close(torch.stack(part.initial, -1)[:, 1::2], between)


def test_a_cut_is_the_same_whatever_was_cut_before() -> None:
    whole = whole_episode(masked=True)
    segments = whole.cut(4)
    assert_same(segments.cut(3), whole.cut(3))
    assert_same(segments.cut(3).support, whole.support.cut(3))
    assert (
        segments.cut(4) is segments and segments.cut(7) is segments
    )  # they are that short already
    assert segments.cut(None) is whole


def test_a_trajectory_that_is_short_already_is_not_cut() -> None:
    whole = whole_episode()
    assert whole.cut(None) is whole and whole.cut(POINTS - 1) is whole and whole.cut(99) is whole


def test_a_cut_of_the_first_steps_knows_nothing_of_the_others_but_for_encoders() -> None:
    whole = whole_episode(masked=True)
    part = whole.until(6).cut(4)
    assert float(part.times.max()) == float(TIMES[6]) and part.whole is whole
    assert_same(part.cut(2), whole.until(6).cut(2))
    shot, time = originals(part, whole)
    counted = torch.zeros(whole.query.shape, dtype=torch.int64)
    for row in range(part.shape[1]):
        counted[:, shot[row, 0], time[row]] += part.mask[:, row]
    expected = whole.mask.long()
    expected[:, :, 7:] = 0
    assert torch.equal(counted, expected)


@settings(max_examples=40, deadline=None)
@given(points=st.integers(2, 30), steps=st.integers(1, 35))
def test_for_any_length_every_observation_counts_once(points: int, steps: int) -> None:
    times, values = torch.arange(float(points)), torch.randn(1, 2, points, 1)
    whole = Tasks.from_trajectories(times, values, num_support=1).episode()
    part = whole.cut(steps)
    counted = part.times.expand(part.shape[1], -1)[part.mask[0, :, :, 0]]
    assert sorted(counted.tolist()) == list(range(1, points))
    assert part.times.shape[-1] == min(steps + 1, points)


# ----------------------------------------------------------------------------------------------------------------- some


@pytest.mark.parametrize("order", [[0], [2, 0], [1, 2, 0]])
def test_some_takes_the_same_segments_of_every_task(order: list[int]) -> None:
    episode, shots = whole_episode(masked=True).cut(4), torch.tensor(order)
    few = episode.some(shots)
    assert few.shape == (T, len(order)) and few.support is episode.support
    assert torch.equal(few.times, episode.query.times[shots])
    for name, value in tensors(episode).items():
        if name.partition(".")[0] not in ("times", "support", "whole", "uncut"):
            assert torch.equal(tensors(few)[name], value[:, shots]), name


def test_some_of_what_was_not_cut_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="an episode that was cut into segments; got whole trajectories. Cut it first",
    ):
        whole_episode().some(torch.tensor([0]))


@pytest.mark.parametrize("change", ["cut", "until and cut"])
def test_of_some_segments_encoders_go_on_reading_the_whole_trajectories(change: str) -> None:
    whole = whole_episode(masked=True)
    begun = whole.until(6) if "until" in change else whole
    few = begun.cut(3).some(torch.tensor([1, 0]))
    assert few.whole is whole and few.uncut is None
    encoder = ph.SetEncoder(SENSORS, POINTS, 3)
    assert torch.equal(encoder(few), encoder(whole))


def test_all_segments_in_their_order_are_the_episode() -> None:
    segments = whole_episode(masked=True).cut(4)
    everything = segments.some(torch.arange(segments.shape[1]))
    for name, value in tensors(everything).items():
        assert torch.equal(value, tensors(segments)[name]), name


def test_some_segments_count_what_they_counted_among_all() -> None:
    segments = whole_episode(masked=True).cut(4)
    parts = [segments.some(torch.arange(k, segments.shape[1], 2)) for k in (0, 1)]
    assert sum(int(part.mask.sum()) for part in parts) == int(segments.mask.sum())


@pytest.mark.parametrize("shots", [[0], [7, 0, 3], [4, 3, 5, 0, 1, 2, 8, 7, 6]])
def test_the_canonical_order_of_some_segments_keeps_them_and_their_clocks(shots: list[int]) -> None:
    few = make(torch.randn(T, SHOTS, POINTS, SENSORS)).episode().cut(4).some(torch.tensor(shots))
    ordered = few.sorted_shots
    assert ordered.shape == few.shape
    for shot in range(few.shape[1]):
        for task in range(T):
            same = [
                k
                for k in range(few.shape[1])
                if torch.equal(few.query.values[task, k], ordered.query.values[task, shot])
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
    steps: dict[str, Callable[[Episode], Episode]] = {
        "whole": lambda episode: episode,
        "cut": lambda episode: episode.cut(3),
        "until": lambda episode: episode.until(6),
        "until and cut": lambda episode: episode.until(6).cut(4),
    }
    expected = steps[change](tasks.shots()).sorted_shots
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        assert_same(steps[change](shuffled(tasks, order).shots()).sorted_shots, expected)


def test_the_canonical_order_keeps_shots_whole() -> None:
    episode = make(
        torch.randn(T, SHOTS, POINTS, SENSORS), mask=torch.rand(T, SHOTS, POINTS, SENSORS) < 0.9
    ).episode()
    ordered = episode.sorted_shots
    for task in range(T):
        same = (
            (ordered.query.values[task].unsqueeze(1) == episode.query.values[task])
            .flatten(2)
            .all(-1)
        )
        rows = same.int().argmax(1).tolist()
        assert same.sum() == 3 and sorted(rows) == [0, 1, 2]
        assert torch.equal(ordered.mask[task], episode.query.scored[task, rows])
        assert torch.equal(ordered.seen[task], episode.query.observed[task, rows])
        assert torch.equal(ordered.initial[1][task], episode.query.initial[1][task, rows])
        assert torch.equal(ordered.states[0][task], episode.states[0][task, rows])
    assert_same(ordered.sorted_shots, ordered)


def test_the_canonical_order_of_segments_is_that_of_their_trajectories() -> None:
    episode = make(torch.randn(T, SHOTS, POINTS, SENSORS)).episode()
    assert_same(episode.cut(4).sorted_shots, episode.sorted_shots.cut(4))


def test_shots_with_clocks_of_their_own_stay_where_their_clocks_are() -> None:
    clocks = TIMES + torch.arange(3.0).unsqueeze(-1)
    episode = Episode(clocks, numbered(shots=3), (torch.zeros(T, 3),))
    assert episode.sorted_shots is episode
    with pytest.raises(ValueError, match="one clock for all shots; got a clock for each shot"):
        episode.pick(torch.zeros(T, 2, dtype=torch.int64))


def test_pick_takes_shots_task_by_task() -> None:
    episode, order = whole_episode(masked=True), torch.tensor([[0, 2], [1, 0], [2, 2], [1, 1]])
    picked = episode.pick(order)
    for task, (a, b) in enumerate(order.tolist()):
        assert torch.equal(picked.query.values[task], episode.query.values[task, [a, b]])
        assert torch.equal(picked.mask[task], episode.query.scored[task, [a, b]])
        assert torch.equal(picked.initial[0][task], episode.query.initial[0][task, [a, b]])
    assert picked.support is episode.support and picked.times is episode.query.times
