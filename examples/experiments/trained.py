"""Models that are trained once, and that every experiment then queries in the same way, whatever their kind."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from experiments.run import Choice, slug
from experiments.settings import CASES, ONE_BY_ONE, OURS, UNCONDITIONAL, Case, Setting
from pyro_hybrid.beliefs.belief import Belief, Gaussian
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.dynamics.modes import nan_on_failure
from pyro_hybrid.errors import fail
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.fitting.posterior import Posterior
from pyro_hybrid.fitting.stages import (
    compute_evidence,
    fix_gauge,
    refine_weights,
    rescale_intervals,
)
from pyro_hybrid.inference.draws import draws, predict
from pyro_hybrid.inference.prior import Prior, SupportPrior
from pyro_hybrid.models import APHYNITY, HybridVAE, MetaHybridVAE
from pyro_hybrid.programs.module import HybridModel, local_parameters
from pyro_hybrid.systems import System
from pyro_hybrid.training.fit import Fit, load
from pyro_hybrid.training.meta_train import meta_train
from pyro_hybrid.training.refinement import Refinement
from pyro_hybrid.training.schedule import Ramp

__all__ = [
    "Program",
    "Trained",
    "build_program",
    "fit_model",
    "load_or_train",
    "refine",
    "simulate_exactly",
    "simulate_tasks",
    "train",
]

HELD_OUT = 300
SHOTS = 8
HELD_OUT_SEED = 10_000
BATCH = 100  # tasks whose latents are inferred at once


class Program(NamedTuple):
    """A program with a guide of a kind of its own."""

    model: HybridModel
    guide: nn.Module


def simulate_exactly(system: System, num_tasks: int, num_shots: int, seed: int) -> Tasks:
    """Simulate the trajectories of ``system.simulate`` with the same arguments, without noise."""
    without_noise = copy.copy(system)
    without_noise.noise = (0.0,) * len(system.noise)
    return without_noise.simulate(num_tasks, num_shots, seed)


def simulate_tasks(
    system: str, seed: int, choice: Choice, num_tasks: int | None = None
) -> tuple[Tasks, Tasks]:
    """Simulate training tasks and held-out tasks. The held-out tasks don't depend on the number of training tasks."""
    case = CASES[system]
    num_training = num_tasks or case.tasks
    num_held_out = HELD_OUT
    num_shots = SHOTS
    if choice.fast:
        num_training = 24
        num_held_out = 24
        num_shots = 4
    simulator = case.system()
    return (
        simulator.simulate(num_training, num_shots, seed),
        simulator.simulate(num_held_out, num_shots, HELD_OUT_SEED + seed),
    )


@dataclass(frozen=True)
class Trained:
    """A trained model with the queries that experiments make.

    A prior that is conditioned on the support gives its belief itself. Other models read the support as if it were the
    query: with their guide, or with ``reading``, evidence that is computed from where their guide points.

    Arguments:
        name: the model's name in ``experiments.settings``.
        posterior: the trained program with its guide.
        fit: record of its training.
        processor_seconds: processor time of its training.
        reading: evidence that goes on from the guide's draws, or None for the guide alone.
    """

    name: str
    posterior: Posterior | Program
    fit: Fit
    processor_seconds: float
    reading: GaussNewton | None = None

    @property
    def model(self) -> HybridModel:
        """The trained program."""
        return self.posterior.model

    @property
    def prior(self) -> Prior:
        """The prior of the trained program."""
        return self.model.prior

    @property
    def system(self) -> System:
        """The system that the model was trained on."""
        return self.model.system

    @property
    def is_conditional(self) -> bool:
        """True if the prior reads the support."""
        return isinstance(self.prior, SupportPrior)

    def shots_read(self, support: Shots) -> Shots:
        """Return the shots of a support that the model reads: all of them, or one as published."""
        if self.name not in ONE_BY_ONE:
            return support
        return support.select_shots(torch.zeros(support.shape[0], 1, dtype=torch.long))

    def sample_latents(self, support: Shots | None, num_samples: int = 200) -> dict[str, Tensor]:
        """Draw a task's latents given its support alone, (draw, task, component)."""
        if support is None:
            fail("a support", "none", "Pass the support of an episode.")
        if isinstance(self.prior, SupportPrior):
            with local_parameters():
                belief = self.prior.belief(support, self.model)
            return _sample(belief, num_samples)
        shots = self.shots_read(support)
        samples = self._draw(Episode(None, shots), num_samples)
        latents = {name: samples[name] for name in self.prior.families}
        if self.reading is None:
            return latents
        return _sample(self._compute_belief(self.reading, shots, latents), num_samples)

    def _draw(self, episode: Episode, num_samples: int) -> dict[str, Tensor]:
        return draws(self.posterior.model, self.posterior.guide, episode, num_samples)

    def _compute_belief(
        self, reading: GaussNewton, shots: Shots, latents: dict[str, Tensor]
    ) -> Belief:
        """Compute the belief from the program, linearized from the mean of the guide's draws on."""
        with local_parameters():
            before = self.prior.population().detach().expand(shots.shape[0])
            point = before.unconstrained(latents).mean(0)
            start = Gaussian.around(before.families, point, 1.0)
            return before + reading(before, shots, self.model, start=start)

    @torch.no_grad()
    def latent_means(self, tasks: Tasks) -> Tensor:
        """Compute means of the latents given the support alone, (task, latent), physics first."""
        names = [*self.system.physics, "unknown"]
        means = []
        for start in range(0, len(tasks), BATCH):
            support = tasks[start : start + BATCH].episode().support
            samples = self.sample_latents(support)
            means.append(torch.cat([samples[name] for name in names], -1).mean(0))
        return torch.cat(means)

    @torch.no_grad()
    def predict(
        self, episode: Episode, exact_initial: Tensor | None = None, num_samples: int = 20
    ) -> Tensor:
        """Predict mean trajectories from the support and the initial states; NaN where one diverged.

        Arguments:
            episode: tasks with a support.
            exact_initial: the query's exact initial states; by default the measured ones of the episode.
            num_samples: number of trajectories that are averaged.
        """
        latents = self.sample_latents(episode.support, num_samples)
        if exact_initial is not None:
            episode = replace(episode, query=replace(episode.query, initial=exact_initial))
            latents["initial"] = exact_initial.expand(num_samples, *exact_initial.shape)
        return self.mean_trajectories(latents, episode, num_samples)

    @torch.no_grad()
    def reconstruct(self, episode: Episode, num_samples: int = 20) -> Tensor:
        """Compute mean trajectories of shots that were observed, given the support too if the model reads one."""
        if not self.is_conditional:
            episode = Episode(None, self.shots_read(episode.query))
        latents = self._draw(episode, num_samples)
        if self.reading is not None:
            latents |= self.sample_latents(episode.query, num_samples)
        return self.mean_trajectories(latents, episode, num_samples)

    def mean_trajectories(
        self, latents: dict[str, Tensor], episode: Episode, num_samples: int
    ) -> Tensor:
        """Run the program at draws of its latents, and average the trajectories."""
        if not self.is_conditional:
            episode = Episode(None, episode.query)
        with nan_on_failure(), pyro.validation_enabled(False):  # which refuses NaN
            program = poutine.condition(self.model, latents)
            return predict(program, episode, num_samples)["x"].mean(0)


def _sample(belief: Belief, num_samples: int) -> dict[str, Tensor]:
    return {
        name: distribution.sample((num_samples,))
        for name, distribution in belief.distributions().items()
    }


def load_or_train(
    system: str, model: str, seed: int, choice: Choice, num_tasks: int | None = None
) -> Trained:
    """Return a model trained on a system. It is trained now unless an earlier call left it in the folder."""
    words = [f"{num_tasks} tasks"] if num_tasks else []
    place = choice.folder / "models" / slug(system, model, *words, seed)
    tasks, _ = simulate_tasks(system, seed, choice, num_tasks)
    return fit_model(CASES[system], model, tasks, seed, choice.fast, place)


def fit_model(
    case: Case, name: str, tasks: Tasks, seed: int, fast: bool = False, place: Path | None = None
) -> Trained:
    """Train a model on some tasks, or load it from ``place``, and prepare it for queries."""
    setting = case.setting(name)
    torch.manual_seed(seed)
    program = build_program(case.system(), name, setting)
    cost = None if place is None else place.with_name(f"{place.name}.seconds")
    if place is not None and cost is not None and place.exists() and cost.exists():
        fit = load(place, *program)
        seconds = json.loads(cost.read_text())
        trained = _as_posterior(program)
    else:
        if name in ONE_BY_ONE:
            tasks = replace(tasks, num_support=tasks.values.shape[1] - 1)
        began = time.process_time()
        trained, fit = train(program, tasks, setting, seed, fast)
        seconds = round(time.process_time() - began, 1)
        if place is not None and cost is not None:
            # A folder without its seconds is of a run that was stopped.
            fit.save(place, trained.model, trained.guide, overwrite=True)
            cost.write_text(json.dumps(seconds))
    trained.model.eval()
    trained.guide.eval()
    if isinstance(trained, Posterior):
        trained = _prepare(trained, case, name, tasks, fast)
    return Trained(name, trained, fit, seconds)


def _as_posterior(program: Program) -> Posterior | Program:
    """Build a posterior of the library's own models; rivals stay as they are."""
    if isinstance(program.model, MetaHybridVAE):
        return Posterior(program.model, program.guide)
    return program


def _prepare(posterior: Posterior, case: Case, name: str, tasks: Tasks, fast: bool) -> Posterior:
    """Fix the gauge, compute evidence for the final answer, and rescale intervals."""
    support = replace(case.final, num_restarts=0) if fast else case.final
    posterior = fix_gauge(posterior, tasks[:200])
    if name == UNCONDITIONAL:
        return compute_evidence(posterior, query=support)
    # The query is read from where the support points, without an encoder.
    model = posterior.model
    posterior = Posterior(model, model.guide(case.query), posterior.stages)
    posterior = compute_evidence(posterior, support, case.query)
    return rescale_intervals(posterior, tasks[:300])


def build_program(system: System, name: str, setting: Setting) -> Program:
    """Build a program and its guide, untrained."""
    if name == OURS:
        support, query = setting.evidence or (None, None)
        ours = MetaHybridVAE(system, support, **setting.options)
        return Program(ours, ours.guide(query))
    if name == UNCONDITIONAL:
        unconditional = MetaHybridVAE(system, conditional=False, **setting.options)
        evidence = setting.evidence[0] if setting.evidence else None
        return Program(unconditional, unconditional.guide(evidence))
    kind = HybridVAE if name.startswith("HybridVAE") else APHYNITY
    rival = kind(system, **setting.options)
    return Program(rival, rival.guide())


def train(
    program: Program, tasks: Tasks, setting: Setting, seed: int, fast: bool = False
) -> tuple[Posterior | Program, Fit]:
    """Train a program, and refine its weights if the setting says so.

    Arguments:
        program: changed in place.
        tasks: the training tasks.
        setting: how to train.
        seed: of batches and samples.
        fast: take a few small steps only, to test the code.
    """
    correction = Ramp(setting.correction, power=2)
    fit = meta_train(
        program.model,
        program.guide,
        tasks,
        num_steps=3 if fast else setting.num_steps,
        batch_size=4 if fast else setting.batch_size,
        learning_rate=setting.learning_rate,
        seed=seed,
        curriculum=setting.curriculum,
        segments_per_shot=setting.segments_per_shot,
        average_last=setting.average_last,
        progress=False,
        penalty_weights={"projection": correction} if setting.correction else None,
    )
    trained = _as_posterior(program)
    if isinstance(trained, Posterior) and setting.refinement is not None:
        trained = refine(trained, tasks, setting.refinement, seed, fast)
    return trained, fit


def refine(
    posterior: Posterior, tasks: Tasks, settings: Refinement, seed: int, fast: bool = False
) -> Posterior:
    """Refine the weights of the neural term: the end of a training."""
    settings = settings._replace(seed=seed)
    if fast:
        settings = settings._replace(num_steps=1, batch_size=4)
    return refine_weights(posterior, tasks, **settings._asdict(), progress=False)
