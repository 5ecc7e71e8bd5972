"""A program whose posterior is known in closed form, for all tests of inference and training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jaxtyping
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

import pyro_hybrid as ph
from pyro_hybrid.beliefs.families import Family, FullNormal, Normal
from pyro_hybrid.evidence.protocol import Evidence
from pyro_hybrid.inference.prior import Prior, SupportPrior

POINTS = 6
TIMES = torch.linspace(0.0, 1.5, POINTS, dtype=torch.float64)
NOISE, START_NOISE = 0.3, 0.5
SLOPE = {"slope": Normal(1, loc=0.5, scale=2.0)}
SEPARATE = {"slope": Normal(1, loc=0.5, scale=2.0), "bend": Normal(2)}
TOGETHER = {"both": FullNormal(3)}
BEND = torch.tensor([[0.7, -0.4]], dtype=torch.float64)


def features(times: Tensor) -> Tensor:
    """Change of the observation by one unit of each latent, (..., time, 3)."""
    return torch.stack([times, torch.sin(3.0 * times), times**2], -1)


def encoder() -> ph.SetEncoder:
    """A small encoder of the toy's trajectories."""
    return ph.SetEncoder(1, POINTS, 8, width=16)


class Line(ph.HybridModel):
    """x = start + slope t + bend · (sin 3t, t²) + noise: linear and Gaussian, its starts known or inferred."""

    def __init__(
        self,
        evidence: Evidence | None = None,
        *,
        inferred: bool = False,
        sites: dict[str, Family] | None = None,
        prior: Prior | None = None,
        noise: float = NOISE,
    ) -> None:
        """Read the support with an encoder; with Gauss-Newton from where it points; or with other evidence alone."""
        super().__init__()
        if evidence is None:
            evidence = ph.Encoder(encoder())
        elif isinstance(evidence, ph.GaussNewton):
            evidence = ph.Encoder(encoder()).then(evidence)
        self.prior = prior or SupportPrior(evidence, **(sites or SEPARATE))
        self.noise = PyroParam(torch.tensor(noise), constraints.positive)
        self.inferred = inferred

    def forward(self, episode: ph.Episode) -> Tensor:
        p = self.prior(episode)
        start = episode.query.initial
        with episode.plate:
            z = torch.cat([pyro.sample(name, p[name]) for name in p], -1)
            if self.inferred:
                start = pyro.sample("start", dist.Normal(start, START_NOISE).to_event(2))
            grown = features(episode.query.times) - features(episode.query.times[..., :1])
            mean = start + (grown[..., : z.shape[-1]] * z[..., None, None, :]).sum(-1)
            x = dist.Normal(mean.unsqueeze(-1), self.noise).mask(episode.query.scored)
            return pyro.sample("x", x.to_event(3), obs=episode.query.values)


def make_tasks(
    tasks: int,
    shots: int,
    seed: int = 0,
    *,
    num_support: int = 1,
    inferred: bool = False,
    latents: int = 3,
    noise: float = NOISE,
    mask: Tensor | None = None,
) -> ph.Tasks:
    """Tasks drawn from the program's own prior; the first observation is the measurement of the start."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    z = normal(tasks, 3) * torch.tensor([2.0, 1.0, 1.0]) + torch.tensor([0.5, 0.0, 0.0])
    z[:, latents:] = 0.0
    start = normal(tasks, shots, 1)
    clean = start + (features(TIMES) @ z.T).T.unsqueeze(1)
    values = clean + noise * normal(tasks, shots, POINTS)
    values[..., 0] = start[..., 0] + (START_NOISE * normal(tasks, shots) if inferred else 0.0)
    return ph.Tasks.from_trajectories(
        TIMES,
        values.unsqueeze(-1),
        num_support=num_support,
        observed=mask,
        true_latents={"slope": z[:, :1], "bend": z[:, 1:]},
    )


class Shared(Line):
    """A line whose bend is the same in every system: a linear network of two weights."""

    def __init__(self, *, inferred: bool = False, noise: float = NOISE) -> None:
        super().__init__(sites=SLOPE, inferred=inferred, noise=noise)
        self.residual = torch.nn.Linear(2, 1, bias=False)

    def forward(self, episode: ph.Episode) -> Tensor:
        p = self.prior(episode)
        start = episode.query.initial
        grown = features(episode.query.times) - features(episode.query.times[..., :1])
        with episode.plate:
            slope = pyro.sample("slope", p["slope"])
            if self.inferred:
                start = pyro.sample("start", dist.Normal(start, START_NOISE).to_event(2))
            bend = self.residual(grown[..., 1:]).squeeze(-1)
            mean = start + grown[..., 0] * slope[..., None] + bend
            x = dist.Normal(mean.unsqueeze(-1), self.noise).mask(episode.query.scored)
            return pyro.sample("x", x.to_event(3), obs=episode.query.values)


def shared(num_tasks: int, num_shots: int = 3, *, inferred: bool = False) -> ph.Tasks:
    """Lines that all bend alike."""
    straight = make_tasks(num_tasks, num_shots, inferred=inferred, latents=1)
    values = straight.values + (features(TIMES)[:, 1:] @ BEND[0]).view(-1, 1)
    return ph.Tasks.from_trajectories(TIMES, values, num_support=1, observed=straight.observed)


def in_float32(tasks: ph.Tasks) -> ph.Tasks:
    """Convert tasks to the precision of training."""
    return ph.Tasks.from_trajectories(
        tasks.times.float(), tasks.values.float(), num_support=tasks.num_support
    )


def system(kind: type[ph.systems.System], points: int = 6, **options: Any) -> Any:
    """Build a system of the library, observed at few times."""
    short = kind(**options)
    short.points = points
    return short


SYSTEMS = {
    "pendulum": partial(system, ph.systems.Pendulum),
    "angles": partial(system, ph.systems.Pendulum, angles_only=True),
    "double pendulum": partial(system, ph.systems.DoublePendulum),
    "rod": partial(system, ph.systems.AdvectionDiffusion, size=6),
}


def alone(
    times: Tensor,
    values: Tensor | None = None,
    initial: Tensor | tuple[Tensor, ...] | None = None,
    **masks: Tensor,
) -> ph.Episode:
    """An episode without a support; components of the initial states may be given one by one."""
    if isinstance(initial, tuple):
        initial = torch.stack(initial, -1)
    return ph.Episode(None, ph.Shots.from_tensors(times, values, initial, **masks))


def with_query(episode: ph.Episode, **changes: Any) -> ph.Episode:
    """The same episode with changes of its query."""
    return replace(episode, query=replace(episode.query, **changes))


class Exact(NamedTuple):
    """The joint posterior of the task's latents and then its shots' starts, by task."""

    mean: Tensor
    covariance: Tensor


def exact(
    *parts: ph.Shots | ph.Episode,
    inferred: bool = False,
    loc: tuple[float, ...] = (0.5, 0.0, 0.0),
    scale: tuple[float, ...] = (2.0, 1.0, 1.0),
    noise: float = NOISE,
) -> Exact:
    """The posterior of all these shots, of episodes the query, by the normal equations in float64."""
    sets = [part.query if isinstance(part, ph.Episode) else part for part in parts]
    x = torch.cat([shots.values for shots in sets], 1).squeeze(-1)
    start = torch.cat([shots.initial[..., 0] for shots in sets], 1)
    counts = torch.cat([shots.scored for shots in sets], 1).squeeze(-1)
    number, design = x.shape[1], features(sets[0].times)[:, : len(loc)]
    rows = [
        torch.cat([design, torch.eye(number, dtype=x.dtype)[k].expand(len(design), -1)], -1)
        for k in range(number)
    ]
    design = torch.cat(rows)  # (shot * time, latents + shot)
    centre = torch.cat([torch.tensor(loc, dtype=x.dtype).expand(len(x), -1), start], -1)
    free = START_NOISE if inferred else 1e-9
    weight = torch.tensor([*scale, *[free] * number], dtype=x.dtype) ** -2
    w = counts.flatten(1).to(x.dtype) / noise**2
    precision = torch.diag(weight) + torch.einsum("tn,ni,nj->tij", w, design, design)
    right = weight * centre + torch.einsum("tn,ni,tn->ti", w, design, x.flatten(1))
    return Exact(torch.linalg.solve(precision, right), torch.linalg.inv(precision))


@contextmanager
def without_type_checks() -> Iterator[None]:
    """Run the library as users do: only its own messages refuse a wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
