"""step_error against the error that closed forms say steps have."""

from __future__ import annotations

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from toys import alone

import pyro_hybrid as ph

NOISE, POINTS = 0.01, 9


def episode(points: int = POINTS, scored: Tensor | None = None) -> ph.Episode:
    times, one = (
        torch.linspace(0.0, 2.0, points, dtype=torch.float64),
        torch.ones(3, 1, dtype=torch.float64),
    )
    query = torch.zeros(3, 1, points, 2, dtype=torch.float64)
    return alone(times, query, (one, 0.0 * one), scored=scored)


class Swing(ph.HybridModel):
    """Harmonic oscillators, task k of frequency 2 k, so that the first stands still."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options
        self.share = torch.nn.Parameter(torch.zeros(()))

    def forward(self, episode: ph.Episode) -> Tensor:
        rate = (2.0 * torch.arange(3.0, dtype=episode.query.times.dtype).unsqueeze(-1)) ** 2
        with episode.plate:
            x = ph.solve(
                lambda t, y: (y[1], -rate * y[0]),
                episode.query.initial.unbind(-1),
                episode.query.times,
                **self.options,
            )
            self.states = x
            fn = dist.Normal(x + self.share, NOISE).mask(episode.query.scored)
            return pyro.sample("x", fn.to_event(3), obs=episode.query.values)


def true_error(model: Swing) -> Tensor:
    """Largest error in standard deviations of the noise, by task, against the closed form."""
    few, omega = episode(), 2.0 * torch.arange(3.0, dtype=torch.float64).view(3, 1, 1)
    exact = torch.stack(
        [torch.cos(omega * few.query.times), -omega * torch.sin(omega * few.query.times)], -1
    )
    model(few)
    return ((model.states - exact) / NOISE).abs().flatten(1).amax(1)


@pytest.mark.parametrize("options", [{}, {"substeps": 2}, {"step": 0.2}], ids=str)
def test_it_is_the_true_error_but_for_a_sixteenth(options: dict[str, float]) -> None:
    model = Swing(**options)
    found, true = ph.step_error(model, episode()), true_error(model)
    assert found.by_task[0] < 1e-9
    torch.testing.assert_close(found.by_task[1:], true[1:] * 15 / 16, rtol=0.1, atol=0.0)
    assert found.worst == float(found.by_task.max()) and 0.0 < found.typical < found.worst


def test_what_is_masked_does_not_count() -> None:
    late = torch.zeros(3, 1, POINTS, 2, dtype=torch.bool)
    late[:, :, 0] = True  # the initial state is exact
    assert ph.step_error(Swing(), episode(scored=late))[:2] == (0.0, 0.0)


def test_adaptive_steps_have_none() -> None:
    assert ph.step_error(Swing(method="dopri8", rtol=1e-9), episode()).worst == 0.0


def test_trajectories_that_diverge_are_infinitely_wrong() -> None:
    found = ph.step_error(Swing(step=2.0), episode())
    assert found.worst > 100.0
    assert math.isinf(ph.step_error(Exploding(), episode()).worst)


class Exploding(Swing):
    """Its steps are too long for it to stay finite."""

    def forward(self, episode: ph.Episode) -> Tensor:
        with episode.plate:
            shots = episode.query
            x = ph.solve(
                lambda t, y: (-1e200 * y[0] ** 3, y[1]), shots.initial.unbind(-1), shots.times
            )
            return pyro.sample("x", dist.Normal(x, NOISE).to_event(3), obs=shots.values)


@pytest.mark.parametrize(("options", "warns"), [({}, True), ({"substeps": 20}, False)])
def test_training_warns_of_steps_that_are_too_long(
    options: dict[str, int], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    few = episode()
    tasks = ph.Tasks.from_trajectories(
        few.query.times, few.query.values.expand(3, 2, -1, -1).contiguous(), num_support=1
    )
    model = Swing(**options)

    class Nothing(torch.nn.Module):
        def forward(self, episode: ph.Episode) -> None:
            pass

    with caplog.at_level(logging.WARNING, "pyro_hybrid"):
        fit = ph.meta_train(
            model,
            Nothing(),
            moved(tasks),
            num_steps=2,
            batch_size=3,
            curriculum={0.0: None},
            progress=False,
        )
    assert (fit.step_error > 0.1) == warns
    assert ("Fixed steps are too long" in caplog.text) == warns


def moved(tasks: ph.Tasks) -> ph.Tasks:
    """Tasks that don't start at rest."""
    values = tasks.values + 1.0
    return ph.Tasks.from_trajectories(tasks.times, values, num_support=1)
