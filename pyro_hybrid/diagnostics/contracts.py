"""The contracts of check_hybrid_model: a function each, whose docstring is what it says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad
from torch import Tensor, nn

from pyro_hybrid.data.segments import to_segments
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.diagnostics.case import (
    Case,
    Unchecked,
    demand,
    demand_finite,
    demand_same,
    density_of,
    drawn,
    elbo_of,
    log_density,
    query_of,
    run,
    settings,
    shapes_of,
    sites_of,
    support_of,
)
from pyro_hybrid.inference.posterior import to_arviz
from pyro_hybrid.programs.module import require_local

__all__ = ["STAGES", "Contract"]

Contract = Callable[[Case], str | None]


def another_order(shots: Shots) -> Tensor:
    """Of its shots."""
    if shots.shape[1] == 1:
        raise Unchecked("one shot has no order: pass an episode of two or more")
    return torch.arange(shots.shape[1], device=shots.times.device).roll(1).expand(shots.shape)


def parameters(case: Case) -> None:
    """Model and guide are modules, and parameters belong to them."""
    require_local(model=case.model, guide=case.guide)


def copies(case: Case) -> None:
    """Two deep copies share no parameter and no buffer."""

    def places(model: nn.Module, guide: nn.Module) -> dict[int, str]:
        return {
            value.untyped_storage().data_ptr(): name
            for module in (model, guide)
            for name, value in (*module.named_parameters(), *module.named_buffers())
            if value.numel()
        }

    first, second = copy.deepcopy((case.model, case.guide)), copy.deepcopy((case.model, case.guide))
    one, other = places(*first), places(*second)
    shared = [name for place, name in one.items() if place in other]
    demand(
        not shared,
        "nothing shared",
        shared,
        "Keep parameters on the instance, and leave __deepcopy__ alone.",
    )


def runs(case: Case) -> None:
    """Model and guide run on the episode."""
    run(case.model.eval(), case.episode), run(case.guide.eval(), case.episode)


def latents(case: Case) -> None:
    """The guide samples the latents of the program, all of them in their shapes, and no others."""
    theirs, ours = (
        shapes_of(sites_of(program, case.episode)[0]) for program in (case.model, case.guide)
    )
    demand(
        ours == theirs,
        f"a guide of {theirs}",
        ours,
        "Name a task's latents, with their sizes, in the prior.",
    )


def plates(case: Case) -> None:
    """Sites are in the plate of tasks; values of latents are (task, component) or (task, shot, component)."""
    tasks, shots = case.episode.query.shape
    for latent, seen in (sites_of(program, case.episode) for program in (case.model, case.guide)):
        for name, site in (latent | seen).items():
            value, batch = tuple(site["value"].shape), tuple(site["fn"].batch_shape)
            fits = name in seen or len(value) == 2 or len(value) == 3 and value[1] == shots
            around = [(frame.dim, frame.size) for frame in site["cond_indep_stack"]]
            demand(
                fits and batch == (tasks,) and around == [(-1, tasks)],
                f"{name!r} of batch shape ({tasks},) in a plate (axis, size) {[(-1, tasks)]}",
                f"a value {value} of batch shape {batch} in {around}",
                "Sample it inside `with episode.plate`; make all axes after the task's events, with to_event.",
            )


def observation(case: Case) -> None:
    """One site observes the query."""
    seen, (query, names) = shapes_of(sites_of(case.model, case.episode)[1]), query_of(case)
    demand(
        len(names) == 1,
        f"one of shape {tuple(query.shape)}",
        seen or "none observed",
        "End the program with pyro.sample(name, distribution, obs=episode.query.values).",
    )


def double(case: Case) -> None:
    """After .double() all sites are in float64."""
    case = case.double()
    for latent, seen in (sites_of(program, case.episode) for program in (case.model, case.guide)):
        dtypes = {name: site["value"].dtype for name, site in (latent | seen).items()}
        demand(
            {*dtypes.values()} == {torch.float64},
            "torch.float64",
            dtypes,
            "Take dtypes from data and parameters, and register constants as buffers.",
        )


def untouched(case: Case) -> None:
    """A run changes no global setting or parameter, and nothing in model, guide and episode."""

    def state() -> dict[str, Any]:
        data = {
            f"{role}.{name}": getattr(shots, name)
            for name in ("values", "initial", "scored", "observed")
            for role, shots in (("query", case.episode.query), ("support", case.episode.support))
        }
        modules = {
            **case.model.state_dict(prefix="model."),
            **case.guide.state_dict(prefix="guide."),
        }
        stored = {"parameters in Pyro's store": sorted(pyro.get_param_store().keys())}
        return copy.deepcopy({**data, **modules, **stored, **settings()})

    def same(one: Any, other: Any) -> bool:
        return (
            torch.equal(one.nan_to_num(), other.nan_to_num())
            if isinstance(one, Tensor)
            else one == other
        )

    before = state()
    drawn(case), sites_of(case.model, case.episode), sites_of(case.model, case.episode.simulation())
    changed = [
        name
        for name, value in state().items()
        if name not in before or not same(value, before[name])
    ]
    demand(
        not changed,
        "all as before",
        f"changes of {changed}",
        "Compute new tensors, make parameters attributes of the module, and leave settings to callers.",
    )


def mask(case: Case) -> None:
    """Values where the mask is False don't count, and unseen ones tell the guide nothing."""
    case = case.double()
    episode, values, query = case.episode, drawn(case), query_of(case)[0]
    last = torch.zeros_like(query, dtype=torch.bool)
    last[:, :, -1] = True
    masked = replace(episode.query, scored=episode.query.scored & ~last)
    unseen = replace(masked, observed=masked.observed & ~last)

    def densities(query: Tensor) -> Tensor:
        pairs = ((case.model, masked), (case.guide, unseen))
        return torch.stack(
            [
                density_of(program, replace(episode, query=replace(shots, values=query)), values)
                for program, shots in pairs
            ]
        )

    demand_same(
        densities(query),
        densities(query + last),
        "Observe dist.Normal(...).mask(episode.query.scored); read values only where episode.query.observed is True.",
    )


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
    found = {
        id(p): (f"{role}.{name}", p.grad)
        for role, module in (("guide", case.guide), ("model", case.model))
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    bad = [name for name, grad in found.values() if grad is not None and not grad.isfinite().all()]
    none = [name for name, grad in found.values() if grad is None]
    demand(
        not bad,
        "finite ones",
        f"NaN or Inf for {bad}",
        "Keep roots and divisions away from zero, also in the branch that torch.where drops.",
    )
    return f"none reaches {', '.join(none)}" if none else None


def seed(case: Case) -> None:
    """The same seed of torch gives the same latents, simulation and loss."""

    def results() -> list[Tensor]:
        simulated = sites_of(case.model, case.episode.simulation())[0]
        return [
            *drawn(case).values(),
            *(site["value"] for site in simulated.values()),
            elbo_of(case).nan_to_num(),
        ]

    demand(
        all(map(torch.equal, results(), results())),
        "equal results",
        "different ones",
        "Draw everything random with pyro.sample or torch.",
    )


def support_order(case: Case) -> None:
    """The order of support shots doesn't matter."""
    case = case.double()
    values, order = drawn(case), another_order(support_of(case))
    other = replace(case.episode, support=support_of(case).select_shots(order))
    demand_same(
        log_density(case, values),
        log_density(case.on(other), values),
        "Read a set, as ph.SetEncoder does.",
    )


def query_order(case: Case) -> None:
    """The order of query shots doesn't matter."""
    case = case.double()
    values, order = drawn(case), another_order(case.episode.query)
    other = replace(case.episode, query=case.episode.query.select_shots(order))
    moved = {
        name: value[:, order[0]] if value.dim() > 2 else value for name, value in values.items()
    }
    demand_same(
        log_density(case, values),
        log_density(case.on(other), moved),
        "Treat all shots alike, and read a set, as ph.SetEncoder does.",
    )


def tasks(case: Case) -> None:
    """Tasks are independent: their order, their number and the data of others don't matter."""
    case = case.double()
    own = torch.arange(case.episode.query.shape[0], device=case.episode.query.times.device)
    if len(own) == 1:
        raise Unchecked("there is one task only: pass an episode of two or more")
    values = drawn(case)
    before = log_density(case, values)
    for rows in (own.roll(1), torch.cat([own[1:2], own[1:]]), own.repeat(2)):
        others = {name: value[rows] for name, value in values.items()}
        after = log_density(case.on(case.episode.select_tasks(rows)), others)
        demand_same(
            before[:, rows], after, "Mix nothing over the axis of tasks; it has any size and order."
        )


def simulation(case: Case) -> None:
    """Where the query is None the program simulates one, with nothing observed and a finite density."""
    (query, (name,)), (latent, seen) = (
        query_of(case),
        sites_of(case.model, case.episode.simulation()),
    )
    demand(
        not seen,
        "no observed site",
        sorted(seen),
        "Write obs=episode.query.values, which is None then.",
    )
    values = {site: latent[site]["value"] for site in latent}
    x = values.pop(name)
    demand(
        x.shape == query.shape,
        f"{name!r} of shape {tuple(query.shape)}",
        tuple(x.shape),
        "Sample as you observe.",
    )
    density = density_of(
        case.model,
        replace(case.episode, query=replace(case.episode.query.simulation(), values=x)),
        values,
    )
    demand(
        bool(density.isfinite().all()),
        "a finite log density of what it simulated",
        density.tolist(),
        "Observe what can be simulated; narrow the prior where trajectories diverge.",
    )


def particles(case: Case) -> None:
    """Under a further plate, of particles, each has the density that it has alone; so run vectorised ELBOs."""
    case, remedy = (
        case.double(),
        "Count axes from the last, and mix nothing over those before the task's.",
    )
    with pyro.plate("particle", 2, dim=-2):
        values = drawn(case)
        together = log_density(case, values)
    expected = (2, 2, case.episode.query.shape[0])
    demand(
        together.shape == expected,
        f"log densities {expected[1:]}",
        tuple(together.shape[1:]),
        remedy,
    )
    alone = [
        log_density(case, {name: value[i] for name, value in values.items()}) for i in range(2)
    ]
    demand_same(torch.stack(alone, 1), together, remedy)
    elbo_of(case, num_particles=2, vectorize_particles=True, max_plate_nesting=1)


def predictive(case: Case) -> None:
    """It runs under pyro.infer.Predictive, alone and after the guide, one by one and in parallel."""
    episode, guide = case.episode.simulation(), case.guide.eval()
    expected = shapes_of(sites_of(case.model, episode)[0], 2)
    for how in ({}, {"parallel": True}, {"guide": guide}, {"guide": guide, "parallel": True}):
        samples = Predictive(case.model, num_samples=2, **how)(episode)
        shapes = {name: tuple(value.shape) for name, value in samples.items() if name in expected}
        demand(
            shapes == expected,
            f"samples {expected}",
            shapes,
            "Let shapes follow from episode and latents.",
        )


def condition(case: Case) -> None:
    """Conditioned on its latents the program is a function of them: all that is random is a site."""
    case = case.double()
    values = drawn(case)
    demand_same(
        log_density(case, values, seed=0),
        log_density(case, values, seed=1),
        "Draw what is random with pyro.sample, outside of poutine.block.",
    )


def nuts(case: Case) -> None:
    """NUTS sees a finite potential of the latents, with finite gradients."""
    values = drawn(case)
    _, potential, transforms, _ = initialize_model(
        case.model.eval(),
        (case.episode,),
        initial_params={},
        init_strategy=init_to_value(values=values),
    )
    slopes, energy = potential_grad(
        potential, {name: transforms[name](value) for name, value in values.items()}
    )
    bad = [name for name, slope in slopes.items() if not slope.isfinite().all()]
    demand(
        bool(energy.isfinite()) and not bad,
        "finite ones",
        f"{float(energy)}, and NaN or Inf for {bad}",
        "Keep the program differentiable in its latents.",
    )


def segments(case: Case) -> None:
    """It runs on trajectories cut into segments, each a shot with a clock of its own."""
    if case.episode.query.states is None or len(case.episode.query.times) < 3:
        raise Unchecked(
            "the episode can't be cut: it has no measured states at three times or more"
        )
    length = (len(case.episode.query.times) - 1) // 2
    pieces = case.episode.map_shots(lambda shots: to_segments(shots, length))
    demand_finite(
        case.on(pieces), "Take times of shape (shot, time) too, and no number of shots for granted."
    )


def one_task(case: Case) -> None:
    """It runs on one task."""
    demand_finite(
        case.on(case.episode.select_tasks(0)),
        "No squeeze(), and no spread over tasks: there may be one.",
    )


def one_shot(case: Case) -> None:
    """It runs on one shot of each task, given one of support."""
    first = torch.zeros(
        case.episode.query.shape[0], 1, dtype=torch.long, device=case.episode.query.times.device
    )
    one = case.episode.map_shots(lambda shots: shots.select_shots(first))
    demand_finite(case.on(one), "No squeeze(), and no spread over shots: there may be one.")


def state_dict(case: Case) -> None:
    """State dicts hold all that was learned: loaded into a copy, they give the same density to the last bit."""
    values, other = drawn(case), copy.deepcopy(case)
    for module in (other.model, other.guide):
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data.add_(torch.ones_like(tensor))
    (
        other.model.load_state_dict(case.model.state_dict()),
        other.guide.load_state_dict(case.guide.state_dict()),
    )
    gap = (log_density(case, values) - log_density(other, values)).abs()
    demand(
        bool((gap == 0.0).all()),
        "equal log densities",
        f"differences up to {float(gap.max()):.2g}",
        "Register what is learned or measured as parameters, or as buffers that are persistent.",
    )


def arviz(case: Case) -> None:
    """ph.to_arviz makes ArviZ data of it."""
    expected = shapes_of(sites_of(case.guide, case.episode)[0], 1, 2)
    posterior = to_arviz(case.model.eval(), case.guide, case.episode, 2)["posterior"]
    shapes = {name: tuple(posterior[name].shape) for name in expected}
    demand(
        shapes == expected,
        f"(chain, draw, task, ...) as {expected}",
        shapes,
        "Sample latents in episode.plate.",
    )


STAGES: tuple[tuple[Contract, ...], ...] = (  # each takes for granted what the one before has found
    (parameters, copies),
    (runs,),
    (latents, plates, observation, double),
    (
        untouched,
        mask,
        elbo,
        gradients,
        seed,
        support_order,
        query_order,
        tasks,
        simulation,
        particles,
        predictive,
        condition,
        nuts,
        segments,
        one_task,
        one_shot,
        state_dict,
        arviz,
    ),
)
