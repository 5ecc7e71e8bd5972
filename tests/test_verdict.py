"""A verdict: nothing is found where all is well, and each thing that goes wrong is found and named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_hybrid as ph
from pyro_hybrid.beliefs.families import LogNormal, Normal
from pyro_hybrid.fitting.verdict import Verdict, judge

NOISE = 0.02
TIMES = torch.linspace(0.0, 3.0, 41)


class Decay(ph.HybridModel):
    """y' = -rate y + push: both numbers are latents of the system, and nothing is trained."""

    def __init__(self, *, silent: bool = False, noise: float = NOISE, substeps: int = 1) -> None:
        super().__init__()
        sites = {"rate": LogNormal(1, scale=0.5), "push": Normal(1)}
        self.prior = ph.SupportPrior(ph.GaussNewton(8), **sites)
        self.noise = torch.nn.Parameter(torch.tensor(noise))
        self.silent, self.substeps = silent, substeps

    def forward(self, episode: ph.Episode) -> Tensor:
        p, shots = self.prior(episode), episode.query
        with episode.plate:
            rate = pyro.sample("rate", p["rate"])
            push = pyro.sample("push", p["push"])
            push = torch.zeros_like(push) if self.silent else push

            def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return (-rate * state[0] + push,)

            states = ph.solve(field, shots.initial.unbind(-1), shots.times, substeps=self.substeps)
            x = dist.Normal(states, self.noise).mask(shots.scored)
            return pyro.sample("x", x.to_event(3), obs=shots.values)


def decays(extra: Any = None, *, times: Tensor = TIMES, num_tasks: int = 24) -> ph.Tasks:
    """Decays with pushes; ``extra(t)`` is added to the slope, where the program doesn't know of it."""
    generator = torch.Generator().manual_seed(0)
    rate = torch.exp(0.4 * torch.randn(num_tasks, 1, generator=generator))
    push = torch.randn(num_tasks, 1, generator=generator)
    start = 2.0 + torch.randn(num_tasks, 4, generator=generator)
    more = extra or (lambda t: torch.zeros(()))
    clean = ph.solve(lambda t, y: (-rate * y[0] + push + more(t),), (start,), times, substeps=4)
    values = clean + NOISE * torch.randn(clean.shape, generator=generator)
    return ph.Tasks.from_trajectories(times, values, num_support=2, initial=start.unsqueeze(-1))


def judged(tasks: ph.Tasks, **options: Any) -> Verdict:
    model = Decay(**options)
    return judge(ph.Posterior(model, ph.AmortizedGuide(model, ph.GaussNewton(2))), tasks)


def names(verdict: Verdict) -> set[str]:
    return {finding.name for finding in verdict.findings}


def test_nothing_is_found_where_all_is_well() -> None:
    verdict = judged(decays())
    assert verdict.findings == []
    assert str(verdict) == "Nothing speaks against the fit."


def test_a_wrong_equation_shows_in_noise_residuals_and_fit() -> None:
    verdict = judged(decays(lambda t: 2.0 * torch.sin(4.0 * t)))
    assert {"noise", "residuals", "fit"} <= names(verdict)
    assert "give it more inputs" in str(verdict)


def test_a_wrong_equation_shows_although_the_noise_was_learned_from_it() -> None:
    found = names(judged(decays(lambda t: 2.0 * torch.sin(4.0 * t)), noise=0.3))
    assert {"noise", "residuals"} <= found


def test_a_noise_that_is_too_small_shows_in_the_fit_alone() -> None:
    verdict = judged(decays(), noise=NOISE / 3.0)
    assert names(verdict) == {"fit"}
    assert "If the noise is fixed, learn it." in verdict.findings[0].remedy


def test_a_noise_that_is_much_too_large_shows_in_the_fit() -> None:
    verdict = judged(decays(), noise=3.0 * NOISE)
    assert names(verdict) == {"fit"} and "the noise was not learned" in str(verdict)


def test_systems_of_another_kind_are_counted_and_named() -> None:
    tasks = decays()
    values = tasks.values.clone()
    values[5:8] = decays(lambda t: 4.0 * torch.cos(2.0 * t)).values[5:8]
    verdict = judged(replace(tasks, values=values))
    finding = next(one for one in verdict.findings if one.name == "systems that don't fit")
    assert "12% of the held-out systems" in finding.why and "5, 6, 7" in finding.why


def test_a_latent_that_nothing_shows_is_named() -> None:
    tasks = decays()
    verdict = judged(tasks, silent=True, noise=2.0)
    assert "`push`" in next(one.why for one in verdict.findings if one.name == "latents")


def test_shots_that_contradict_each_other_are_found_by_the_scale_of_intervals() -> None:
    model = Decay()
    model.prior.interval_scale.fill_(5.0)
    posterior = ph.Posterior(model, ph.AmortizedGuide(model, ph.GaussNewton(2)))
    verdict = judge(posterior, decays())
    assert "differ by 5 times their error bars" in str(verdict)


def test_steps_of_the_solver_that_are_too_long_are_found_and_shorter_ones_are_not() -> None:
    coarse = torch.linspace(0.0, 12.0, 9)
    tasks = decays(times=coarse)
    assert "solver" in names(judged(tasks))
    assert "solver" not in names(judged(tasks, substeps=8))


def test_a_training_that_did_not_get_better_is_found() -> None:
    model = Decay()
    posterior = ph.Posterior(model, ph.AmortizedGuide(model, ph.GaussNewton(2)))
    worse = posterior.after("fit", {}, {"is_settled": True, "held_out": [1.0, 0.5]})
    assert "did not rise (1 -> 0.5)" in str(judge(worse, decays()))
    better = posterior.after("fit", {}, {"is_settled": True, "held_out": [0.5, 1.0]})
    assert judge(better, decays()).findings == []


def test_irregular_times_and_counts_are_judged_too() -> None:
    generator = torch.Generator().manual_seed(1)
    irregular = TIMES + 0.02 * torch.rand(41, generator=generator)
    assert judged(decays(times=irregular)).findings == []
    assert "residuals" in names(
        judged(decays(lambda t: 2.0 * torch.sin(4.0 * t), times=irregular), noise=0.3)
    )


def test_a_posterior_that_reads_by_an_encoder_alone_is_refused() -> None:
    model = Decay()
    model.prior = ph.SupportPrior(ph.SetEncoder(1, 41), rate=LogNormal(1), push=Normal(1))
    posterior = ph.Posterior(model, ph.AmortizedGuide(model, ph.GaussNewton(2)))
    with pytest.raises(TypeError, match="expected a posterior that computes evidence"):
        judge(posterior, decays())
