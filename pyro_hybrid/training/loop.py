"""The loop of meta_train: steps, what may go wrong in them, and how it goes on after an end."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import pyro
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.segments import select_segments, to_segments, truncate
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.dynamics.failures import SolverError
from pyro_hybrid.dynamics.modes import nan_on_failure
from pyro_hybrid.dynamics.rk4 import seconds_compiling
from pyro_hybrid.training.checkpoint import Checkpoints, Fit, Parameters, parameters, put_back
from pyro_hybrid.training.guards import Ending, Lost, Terms, seeded
from pyro_hybrid.training.step_error import step_error
from pyro_hybrid.training.storage import Stored
from pyro_hybrid.training.svi import SVI

__all__ = ["Length", "Loop", "Plan", "TrainingError"]

Length = int | None | tuple[int | None, int]
Plan = dict[float, Length]
_log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training that could not go on; the model has been put back to its last good state."""


def _shortened(episode: Episode, length: Length) -> Episode:
    steps, horizon = length if isinstance(length, tuple) else (length, None)
    if horizon is not None:
        episode = episode.map_shots(lambda shots: truncate(shots, horizon))
    return episode.map_shots(lambda shots: to_segments(shots, steps))


@dataclass
class Loop:
    """What meta_train was asked for, and how far it is."""

    svi: SVI
    tasks: Tasks
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    plan: Plan
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
    folder: Checkpoints | None = None

    def run(self, progress: bool, stored: Stored | None = None) -> Fit:
        """All steps, or those that are left after a checkpoint."""
        self.fit, self.norm, self.run_of_skips, self.cause = Fit(), 0.0, 0, ""
        self.good, self.since = self._state(), 0
        self.best: tuple[float, Parameters] = math.inf, {}
        self.mean: list[Tensor] = []
        self.came = torch.zeros(len(self.tasks), dtype=torch.long)
        self.averaged, self.start = 0, 0
        if stored:
            self._resume(stored)
        if stored and stored.about["finished"]:
            return self.fit
        self.since_when = time.perf_counter() - self.fit.seconds
        self.compiled = seconds_compiling() - self.fit.seconds_compiling
        bar = tqdm(
            range(self.start, self.steps),
            desc="meta-training",
            unit="step",
            disable=not progress,
            dynamic_ncols=True,
            initial=self.start,
            total=self.steps,
        )
        self.svi.model.train()
        with Ending(self.folder is not None) as ending:
            try:
                self._steps(bar, ending)
            finally:
                self.svi.model.eval()
                bar.close()
            self._finish()
            ending.happen()  # who asked during the last step
        return self.fit

    def _finish(self) -> None:
        if self.averaged and not self.fit.stopped_early and self.patience is None:
            with torch.no_grad():
                for parameter, mean in zip(self.svi.parameters(), self.mean, strict=True):
                    parameter.copy_(mean)
        self._measure_steps()
        self._name_the_hopeless()
        self._save(len(self.fit.loss), finished=True)

    def _steps(self, bar: tqdm, ending: Ending) -> None:
        batches = self.tasks.numbered_batches(self.batch_size, self.seed, self.start)
        for step in bar:
            self._step(step, *next(batches))
            if step >= (1.0 - self.average) * self.steps:
                self._average()
            if step % 20 == 0 or step == self.steps - 1:
                bar.set_postfix_str(self._summary())
            if self.callback:
                self.callback(step, self.fit)
            if self._look(step):
                break
            if step == self.steps - 1:
                continue
            if ending.asked or (step + 1) % self.every == 0:
                self._save(step + 1)
            if ending.asked:
                bar.close()
                _log.warning(
                    "Stopped after step %d of %d, which is saved in %s. The same call with resume=True goes "
                    "on from there.",
                    step + 1,
                    self.steps,
                    self.folder and self.folder.folder,
                )
                ending.happen()

    def _save(self, done: int, finished: bool = False) -> None:
        self.fit.seconds = time.perf_counter() - self.since_when
        self.fit.seconds_compiling = seconds_compiling() - self.compiled
        if self.folder:
            value, best = self.best
            state = {
                "fit": asdict(self.fit),
                "optimizer": self.svi.optimizer.state_dict(),
                "good": self.good,
                "best": best,
                "mean": self.mean,
                "came": self.came,
                "numbers": [
                    self.norm,
                    self.run_of_skips,
                    self.since,
                    self.averaged,
                    value,
                    self.cause,
                ],
            }
            now = self.fit.held_out[-1] if self.fit.held_out else (-1, math.inf)
            self.folder.save(
                done,
                self.svi.model,
                self.svi.guide,
                {"fit": state["fit"]} if finished else state,
                finished=finished,
                held_out=now[1] if now[0] == done - 1 else math.inf,
            )

    def _resume(self, stored: Stored) -> None:
        """Everything as it was after so many steps."""
        put_back(self.svi.model, self.svi.guide, stored.weights, stored.about)
        self.fit = Fit(**stored.state["fit"])
        if not stored.about["finished"]:
            self.svi.optimizer.load_state_dict(stored.state["optimizer"])
            self.good, best = stored.state["good"], stored.state["best"]
            self.mean = [mean.to(self.device) for mean in stored.state["mean"]]
            self.came = stored.state["came"]
            self.norm, self.run_of_skips, self.since, self.averaged, value, self.cause = (
                stored.state["numbers"]
            )
            self.best = value, best
        self.start = stored.about["step"]

    def _step(self, step: int, rows: Tensor, episode: Episode) -> None:
        progress = step / self.steps
        episode = _shortened(
            episode.to(self.device), self.plan[max(f for f in self.plan if f <= progress)]
        )
        rise = min(1.0, (step + 1) / (0.05 * self.steps))
        for group in self.svi.optimizer.param_groups:
            group["lr"] = (
                self.learning_rate * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            )
        weight = 1.0 if progress >= self.warmup else (progress + 1 / self.steps) / self.warmup
        self.came[rows] += 1
        loss, terms = self._evaluate(step, rows, episode, weight)
        if not math.isfinite(loss):
            loss, terms = self._without_the_lost(step, rows, episode, weight, loss, terms)
        norm = self._clip() if math.isfinite(loss) else math.nan
        if not math.isfinite(norm):
            return self._skip(step, loss)
        if step % 50 == 0:
            self.good = self._state()  # before the step: that of a finite loss
        self.svi.optimizer.step()
        self.run_of_skips, size = 0, self.episode.query.shape[0]
        self.fit.loss.append(loss / size)
        log_likelihood = terms.log_likelihood / self.svi.num_particles
        self.fit.log_likelihood.append(log_likelihood / size)
        self.fit.kl.append((loss + log_likelihood) / size)  # and factors such as a penalty

    def _evaluate(
        self, step: int, rows: Tensor, episode: Episode, weight: float, kept: Tensor | None = None
    ) -> tuple[float, Terms]:
        """The loss, its gradients left on the parameters, and what it consists of."""
        with self._drawn(step, episode) as (sampled, share):
            self.episode = sampled if kept is None else sampled.select_tasks(kept)
            self.rows = rows if kept is None else rows[kept]
            with Terms(weight, 1.0 / share, self.episode.query.shape[1]) as terms:
                return self._loss(self.episode, checked=step == 0), terms

    def _without_the_lost(
        self, step: int, rows: Tensor, episode: Episode, weight: float, loss: float, terms: Terms
    ) -> tuple[float, Terms]:
        """The same again without the tasks whose densities aren't finite, if there are others."""
        with (
            self._drawn(step, episode) as (sampled, _),
            Lost(sampled.query.shape[0]) as found,
            nan_on_failure(),
            pyro.validation_enabled(False),
            contextlib.suppress(SolverError, ValueError, torch.linalg.LinAlgError),
        ):
            self.svi.evaluate_loss(sampled)
        lost = found.lost.cpu()
        if not lost.any():
            return loss, terms
        for row in rows[lost].tolist():
            self.fit.left_out[row] = self.fit.left_out.get(row, 0) + 1
        kept = (~lost).nonzero().squeeze(-1)
        return self._evaluate(step, rows, episode, weight, kept) if len(kept) else (loss, terms)

    def _name_the_hopeless(self) -> None:
        hopeless = [
            row for row, times in sorted(self.fit.left_out.items()) if times == self.came[row]
        ]
        if hopeless:
            _log.warning(
                "Nothing was learned from %d of %d tasks, which failed whenever they came: %s%s. The last "
                "failure: %s. Look at one with tasks[%d:%d].",
                len(hopeless),
                len(self.tasks),
                ", ".join(map(str, hopeless[:10])),
                ", ..." if len(hopeless) > 10 else "",
                self.cause or "a loss that isn't finite",
                hopeless[0],
                hopeless[0] + 1,
            )

    @contextlib.contextmanager
    def _drawn(self, step: int, episode: Episode) -> Iterator[tuple[Episode, float]]:
        """Inside, the random numbers of this step; what is looked at of its episode, and its share."""
        with seeded(self.seed, step):
            yield self._sample(episode)

    def _sample(self, episode: Episode) -> tuple[Episode, float]:
        """Some of its segments, and their share."""
        number, shots = episode.query.shape[1], (episode.query.uncut or episode.query).shape[1]
        if self.segments is None or self.segments * shots >= number:
            return episode, 1.0
        chosen = torch.randperm(number)[: self.segments * shots]
        sample = replace(episode, query=select_segments(episode.query, chosen))
        return sample, self.segments * shots / number

    def _loss(self, episode: Episode, *, checked: bool) -> float:
        """The loss, its gradients left on the parameters; NaN where the numbers are wrong, and not the program."""
        try:
            with pyro.validation_enabled(checked):
                return float(self.svi.backward(episode))
        except (SolverError, ValueError, torch.linalg.LinAlgError) as error:
            failure: Exception = error
        if isinstance(failure, ValueError) and (
            not checked or math.isfinite(self._loss(episode, checked=False))
        ):
            raise failure
        self.cause = _in_the_data(str(failure).partition("\n")[0], self.rows)
        return math.nan

    @torch.no_grad()
    def _average(self) -> None:
        parameters: list[Tensor] = [*self.svi.parameters()]
        self.averaged += 1
        if self.averaged == 1:
            self.mean = [p.clone() for p in parameters]
        torch._foreach_lerp_(self.mean, parameters, 1.0 / self.averaged)

    def _clip(self) -> float:
        norm = float(
            nn.utils.clip_grad_norm_(self.svi.parameters(), self.clip * self.norm or math.inf)
        )
        if math.isfinite(norm):
            self.norm = (
                norm
                if self.norm == 0.0
                else 0.95 * self.norm + 0.05 * min(norm, self.clip * self.norm)
            )
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
                "with shorter segments (curriculum={0.0: 5, ...}), or bound the neural term."
            )

    def _measure_steps(self) -> None:
        """Fixed steps are guarded: whoever chose them too long should know."""
        with seeded(self.seed, -2), pyro.validation_enabled(False):
            try:
                self.fit.step_error = step_error(self.svi.model, self.episode).typical
            except (
                SolverError,
                NotImplementedError,
            ):  # it diverged, or observes what has no standard deviation
                self.fit.step_error = math.nan
        if self.fit.step_error > 0.1:
            _log.warning(
                "Fixed steps are too long: halving them moves predictions by %.2g standard deviations of the "
                "noise. Raise substeps, or shorten step, in solve(...); see pyro_hybrid.step_error.",
                self.fit.step_error,
            )

    def _look(self, step: int) -> bool:
        if self.held_out is None or (step + 1) % self.every and step != self.steps - 1:
            return False
        with seeded(self.seed, -1), pyro.validation_enabled(False):
            try:
                value = self.svi.evaluate_loss(self.held_out.episode().to(self.device)) / len(
                    self.held_out
                )
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

        loss, likelihood, kl = (
            recent(x) for x in (self.fit.loss, self.fit.log_likelihood, self.fit.kl)
        )
        text = f"loss {loss:.4g}, log p {likelihood:.4g}, KL {kl:.3g}"
        return text + (f", {self.fit.skipped} skipped" if self.fit.skipped else "")

    def _state(self) -> Parameters:
        return {
            name: value.detach().clone()
            for name, value in parameters(self.svi.model, self.svi.guide).items()
        }

    def _restore(self, state: Parameters) -> None:
        put_back(self.svi.model, self.svi.guide, state, {})


def _in_the_data(message: str, rows: Tensor) -> str:
    """What names a task by its place in the batch, with its number in the data set instead."""
    return re.sub(
        r"in task (\d+) \(batch index \([^)]*\)\)",
        lambda found: f"in task {rows[int(found[1])]}",
        message,
    )
