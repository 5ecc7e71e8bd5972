"""Curves of what is recovered against how much there is, on programs whose answer is known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from toys import POINTS, Line, exact, make_tasks

import pyro_hybrid as ph
from pyro_hybrid.identifiability.learning_curves import (
    LearningCurve,
    required_size,
    shots_curve,
    tasks_curve,
)

C = 20.0  # variance of what a program adds to a latent, times the number of its tasks and shots, in latents' variances
TASKS, SHOTS = 400, 8
SPREAD = torch.tensor([1.0, 3.0], dtype=torch.float64)


def noisy(tasks: int, shots: int = SHOTS, seed: int = 0, *, truth: bool = True) -> ph.Tasks:
    """Two sensors show two latents as they are, two more a standard Normal number of each shot."""
    generator = torch.Generator().manual_seed(seed)
    z = SPREAD * torch.randn(tasks, 1, 2, generator=generator, dtype=torch.float64)
    noise = SPREAD * torch.randn(tasks, shots, 2, generator=generator, dtype=torch.float64)
    values = torch.cat([z.expand(-1, shots, -1), noise], -1).unsqueeze(-2).expand(-1, -1, 2, -1)
    return ph.Tasks.from_trajectories(
        torch.arange(2.0, dtype=torch.float64),
        values,
        num_support=shots // 2,
        true_latents={"z": z.squeeze(1)} if truth else None,
    )


class Apprentice:
    """Remembers what it was trained on; its error falls with the number of tasks, and with that of shots."""

    def __init__(self, tasks: ph.Tasks, *, learns: bool = True) -> None:
        self.tasks, self.error = tasks, (C / len(tasks)) ** 0.5 if learns else 1.0

    def __call__(self, episode: ph.Episode) -> Tensor:
        signal, noise = episode.support.values[:, :, 0].mean(1).split(2, -1)
        with episode.plate:
            z = pyro.sample("z", dist.Normal(signal + self.error * noise, 0.1).to_event(1))
            x = dist.Normal(z[:, None, None, :], 1.0).to_event(3)
            return pyro.sample(
                "x", x, obs=None if episode.query.values is None else episode.query.values[..., :2]
            )


def trend(slope: float, *sizes: int, scale: float = 5.0) -> LearningCurve:
    """Two latents: one that is always well recovered, one whose 1 - R² is a power of the number of tasks."""
    r = np.sqrt(1.0 - np.minimum(scale * np.array(sizes) ** slope, 1.0))
    both = np.stack([np.full_like(r, 0.9999), r], -1)
    return LearningCurve(
        "tasks", ["a", "b"], list(sizes), both, np.stack([both, both], -1), both.mean(1), 5
    )


# ---- tasks ---------------------------------------------------------------------------------------


def test_more_tasks_are_as_much_better_as_the_closed_form_says() -> None:
    tasks, sizes = noisy(1000), (5, 20, 100, 1000)
    found = tasks_curve(Apprentice, tasks, noisy(TASKS, seed=1), sizes, progress=False)
    expected = 1.0 / (
        1.0 + C / np.array(sizes) / (SHOTS // 2)
    )  # R² of a latent and the mean of so many shots' errors
    assert np.allclose(found.linear_r**2, expected[:, None], atol=0.06)
    assert (np.diff(found.linear_r, axis=0) > 0.0).all() and found.linear_r[-1].min() > 0.99
    assert np.allclose(found.strong, np.sqrt(expected), atol=0.04)
    assert (found.interval[..., 0] <= found.linear_r).all() and (
        found.linear_r <= found.interval[..., 1]
    ).all()
    assert (np.diff(found.interval)[..., 0] < 0.2).all()


def test_a_curve_says_what_was_counted_and_what_the_theorem_counts() -> None:
    found = tasks_curve(Apprentice, noisy(40), noisy(50, seed=1), [2, 40], progress=False)
    assert found.of == "tasks" and found.names == ["z[0]", "z[1]"] and found.sizes == [2, 40]
    assert found.threshold == 2 * 2 + 1  # two latents, a Normal's two statistics
    assert (
        found.linear_r.shape == (2, 2)
        and found.interval.shape == (2, 2, 2)
        and found.strong.shape == (2,)
    )


def test_every_training_gets_the_first_so_many_tasks() -> None:
    tasks, seen = noisy(30), []

    def train(some: ph.Tasks) -> Apprentice:
        seen.append(some)
        return Apprentice(some)

    tasks_curve(train, tasks, noisy(50, seed=1), (3, 10, 30), progress=False)
    assert [len(some) for some in seen] == [3, 10, 30]
    assert all(torch.equal(some.values, tasks.values[: len(some)]) for some in seen)


def test_held_out_tasks_are_read_from_their_own_support() -> None:
    few, many = (
        ph.Tasks.from_trajectories(t.times, t.values, num_support=n, true_latents=t.true_latents)
        for t in [noisy(TASKS, seed=1)]
        for n in (1, 4)
    )
    worse, better = (
        tasks_curve(Apprentice, noisy(20), held_out, [20], progress=False)
        for held_out in (few, many)
    )
    assert (worse.linear_r < better.linear_r - 0.05).all()


# ---- shots ---------------------------------------------------------------------------------------


def test_more_shots_are_as_much_better_as_the_exact_posterior_says() -> None:
    tasks = make_tasks(TASKS, 8, num_support=2, noise=1.0)
    model = Line(ph.GaussNewton(6), noise=1.0).double()
    found = shots_curve(model, tasks, progress=False)
    assert (
        found.of == "shots"
        and found.threshold is None
        and found.names == ["slope", "bend[0]", "bend[1]"]
    )
    assert found.sizes == [1, 2, 4, 8]
    prior = torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64)
    for i, size in enumerate(found.sizes):
        left = exact(tasks.shots(slice(0, size)), noise=1.0).covariance[0].diagonal()[:3]
        assert np.allclose(found.linear_r[i] ** 2, 1.0 - left / prior, atol=0.08), size
    assert (np.diff(found.linear_r, axis=0) > 0.0).all()


def test_shots_are_counted_from_the_first_as_far_as_asked() -> None:
    model, tasks = Apprentice(noisy(10)), noisy(60, 12, seed=1)
    found = shots_curve(model, tasks, [1, 3, 12], progress=False)
    assert found.sizes == [1, 3, 12] and shots_curve(model, tasks, progress=False).sizes == [
        1,
        2,
        4,
        8,
    ]
    whole = ph.Tasks.from_trajectories(
        tasks.times, tasks.values[:, :3], num_support=1, true_latents=tasks.true_latents
    )
    assert np.allclose(
        shots_curve(model, whole, [3], progress=False).linear_r[0], found.linear_r[1]
    )


def test_a_prior_that_ignores_its_shots_gains_nothing_by_more_of_them() -> None:
    class Deaf(Apprentice):
        def __call__(self, episode: ph.Episode) -> Tensor:
            return super().__call__(
                replace(
                    episode,
                    support=episode.support
                    and episode.support.select_shots(
                        torch.zeros(len(episode.support.values), 1, dtype=torch.long)
                    ),
                )
            )

    found = shots_curve(Deaf(noisy(20), learns=False), noisy(100, seed=1), progress=False)
    assert np.allclose(found.linear_r, found.linear_r[:1]) and required_size(found) is None


def test_neither_curve_shows_a_bar_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    held_out = noisy(50, seed=1)
    tasks_curve(Apprentice, noisy(10), held_out, [10], progress=False)
    shots_curve(Apprentice(noisy(10)), held_out, [1], progress=False)
    assert capsys.readouterr() == ("", "")
    tasks_curve(Apprentice, noisy(10), held_out, [10])
    shots_curve(Apprentice(noisy(10)), held_out, [1])
    said = capsys.readouterr()
    assert (
        "training on more and more tasks" in said.err
        and "inferring from more and more shots" in said.err
    )
    assert said.out == ""


# ---- how many more -------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [-0.3, -0.5, -1.0, -2.0])
@pytest.mark.parametrize("target", [0.9, 0.99, 0.9999])
def test_a_power_law_is_extrapolated_to_its_closed_form(slope: float, target: float) -> None:
    found = trend(
        slope, 30, 100, 300, scale=0.5 * 30.0**-slope
    )  # half of the variance is missing at 30 tasks
    expected = (0.5 * 30.0**-slope / (1.0 - target**2)) ** (-1.0 / slope)
    answer = required_size(found, target)
    if expected <= 300:
        assert answer == min(size for size in found.sizes if size >= expected)
    else:
        assert answer == pytest.approx(expected, rel=1e-6, abs=1.0)


def test_what_is_reached_is_not_extrapolated() -> None:
    assert (
        required_size(trend(-1.0, 10, 100, 1000), 0.9) == 100
        and required_size(trend(-1.0, 1000), 0.9) == 1000
    )


def test_only_what_has_begun_to_fall_counts() -> None:
    """Below the threshold there is nothing to learn from, and no trend."""
    begun = trend(-1.0, 10, 20, 100, 1000, 10_000, scale=200.0)
    assert begun.linear_r[:3, 1].max() == 0.0
    expected = 200.0 / (1.0 - 0.999**2)
    assert required_size(begun, 0.999) == pytest.approx(expected, rel=1e-6, abs=1.0)


def test_a_learned_curve_is_extrapolated_near_the_truth() -> None:
    found = tasks_curve(
        Apprentice, noisy(600), noisy(TASKS, seed=1), (20, 60, 200, 600), progress=False
    )
    target = 0.999
    expected = C / (SHOTS // 2) * target**2 / (1.0 - target**2)
    assert 0.6 < required_size(found, target) / expected < 1.7


def test_what_is_not_reached_yet_takes_more_than_there_was() -> None:
    """Even where the curve flattens, so that its trend says otherwise."""
    r = np.sqrt(1.0 - np.array([[0.8], [0.1], [0.09]]))
    flattening = LearningCurve("tasks", ["a"], [10, 100, 1000], r, np.stack([r, r], -1), r[:, 0], 3)
    assert required_size(flattening, 0.92**0.5) > 1000


@pytest.mark.parametrize(
    "curve",
    [
        trend(0.0, 10, 100, 1000, scale=0.5),
        trend(-0.01, 10, 100, 1000, scale=0.5),
        trend(0.1, 10, 100, 1000, scale=0.3),
        trend(-1.0, 10, 100, 150, scale=100.0),
        trend(-1.0, 10, scale=5.0),
    ],
    ids=["flat", "hardly falling", "worse and worse", "hardly begun", "a single size"],
)
def test_without_a_trend_there_is_no_answer(curve: LearningCurve) -> None:
    assert required_size(curve, 0.99) is None


# ---- what is refused -----------------------------------------------------------------------------


def refuse(tasks: ph.Tasks) -> Apprentice:
    """A training takes long: what is wrong must be said before it."""
    raise AssertionError("it was trained")


@pytest.mark.parametrize(
    "sizes",
    [[], [1, 10], [10, 5], [5, 5], [5, 11]],
    ids=["none", "one task", "falling", "twice", "too many"],
)
def test_numbers_of_tasks_that_cannot_be_are_refused_before_any_training(sizes: list[int]) -> None:
    with pytest.raises(
        ValueError,
        match=r"expected ascending whole numbers from 2 to 10 as sizes; got \[.*\]\. Simulate more tasks, or",
    ):
        tasks_curve(refuse, noisy(10), noisy(50, seed=1), sizes, progress=False)


@pytest.mark.parametrize(
    "sizes",
    [[], [0, 1], [4, 2], [2, 2], [4, 9]],
    ids=["none", "no shot", "falling", "twice", "too many"],
)
def test_numbers_of_shots_that_cannot_be_are_refused(sizes: list[int]) -> None:
    with pytest.raises(
        ValueError,
        match=r"expected ascending whole numbers from 1 to 8 as sizes; got \[.*\]\. Record more shots, or",
    ):
        shots_curve(Apprentice(noisy(10)), noisy(50, seed=1), sizes, progress=False)


def test_without_truth_there_is_nothing_to_compare_with() -> None:
    held_out = noisy(50, seed=1, truth=False)
    message = r"expected held-out tasks with truth; got none\. Pass true_latents= to Tasks\.from_trajectories, or simulate"
    with pytest.raises(ValueError, match=message):
        shots_curve(Apprentice(noisy(10)), held_out, progress=False)
    with pytest.raises(ValueError, match=message):
        tasks_curve(refuse, noisy(10), held_out, [10], progress=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tasks_curve(noisy(10), noisy(10), noisy(50), [2, 4]),
            r"train to be callable; got Tasks\. Pass a function from tasks to a trained model",
        ),
        (
            lambda: tasks_curve(refuse, noisy(10).episode(), noisy(50), [2, 4]),
            r"tasks to be a data set \(ph\.Tasks\); got Episode\. Make one with",
        ),
        (
            lambda: tasks_curve(refuse, noisy(10), noisy(50).episode(), [2, 4]),
            r"held_out to be a data set \(ph\.Tasks\); got Episode\. Make one with",
        ),
        (
            lambda: tasks_curve(refuse, noisy(10), noisy(50), [2, 4.5]),
            r"ascending whole numbers from 2 to 10 as sizes; got \[2, 4\.5\]",
        ),
        (
            lambda: shots_curve(noisy(10), noisy(50)),
            r"model to be callable; got Tasks\. Pass the trained program",
        ),
        (
            lambda: shots_curve(Apprentice(noisy(10)), noisy(50).values),
            r"held_out to be a data set \(ph\.Tasks\); got Tensor\. Make one with",
        ),
    ],
)
def test_wrong_objects_are_answered_with_what_to_pass(
    without_jaxtyping: None, call: Callable[[], object], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("target", [0.0, 1.0, 1.2, -0.5])
def test_a_target_that_no_number_reaches_is_refused(target: float) -> None:
    with pytest.raises(
        ValueError, match=rf"expected a target between 0 and 1; got {target}\. Linear R of 1 takes"
    ):
        required_size(trend(-1.0, 10, 100), target)


def test_the_toy_is_as_noisy_as_it_claims() -> None:
    """What the closed forms above rest on."""
    values = noisy(4000).values
    assert POINTS > 2 and torch.allclose(values[:, :, 0, :2].std((0, 1)), SPREAD, rtol=0.05)
    assert torch.allclose(values[:, :, 0, 2:].std((0, 1)), SPREAD, rtol=0.05)
