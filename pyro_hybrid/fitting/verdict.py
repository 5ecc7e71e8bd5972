"""A verdict on a fit: signs that it failed, and the lever that each calls for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.dynamics.modes import halve_steps
from pyro_hybrid.errors import fail
from pyro_hybrid.evidence.encoder import Then
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.evidence.least_squares import Iterate, LeastSquares
from pyro_hybrid.fitting.posterior import Posterior
from pyro_hybrid.inference.prior import SupportPrior
from pyro_hybrid.programs.module import local_parameters
from pyro_hybrid.programs.run import Observation, run_at

__all__ = ["Finding", "Verdict", "judge"]

LARGER_NOISE = 1.5  # times the jitter of the data
POOR_FIT = 1.5  # deviances per observation
CORRELATED = 0.2  # correlation of a residual with the next one
UNREAD = 0.05  # share of systems
UNEXPLAINED = 3.0  # times the typical cost: a system that wasn't read
SAYS_NOTHING = 0.9  # share of a latent's variance that is left after all shots
CONTRADICTION = 3.0  # factor of the intervals from one half of a system's shots to the other
FEWEST_TIMES = 8  # of a trajectory whose errors are compared from one to the next
FEWEST = 4  # systems that a variance between systems is measured from
STEP = 0.1  # standard deviations of the noise


class Finding(NamedTuple):
    """A sign that something is wrong.

    Attributes:
        name: what it is about.
        why: what was measured.
        remedy: what to do.
    """

    name: str
    why: str
    remedy: str


class Verdict(NamedTuple):
    """The findings about a fit; none where nothing speaks against it."""

    findings: list[Finding]

    @property
    def headline(self) -> str:
        """One line."""
        if not self.findings:
            return "nothing speaks against the fit"
        names = ", ".join(finding.name for finding in self.findings)
        return f"{len(self.findings)} signs that the fit failed: {names}"

    def __str__(self) -> str:
        lines = [self.headline[0].upper() + self.headline[1:] + "."]
        lines += [f"- {one.name}: {one.why} {one.remedy}" for one in self.findings]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON."""
        return {"findings": [finding._asdict() for finding in self.findings]}


@torch.no_grad()
def judge(posterior: Posterior, tasks: Tasks) -> Verdict:
    """Look for signs that a fit failed; their absence proves nothing.

    Arguments:
        posterior: the fitted program; its prior or its guide computes evidence.
        tasks: tasks to judge on, best ones that were held out.
    """
    with local_parameters(), pyro.validation_enabled(False):
        problem, iterate = _read(posterior, tasks)
        sites = run_at(
            problem.program, problem.episode, problem.values(iterate.task, iterate.shot)
        ).observations
        findings = [
            *_training(posterior),
            *_fit(problem, iterate),
            *_unread(problem, iterate),
            *_noise(problem, sites),
            *_correlation(problem, sites),
            *_latents(posterior, problem, iterate),
            *_halves(posterior),
            *_solver(problem, iterate, sites),
        ]
    return Verdict(findings)


def _read(posterior: Posterior, tasks: Tasks) -> tuple[LeastSquares, Iterate]:
    """Read all shots of the tasks, in the way in which the posterior reads a support."""
    prior = posterior.model.prior
    evidence = prior.evidence if isinstance(prior, SupportPrior) else posterior.guide.evidence
    computed = evidence.second if isinstance(evidence, Then) else evidence
    if not isinstance(computed, GaussNewton):
        fail(
            "a posterior that computes evidence",
            "one that reads by an encoder alone",
            "Compute evidence first: posterior = ph.compute_evidence(posterior).",
            TypeError,
        )
    problem = LeastSquares(posterior.model, tasks.shots(), prior.population())
    return problem, computed.minimize(problem)


def _training(posterior: Posterior) -> Iterator[Finding]:
    for stage in posterior.stages:
        if stage.name == "fit" and stage.numbers.get("is_settled") is False:
            yield Finding(
                "training",
                f"Steps still lowered the costs after {len(stage.numbers['cost'])} batches, or were all rejected.",
                "Start from another seed, give families in the prior whose location and scale are of the right order, "
                "or train with ph.meta_train first.",
            )
    densities = [s.numbers["held_out"] for s in posterior.stages if "held_out" in s.numbers]
    if densities and not densities[-1][1] > densities[-1][0]:
        before, after = densities[-1]
        yield Finding(
            "training",
            f"The log density of a held-out observation did not rise ({before:.3g} -> {after:.3g}).",
            "Start from another seed, or give the prior's families a location and a scale of the right order.",
        )


def _fit(problem: LeastSquares, iterate: Iterate) -> Iterator[Finding]:
    per_observation = float((iterate.cost / problem.num_observed.clamp(min=1.0)).median())
    if per_observation > POOR_FIT:
        yield Finding(
            "fit",
            f"A typical system's squared errors are {per_observation:.3g} times those of the noise that the program "
            "claims.",
            "Something is missing in the equations, or the neural term can't express it: give it more inputs or "
            "latents. If the noise is fixed, learn it.",
        )
    if per_observation < 1.0 / POOR_FIT:
        yield Finding(
            "fit",
            f"A typical system's squared errors are only {per_observation:.3g} times those of the noise that the program "
            "claims: the noise was not learned.",
            "Make the noise a parameter of the model. identify learns it if the program observes a single site.",
        )


def _unread(problem: LeastSquares, iterate: Iterate) -> Iterator[Finding]:
    typical = iterate.cost.median()
    lost = ~(iterate.cost < UNEXPLAINED * typical)
    share = float(lost.double().mean())
    if share > UNREAD:
        numbers = lost.nonzero().flatten().tolist()[:5]
        yield Finding(
            "systems that don't fit",
            f"{share:.0%} of the held-out systems are explained more than {UNEXPLAINED:.0f} times worse than a typical "
            f"one, such as numbers {', '.join(map(str, numbers))}.",
            "Look at them: they may be of another kind, wrongly labelled, or misread; more restarts find the latter.",
        )


def _noise(problem: LeastSquares, sites: list[Observation]) -> Iterator[Finding]:
    """Compare the noise with the jitter of the data from one time to the next."""
    for site in sites:
        jitter = _jitter(problem, site)
        squares = (site.value - site.mean).square()
        counted = site.mask.expand(squares.shape)
        error = (squares * counted).sum((1, 2)) / counted.sum((1, 2)).clamp(min=1)
        ratio = (error.median(0).values.sqrt() / jitter).nan_to_num(0.0)
        if float(ratio.max()) > LARGER_NOISE:
            yield Finding(
                "noise",
                f"What the program leaves unexplained is {float(ratio.max()):.2g} times what jitters from one time to "
                f"the next (sensor {int(ratio.argmax())}).",
                "The known equations are wrong or incomplete where the neural term can't help: give it more inputs, "
                "more latents or more width.",
            )


def _jitter(problem: LeastSquares, site: Observation) -> Tensor:
    """Standard deviation of each sensor by third differences, which smooth trajectories have little of.

    NaN where times are irregular or too few.
    """
    value = site.value
    times = problem.shots.expanded_times
    steps = times.diff(dim=-1)
    is_regular = (steps - steps[..., :1]).abs().amax(-1) < 1e-3 * steps[..., 0]
    observed = site.mask.expand(value.shape).unfold(2, 4, 1).all(-1) if value.dim() == 4 else None
    if observed is None or value.shape[2] < FEWEST_TIMES:
        return value.new_full(value.shape[-1:], math.nan)
    third = value.diff(n=3, dim=2) / math.sqrt(20.0)
    usable = observed & is_regular[..., None, None]
    return torch.stack(
        [
            third[..., i][usable[..., i]].abs().median() / 0.6745
            if bool(usable[..., i].any())
            else value.new_tensor(math.nan)
            for i in range(value.shape[-1])
        ]
    )


def _correlation(problem: LeastSquares, sites: list[Observation]) -> Iterator[Finding]:
    for site in sites:
        residual = site.whitened.residual
        if residual.dim() != 4 or residual.shape[2] < FEWEST_TIMES:
            continue
        mask = site.mask.expand(residual.shape)
        both = mask[:, :, 1:] & mask[:, :, :-1]
        products = (residual[:, :, 1:] * residual[:, :, :-1] * both).double().sum((1, 2))
        squares = (residual.square() * mask).double().sum((1, 2))
        squares = squares * both.sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)
        number = both.sum((0, 1, 2)).clamp(min=1)
        correlation = (products / squares).nan_to_num(0.0).median(0).values
        worst = int(correlation.argmax())
        if float(correlation[worst]) > CORRELATED + 3.0 / math.sqrt(float(number[worst])):
            yield Finding(
                "residuals",
                f"Errors follow each other: the correlation of one with the next is {float(correlation[worst]):.2f} "
                f"(sensor {worst}), where noise has none.",
                "Something that lasts longer than a time step is missing in the equations, or differs from shot to "
                "shot: sample it as a latent of the shot.",
            )


def _latents(posterior: Posterior, problem: LeastSquares, iterate: Iterate) -> Iterator[Finding]:
    belief = problem.belief + problem.increment(iterate)
    mean, scale = belief.moments()
    usable = (mean + scale).isfinite().all(-1)
    if int(usable.sum()) < FEWEST:
        return
    between = mean[usable].var(0)
    left = scale[usable].square().mean(0) / (between + scale[usable].square().mean(0))
    names = [
        name if family.n == 1 else f"{name}[{i}]"
        for name, family in posterior.model.prior.families.items()
        for i in range(family.n)
    ]
    silent = [
        name for name, share in zip(names, left.tolist(), strict=True) if share > SAYS_NOTHING
    ]
    if silent:
        yield Finding(
            "latents",
            f"The data say next to nothing about {', '.join(f'`{name}`' for name in silent)}.",
            "Leave them out, or observe something that they act on.",
        )


def _halves(posterior: Posterior) -> Iterator[Finding]:
    largest = float(posterior.model.prior.interval_scale.max())
    if largest > CONTRADICTION:
        yield Finding(
            "halves of a system",
            f"Two halves of a system's shots differ by {largest:.2g} times their error bars.",
            "Shots of one task may be of different systems, or something differs from shot to shot: sample it as a "
            "latent of the shot.",
        )


def _solver(problem: LeastSquares, iterate: Iterate, sites: list[Observation]) -> Iterator[Finding]:
    values = problem.values(iterate.task, iterate.shot)
    with halve_steps():
        finer = run_at(problem.program, problem.episode, values).observations
    for site, fine in zip(sites, finer, strict=True):
        error = ((site.mean - fine.mean) / fine.scale).square()
        counted = fine.mask.expand(error.shape)
        total = error.where(counted, 0.0).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)
        typical = float(total.nan_to_num(math.inf).median().sqrt())
        if typical > STEP:
            yield Finding(
                "solver",
                f"Halving the solver's steps moves the trajectories of a typical system by {typical:.2g} standard "
                "deviations of the noise.",
                "Raise substeps in solve(...).",
            )
