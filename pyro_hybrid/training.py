"""meta_train -> Fit: the one loop, around ph.SVI."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer import SVI as PyroSVI
from pyro.infer import TraceMeanField_ELBO
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from tqdm.auto import tqdm

from ._checks import require
from .accuracy import step_error
from .dynamics import SolverError
from .encoders import SetEncoder, reading_once
from .linearise import is_random
from .module import local_parameters, require_local
from .stepping import seconds_compiling
from .tasks import Episode, Tasks

__all__ = ["SVI", "Fit", "TrainingError", "meta_train"]

Length = int | None | tuple[int | None, int]
Weights = list[dict[str, Any]]
_log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training that could not go on; the model has been put back to its last good state."""


class SVI(PyroSVI):
    """A ``pyro.infer.SVI`` for models that own their parameters.

    Underneath, the ELBO is an ``nn.Module`` over model and guide, stepped by one torch optimizer.

    Arguments:
        model, guide: each an ``nn.Module``, such as a HybridModel and an AmortizedGuide.
        optim: a torch optimizer over their parameters, or a ``pyro.optim`` one, whose class and options are taken.
        loss: a Pyro ELBO.
    """

    def __init__(self, model: nn.Module, guide: nn.Module, optim: torch.optim.Optimizer | PyroOptim,
                 loss: Any = None) -> None:
        require_local(model=model, guide=guide)
        self.model, self.guide = model, guide
        self.elbo = (TraceMeanField_ELBO() if loss is None else loss)(model, guide)
        self.optim = _torchs(optim, self.parameters()) if isinstance(optim, PyroOptim) else optim

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter of model and guide, once."""
        return [p for p in self.elbo.parameters() if p.requires_grad]

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, with its gradients left on the parameters."""
        self.optim.zero_grad(set_to_none=True)
        with local_parameters(), reading_once():
            loss = self.elbo(*args, **kwargs)
            if loss.requires_grad:
                loss.backward()
        return loss.detach()

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One gradient step; returns the loss."""
        loss = self.backward(*args, **kwargs)
        self.optim.step()
        return float(loss)

    @torch.no_grad()
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss, with no step taken."""
        with local_parameters(), reading_once():
            return float(self.elbo(*args, **kwargs))


def _torchs(optim: Any, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimizer that a ``pyro.optim`` one would make for each parameter, for all of them."""
    require(type(optim) is PyroOptim and isinstance(optim.pt_optim_args, dict) and not optim.pt_clip_args,
            "a pyro.optim optimizer with a dictionary of options only", type(optim).__name__ + " with more",
            "Pass a torch optimizer with a schedule of torch's beside it; meta_train clips and schedules itself.")
    return optim.pt_optim_constructor(parameters, **optim.pt_optim_args)


@dataclass
class Fit:
    """What came out of a training: a history of every step, per task, and of every look at the held-out tasks.

    ``step_error`` is the ``typical`` one of :func:`~pyro_hybrid.step_error` on the last batch; NaN where there is none.
    """

    loss: list[float] = field(default_factory=list)
    log_likelihood: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    skipped: int = 0
    seconds: float = 0.0
    seconds_compiling: float = 0.0
    step_error: float = 0.0
    stopped_early: bool = False


def meta_train(model: nn.Module, guide: nn.Module, tasks: Tasks, *, steps: int = 1000, batch_size: int = 32,
               learning_rate: float = 3e-3, seed: int = 0, curriculum: Mapping[float, Length] | None = None,
               segments: int | None = None, warmup: float = 0.0, clip: float = 4.0, average: float = 0.0,
               held_out: Tasks | None = None, every: int = 100, patience: int | None = None, loss: Any = None,
               max_skips: int = 20, device: torch.device | str | None = None, progress: bool = True,
               callback: Callable[[int, Fit], None] | None = None) -> Fit:
    """Train model and guide over many tasks; same seed, same result.

    Arguments:
        model, guide: a Pyro program and its guide, changed in place.
        tasks: the data set. Who is support and who query is drawn anew at every step.
        steps, batch_size: number of gradient steps, and tasks in each.
        learning_rate: its peak; it rises over the first 5% of the steps and then follows a cosine down to a fiftieth.
        seed: of batches and samples. The global random state is left as it was.
        curriculum: ``{fraction of the steps: length}``: from there on, trajectories are cut into segments of so many
            steps (None: not cut); of ``(length, horizon)``, only their first ``horizon`` steps are used. Default:
            segments of a seventh, then of two sevenths, then the whole.
        segments: look at so many segments of each query shot at a step, drawn anew, instead of at all of them. Their
            likelihood is scaled up, so that the loss stays right on average: steps that cost less and inform nearly as
            well, since the segments of a shot share its task's latents. Not with computed evidence in the guide.
        warmup: fraction of the steps over which the KL's weight rises from 0 to 1.
        clip: gradients longer than so many times their running mean are shortened.
        average: the parameters' mean over so large a last fraction of the steps is what remains; it damps the noise of
            directions that the data determine weakly. 0 for the last step's.
        held_out: tasks on which the ELBO is looked at ``every`` so many steps.
        patience: stop, and go back to the best state, after so many looks without improvement.
        loss: a Pyro ELBO; default ``TraceMeanField_ELBO()``.
        max_skips: so many non-finite steps in a row end the training, back at the last good state.
        device: where to train.
        progress: show a progress bar.
        callback: called with the step's number and the fit so far.
    """
    require(len(tasks) > 0 and steps >= 1 and batch_size >= 1, "steps, batch_size and tasks of 1 or more",
            f"{steps}, {batch_size}, {len(tasks)}", "Check the arguments.")
    require(patience is None or held_out is not None, "held_out tasks for early stopping", "none",
            "Pass held_out=tasks, or patience=None.")
    require(segments is None or segments >= 1 and getattr(guide, "evidence", None) is None,
            "segments of 1 or more, and a guide that reads by its encoder", f"{segments} and {type(guide).__name__}",
            "Leave segments=None: computed evidence needs all that was observed.")
    device = torch.device(device) if device is not None else tasks.values.device
    model.to(device), guide.to(device)
    _standardise(model, guide, tasks)
    svi = SVI(model, guide, _adam(model, guide, learning_rate, device), loss)
    return _Loop(svi, tasks, steps, batch_size, learning_rate, seed, _plan(curriculum, tasks), segments, warmup, clip,
                 average, held_out, every, patience, max_skips, device, callback).run(progress)


def _adam(model: nn.Module, guide: nn.Module, learning_rate: float, device: torch.device) -> torch.optim.Adam:
    parameters = {id(p): p for p in (*model.parameters(), *guide.parameters())}
    fused = device.type in ("cpu", "cuda")
    return torch.optim.Adam(parameters.values(), lr=learning_rate, betas=(0.9, 0.99), fused=fused)


def _standardise(model: nn.Module, guide: nn.Module, tasks: Tasks) -> None:
    for module in {*model.modules(), *guide.modules()}:
        if isinstance(module, SetEncoder):
            module.standardise(tasks.values.to(module.centre.device), tasks.seen)


def _plan(curriculum: Mapping[float, Length] | None, tasks: Tasks) -> dict[float, Length]:
    if curriculum is not None:
        require(0.0 in curriculum, "a curriculum that says what to do from 0.0 on", dict(curriculum), "Add {0.0: ...}.")
        return dict(sorted(curriculum.items()))
    last = len(tasks.times) - 1
    if not tasks.timed or last < 14:
        return {0.0: None}
    return {0.0: last // 7, 0.25: 2 * last // 7, 0.5: None}


def _shortened(episode: Episode, length: Length) -> Episode:
    steps, horizon = length if isinstance(length, tuple) else (length, None)
    return (episode if horizon is None else episode.until(horizon)).cut(steps)


@dataclass
class _Loop:
    svi: SVI
    tasks: Tasks
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    plan: dict[float, Length]
    segments: int | None
    warmup: float
    clip: float
    average: float
    held_out: Tasks | None
    every: int
    patience: int | None
    max_skips: int
    device: torch.device
    callback: Callable[[int, Fit], None] | None

    def run(self, progress: bool) -> Fit:
        self.fit, self.norm, self.run_of_skips, self.cause = Fit(), 0.0, 0, ""
        self.good, self.since = self._state(), 0
        self.best: tuple[float, Weights | None] = math.inf, None
        self.mean: list[Tensor] = []
        self.averaged, start, compiled = 0, time.perf_counter(), seconds_compiling()
        bar = tqdm(range(self.steps), desc="meta-training", unit="step", disable=not progress, dynamic_ncols=True)
        self.svi.model.train()
        try:
            self._steps(bar)
        finally:
            self.svi.model.eval()
            bar.close()
        if self.averaged and not self.fit.stopped_early and self.patience is None:
            with torch.no_grad():
                for parameter, mean in zip(self.svi.parameters(), self.mean, strict=True):
                    parameter.copy_(mean)
        self._measure_steps()
        self.fit.seconds = time.perf_counter() - start
        self.fit.seconds_compiling = seconds_compiling() - compiled
        return self.fit

    def _steps(self, bar: tqdm) -> None:
        batches = self.tasks.batches(self.batch_size, self.seed)
        for step in bar:
            self._step(step, next(batches))
            if step >= (1.0 - self.average) * self.steps:
                self._average()
            if step % 20 == 0 or step == self.steps - 1:
                bar.set_postfix_str(self._summary())
            if self.callback:
                self.callback(step, self.fit)
            if self._look(step):
                break

    def _step(self, step: int, episode: Episode) -> None:
        progress = step / self.steps
        episode = _shortened(episode.to(self.device), self.plan[max(f for f in self.plan if f <= progress)])
        rise = min(1.0, (step + 1) / (0.05 * self.steps))
        for group in self.svi.optim.param_groups:
            group["lr"] = self.learning_rate * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        weight = 1.0 if progress >= self.warmup else (progress + 1 / self.steps) / self.warmup
        with _seeded(self.seed, step):
            self.episode, share = self._sample(episode)
            with _Terms(weight, 1.0 / share, self.episode.shape[1]) as terms:
                loss = self._loss(self.episode, checked=step == 0)
        norm = self._clip() if math.isfinite(loss) else math.nan
        if not math.isfinite(norm):
            return self._skip(step, loss)
        if step % 50 == 0:
            self.good = self._state()  # before the step: that of a finite loss
        self.svi.optim.step()
        self.run_of_skips, self.cause, size = 0, "", episode.shape[0]
        self.fit.loss.append(loss / size)
        log_likelihood = terms.log_likelihood / self.svi.elbo.elbo.num_particles
        self.fit.log_likelihood.append(log_likelihood / size)
        self.fit.kl.append((loss + log_likelihood) / size)  # and factors such as a penalty

    def _sample(self, episode: Episode) -> tuple[Episode, float]:
        """Some of its segments, and their share."""
        number, shots = episode.shape[1], (episode.uncut or episode).shape[1]
        if self.segments is None or self.segments * shots >= number:
            return episode, 1.0
        return episode.some(torch.randperm(number)[: self.segments * shots]), self.segments * shots / number

    def _loss(self, episode: Episode, *, checked: bool) -> float:
        """The loss, its gradients left on the parameters; NaN where the numbers are wrong, and not the program."""
        try:
            with pyro.validation_enabled(checked):
                return float(self.svi.backward(episode))
        except (SolverError, ValueError) as error:
            failure = error
        if isinstance(failure, ValueError) and (not checked or math.isfinite(self._loss(episode, checked=False))):
            raise failure
        self.cause = str(failure).partition("\n")[0]
        return math.nan

    @torch.no_grad()
    def _average(self) -> None:
        parameters: list[Tensor] = [*self.svi.parameters()]
        self.averaged += 1
        if self.averaged == 1:
            self.mean = [p.clone() for p in parameters]
        torch._foreach_lerp_(self.mean, parameters, 1.0 / self.averaged)

    def _clip(self) -> float:
        norm = float(nn.utils.clip_grad_norm_(self.svi.parameters(), self.clip * self.norm or math.inf))
        if math.isfinite(norm):
            self.norm = norm if self.norm == 0.0 else 0.95 * self.norm + 0.05 * min(norm, self.clip * self.norm)
        return norm

    def _skip(self, step: int, loss: float) -> None:
        self.fit.skipped += 1
        self.run_of_skips += 1
        for history in (self.fit.loss, self.fit.log_likelihood, self.fit.kl):
            history.append(math.nan)
        if self.run_of_skips >= self.max_skips:
            self._restore(self.good)
            raise TrainingError(
                f"{self.run_of_skips} steps in a row up to step {step} had no finite loss and gradient (the last loss "
                f"was {loss}). {self.cause} The parameters are back at the last good state. Lower learning_rate, start "
                "with shorter segments (curriculum={0.0: 5, ...}), or bound the neural term.")

    def _measure_steps(self) -> None:
        """Fixed steps are guarded: whoever chose them too long should know."""
        with _seeded(self.seed, -2), pyro.validation_enabled(False):
            try:
                self.fit.step_error = step_error(self.svi.model, self.episode).typical
            except (SolverError, NotImplementedError):  # it diverged, or observes what has no standard deviation
                self.fit.step_error = math.nan
        if self.fit.step_error > 0.1:
            _log.warning("Fixed steps are too long: halving them moves predictions by %.2g standard deviations of the "
                         "noise. Raise substeps, or shorten step, in solve(...); see pyro_hybrid.step_error.",
                         self.fit.step_error)

    def _look(self, step: int) -> bool:
        if self.held_out is None or (step + 1) % self.every and step != self.steps - 1:
            return False
        with _seeded(self.seed, -1), pyro.validation_enabled(False):
            try:
                value = self.svi.evaluate_loss(self.held_out.episode().to(self.device)) / len(self.held_out)
            except SolverError:
                value = math.inf
        self.fit.held_out.append((step, value))
        if self.patience is None:
            return False
        self.since = 0 if value < self.best[0] else self.since + 1
        if self.since == 0:
            self.best = value, self._state()
        self.fit.stopped_early = self.since >= self.patience
        if self.fit.stopped_early or step == self.steps - 1:
            self._restore(self.best[1] or self.good)
        return self.fit.stopped_early

    def _summary(self) -> str:
        def recent(values: list[float]) -> float:
            finite = [v for v in values[-20:] if math.isfinite(v)]
            return sum(finite) / max(len(finite), 1)

        loss, likelihood, kl = (recent(x) for x in (self.fit.loss, self.fit.log_likelihood, self.fit.kl))
        text = f"loss {loss:.4g}, log p {likelihood:.4g}, KL {kl:.3g}"
        return text + (f", {self.fit.skipped} skipped" if self.fit.skipped else "")

    def _state(self) -> Weights:
        return [copy.deepcopy(m.state_dict()) for m in (self.svi.model, self.svi.guide)]

    def _restore(self, state: Weights) -> None:
        for module, values in zip((self.svi.model, self.svi.guide), state, strict=True):
            module.load_state_dict(values)


@contextlib.contextmanager
def _seeded(seed: int, step: int) -> Iterator[None]:
    """Random numbers of their own for this step of this seed; the global state is left as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed((seed * 1_000_003 + step + 1) % 2**63)
        yield


class _Terms(Messenger):
    """Weighs the KL (sites that aren't observed) and whatever belongs to shots; adds up the log-likelihood."""

    def __init__(self, weight: float, by_shot: float, shots: int) -> None:
        super().__init__()
        self.weight, self.by_shot, self.shots, self.log_likelihood = weight, by_shot, shots, 0.0

    def _scale(self, msg: dict[str, Any]) -> float:
        """A shot's site has an axis of shots, among others unless it is observed; a task's has its components alone."""
        event = msg["fn"].event_shape
        return self.by_shot if event[:1] == (self.shots,) and (len(event) > 1 or msg["is_observed"]) else 1.0

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not is_random(msg):
            return
        weight = self._scale(msg) * (1.0 if msg["is_observed"] else self.weight)
        if weight != 1.0:
            msg["scale"] = msg["scale"] * weight

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] and is_random(msg):
            with torch.no_grad():
                value = msg["fn"].log_prob(msg["value"])
                mask = True if msg["mask"] is None else msg["mask"]
                value = torch.where(torch.as_tensor(mask, device=value.device), value, 0.0)
                self.log_likelihood += self._scale(msg) * float(value.sum())
