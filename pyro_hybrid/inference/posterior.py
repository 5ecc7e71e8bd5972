"""Draws, predictions, and everything that ArviZ needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.data.validate import check_episode
from pyro_hybrid.errors import fail, require
from pyro_hybrid.evidence.gauss_newton import Program, Site, bare, random_sites
from pyro_hybrid.inference import arviz_data as _arviz
from pyro_hybrid.inference.prior import SupportPrior
from pyro_hybrid.programs.module import HybridModel, local_parameters

__all__ = [
    "calibrate",
    "draws",
    "load_arviz",
    "pareto_k",
    "predict",
    "save_arviz",
    "summary",
    "to_arviz",
]


AT_ONCE = 20_000_000  # observations that are predicted at once


@runtime_checkable
class Judged(Protocol):
    """What a certificate is to those who only pass it on."""

    @property
    def verdict(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


summary, save_arviz, load_arviz = _arviz.summary, _arviz.save, _arviz.load


def draws(model: Program, guide: Program, episode: Episode, num_samples: int) -> dict[str, Tensor]:
    """Posterior draws of every latent site, ``(draw, task, ...)``."""
    _require_some(num_samples)
    return _latent(_sites(guide, check_episode(episode), num_samples))


def predict(model: Program, episode: Episode, num_samples: int) -> dict[str, Tensor]:
    """Draws of every site, observations included, from the support and the initial states alone."""
    _require_some(num_samples)
    return _latent(_sites(model, check_episode(episode).simulation(), num_samples))


@torch.no_grad()
def calibrate(model: HybridModel, tasks: Tasks, prob: float = 0.9) -> Tensor:
    """Widen or narrow computed evidence until halves of a task agree as often as they should; no truth is needed.

    A neural term is never quite right, and what it does wrong differs from shot to shot: posteriors of one task from
    two halves of its shots then lie further apart than they say. Each latent's standard deviation is multiplied by what
    makes ``prob`` of the tasks' differences fall within their ``prob`` interval. Call it after training, on training
    tasks.

    Returns:
        The factors, in unconstrained coordinates, in the order of the prior's sites; kept in ``model.prior.spread``.
    """
    prior = model.prior
    require(
        isinstance(prior, SupportPrior) and prior.evidence is not None,
        "a SupportPrior with computed evidence",
        type(prior).__name__,
        "Set model.prior.evidence = ph.Linearised(...) first.",
    )
    prior.spread.fill_(1.0)
    ratios = []
    with local_parameters():
        for start in range(0, len(tasks), 100):
            whole = tasks[start : start + 100].episode(tasks.values.shape[1] // 2)
            one, other = (prior.belief(half) for half in (whole.support, whole.query))
            spread = (one.covariance + other.covariance).diagonal(dim1=-2, dim2=-1).sqrt()
            ratios.append((one.mean - other.mean).abs() / spread)
    expected = torch.special.ndtri(torch.tensor(0.5 + 0.5 * prob, dtype=torch.float64))
    prior.spread.copy_(torch.cat(ratios).quantile(prob, 0) / expected)
    return prior.spread.clone()


def pareto_k(
    model: Program,
    guide: Program,
    episode: Episode,
    num_samples: int = 1000,
    *,
    progress: bool = False,
) -> NDArray[np.floating]:
    """PSIS k̂ of each task: below 0.7 the guide can be trusted as a proposal for the program's exact posterior."""
    episode = check_episode(episode)
    if episode.query.values is None:
        fail("a query with values", "values=None", "There is no posterior without data.")
    _require_some(num_samples)
    size = max(1, AT_ONCE // (num_samples * episode.query.values[:1].numel()))
    pieces = torch.arange(episode.query.shape[0]).split(size)
    weights = [
        _log_weights(model, guide, episode.select_tasks(rows), num_samples)
        for rows in tqdm(
            pieces,
            desc="weighing draws",
            unit="batch",
            leave=False,
            disable=not progress,
            delay=2.0,
        )
    ]
    return _arviz.pareto_k(torch.cat(weights, 1).T.double().cpu().numpy())


def _log_weights(model: Program, guide: Program, episode: Episode, num_samples: int) -> Tensor:
    """log p(x, z | S) - log q(z | S, x), by draw and task."""
    with torch.no_grad(), local_parameters(), pyro.plate("draw", num_samples, dim=-2):
        proposed = poutine.trace(guide).get_trace(episode)
        weighed = poutine.trace(poutine.replay(model, trace=proposed)).get_trace(episode)
    return (_log_density(weighed) - _log_density(proposed)).expand(
        num_samples, episode.query.shape[0]
    )


def _log_density(trace: poutine.Trace) -> Tensor:
    trace.compute_log_prob()
    return sum(
        (site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample"),
        torch.zeros(()),
    )


def to_arviz(
    model: nn.Module,
    guide: nn.Module,
    episode: Episode,
    num_samples: int = 500,
    *,
    names: Mapping[str, Sequence[str]] | None = None,
    certificate: Judged | None = None,
) -> _arviz.Grouped:
    """Posterior, prior, predictions and likelihoods as ArviZ data: InferenceData on ArviZ 0.x, DataTree on 1.x.

    Groups: ``posterior`` (from support and query), ``prior`` (from the support alone), ``posterior_predictive``,
    ``log_likelihood`` (of each shot, so that ``arviz.loo`` leaves out shots), ``observed_data``, ``constant_data``.
    Draws of a variational posterior are independent: one chain, and no R-hat.

    Arguments:
        names: names of the components of a site, ``{"unknown": ["damping", "amplitude"], "x": ["angle", "speed"]}``.
        certificate: what :func:`~pyro_hybrid.certify` said of the program: its verdict becomes the attribute
            ``identified``, and all of it, as JSON, ``certificate``.
    """
    episode = check_episode(episode)
    require(
        episode.query.values is not None,
        "a query with values",
        "values=None",
        "There is no posterior without data.",
    )
    _require_some(num_samples)
    posterior = draws(model, guide, episode, num_samples)
    prior = predict(model, episode, num_samples)
    again = _sites(poutine.condition(model, posterior), episode.simulation(), num_samples)
    seen = _sites(poutine.condition(model, posterior), episode, num_samples)
    sites = {
        name: site for name, site in seen.items() if site["is_observed"] and name not in posterior
    }
    groups = {
        "posterior": _chained(posterior),
        "prior": _chained({name: prior[name] for name in posterior}),
        "posterior_predictive": _chained({name: again[name]["value"] for name in sites}),
        "log_likelihood": _chained({name: _by_shot(site) for name, site in sites.items()}),
        "observed_data": {
            name: _with_gaps(site["value"], episode.query.observed) for name, site in sites.items()
        },
        "constant_data": _constants(episode),
    }
    dims, coords = _labels(groups, names or {})
    coords["time"] = _numpy(episode.query.times)
    num_support = episode.support.shape[1] if episode.support else 0
    attrs: dict[str, str | int | float] = {"num_support": num_support}
    if certificate is not None:
        attrs |= {
            "identified": certificate.verdict,
            "certificate": json.dumps(certificate.to_dict(), allow_nan=False),
        }
    return _arviz.to_inference_data(groups, dims, coords, attrs)


def _sites(program: Program, episode: Episode, num_samples: int) -> dict[str, Site]:
    """Latents and observations of so many runs at once."""
    with torch.no_grad(), local_parameters(), pyro.plate("draw", num_samples, dim=-2):
        return random_sites(poutine.trace(program).get_trace(episode))


def _require_some(num_samples: int) -> None:
    require(
        num_samples >= 1,
        "num_samples of 1 or more",
        num_samples,
        "Some hundreds make a smooth picture.",
    )


def _latent(sites: Mapping[str, Site]) -> dict[str, Tensor]:
    return {name: site["value"] for name, site in sites.items() if not site["is_observed"]}


def _by_shot(site: Site) -> Tensor:
    """Log-likelihood of every shot: summed over whatever comes after (draw, task, shot)."""
    fn, mask = bare(site["fn"], site["mask"])
    value = fn.log_prob(site["value"])
    return torch.where(torch.as_tensor(mask, device=value.device), value, 0.0).flatten(3).sum(-1)


def _constants(episode: Episode) -> dict[str, NDArray[np.floating]]:
    constants = {}
    if episode.query.initial is not None:
        constants["initial_measured"] = _numpy(episode.query.initial)
    if episode.support is not None and episode.support.values is not None:
        constants["support"] = _with_gaps(episode.support.values, episode.support.observed)
    return constants


def _labels(
    groups: Mapping[str, Mapping[str, NDArray[np.floating]]],
    names: Mapping[str, Sequence[str]],
) -> tuple[dict[str, list[str]], dict[str, Sequence[str] | NDArray[np.floating]]]:
    """Named axes: (task, shot, time, sensor) for trajectories, (task, [shot,] component of the site) for latents."""
    dims: dict[str, list[str]] = {
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
    for name, value in groups["observed_data"].items():
        dims[name] = [
            "task",
            "shot",
            "time",
            "sensor" if len(groups["observed_data"]) == 1 else f"{name}_sensor",
        ]
        if name in names:
            coords[dims[name][-1]] = list(names[name])
        require(
            value.ndim == 4,
            f"observations {name!r} with axes (task, shot, time, sensor)",
            value.shape,
            "Reshape them.",
        )
    for name, value in groups["posterior"].items():
        dims[name] = ["task", *(["shot"] if value.ndim == 5 else []), f"{name}_component"]
        if name in names:
            coords[f"{name}_component"] = list(names[name])
    return dims, coords


def _chained(values: Mapping[str, Tensor]) -> dict[str, NDArray[np.floating]]:
    return {name: _numpy(value)[None] for name, value in values.items()}


def _with_gaps(values: Tensor, seen: Tensor) -> NDArray[np.floating]:
    if seen.shape != values.shape:
        return _numpy(values)  # a site of another shape is refused where its axes are named
    return _numpy(values.where(seen, torch.nan))


def _numpy(value: Tensor) -> NDArray[np.floating]:
    return value.detach().cpu().numpy()
