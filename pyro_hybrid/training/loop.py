"""The loop of meta_train: steps, looks at held-out tasks, averages, checkpoints, and what is reported at the end."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyro
import torch
from torch import nn
from tqdm.auto import tqdm

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.dynamics.failures import SolverError
from pyro_hybrid.dynamics.rk4 import seconds_compiling
from pyro_hybrid.training.batch import Batch, BatchLoss, Evaluation, shortened
from pyro_hybrid.training.checkpoint import Checkpoints
from pyro_hybrid.training.fit import Fit
from pyro_hybrid.training.guards import (
    DeferredSignals,
    clip_gradients,
    penalty_weights_restored,
    seeded,
    set_penalty_weights,
)
from pyro_hybrid.training.named_tensors import (
    Parameters,
    copied,
    model_tensors,
    set_model_tensors,
    trained_names,
)
from pyro_hybrid.training.schedule import StepValues
from pyro_hybrid.training.settings import Settings
from pyro_hybrid.training.state import LoopState
from pyro_hybrid.training.step_error import step_error
from pyro_hybrid.training.svi import SVI

__all__ = ["Loop", "TrainingError"]

_log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """A training that could not go on; the model is back at its last good state, or its state is in a checkpoint."""


class _Stopwatch:
    """The seconds of a training, with those before it was resumed."""

    def __init__(self, fit: Fit) -> None:
        self.start = time.perf_counter() - fit.seconds
        self.start_compiling = seconds_compiling() - fit.seconds_compiling

    def write(self, fit: Fit) -> None:
        """Write the seconds until now into a record."""
        fit.seconds = time.perf_counter() - self.start
        fit.seconds_compiling = seconds_compiling() - self.start_compiling


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The loop of a training: it changes ``state``, the model and the optimizer, and nothing else.

    Arguments:
        svi: model, guide, loss and optimizer.
        tasks, held_out: to train on, and to look at.
        settings: the arguments of the training.
        state: where the training stands.
        checkpoints: the folder to write checkpoints into, or None.
        callback: called after each step with its number and the record so far.
        device: of the model.
        progress: whether to show a progress bar.
    """

    svi: SVI
    tasks: Tasks
    held_out: Tasks | None
    settings: Settings
    state: LoopState
    checkpoints: Checkpoints | None
    callback: Callable[[int, Fit], None] | None
    device: torch.device
    progress: bool

    def run(self, signals: DeferredSignals) -> Fit:
        """Take all steps, or those that are left after a checkpoint; stop after a step in which a signal came."""
        num_steps = self.settings.schedule.num_steps
        stopwatch = _Stopwatch(self.state.fit)
        bar = tqdm(
            range(self.state.counters.step, num_steps),
            desc="meta-training",
            unit="step",
            disable=not self.progress,
            dynamic_ncols=True,
            initial=self.state.counters.step,
            total=num_steps,
        )
        self.svi.model.train()
        with penalty_weights_restored(self.svi.model):
            try:
                episode = self._steps(bar, signals, stopwatch)
            finally:
                self.svi.model.eval()
                bar.close()
        if episode is not None:
            self._finish(episode, stopwatch)
        return self.state.fit

    def _steps(self, bar: tqdm, signals: DeferredSignals, stopwatch: _Stopwatch) -> Episode | None:
        """Take the steps; return the last batch, or None if a signal ended them."""
        settings = self.settings
        last_step = settings.schedule.num_steps - 1
        start = self.state.counters.step
        batches = self.tasks.numbered_batches(settings.batch_size, settings.seed, start)
        batch_loss = BatchLoss(self.svi, settings.seed, settings.segments_per_shot)
        trained = trained_names(self.svi.model, self.svi.guide)
        episode: Episode | None = None
        for step in bar:
            numbers, drawn = next(batches)
            values = settings.schedule.at(step)
            set_penalty_weights(self.svi.model, values.penalty_weights)
            batch = Batch(step, numbers, shortened(drawn.to(self.device), values.length))
            episode = self._step(batch, values, batch_loss)
            if values.is_averaged:
                self._average(trained)
            if step % 20 == 0 or step == last_step:
                bar.set_postfix_str(_summary(self.state.fit))
            if self.callback:
                self.callback(step, self.state.fit)
            if self._look(step, is_last=step == last_step):
                return episode
            is_interrupted = signals.received is not None and step < last_step
            if step < last_step and (is_interrupted or (step + 1) % settings.eval_every == 0):
                self._save(stopwatch, finished=False)
            if is_interrupted:
                return None
        return episode

    def _step(self, batch: Batch, values: StepValues, batch_loss: BatchLoss) -> Episode:
        """Take one step, or skip it if loss or gradient aren't finite; return what was looked at."""
        state = self.state
        for group in self.svi.optimizer.param_groups:
            group["lr"] = values.learning_rate
        state.task_visits[batch.tasks] += 1
        evaluation = batch_loss(batch, values.kl_weight)
        self._count_failures(evaluation)
        norm = math.nan
        if math.isfinite(evaluation.loss):
            norm, state.counters.gradient_norm = clip_gradients(
                self.svi.parameters(), self.settings.clip, state.counters.gradient_norm
            )
        if math.isfinite(norm):
            if batch.step % 50 == 0:
                state.last_good = self._tensors()  # those before the step, whose loss is finite
            self.svi.optimizer.step()
            self._record(evaluation)
        else:
            self._skip(batch.step, evaluation.loss)
        state.counters.step = batch.step + 1
        return evaluation.episode

    def _count_failures(self, evaluation: Evaluation) -> None:
        counts = self.state.fit.skipped_tasks
        for number in evaluation.failed_tasks:
            counts[number] = counts.get(number, 0) + 1
        if evaluation.failure:
            self.state.counters.last_failure = evaluation.failure

    def _record(self, evaluation: Evaluation) -> None:
        size = evaluation.episode.query.shape[0]
        fit = self.state.fit
        fit.loss.append(evaluation.loss / size)
        fit.log_likelihood.append(evaluation.log_likelihood / size)
        # The rest of the loss: the KL divergence, and factors such as a penalty.
        fit.kl.append((evaluation.loss + evaluation.log_likelihood) / size)
        self.state.counters.consecutive_skips = 0

    def _skip(self, step: int, loss: float) -> None:
        fit = self.state.fit
        counters = self.state.counters
        fit.skipped += 1
        counters.consecutive_skips += 1
        for history in (fit.loss, fit.log_likelihood, fit.kl):
            history.append(math.nan)
        if counters.consecutive_skips >= self.settings.max_skips:
            self._set_tensors(self.state.last_good)
            raise TrainingError(
                f"expected a finite loss and gradient; got none in {counters.consecutive_skips} steps in a row up to "
                f"step {step} (the last loss was {loss}). {counters.last_failure} The parameters are back at the last "
                "good state. Lower learning_rate, start with shorter segments (curriculum={0.0: 5, ...}), or bound "
                "the neural term."
            )

    @torch.no_grad()
    def _average(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Move the mean of the parameters towards their values now."""
        state = self.state
        state.counters.num_averaged += 1
        if state.counters.num_averaged == 1:
            state.average = copied(parameters)
        means = [state.average[name] for name in parameters]
        torch._foreach_lerp_(means, list(parameters.values()), 1.0 / state.counters.num_averaged)

    def _look(self, step: int, *, is_last: bool) -> bool:
        """Look at the held-out tasks if it is time, and tell whether to stop early."""
        if self.held_out is None or ((step + 1) % self.settings.eval_every and not is_last):
            return False
        value = self._held_out_loss(self.held_out)
        state = self.state
        state.fit.held_out.append((step, value))
        if self.settings.patience is None:
            return False
        counters = state.counters
        if value < counters.best_loss:
            counters.best_loss = value
            counters.looks_without_improvement = 0
            state.best = self._tensors()
        else:
            counters.looks_without_improvement += 1
        state.fit.stopped_early = counters.looks_without_improvement >= self.settings.patience
        if state.fit.stopped_early or is_last:
            self._set_tensors(state.best or state.last_good)
        return state.fit.stopped_early

    def _held_out_loss(self, held_out: Tasks) -> float:
        """Return the loss per task; infinity where the solver fails."""
        with seeded(self.settings.seed, -1), pyro.validation_enabled(False):
            try:
                loss = self.svi.evaluate_loss(held_out.episode().to(self.device))
            except SolverError:
                return math.inf
        return loss / len(held_out)

    def _finish(self, episode: Episode, stopwatch: _Stopwatch) -> None:
        """Put the averaged parameters into the model, measure the solver's steps, report, and save."""
        state = self.state
        has_best = state.fit.stopped_early or self.settings.patience is not None
        if state.counters.num_averaged and not has_best:
            with torch.no_grad():
                for name, parameter in trained_names(self.svi.model, self.svi.guide).items():
                    parameter.copy_(state.average[name])
        self._measure_step_error(episode)
        self._warn_about_hopeless_tasks()
        self._save(stopwatch, finished=True)

    def _measure_step_error(self, episode: Episode) -> None:
        """Warn if the fixed solver step is too long for the noise."""
        fit = self.state.fit
        with seeded(self.settings.seed, -2), pyro.validation_enabled(False):
            try:
                fit.step_error = step_error(self.svi.model, episode).typical
            except (SolverError, NotImplementedError):  # diverged, or without a standard deviation
                fit.step_error = math.nan
        if fit.step_error > 0.1:
            _log.warning(
                "Fixed steps are too long: halving them moves predictions by %.2g standard deviations of the "
                "noise. Raise substeps, or shorten step, in solve(...); see pyro_hybrid.step_error.",
                fit.step_error,
            )

    def _warn_about_hopeless_tasks(self) -> None:
        """Name the tasks that failed whenever they were drawn."""
        counts = self.state.fit.skipped_tasks
        visits = self.state.task_visits
        hopeless = [number for number in sorted(counts) if counts[number] == int(visits[number])]
        if not hopeless:
            return
        _log.warning(
            "Nothing was learned from %d of %d tasks, which failed whenever they were drawn: %s%s. The last "
            "failure: %s. Look at one with tasks[%d:%d].",
            len(hopeless),
            len(self.tasks),
            ", ".join(map(str, hopeless[:10])),
            ", ..." if len(hopeless) > 10 else "",
            self.state.counters.last_failure or "a loss that isn't finite",
            hopeless[0],
            hopeless[0] + 1,
        )

    def _save(self, stopwatch: _Stopwatch, *, finished: bool) -> None:
        state = self.state
        stopwatch.write(state.fit)
        if self.checkpoints is None:
            return
        state.capture(self.svi.model, self.svi.guide, self.svi.optimizer)
        looked_at, value = state.fit.held_out[-1] if state.fit.held_out else (-1, math.inf)
        self.checkpoints.save(
            state,
            self.svi.model,
            self.svi.guide,
            finished=finished,
            held_out=value if looked_at == state.counters.step - 1 else math.inf,
        )

    def _tensors(self) -> Parameters:
        return copied(model_tensors(self.svi.model, self.svi.guide))

    def _set_tensors(self, tensors: Parameters) -> None:
        set_model_tensors(self.svi.model, self.svi.guide, tensors)


def _summary(fit: Fit) -> str:
    """Describe the last steps for the progress bar."""

    def recent(values: list[float]) -> float:
        finite = [value for value in values[-20:] if math.isfinite(value)]
        return sum(finite) / max(len(finite), 1)

    text = f"loss {recent(fit.loss):.4g}, log p {recent(fit.log_likelihood):.4g}, KL {recent(fit.kl):.3g}"
    return text + (f", {fit.skipped} skipped" if fit.skipped else "")
