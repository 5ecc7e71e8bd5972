"""Contracts on what a program can be used for: training, simulation, other samplers. A contract's docstring is its text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad

from pyro_hybrid.data.segments import to_segments
from pyro_hybrid.diagnostics.case import (
    Case,
    UncheckableContract,
    demand,
    demand_finite,
    density_of,
    elbo_of,
    query_sites,
    sample_latents,
    shapes_of,
    sites_of,
)
from pyro_hybrid.inference.to_arviz import to_arviz

__all__ = [
    "arviz",
    "elbo",
    "gradients",
    "nuts",
    "one_shot",
    "one_task",
    "predictive",
    "segments",
    "simulation",
]


def elbo(case: Case) -> None:
    """The ELBO is finite in train() mode."""
    loss = elbo_of(case)
    demand(
        bool(loss.isfinite()),
        "a finite loss",
        float(loss),
        "Begin with more noise, or shorter trajectories.",
    )


def gradients(case: Case) -> str | None:
    """Gradients of the ELBO are finite."""
    elbo_of(case).backward()
    by_parameter = {
        id(p): (f"{role}.{name}", p.grad)
        for role, module in (("guide", case.guide), ("model", case.model))
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    not_finite = []
    not_reached = []
    for name, gradient in by_parameter.values():
        if gradient is None:
            not_reached.append(name)
        elif not gradient.isfinite().all():
            not_finite.append(name)
    demand(
        not not_finite,
        "finite ones",
        f"NaN or Inf for {not_finite}",
        "Keep roots and divisions away from zero, also in the branch that torch.where drops.",
    )
    return f"none reaches {', '.join(not_reached)}" if not_reached else None


def simulation(case: Case) -> None:
    """Simulations, where the query is None, observe nothing and have a finite density."""
    (name,) = query_sites(case)
    episode = case.episode.simulation()
    latent, observed = sites_of(case.model, episode)
    demand(
        not observed,
        "no observed site",
        sorted(observed),
        "Write obs=episode.query.values, which is None then.",
    )
    values = {site: latent[site]["value"] for site in latent}
    simulated = values.pop(name)
    demand(
        simulated.shape == case.query.shape,
        f"{name!r} of shape {tuple(case.query.shape)}",
        tuple(simulated.shape),
        "Sample as you observe.",
    )
    shots = replace(episode.query, values=simulated)
    density = density_of(case.model, replace(episode, query=shots), values)
    demand(
        bool(density.isfinite().all()),
        "a finite log density of what it simulated",
        density.tolist(),
        "Observe what can be simulated; narrow the prior where trajectories diverge.",
    )


def predictive(case: Case) -> None:
    """Model and guide run under pyro.infer.Predictive, one draw at a time and in parallel."""
    episode = case.episode.simulation()
    guide = case.guide.eval()
    expected = shapes_of(sites_of(case.model, episode)[0], 2)
    variants: list[dict[str, Any]] = [
        {},
        {"parallel": True},
        {"guide": guide},
        {"guide": guide, "parallel": True},
    ]
    for options in variants:
        samples = Predictive(case.model, num_samples=2, **options)(episode)
        shapes = {name: tuple(value.shape) for name, value in samples.items() if name in expected}
        demand(
            shapes == expected,
            f"samples {expected}",
            shapes,
            "Let shapes follow from episode and latents.",
        )


def nuts(case: Case) -> None:
    """NUTS sees a finite potential of the latents, with finite gradients."""
    values = sample_latents(case)
    _, potential, transforms, _ = initialize_model(
        case.model.eval(),
        (case.episode,),
        initial_params={},
        init_strategy=init_to_value(values=values),
    )
    unconstrained = {name: transforms[name](value) for name, value in values.items()}
    slopes, energy = potential_grad(potential, unconstrained)
    not_finite = [name for name, slope in slopes.items() if not slope.isfinite().all()]
    demand(
        bool(energy.isfinite()) and not not_finite,
        "finite ones",
        f"{float(energy)}, and NaN or Inf for {not_finite}",
        "Keep the program differentiable in its latents.",
    )


def segments(case: Case) -> None:
    """Trajectories may be cut into segments, each a shot with a clock of its own."""
    num_times = case.episode.query.times.shape[-1]
    if case.episode.query.states is None or num_times < 3:
        reason = "the episode can't be cut: it has no measured states at three times or more"
        raise UncheckableContract(reason)
    length = (num_times - 1) // 2
    pieces = case.episode.map_shots(lambda shots: to_segments(shots, length))
    demand_finite(
        case.with_episode(pieces),
        "Take times of shape (shot, time) too, and no number of shots for granted.",
    )


def one_task(case: Case) -> None:
    """Model and guide run on one task."""
    demand_finite(
        case.with_episode(case.episode.select_tasks(0)),
        "No squeeze(), and no spread over tasks: there may be one.",
    )


def one_shot(case: Case) -> None:
    """Model and guide run on one shot of each task, given one shot of support."""
    num_tasks = case.episode.query.shape[0]
    first = torch.zeros(num_tasks, 1, dtype=torch.long, device=case.query.device)
    episode = case.episode.map_shots(lambda shots: shots.select_shots(first))
    demand_finite(
        case.with_episode(episode), "No squeeze(), and no spread over shots: there may be one."
    )


def arviz(case: Case) -> None:
    """ArviZ data can be made with ph.to_arviz."""
    expected = shapes_of(sites_of(case.guide, case.episode)[0], 1, 2)
    posterior = to_arviz(case.model.eval(), case.guide, case.episode, 2)["posterior"]
    shapes = {name: tuple(posterior[name].shape) for name in expected}
    demand(
        shapes == expected,
        f"(chain, draw, task, ...) as {expected}",
        shapes,
        "Sample latents in episode.plate.",
    )
