"""Contracts on what must not change a program's density, or be changed by it. A contract's docstring is its text."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_hybrid.data.shots import Shots
from pyro_hybrid.diagnostics.case import (
    Case,
    UncheckableContract,
    demand,
    demand_same,
    density_of,
    elbo_of,
    global_settings,
    log_density,
    sample_latents,
    sites_of,
)

__all__ = [
    "condition",
    "mask",
    "particles",
    "query_order",
    "seed",
    "state_dict",
    "support_order",
    "tasks",
    "untouched",
]


def untouched(case: Case) -> None:
    """A run changes no global setting or parameter, and nothing in model, guide and episode."""
    before = _state(case)
    sample_latents(case)
    sites_of(case.model, case.episode)
    sites_of(case.model, case.episode.simulation())
    after = _state(case)
    changed = [
        name
        for name, value in after.items()
        if name not in before or not _is_same(value, before[name])
    ]
    demand(
        not changed,
        "all as before",
        f"changes of {changed}",
        "Compute new tensors, make parameters attributes of the module, and leave settings to callers.",
    )


def _state(case: Case) -> dict[str, Any]:
    """Return a copy of everything that a run must leave alone, by name."""
    state: dict[str, Any] = {}
    for name in ("values", "initial", "scored", "observed"):
        state[f"query.{name}"] = getattr(case.episode.query, name)
        state[f"support.{name}"] = getattr(case.support, name)
    state |= case.model.state_dict(prefix="model.")
    state |= case.guide.state_dict(prefix="guide.")
    state["parameters in Pyro's store"] = sorted(pyro.get_param_store().keys())
    return copy.deepcopy(state | global_settings())


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    return bool(one == other)


def mask(case: Case) -> None:
    """Values where the mask is False don't count, and unseen values are not read by the guide."""
    case = case.in_double()
    latents = sample_latents(case)
    last = torch.zeros_like(case.query, dtype=torch.bool)
    last[:, :, -1] = True
    query = case.episode.query
    unscored = replace(query, scored=query.scored & ~last)
    unobserved = replace(unscored, observed=query.observed & ~last)

    def densities(values: Tensor) -> Tensor:
        for_model = replace(case.episode, query=replace(unscored, values=values))
        for_guide = replace(case.episode, query=replace(unobserved, values=values))
        model = density_of(case.model, for_model, latents)
        guide = density_of(case.guide, for_guide, latents)
        return torch.stack([model, guide])

    demand_same(
        case,
        latents,
        densities(case.query),
        densities(case.query + last),
        "Observe dist.Normal(...).mask(episode.query.scored); read values only where episode.query.observed is True.",
    )


def seed(case: Case) -> None:
    """The same seed of torch gives the same latents, simulation and loss."""
    first = _random_results(case)
    second = _random_results(case)
    demand(
        all(map(torch.equal, first, second)),
        "equal results",
        "different ones",
        "Draw everything random with pyro.sample or torch.",
    )


def _random_results(case: Case) -> list[Tensor]:
    simulated, _ = sites_of(case.model, case.episode.simulation())
    return [
        *sample_latents(case).values(),
        *(site["value"] for site in simulated.values()),
        # A step of a training may change the model's state, such as the weight of a penalty.
        elbo_of(copy.deepcopy(case)).nan_to_num(),
    ]


def support_order(case: Case) -> None:
    """The order of support shots doesn't matter."""
    case = case.in_double()
    values = sample_latents(case)
    support = case.support.select_shots(_another_order(case.support))
    other = case.with_episode(replace(case.episode, support=support))
    demand_same(
        case,
        values,
        log_density(case, values),
        log_density(other, values),
        "Read a set, as ph.SetEncoder does.",
    )


def query_order(case: Case) -> None:
    """The order of query shots doesn't matter."""
    case = case.in_double()
    values = sample_latents(case)
    order = _another_order(case.episode.query)
    query = case.episode.query.select_shots(order)
    moved = {
        name: value[:, order[0]] if value.dim() > 2 else value for name, value in values.items()
    }
    other = case.with_episode(replace(case.episode, query=query))
    demand_same(
        case,
        values,
        log_density(case, values),
        log_density(other, moved),
        "Treat all shots alike, and read a set, as ph.SetEncoder does.",
    )


def _another_order(shots: Shots) -> Tensor:
    num_tasks, num_shots = shots.shape
    if num_shots == 1:
        raise UncheckableContract("one shot has no order: pass an episode of two or more")
    return torch.arange(num_shots, device=shots.times.device).roll(1).expand(num_tasks, num_shots)


def tasks(case: Case) -> None:
    """Tasks are independent: their order, their number and the data of others don't matter."""
    case = case.in_double()
    num_tasks = case.episode.query.shape[0]
    if num_tasks == 1:
        raise UncheckableContract("there is one task only: pass an episode of two or more")
    own = torch.arange(num_tasks, device=case.query.device)
    values = sample_latents(case)
    before = log_density(case, values)
    for rows in (own.roll(1), torch.cat([own[1:2], own[1:]]), own.repeat(2)):
        other = case.with_episode(case.episode.select_tasks(rows))
        after = log_density(other, {name: value[rows] for name, value in values.items()})
        demand_same(
            case,
            values,
            before[:, rows],
            after,
            "Mix nothing over the axis of tasks; it has any size and order.",
        )


def particles(case: Case) -> None:
    """Particles, under a further plate, each have the density that they have alone, as vectorized ELBOs need."""
    case = case.in_double()
    remedy = "Count axes from the last, and mix nothing over those before the task's."
    with pyro.plate("particle", 2, dim=-2):
        values = sample_latents(case)
        together = log_density(case, values)
    expected = (2, 2, case.episode.query.shape[0])
    demand(
        together.shape == expected,
        f"log densities {expected[1:]}",
        tuple(together.shape[1:]),
        remedy,
    )
    singles = [{name: value[i] for name, value in values.items()} for i in range(2)]
    alone = torch.stack([log_density(case, single) for single in singles], 1)
    demand_same(case, singles[0], alone, together, remedy)
    elbo_of(case, num_particles=2, vectorize_particles=True, max_plate_nesting=1)


def condition(case: Case) -> None:
    """Conditioned on its latents the program is a function of them: everything random is a site."""
    case = case.in_double()
    values = sample_latents(case)
    demand_same(
        case,
        values,
        log_density(case, values, seed=0),
        log_density(case, values, seed=1),
        "Draw what is random with pyro.sample, outside of poutine.block.",
    )


def state_dict(case: Case) -> None:
    """State dicts hold all that was learned: loaded into a copy, they give the same density to the last bit."""
    values = sample_latents(case)
    other = copy.deepcopy(case)
    for module in (other.model, other.guide):
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data.add_(torch.ones_like(tensor))
    other.model.load_state_dict(case.model.state_dict())
    other.guide.load_state_dict(case.guide.state_dict())
    gap = (log_density(case, values) - log_density(other, values)).abs()
    demand(
        bool((gap == 0.0).all()),
        "equal log densities",
        f"differences up to {float(gap.max()):.2g}",
        "Register what is learned or measured as parameters, or as buffers that are persistent.",
    )
