"""Trajectories with clocks and lengths of their own, on their way from a table to ArviZ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroParam
from toys import system

import pyro_hybrid as ph

NOISE = 0.05


def recordings() -> pd.DataFrame:
    """Exponential decays, read off at random times, five to nine of each."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for task in range(12):
        rate = np.exp(0.3 * random.normal())
        for shot in range(4):
            start = 1.0 + random.uniform()
            for time in np.r_[0.0, np.sort(random.uniform(0.1, 3.0, random.integers(4, 9)))]:
                value = start * np.exp(-rate * time) + NOISE * random.normal()
                rows.append({"task": task, "shot": shot, "time": time, "x": value, "rate": rate})
    return pd.DataFrame(rows)


class Decay(ph.HybridModel):
    """x' = -rate x; the start is a latent of the shot, around its measurement if there is one."""

    def __init__(self, num_times: int) -> None:
        super().__init__()
        evidence = ph.Encoder(ph.SetEncoder(1, num_times, 8)).then(ph.GaussNewton(3))
        self.prior = ph.SupportPrior(evidence, rate=ph.families.LogNormal(1, scale=0.5))
        self.noise = PyroParam(torch.tensor(NOISE), dist.constraints.positive)

    def forward(self, episode: ph.Episode) -> torch.Tensor:
        p, shots = self.prior(episode), episode.query
        if shots.initial is None:
            begin = dist.Normal(1.5 * torch.ones(*shots.shape, 1), 1.0)
        else:
            begin = dist.Normal(shots.initial, self.noise)
        with episode.plate:
            rate = pyro.sample("rate", p["rate"])
            start = pyro.sample("start", begin.to_event(2))
            states = ph.solve(
                lambda t, y: (-rate * y[0],), start.unbind(-1), shots.times, substeps=2
            )
            x = dist.Normal(states, self.noise).mask(shots.scored)
            return pyro.sample("x", x.to_event(3), obs=shots.values)


def fitted(**options: Any) -> tuple[ph.Tasks, Decay, ph.AmortizedGuide]:
    tasks = ph.Tasks.from_frame(
        recordings(), sensors=["x"], num_support=2, true_latents={"rate": ["rate"]}, **options
    )
    assert tasks.times.dim() == 3 and not tasks.observed.all()
    model = Decay(tasks.values.shape[2])
    return tasks, model, ph.AmortizedGuide(model, ph.GaussNewton(3))


@pytest.mark.parametrize("initial", ["sensors", None])
def test_rates_are_recovered_from_a_table_of_irregular_recordings(initial: str | None) -> None:
    tasks, model, guide = fitted(initial=initial)
    fit = ph.meta_train(model, guide, tasks, num_steps=2, batch_size=4, progress=False)
    assert all(np.isfinite(fit.loss))
    latents = ph.draws(model, guide, tasks.episode(), 100)["rate"]
    correlation = torch.corrcoef(
        torch.stack([latents.mean(0).flatten(), tasks.true_latents["rate"].flatten()])
    )[0, 1]
    assert correlation > 0.97


def test_what_padding_holds_does_not_matter() -> None:
    tasks, model, guide = fitted()
    shots = tasks.shots()
    results = []
    for filler in (0.0, 1e6):
        spoiled = shots.values.where(shots.observed, filler)
        changed = ph.Shots.from_tensors(
            shots.times, spoiled, shots.initial, observed=shots.observed, scored=shots.scored
        )
        torch.manual_seed(0)
        results.append(ph.draws(model, guide, ph.Episode(changed, changed), 3)["rate"])
    assert torch.equal(*results)


def test_own_clocks_go_to_arviz_beside_the_trajectories() -> None:
    tasks, model, guide = fitted()
    episode = tasks[:3].episode()
    data = ph.to_arviz(model, guide, episode, 4)
    times = data["constant_data"]["times"]
    assert times.dims == ("task", "shot", "time")
    assert np.array_equal(times.values, episode.query.times.numpy())
    observed = data["observed_data"]["x"].values
    assert np.array_equal(np.isfinite(observed), episode.query.observed.numpy())


@pytest.mark.parametrize("kind", [ph.systems.Pendulum, ph.systems.AdvectionDiffusion])
def test_a_common_clock_written_out_by_task_changes_no_loss(
    kind: type[ph.systems.System],
) -> None:
    options = {"size": 6} if kind is ph.systems.AdvectionDiffusion else {}
    short = system(kind, **options)
    tasks = short.simulate(4, 4, seed=0)
    clocks = tasks.times.expand(*tasks.values.shape[:2], -1)
    written_out = ph.Tasks.from_trajectories(
        clocks, tasks.values, num_support=2, initial=tasks.states
    )
    losses = []
    for data in (tasks, written_out):
        torch.manual_seed(0)
        model = ph.models.MetaHybridVAE(short, correction=1.0)
        fit = ph.meta_train(
            model, model.guide(), data, num_steps=2, batch_size=2, seed=0, progress=False
        )
        losses.append(fit.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
