"""Report: how well a trained program does on tasks that training never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.errors import fail, require
from pyro_hybrid.identifiability.certificate import Certificate
from pyro_hybrid.identifiability.certify import certify as certify_program
from pyro_hybrid.inference.draws import draws, predict
from pyro_hybrid.inference.guide import AmortizedGuide
from pyro_hybrid.inference.prior import SupportPrior
from pyro_hybrid.programs.module import HybridModel, local_parameters
from pyro_hybrid.scores.ica import disentangle
from pyro_hybrid.scores.mcc import mcc

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Recovered", "Report", "recover", "report"]

PROB = 0.9
BATCH = 100  # tasks that are read at once
NUM_PREDICTED = 100  # tasks whose trajectories are compared


@dataclass(frozen=True, eq=False)
class Recovered:
    """Latents inferred from the support alone: one row a task, one column a latent.

    Attributes:
        names: the latents.
        draws: ``(draw, task, latent)``.
        truth: the true latents, ``(task, latent)``, or None.
        num_physics: number of physics latents, which come first; the others are neural.
    """

    names: list[str]
    draws: Tensor
    truth: Tensor | None
    num_physics: int

    @property
    def mean(self) -> Tensor:
        """Mean of the draws, ``(task, latent)``."""
        return self.draws.mean(0)


@dataclass(frozen=True, eq=False)
class Report:
    """Scores of held-out tasks, and the certificate of the training tasks.

    Attributes:
        numbers: every score by name, as JSON can hold it.
        recovered: latents of the held-out tasks.
        aligned: their draws after the linear map that training tasks give, ``(draw, task, latent)``, or None.
        certificate: what the data identify, or None.
    """

    numbers: Mapping[str, Any]
    recovered: Recovered
    aligned: Tensor | None
    certificate: Certificate | None

    def __str__(self) -> str:
        lines = _table(self.numbers, self.recovered) if self.aligned is not None else []
        reconstruction = self.numbers["reconstruction_error_in_noise_variances"]
        prediction = self.numbers["prediction_error_in_noise_variances"]
        lines.append(
            f"squared error of trajectories in noise variances: reconstruction {reconstruction}, "
            f"prediction from the support alone {prediction}"
        )
        if self.certificate is not None:
            lines += ["", str(self.certificate)]
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Plot true against recovered latents."""
        from pyro_hybrid.fitting.plots import latents_figure

        return latents_figure(self)


def report(
    model: HybridModel,
    guide: AmortizedGuide,
    train: Tasks,
    held_out: Tasks,
    *,
    neural: Sequence[str] = ("unknown",),
    names: Sequence[str] | None = None,
    bound: Tensor | None = None,
    noise: Sequence[float] | None = None,
    observation: str = "x",
    certify: bool = True,
    num_samples: int = 400,
) -> Report:
    """Score a trained program on held-out tasks, and certify it on the training tasks.

    If the true latents are known, the linear map and the unmixing that theory leaves open come from training tasks; the
    held-out tasks only get them applied.

    Arguments:
        model: a trained program.
        guide: its guide.
        train: training tasks.
        held_out: tasks that training never saw.
        neural: names of the sites of neural latents; all others are physics latents.
        names: names of the latents, physics first; by default those of the sites.
        bound: Cramér-Rao bound of each latent, ``(task, latent)``, if it is known.
        noise: standard deviation of each sensor's noise; by default the model's ``noise``.
        observation: name of the observed site.
        certify: whether to certify, which takes a minute or so.
        num_samples: number of draws of each task.
    """
    seen = recover(model, guide, train[: min(500, len(train))], neural, names, num_samples)
    new = recover(model, guide, held_out, neural, names, num_samples)
    numbers: dict[str, Any] = {"latents": new.names}
    aligned = None
    if seen.truth is not None and new.truth is not None:
        aligned = _align(seen, new)
        numbers |= _scores(seen, new, aligned)
        if bound is not None:
            numbers |= _efficiency(new, bound.mean(0))
    numbers |= _trajectory_errors(model, guide, held_out, noise, observation)
    certificate = certify_program(model, guide, train) if certify else None
    return Report(numbers, new, aligned, certificate)


@torch.no_grad()
def recover(
    model: HybridModel,
    guide: AmortizedGuide,
    tasks: Tasks,
    neural: Sequence[str] = ("unknown",),
    names: Sequence[str] | None = None,
    num_samples: int = 400,
) -> Recovered:
    """Infer the latents of tasks from their supports alone: by the prior, or by the guide if the prior can't."""
    prior = model.prior
    physics = [name for name in prior.families if name not in neural]
    sites = [*physics, *(name for name in prior.families if name in neural)]
    pieces = []
    starts = range(0, len(tasks), BATCH)
    for start in tqdm(starts, desc="reading supports", unit="batch", leave=False, delay=2.0):
        support = tasks[start : start + BATCH].episode().support
        if support is None:
            fail("tasks with supports", "none", "Pass num_support when you make the tasks.")
        if isinstance(prior, SupportPrior):
            with local_parameters():
                belief = prior.belief(support, model)
            samples = {n: fn.sample((num_samples,)) for n, fn in belief.distributions().items()}
        else:
            samples = draws(model, guide, Episode(None, support), num_samples)
        pieces.append(torch.cat([samples[name] for name in sites], -1).cpu())
    sizes = {name: prior.families[name].n for name in sites}
    default = [s if n == 1 else f"{s}[{i}]" for s, n in sizes.items() for i in range(n)]
    columns = default if names is None else list(names)
    require(
        len(columns) == len(default),
        f"{len(default)} names, one for each of {default}",
        columns,
        "Name physics latents first, in the order of the prior's sites.",
    )
    truth = tasks.true_latents
    is_known = truth is not None and set(truth) >= set(sites)
    true = torch.cat([truth[name] for name in sites], -1) if truth and is_known else None
    return Recovered(columns, torch.cat(pieces, 1), true, sum(sizes[name] for name in physics))


def _scores(seen: Recovered, new: Recovered, aligned: Tensor) -> dict[str, Any]:
    """Agreement with the truth, as it is and after what theory leaves open was taken off."""
    truth = _known(new)
    k = new.num_physics
    plain = mcc(new.mean, truth)
    unmixed = disentangle(new.mean, fit=seen.mean)
    physics, neural = new.mean[:, :k], new.mean[:, k:]
    alone = disentangle(neural, fit=seen.mean[:, k:]) if neural.shape[1] else neural
    after = mcc(torch.cat([physics, torch.as_tensor(alone)], -1), truth)
    numbers = {
        "linear_r": plain.linear_r.round(4).tolist(),
        "linear_r_mean": round(float(plain.linear_r.mean()), 4),
        "strong": plain.matched.round(4).tolist(),
        "strong_mcc": round(plain.strong, 4),
        "after_disentangle": after.matched.round(4).tolist(),
        "strong_mcc_after_disentangle": round(after.strong, 4),
        "strong_mcc_after_disentangling_all_together": round(mcc(unmixed, truth).strong, 4),
        "weak_mcc": round(plain.weak, 4),
        "coverage_90": _coverage(aligned, truth),
        "coverage_90_physics_as_is": _coverage(new.draws[..., :k], truth[:, :k]),
    }
    if neural.shape[1]:
        numbers["strong_mcc_neural_after_disentangle"] = round(mcc(alone, truth[:, k:]).strong, 4)
    return numbers


def _efficiency(new: Recovered, bound: Tensor) -> dict[str, Any]:
    """Mean squared errors of physics latents over their bounds."""
    k = new.num_physics
    error = (new.mean[:, :k] - _known(new)[:, :k]).square().mean(0)
    ratios = zip(error, bound, strict=False)
    return {
        "mse_physics": [float(f"{x:.4g}") for x in error],
        "cramer_rao": [float(f"{x:.4g}") for x in bound],
        "mse_over_cramer_rao": [round(float(a / b), 2) for a, b in ratios],
    }


def _known(recovered: Recovered) -> Tensor:
    if recovered.truth is None:
        fail("tasks with true latents", "none", "Pass true_latents when you make the tasks.")
    return recovered.truth


def _align(seen: Recovered, new: Recovered) -> Tensor:
    """Apply the linear map that leads from training tasks' latents to their truth."""

    def affine(x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones(*x.shape[:-1], 1)], -1)

    matrix: Tensor = torch.linalg.lstsq(affine(seen.mean), _known(seen)).solution
    return affine(new.draws) @ matrix


def _coverage(samples: Tensor, truth: Tensor) -> list[float]:
    low = samples.quantile((1 - PROB) / 2, 0)
    high = samples.quantile((1 + PROB) / 2, 0)
    is_inside = (truth >= low) & (truth <= high)
    return [round(float(x), 3) for x in is_inside.float().mean(0)]


@torch.no_grad()
def _trajectory_errors(
    model: HybridModel,
    guide: AmortizedGuide,
    tasks: Tasks,
    noise: Sequence[float] | None,
    observation: str,
) -> dict[str, float]:
    """Mean squared errors of held-out query shots, in units of the noise variance."""
    episode = tasks[: min(NUM_PREDICTED, len(tasks))].episode()
    deviation = torch.as_tensor(model.noise.detach() if noise is None else noise)
    values = episode.query.values
    if values is None:
        fail("tasks with values", "none", "Pass tasks that were observed.")

    def error(samples: Tensor) -> float:
        residuals = (samples.mean(0) - values) / deviation
        return round(float(residuals.square()[episode.query.scored].mean()), 3)

    latents = draws(model, guide, episode, 20)
    conditioned = poutine.condition(model, latents)
    return {
        "reconstruction_error_in_noise_variances": error(
            predict(conditioned, replace(episode, belief=None), 20)[observation]
        ),
        "prediction_error_in_noise_variances": error(predict(model, episode, 20)[observation]),
    }


def _table(numbers: Mapping[str, Any], new: Recovered) -> list[str]:
    head = ("latent", "kind", "strong", "after ICA", "linear R", "coverage", "MSE / CRB")
    rows = ["{:<12}{:<9}{:>8}{:>11}{:>10}{:>10}{:>11}".format(*head)]
    ratios = numbers.get("mse_over_cramer_rao", [])
    for i, name in enumerate(new.names):
        kind = "physics" if i < new.num_physics else "neural"
        ratio = ratios[i] if i < len(ratios) else "-"
        rows.append(
            f"{name:<12}{kind:<9}{numbers['strong'][i]:>8.3f}"
            f"{numbers['after_disentangle'][i]:>11.3f}{numbers['linear_r'][i]:>10.3f}"
            f"{numbers['coverage_90'][i]:>10.2f}{ratio:>11}"
        )
    rows.append(
        f"{'mean':<21}{numbers['strong_mcc']:>8.3f}"
        f"{numbers['strong_mcc_after_disentangle']:>11.3f}{numbers['linear_r_mean']:>10.3f}"
    )
    return rows
