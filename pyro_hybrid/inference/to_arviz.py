"""Posterior draws and predictions as ArviZ data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor, nn

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.data.validate_episode import check_episode
from pyro_hybrid.errors import require
from pyro_hybrid.inference import arviz_data
from pyro_hybrid.inference.draws import draws, predict, require_num_samples, sample_sites
from pyro_hybrid.programs.module import with_belief
from pyro_hybrid.programs.sites import Site, unwrap

__all__ = ["HasVerdict", "load_arviz", "save_arviz", "summary", "to_arviz"]

summary = arviz_data.summary
save_arviz = arviz_data.save
load_arviz = arviz_data.load


@runtime_checkable
class HasVerdict(Protocol):
    """A certificate, as far as it is passed on."""

    @property
    def verdict(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


def to_arviz(
    model: nn.Module,
    guide: nn.Module,
    episode: Episode,
    num_samples: int = 500,
    *,
    names: Mapping[str, Sequence[str]] | None = None,
    certificate: HasVerdict | None = None,
) -> arviz_data.Grouped:
    """Convert posterior, prior, predictions and likelihoods to ArviZ data: InferenceData on ArviZ 0.x, DataTree on 1.x.

    Groups: ``posterior`` (from support and query), ``prior`` (from the support alone), ``posterior_predictive``,
    ``log_likelihood`` (of each shot, so that ``arviz.loo`` leaves out shots), ``observed_data``, ``constant_data``.
    Draws of a variational posterior are independent: one chain, and no R-hat.

    Arguments:
        model: the program.
        guide: its guide.
        episode: tasks with support and query.
        num_samples: number of draws.
        names: names of the components of a site, ``{"unknown": ["damping", "amplitude"], "x": ["angle", "speed"]}``.
        certificate: the result of :func:`~pyro_hybrid.certify`; its verdict becomes the attribute
            ``identified``, and all of it, as JSON, ``certificate``.
    """
    episode = check_episode(episode)
    require(
        episode.query.values is not None,
        "a query with values",
        "values=None",
        "There is no posterior without data.",
    )
    require_num_samples(num_samples)
    episode = with_belief(model, episode)
    posterior = draws(model, guide, episode, num_samples)
    prior = predict(model, episode, num_samples)
    simulated = sample_sites(poutine.condition(model, posterior), episode.simulation(), num_samples)
    observed = sample_sites(poutine.condition(model, posterior), episode, num_samples)
    sites = {
        name: site
        for name, site in observed.items()
        if site["is_observed"] and name not in posterior
    }
    groups = {
        "posterior": _chained(posterior),
        "prior": _chained({name: prior[name] for name in posterior}),
        "posterior_predictive": _chained({name: simulated[name]["value"] for name in sites}),
        "log_likelihood": _chained({name: _by_shot(site) for name, site in sites.items()}),
        "observed_data": {
            name: _observations(name, site, episode.query) for name, site in sites.items()
        },
        "constant_data": _constants(episode),
    }
    dims, coords = _labels(groups, names or {})
    if episode.query.times.dim() == 1:
        coords["time"] = _numpy(episode.query.times)
    num_support = episode.support.shape[1] if episode.support else 0
    attrs: dict[str, str | int | float] = {"num_support": num_support}
    if certificate is not None:
        attrs |= {
            "identified": certificate.verdict,
            "certificate": json.dumps(certificate.to_dict(), allow_nan=False),
        }
    return arviz_data.to_inference_data(groups, dims, coords, attrs)


def _by_shot(site: Site) -> Tensor:
    """Sum the log-likelihood of every shot over whatever axes come after (draw, task, shot)."""
    fn, mask = unwrap(site["fn"], site["mask"])
    value = fn.log_prob(site["value"])
    return torch.where(torch.as_tensor(mask, device=value.device), value, 0.0).flatten(3).sum(-1)


def _observations(name: str, site: Site, query: Shots) -> NDArray[np.floating]:
    """Values of an observed site, NaN where nothing was measured."""
    values = site["value"]
    require(
        values.dim() == 4,
        f"observations {name!r} with axes (task, shot, time, sensor)",
        tuple(values.shape),
        "Reshape them.",
    )
    if values.shape == query.observed.shape:
        return _with_gaps(values, query.observed)
    # A program may observe its sensors at several sites; each knows which of its values count.
    is_scored = torch.as_tensor(unwrap(site["fn"], site["mask"])[1], device=values.device)
    if is_scored.dim() > values.dim():  # the same for every draw
        is_scored = is_scored[0]
    return _with_gaps(values, is_scored)


def _constants(episode: Episode) -> dict[str, NDArray[np.floating]]:
    constants = {}
    if episode.query.times.dim() > 1:
        constants["times"] = _numpy(episode.query.expanded_times)
    if episode.query.initial is not None:
        constants["initial_measured"] = _numpy(episode.query.initial)
    if episode.support is not None and episode.support.values is not None:
        constants["support"] = _with_gaps(episode.support.values, episode.support.observed)
    return constants


def _labels(
    groups: Mapping[str, Mapping[str, NDArray[np.floating]]],
    names: Mapping[str, Sequence[str]],
) -> tuple[dict[str, list[str]], dict[str, Sequence[str] | NDArray[np.floating]]]:
    """Name the axes: (task, shot, time, sensor) of trajectories, (task, [shot,] component of the site) of latents."""
    dims: dict[str, list[str]] = {
        "times": ["task", "shot", "time"],
        "initial_measured": ["task", "shot", "state"],
        "support": ["task", "support_shot", "time", "sensor"],
    }
    coords: dict[str, Sequence[str] | NDArray[np.floating]] = {}
    sites = sorted({*groups["observed_data"], *groups["posterior"]})
    strangers = sorted(set(names) - set(sites))
    require(
        not strangers,
        f"names of sites among {sites}",
        strangers,
        "Name the components of a site: names={site: [...]}.",
    )
    for name in groups["observed_data"]:
        dims[name] = [
            "task",
            "shot",
            "time",
            "sensor" if len(groups["observed_data"]) == 1 else f"{name}_sensor",
        ]
        if name in names:
            coords[dims[name][-1]] = list(names[name])
    for name, value in groups["posterior"].items():
        dims[name] = ["task", *(["shot"] if value.ndim == 5 else []), f"{name}_component"]
        if name in names:
            coords[f"{name}_component"] = list(names[name])
    for axis, labels in coords.items():
        doubled = sorted({str(label) for label in labels if list(labels).count(label) > 1})
        require(
            not doubled, f"different names along axis {axis!r}", f"{doubled} twice", "Rename one."
        )
    return dims, coords


def _chained(values: Mapping[str, Tensor]) -> dict[str, NDArray[np.floating]]:
    return {name: _numpy(value)[None] for name, value in values.items()}


def _with_gaps(values: Tensor, observed: Tensor) -> NDArray[np.floating]:
    return _numpy(values.where(observed, torch.nan))


def _numpy(value: Tensor) -> NDArray[np.floating]:
    return value.detach().cpu().numpy()
