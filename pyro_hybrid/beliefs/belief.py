r"""Beliefs about a task's latents in natural form: they add, and a posterior is a belief plus evidence.

.. math:: p(z \mid S) = \text{population} + \text{evidence}(S), \qquad
          q(z \mid S, x) = p(z \mid S) + \text{evidence}(x)

A belief that is incomplete or improper is one too: what evidence adds is of the same kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_hybrid.beliefs.families import Family
from pyro_hybrid.beliefs.quadratic import Quadratic
from pyro_hybrid.shapes import Natural, Stock

__all__ = ["Belief", "Factorized", "Gaussian", "require_same_sites", "rescale"]


class Belief(ABC):
    """Natural parameters of the latents of a batch of tasks, by the name of their sites.

    A belief may be improper: what evidence adds to a belief is a belief too.
    """

    families: Mapping[str, Family]

    @abstractmethod
    def gaussian(self) -> Gaussian:
        """Convert to a joint Gaussian in unconstrained coordinates."""

    @abstractmethod
    def factorized(self) -> Factorized:
        """Convert to members of the declared families with the same marginal moments."""

    @abstractmethod
    def __add__(self, increment: Belief) -> Belief:
        """Multiply the densities."""

    @abstractmethod
    def expand(self, num_tasks: int) -> Belief:
        """Repeat a belief about any task for so many tasks."""

    @abstractmethod
    def select_tasks(self, rows: Tensor) -> Belief:
        """Select tasks by index."""

    @abstractmethod
    def moments(self) -> tuple[Tensor, Tensor]:
        """Marginal means and standard deviations of all sites in unconstrained coordinates, ``(..., d)``."""

    def distributions(self) -> dict[str, Stock]:
        """Stock Pyro distributions of the sites."""
        belief = self.factorized()
        return {
            name: family.distribution(belief.natural[name])
            for name, family in self.families.items()
        }

    @property
    def size(self) -> int:
        """Number of latent components of all sites."""
        return sum(family.n for family in self.families.values())

    def split(self, coordinates: Tensor) -> dict[str, Tensor]:
        """Split unconstrained coordinates ``(..., d)`` by site."""
        sizes = [family.n for family in self.families.values()]
        return dict(zip(self.families, coordinates.split(sizes, -1), strict=True))

    def constrained(self, coordinates: Tensor) -> dict[str, Tensor]:
        """Map unconstrained coordinates ``(..., d)`` to the values of the sites."""
        return {
            name: self.families[name].constrained(part)
            for name, part in self.split(coordinates).items()
        }

    def unconstrained(self, values: Mapping[str, Tensor]) -> Tensor:
        """Map the values of the sites to unconstrained coordinates ``(..., d)``."""
        parts = [family.unconstrained(values[name]) for name, family in self.families.items()]
        return torch.cat(parts, -1)


@dataclass(frozen=True, eq=False)
class Factorized(Belief):
    r"""A product of exponential families, one for each site: :math:`\prod_s \exp \langle T(z_s), \lambda_s \rangle`.

    Arguments:
        families: the family of each site.
        natural: :math:`\lambda_s`, ``(..., component, statistic)`` for families of independent components.
    """

    families: Mapping[str, Family]
    natural: Mapping[str, Natural]

    def __add__(self, increment: Belief) -> Belief:
        if isinstance(increment, Gaussian):
            return self.gaussian() + increment
        require_same_sites(self, increment)
        other = increment.factorized().natural
        total = {name: value + other[name] for name, value in self.natural.items()}
        return Factorized(self.families, total)

    def factorized(self) -> Factorized:
        return self

    def moments(self) -> tuple[Tensor, Tensor]:
        parts = [family.gaussian(self.natural[name]) for name, family in self.families.items()]
        means = torch.cat([mean for mean, _ in parts], -1)
        scales = torch.cat([scale for _, scale in parts], -1)
        return means, scales

    @torch.no_grad()
    def gaussian(self) -> Gaussian:
        """Convert to a joint Gaussian with the same moments; no gradient flows through it."""
        means = []
        blocks = []
        for name, family in self.families.items():
            mean, precision = family.information(self.natural[name])
            means.append(mean.double())
            blocks.append(precision.double())
        mean = torch.cat(means, -1)
        precision = _block_diagonal(blocks)
        dtype = next(iter(self.natural.values())).dtype
        return Gaussian(self.families, Quadratic.centered(mean, precision), dtype)

    def expand(self, num_tasks: int) -> Factorized:
        natural = {name: x.expand(num_tasks, *x.shape[-2:]) for name, x in self.natural.items()}
        return Factorized(self.families, natural)

    def detach(self) -> Factorized:
        """Return the same belief outside the graph of gradients."""
        return Factorized(self.families, {name: x.detach() for name, x in self.natural.items()})

    def select_tasks(self, rows: Tensor) -> Factorized:
        return Factorized(self.families, {name: x[rows] for name, x in self.natural.items()})

    def mean_statistics(self) -> dict[str, Natural]:
        """Expected statistics of each site, the gradient of its log partition function."""
        return {
            name: family.mean_statistics(self.natural[name])
            for name, family in self.families.items()
        }

    def kl(self, other: Factorized) -> Tensor:
        r"""Kullback-Leibler divergence to another belief of the same families, by task.

        .. math:: \sum_s \langle \lambda_s - \lambda'_s, \mathrm{E}[T] \rangle - A(\lambda_s) + A(\lambda'_s)
        """
        total = torch.zeros(())
        for name, family in self.families.items():
            mine = self.natural[name]
            theirs = other.natural[name]
            inner = ((mine - theirs) * family.mean_statistics(mine)).sum((-2, -1))
            partition = family.log_partition(theirs) - family.log_partition(mine)
            total = total + inner + (partition.sum(-1) if family.factorized else partition)
        return total


@dataclass(frozen=True, eq=False)
class Gaussian(Belief):
    r"""A joint Gaussian over the unconstrained coordinates of all sites, in information form.

    Latents of a task's shots, such as initial states, may be attached. Given the task's latents u the shots'
    latents s are independent, so that the precision is an arrow:

    .. math:: f(u, s_1, \dots, s_n) = f_0(u) \prod_k f_k(u, s_k)

    Arguments:
        families: the family of each site, which says what its unconstrained coordinates are.
        own: the factor :math:`f_0`, ``(task, d)``.
        dtype: precision of what is handed out.
        shots: the factors :math:`f_k` over task and shot, ``(task, shot, d + m)``, or None.
        shot_sizes: number of components of each latent of a shot, by the name of its site.
    """

    families: Mapping[str, Family]
    own: Quadratic
    dtype: torch.dtype
    shots: Quadratic | None = None
    shot_sizes: Mapping[str, int] | None = None

    @classmethod
    def around(
        cls, families: Mapping[str, Family], mean: Tensor, precision: Tensor | float
    ) -> Gaussian:
        """Build a belief with this mean, ``(..., d)``, and this precision, ``(..., d, d)`` or one number for all."""
        if not isinstance(precision, Tensor):
            precision = torch.diag_embed(torch.full_like(mean, precision))
        return cls(families, Quadratic.centered(mean, precision), mean.dtype)

    def __add__(self, increment: Belief) -> Belief:
        require_same_sites(self, increment)
        if isinstance(increment, Factorized):
            return self.factorized() + increment
        other = increment.gaussian()
        own = self.own + other.own
        if other.shots is None:
            return Gaussian(self.families, own, self.dtype, self.shots, self.shot_sizes)
        if self.shots is not None:  # the same trajectories' latents can't be attached twice
            own = self.task_marginal + other.own
        return Gaussian(self.families, own, self.dtype, other.shots, other.shot_sizes)

    @property
    def task_marginal(self) -> Quadratic:
        """The factor of the task's latents, those of its shots being integrated out."""
        if self.shots is None:
            return self.own
        return self.own + self.shots.marginal(self.size).sum(1)

    def gaussian(self) -> Gaussian:
        return self

    def without_shots(self) -> Gaussian:
        """Integrate the latents of shots out."""
        return Gaussian(self.families, self.task_marginal, self.dtype)

    def factorized(self) -> Factorized:
        marginal = self.task_marginal
        covariance = marginal.covariance
        mean = marginal.mean.to(self.dtype)
        natural = {}
        start = 0
        for name, family in self.families.items():
            part = slice(start, start + family.n)
            natural[name] = family.from_covariance(mean[..., part], covariance[..., part, part])
            start += family.n
        return Factorized(self.families, natural)

    def moments(self) -> tuple[Tensor, Tensor]:
        marginal = self.task_marginal
        scale = marginal.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        return marginal.mean.to(self.dtype), scale.to(self.dtype)

    def expand(self, num_tasks: int) -> Gaussian:
        """Repeat the belief about the task's latents; those of shots are integrated out."""
        return Gaussian(self.families, self.task_marginal.expand(num_tasks), self.dtype)

    def select_tasks(self, rows: Tensor) -> Gaussian:
        shots = None if self.shots is None else self.shots[rows]
        return Gaussian(self.families, self.own[rows], self.dtype, shots, self.shot_sizes)

    def shots_given(self, coordinates: Tensor) -> Quadratic:
        """The factor of each shot's latents given the task's, ``(..., task, shot, m)``."""
        if self.shots is None:
            raise ValueError(
                "expected a belief with latents of shots attached; got one without. Compute evidence on trajectories "
                "whose program samples latents of shots."
            )
        return self.shots.condition(coordinates.double().unsqueeze(-2))


def rescale(posterior: Gaussian, before: Gaussian, scale: Tensor) -> Gaussian:
    """Scale the standard deviations that the evidence alone would leave, the mean staying where it is.

    Arguments:
        posterior: the belief with its evidence.
        before: the belief without.
        scale: a factor for each component; 1 changes nothing.
    """
    marginal = posterior.task_marginal
    weight = scale.double().reciprocal()
    evidence = marginal.precision - before.task_marginal.precision
    precision = before.task_marginal.precision + weight.unsqueeze(-1) * evidence * weight
    change = Quadratic.centered(marginal.mean, precision) - marginal
    return Gaussian(
        posterior.families,
        posterior.own + change,
        posterior.dtype,
        posterior.shots,
        posterior.shot_sizes,
    )


def require_same_sites(one: Belief, other: Belief) -> None:
    """Refuse to add beliefs about different latents."""
    if dict(one.families) != dict(other.families):
        raise ValueError(
            f"expected beliefs about the same sites; got {list(one.families)} and {list(other.families)}. "
            "Build both from the same families."
        )


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    size = sum(block.shape[-1] for block in blocks)
    batch = torch.broadcast_shapes(*(block.shape[:-2] for block in blocks))
    whole = blocks[0].new_zeros(*batch, size, size)
    start = 0
    for block in blocks:
        stop = start + block.shape[-1]
        whole[..., start:stop, start:stop] = block
        start = stop
    return whole
