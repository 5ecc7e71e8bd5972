"""Models that are trained once, and that every experiment then queries in the same way, whatever their kind."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro_hybrid.training.refinement import sharpen
from torch import Tensor

from experiments.run import Choice, slug
from experiments.settings import CASES, DEAF, ONE_BY_ONE, OURS, Case, Setting, Sharpening
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.dynamics.modes import nan_on_failure
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.evidence.least_squares import LeastSquares
from pyro_hybrid.inference.draws import draws, predict
from pyro_hybrid.inference.prior import SupportPrior, handed_out
from pyro_hybrid.models import APHYNITY, HybridVAE, MetaHybridVAE
from pyro_hybrid.programs.fix_gauge import fix_gauge
from pyro_hybrid.programs.module import local_parameters
from pyro_hybrid.shapes import Stock
from pyro_hybrid.systems import System
from pyro_hybrid.training.fit import Fit, load
from pyro_hybrid.training.meta_train import meta_train
from pyro_hybrid.training.schedule import Ramp

__all__ = ["Trained", "data", "exactly", "learnt", "sharpened", "taught", "trained"]

HELD_OUT, SHOTS, HELD_OUT_SEED = 300, 8, 10_000


def exactly(system: System, tasks: int, shots: int, seed: int) -> Tasks:
    """Simulate as ``system.simulate`` does with the same arguments, but without observation noise."""
    clear = copy.copy(system)
    clear.noise = (0.0,) * len(system.noise)
    return clear.simulate(tasks, shots, seed)


def data(system: str, seed: int, choice: Choice, tasks: int | None = None) -> tuple[Tasks, Tasks]:
    """Simulate systems to learn from, and others to judge on, which don't depend on the number of the former."""
    learn, judge, shots = (
        (24, 24, 4) if choice.fast else (tasks or CASES[system].tasks, HELD_OUT, SHOTS)
    )
    made = CASES[system].system()
    return made.simulate(learn, shots, seed), made.simulate(judge, shots, HELD_OUT_SEED + seed)


@dataclass
class Trained:
    """A trained model with its guide, and the questions that experiments ask of it.

    A conditional prior gives the latents given the support. Other models treat the support as a query: their guide
    infers it, and ``reading``, if given, refines the guide's answer with evidence computed from the program.
    """

    name: str
    model: Any
    guide: Any
    fit: Fit
    processor_seconds: float  # of its training
    reading: GaussNewton | None = None

    @property
    def system(self) -> System:
        """Return the system that it was trained on."""
        return self.model.system

    @property
    def conditional(self) -> bool:
        """Tell whether the prior is conditioned on the support."""
        return isinstance(self.model.prior, SupportPrior)

    def given(self, support: Shots) -> Shots:
        """Return the part of a support that the model reads: all of it, or one trajectory as published."""
        return (
            support.select_shots(torch.zeros(support.shape[0], 1, dtype=torch.long))
            if self.name in ONE_BY_ONE
            else support
        )

    def read(self, support: Shots | None, samples: int = 200) -> dict[str, Tensor]:
        """Draw a task's latents given its support alone, (draw, task, component)."""
        assert support is not None
        if self.conditional:
            with local_parameters():
                found = self.model.prior(support)
            return {name: fn.sample((samples,)) for name, fn in found.items()}
        support = self.given(support)
        found = draws(self.model, self.guide, Episode(None, support), samples)
        found = {name: found[name] for name in self.model.prior.sites}
        if self.reading is None:
            return found
        return {name: fn.sample((samples,)) for name, fn in self._consulted(support, found).items()}

    def _consulted(self, support: Shots, found: dict[str, Tensor]) -> dict[str, Stock]:
        """Compute the belief from the program, linearized where the encoder points."""
        assert self.reading is not None
        prior = self.model.prior
        with local_parameters():
            mean, precision = (
                x.expand(support.shape[0], *x.shape[-n:])
                for n, x in enumerate(prior.gaussian(None), 1)
            )
            problem = LeastSquares(self.model, Episode(None, support), prior.sites, mean, precision)
            start = torch.cat(
                [prior.sites[name].unconstrained(x) for name, x in found.items()], -1
            ).mean(0)
            naturals = handed_out(prior.sites, self.reading(problem, start))
        return {name: prior.sites[name].distribution(natural) for name, natural in naturals.items()}

    @torch.no_grad()
    def latents(self, tasks: Tasks) -> Tensor:
        """Compute the latents' means given the support alone, (task, latent), physics first."""
        pieces = [
            self.read(tasks[start : start + 100].episode().support)
            for start in range(0, len(tasks), 100)
        ]
        names = [*self.system.physics, "unknown"]
        return torch.cat(
            [torch.cat([piece[name] for name in names], -1).mean(0) for piece in pieces]
        )

    @torch.no_grad()
    def predicted(self, episode: Episode, exact: Tensor | None = None, samples: int = 20) -> Tensor:
        """Predict mean trajectories from the support and the initial states, measured or exact; NaN where one diverged."""
        latents = self.read(episode.support, samples)
        if exact is not None:
            episode = replace(episode, query=replace(episode.query, initial=exact))
            latents["initial"] = exact.expand(samples, *exact.shape)
        return self._run(latents, episode, samples)

    @torch.no_grad()
    def reconstructed(self, episode: Episode, samples: int = 20) -> Tensor:
        """Reconstruct mean trajectories of shots that the model has read, together with the support if it can."""
        if not self.conditional:
            episode = Episode(None, self.given(episode.query))
        found = draws(self.model, self.guide, episode, samples)
        if self.reading is not None:
            found |= self.read(episode.query, samples)
        return self._run(found, episode, samples)

    def _run(self, latents: dict[str, Tensor], episode: Episode, samples: int) -> Tensor:
        blank = episode if self.conditional else Episode(None, episode.query)
        with nan_on_failure(), pyro.validation_enabled(False):  # which refuses NaN
            return predict(poutine.condition(self.model, latents), blank, samples)["x"].mean(0)


def trained(
    system: str, model: str, seed: int, choice: Choice, tasks: int | None = None
) -> Trained:
    """Train a model on a system, or load it if an earlier call left it in the folder."""
    place = (
        choice.folder / "models" / slug(system, model, *([f"{tasks} tasks"] if tasks else []), seed)
    )
    return learnt(
        CASES[system], model, data(system, seed, choice, tasks)[0], seed, choice.fast, place
    )


def learnt(
    case: Case, model: str, learn: Tasks, seed: int, fast: bool = False, place: Path | None = None
) -> Trained:
    """Train a model on tasks, or load it from ``place`` if it is there, and prepare it for questions."""
    setting = case.setting(model)
    torch.manual_seed(seed)
    made, guide = _made(case.system(), model, setting)
    cost = place and place.with_name(f"{place.name}.seconds")
    if place and cost and place.exists() and cost.exists():
        fit, seconds = load(place, made, guide), json.loads(cost.read_text())
    else:
        seen = (
            replace(learn, num_support=learn.values.shape[1] - 1) if model in ONE_BY_ONE else learn
        )
        began = time.process_time()
        fit = taught(made, guide, seen, setting, seed, fast)
        seconds = round(time.process_time() - began, 1)
        if place and cost:
            fit.save(place, made, guide, overwrite=True)  # one without its seconds was cut short
            cost.write_text(json.dumps(seconds))
    out = Trained(model, made.eval(), guide.eval(), fit, seconds)
    final = (
        GaussNewton(case.final.iterations, segments=case.final.segments) if fast else case.final
    )  # no restarts
    if model in (OURS, DEAF):
        fix_gauge(made, learn[:200])
    if model == OURS:
        made.prior.evidence, out.guide = final, made.guide(case.query)
        calibrate(made, learn[:300])
    elif model == DEAF:
        guide.evidence = final
    return out


def _made(system: System, model: str, setting: Setting) -> tuple[Any, Any]:
    """Build the program and its guide, untrained."""
    if model == OURS:
        prior, query = setting.evidence or (None, None)
        ours = MetaHybridVAE(system, prior, **setting.options)
        return ours, ours.guide(query)
    if model == DEAF:
        deaf = MetaHybridVAE(system, conditional=False, **setting.options)
        return deaf, deaf.guide(setting.evidence and setting.evidence[0])
    made = (HybridVAE if model.startswith("HybridVAE") else APHYNITY)(system, **setting.options)
    return made, made.guide()


def taught(
    model: Any, guide: Any, tasks: Tasks, setting: Setting, seed: int, fast: bool = False
) -> Fit:
    """Train a program in place, and refine its weights if the setting says so; ``fast`` does a few steps only."""
    steps = 3 if fast else setting.steps
    fit = meta_train(
        model,
        guide,
        tasks,
        num_steps=steps,
        batch_size=4 if fast else setting.batch_size,
        learning_rate=setting.learning_rate,
        seed=seed,
        curriculum=setting.curriculum,
        segments_per_shot=setting.segments,
        average_last=setting.average,
        progress=False,
        penalty_weights={"projection": Ramp(setting.correction, power=2)}
        if setting.correction
        else None,
    )
    if setting.sharpening:
        sharpened(model, guide, tasks, setting.sharpening, seed, fast)
    return fit


def sharpened(
    model: Any, guide: Any, tasks: Tasks, end: Sharpening, seed: int, fast: bool = False
) -> None:
    """Refine the weights of a trained program in place."""
    sharpen(
        model,
        guide,
        tasks,
        steps=1 if fast else end.steps,
        batch_size=4 if fast else end.batch_size,
        reading=end.reading,
        memory=end.memory,
        width=end.width,
        misread=end.misread,
        seed=seed,
        progress=False,
    )
