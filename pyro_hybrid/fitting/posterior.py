"""Posterior: the fitted answer, as a value."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.errors import fail, require
from pyro_hybrid.evidence.settings import describe, restore
from pyro_hybrid.fitting.report import Report, report
from pyro_hybrid.identifiability.certificate import Certificate
from pyro_hybrid.identifiability.certify import certify
from pyro_hybrid.inference.arviz_data import Grouped
from pyro_hybrid.inference.draws import draws, predict
from pyro_hybrid.inference.guide import AmortizedGuide
from pyro_hybrid.inference.prior import SupportPrior
from pyro_hybrid.inference.to_arviz import to_arviz
from pyro_hybrid.programs.module import HybridModel
from pyro_hybrid.training.json_values import to_json
from pyro_hybrid.training.named_tensors import copied, load_model_tensors, model_tensors
from pyro_hybrid.training.storage import CheckpointError, Stored, read, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Latents", "Posterior", "Stage"]


class Stage(NamedTuple):
    """A step that led to a posterior: its name, its settings, what it measured, and a line that says what it did."""

    name: str
    settings: Mapping[str, Any]
    numbers: Mapping[str, Any]
    summary: str = ""


class Latents(NamedTuple):
    """Moments and intervals of every latent, by the name of its site, ``(task, ...)``."""

    mean: dict[str, Tensor]
    sd: dict[str, Tensor]
    low: dict[str, Tensor]
    high: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Posterior:
    """A trained program with its guide: how any task's latents are inferred from its trajectories.

    A posterior is a value. Steps such as :func:`~pyro_hybrid.refine_weights` and
    :func:`~pyro_hybrid.rescale_intervals` take one and return a new one; none changes the one it was given.

    Arguments:
        model: the program, whose prior says how a support is read and how intervals are scaled.
        guide: its guide, which says how a query is read.
        stages: the steps that led here, in order.
    """

    model: HybridModel
    guide: AmortizedGuide
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        require(
            isinstance(self.model, HybridModel),
            "a HybridModel",
            type(self.model).__name__,
            "Derive the model from ph.HybridModel.",
            TypeError,
        )
        require(
            isinstance(self.guide, AmortizedGuide) and self.guide.model is self.model,
            "a guide of this model",
            type(self.guide).__name__,
            "Build it with ph.AmortizedGuide(model, evidence).",
            TypeError,
        )

    def draws(self, data: Tasks | Episode, num_samples: int = 500) -> dict[str, Tensor]:
        """Draw every latent given support and query, ``(draw, task, ...)``."""
        return draws(self.model, self.guide, _episode(data), num_samples)

    def predict(self, data: Tasks | Episode, num_samples: int = 500) -> dict[str, Tensor]:
        """Draw every site, observations included, given the support and the starts of the query alone."""
        return predict(self.model, _episode(data), num_samples)

    def latents(self, data: Tasks | Episode, prob: float = 0.9, num_samples: int = 500) -> Latents:
        """Summarize every latent given support and query: mean, standard deviation, and a central interval.

        Arguments:
            data: tasks, or an episode of them.
            prob: probability of the interval.
            num_samples: number of draws.
        """
        require(0.0 < prob < 1.0, "prob between 0 and 1", prob, "Pass 0.9 for 90% intervals.")
        samples = self.draws(data, num_samples)
        tail = 0.5 * (1.0 - prob)
        return Latents(
            {name: x.mean(0) for name, x in samples.items()},
            {name: x.std(0) for name, x in samples.items()},
            {name: x.quantile(tail, 0) for name, x in samples.items()},
            {name: x.quantile(1.0 - tail, 0) for name, x in samples.items()},
        )

    def certify(
        self,
        tasks: Tasks,
        *,
        restarts: Sequence[Posterior] = (),
        seed: int = 0,
        progress: bool = True,
    ) -> Certificate:
        """Check which latents the data identify: see :func:`~pyro_hybrid.certify`.

        Arguments:
            tasks: the training data.
            restarts: posteriors of other trainings, from other seeds.
            seed: seed of draws and resampling.
            progress: show progress bars.
        """
        models = [restart.model for restart in restarts]
        return certify(self.model, self.guide, tasks, restarts=models, seed=seed, progress=progress)

    def to_arviz(
        self,
        data: Tasks | Episode,
        num_samples: int = 500,
        *,
        names: Mapping[str, Sequence[str]] | None = None,
        certificate: Certificate | None = None,
    ) -> Grouped:
        """Convert to ArviZ data with posterior, prior, predictions and likelihoods: see :func:`~pyro_hybrid.to_arviz`."""
        return to_arviz(
            self.model,
            self.guide,
            _episode(data),
            num_samples,
            names=names,
            certificate=certificate,
        )

    def report(
        self,
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
        """Score the posterior on held-out tasks, and certify it on the training tasks.

        Arguments:
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
        return report(
            self.model,
            self.guide,
            train,
            held_out,
            neural=neural,
            names=names,
            bound=bound,
            noise=noise,
            observation=observation,
            certify=certify,
            num_samples=num_samples,
        )

    def plot(
        self,
        tasks: Tasks,
        *,
        names: Sequence[str] | None = None,
        sensors: Sequence[int] | None = None,
        observation: str = "x",
    ) -> Figure:
        """Plot a query shot of three tasks: observed, reconstructed, and predicted from the support alone.

        Arguments:
            tasks: three tasks or more.
            names: names of the sensors.
            sensors: the sensors to show, by default up to four.
            observation: name of the observed site.
        """
        from pyro_hybrid.fitting.plots import trajectories_figure

        return trajectories_figure(
            self.model, self.guide, tasks, names=names, sensors=sensors, observation=observation
        )

    def plot_latents(self, tasks: Tasks) -> Figure:
        """Plot the latents of the first task: given the support alone, and given the query too."""
        from pyro_hybrid.fitting.plots import prior_posterior_figure

        return prior_posterior_figure(self.model, self.guide, tasks)

    def copy(self) -> Posterior:
        """Copy model and guide, so that changing the copy leaves this posterior as it is."""
        model, guide = copy.deepcopy((self.model, self.guide))
        return Posterior(model.eval(), guide.eval(), self.stages)

    def after(
        self,
        name: str,
        settings: Mapping[str, Any],
        numbers: Mapping[str, Any],
        summary: str = "",
    ) -> Posterior:
        """Note one more stage."""
        stage = Stage(name, settings, numbers, summary)
        return Posterior(self.model, self.guide, (*self.stages, stage))

    def __str__(self) -> str:
        lines = [f"Posterior of {type(self.model).__name__}"]
        lines += [f"- {stage.name}: {stage.summary}".rstrip(": ") for stage in self.stages]
        findings = [f for stage in self.stages for f in stage.numbers.get("findings", ())]
        lines += [f"! {f['name']}: {f['why']} {f['remedy']}" for f in findings]
        certificates = [s.numbers["certificate"] for s in self.stages if "certificate" in s.numbers]
        for certificate in certificates[-1:]:
            open_ones = [c for c in certificate["conditions"] if c["status"] != "holds"]
            lines += [f"? {c['condition']} {c['status']}: {c['remedy']}" for c in open_ones]
        return "\n".join(lines)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the posterior into a folder of its own; nothing in it is executed when it is loaded."""
        prior = self.model.prior
        support = describe(prior.evidence) if isinstance(prior, SupportPrior) else []
        state = {
            "posterior": {
                "support_evidence": support,
                "query_evidence": describe(self.guide.evidence),
                "stages": [to_json(stage._asdict()) for stage in self.stages],
            }
        }
        about = {"model": type(self.model).__qualname__, "guide": type(self.guide).__qualname__}
        weights = copied(model_tensors(self.model, self.guide), to_cpu=True)
        write(Path(folder), Stored(weights, state, about))

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        model: HybridModel,
        guide: AmortizedGuide | None = None,
    ) -> Posterior:
        """Load a saved posterior into a model of your own making.

        Arguments:
            folder: the folder that :meth:`save` wrote.
            model: built as it was for training; changed in place.
            guide: built as it was for training; changed in place. It can be left out if no encoder reads the query.
        """
        path = Path(folder)
        stored = read(path)
        saved = _saved_posterior(stored.state.get("posterior"), path)
        prior = model.prior
        if bool(saved.support_evidence) != isinstance(prior, SupportPrior):
            expected = "a SupportPrior" if saved.support_evidence else "an UnconditionalPrior"
            fail(
                f"a model with {expected}, as {path} was saved with",
                type(prior).__name__,
                "Build the model as it was built for training.",
                CheckpointError,
            )
        support = None
        if isinstance(prior, SupportPrior):
            support = restore(saved.support_evidence, prior.evidence)
        query = restore(saved.query_evidence, None if guide is None else guide.evidence)
        guide = AmortizedGuide(model, query) if guide is None else guide
        load_model_tensors(model, guide, stored.weights, f"{path} to be a posterior")
        # Nothing was changed before everything was found to fit.
        if support is not None and isinstance(prior, SupportPrior):
            prior.evidence = support
        guide.evidence = query
        return cls(model.eval(), guide.eval(), saved.stages)


class _Saved(NamedTuple):
    """What a saved posterior holds beside its weights."""

    support_evidence: list[dict[str, Any]]
    query_evidence: list[dict[str, Any]]
    stages: tuple[Stage, ...]


def _saved_posterior(saved: Any, path: Path) -> _Saved:
    """Check the types of everything that was saved."""
    try:
        support, query = list(saved["support_evidence"]), list(saved["query_evidence"])
        stages = tuple(Stage(**stage) for stage in saved["stages"])
    except (TypeError, KeyError):
        raise CheckpointError(
            f"expected {path} to hold a posterior; got something else. Load what Posterior.save wrote."
        ) from None
    return _Saved(support, query, stages)


def _episode(data: Tasks | Episode) -> Episode:
    require(
        isinstance(data, Tasks | Episode),
        "tasks, or an episode of them",
        type(data).__name__,
        "Make tasks with ph.Tasks.from_trajectories or ph.Tasks.from_frame.",
        TypeError,
    )
    return data.episode() if isinstance(data, Tasks) else data
