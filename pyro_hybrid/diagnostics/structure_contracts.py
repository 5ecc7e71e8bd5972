"""Contracts on the structure of a program: parameters, sites, plates, dtypes. A contract's docstring is its text."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pyro_hybrid.diagnostics.case import Case, demand, query_sites, run, shapes_of, sites_of
from pyro_hybrid.programs.module import require_local
from pyro_hybrid.programs.sites import Site

__all__ = ["copies", "double", "latents", "observation", "parameters", "plates", "runs"]


def parameters(case: Case) -> None:
    """Model and guide are modules, and parameters belong to them."""
    require_local(model=case.model, guide=case.guide)


def copies(case: Case) -> None:
    """Deep copies share no parameter and no buffer."""
    first = copy.deepcopy((case.model, case.guide))  # both stay alive: addresses are reused
    second = copy.deepcopy((case.model, case.guide))
    addresses = _addresses(*second)
    shared = [name for address, name in _addresses(*first).items() if address in addresses]
    demand(
        not shared,
        "nothing shared",
        shared,
        "Keep parameters on the instance, and leave __deepcopy__ alone.",
    )


def _addresses(model: nn.Module, guide: nn.Module) -> dict[int, str]:
    names = {}
    for module in (model, guide):
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if value.numel():
                names[value.untyped_storage().data_ptr()] = name
    return names


def runs(case: Case) -> None:
    """Model and guide run on the episode."""
    run(case.model.eval(), case.episode)
    run(case.guide.eval(), case.episode)


def latents(case: Case) -> None:
    """The guide samples all latents of the program in their shapes, and no others."""
    expected = shapes_of(sites_of(case.model, case.episode)[0])
    actual = shapes_of(sites_of(case.guide, case.episode)[0])
    demand(
        actual == expected,
        f"a guide of {expected}",
        actual,
        "Name a task's latents, with their sizes, in the prior.",
    )


def plates(case: Case) -> None:
    """Sites are in the plate of tasks; values of latents are (task, component) or (task, shot, component)."""
    for program in (case.model, case.guide):
        latent, observed = sites_of(program, case.episode)
        for name, site in latent.items():
            _demand_plate(case, name, site, is_latent=True)
        for name, site in observed.items():
            _demand_plate(case, name, site, is_latent=False)


def _demand_plate(case: Case, name: str, site: Site, *, is_latent: bool) -> None:
    tasks, shots = case.episode.query.shape
    shape = tuple(site["value"].shape)
    batch = tuple(site["fn"].batch_shape)
    frames = [(frame.dim, frame.size) for frame in site["cond_indep_stack"]]
    fits = len(shape) == 2 or (len(shape) == 3 and shape[1] == shots)
    demand(
        (fits or not is_latent) and batch == (tasks,) and frames == [(-1, tasks)],
        f"{name!r} of batch shape ({tasks},) in a plate (axis, size) {[(-1, tasks)]}",
        f"a value {shape} of batch shape {batch} in {frames}",
        "Sample it inside `with episode.plate`; make all axes after the task's events, with to_event.",
    )


def observation(case: Case) -> None:
    """One site observes the query."""
    observed = shapes_of(sites_of(case.model, case.episode)[1])
    demand(
        len(query_sites(case)) == 1,
        f"one of shape {tuple(case.query.shape)}",
        observed or "none observed",
        "End the program with pyro.sample(name, distribution, obs=episode.query.values).",
    )


def double(case: Case) -> None:
    """Sites are in float64 after .double()."""
    case = case.in_double()
    for program in (case.model, case.guide):
        latent, observed = sites_of(program, case.episode)
        dtypes = {name: site["value"].dtype for name, site in (latent | observed).items()}
        demand(
            set(dtypes.values()) == {torch.float64},
            "torch.float64",
            dtypes,
            "Take dtypes from data and parameters, and register constants as buffers.",
        )
