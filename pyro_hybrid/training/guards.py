"""Guards of a training step: random numbers, signals, weights of the loss, tasks that fail, long gradients."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import nn

from pyro_hybrid.programs.sites import is_random

__all__ = [
    "DeferredSignals",
    "ElboTerms",
    "NonFiniteTasks",
    "clip_gradients",
    "penalty_weights_restored",
    "seeded",
    "set_penalty_weights",
]


@contextlib.contextmanager
def seeded(seed: int, step: int) -> Iterator[None]:
    """Draw random numbers of this step of this seed, and leave the global state as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed((seed * 1_000_003 + step + 1) % 2**63)
        yield


class DeferredSignals:
    """Delay Ctrl-C and SIGTERM inside this context until :meth:`deliver`; a second one acts at once.

    Arguments:
        enabled: whether to delay signals at all; only the main thread can.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled and threading.current_thread() is threading.main_thread()
        self.received: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> DeferredSignals:
        for number in (signal.SIGINT, signal.SIGTERM) if self.enabled else ():
            if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGINT is under nohup
                self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore_handlers()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._handlers = {}

    def deliver(self) -> None:
        """Raise the signal that was received, if any was."""
        if self.received is not None:
            signal.raise_signal(self.received)


class NonFiniteTasks(Messenger):
    """Find the tasks whose draws or densities aren't finite.

    Attributes:
        failed: True for such a task.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.failed = torch.zeros(num_tasks, dtype=torch.bool)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or not hasattr(msg["fn"], "log_prob"):
            return
        log_prob = msg["fn"].log_prob(msg["value"])
        if log_prob.shape[-1:] == self.failed.shape:
            is_finite = torch.isfinite(log_prob).reshape(-1, len(self.failed)).all(0)
            self.failed |= ~is_finite.cpu()


class ElboTerms(Messenger):
    """Weight the terms of an ELBO, and add up the log-likelihood.

    Arguments:
        kl_weight: the factor of sites that aren't observed.
        shot_weight: the factor of sites that belong to shots, where some of the shots are looked at.
        num_shots: number of shots of the episode.
    """

    def __init__(self, kl_weight: float, shot_weight: float, num_shots: int) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        self.shot_weight = shot_weight
        self.num_shots = num_shots
        self.log_likelihood = 0.0

    def _site_weight(self, msg: dict[str, Any]) -> float:
        """Return the factor of a site: one of shots has their axis and others; one of tasks has its components alone."""
        event_shape = msg["fn"].event_shape
        has_shots = event_shape[:1] == (self.num_shots,)
        is_of_shots = has_shots and (len(event_shape) > 1 or msg["is_observed"])
        return self.shot_weight if is_of_shots else 1.0

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not is_random(msg):
            return
        weight = self._site_weight(msg) * (1.0 if msg["is_observed"] else self.kl_weight)
        if weight != 1.0:
            msg["scale"] = msg["scale"] * weight

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"] or not is_random(msg):
            return
        with torch.no_grad():
            log_prob = msg["fn"].log_prob(msg["value"])
            mask = True if msg["mask"] is None else msg["mask"]
            counted = torch.as_tensor(mask, device=log_prob.device)
            log_prob = torch.where(counted, log_prob, 0.0)
            self.log_likelihood += self._site_weight(msg) * float(log_prob.sum())


def clip_gradients(
    parameters: Iterable[nn.Parameter], clip: float, usual: float
) -> tuple[float, float]:
    """Shorten gradients that are longer than ``clip`` times their usual norm.

    Arguments:
        parameters: whose gradients.
        clip: the factor.
        usual: the running mean of the norm; 0 before the first step, whose gradient isn't shortened.

    Returns:
        The norm before, and the running mean with it, in which an outlier counts no more than it was shortened to.
    """
    longest = clip * usual if usual > 0.0 else math.inf
    norm = float(nn.utils.clip_grad_norm_(parameters, longest))
    if not math.isfinite(norm):
        return norm, usual
    return norm, norm if usual == 0.0 else 0.95 * usual + 0.05 * min(norm, longest)


def set_penalty_weights(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Give a model the weights of its penalties, by name."""
    if weights:
        own: Any = model.penalty_weights
        own.update(weights)


@contextlib.contextmanager
def penalty_weights_restored(model: nn.Module) -> Iterator[None]:
    """Put a model's penalty weights back to what they were before this block."""
    own: Any = getattr(model, "penalty_weights", {})
    before = dict(own)
    try:
        yield
    finally:
        own.clear()
        own.update(before)
