"""What meta_train watches while a step runs: random numbers, terms of the loss, tasks that fail, a wish to end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from pyro.poutine.messenger import Messenger

from pyro_hybrid.programs.sites import is_random

__all__ = ["Ending", "Lost", "Terms", "seeded"]


@contextlib.contextmanager
def seeded(seed: int, step: int) -> Iterator[None]:
    """Random numbers of their own for this step of this seed; the global state is left as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed((seed * 1_000_003 + step + 1) % 2**63)
        yield


class Ending:
    """Inside, Ctrl-C and SIGTERM wait for the end of a step. Asked a second time, they don't."""

    def __init__(self, heeded: bool) -> None:
        self.heeded = heeded and threading.current_thread() is threading.main_thread()
        self.asked: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Ending:
        if self.heeded:
            self.before = {
                number: signal.signal(number, self._note)
                for number in (signal.SIGINT, signal.SIGTERM)
                if signal.getsignal(number) is not signal.SIG_IGN
            }  # as SIGINT is under nohup
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self.before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        self.__exit__()

    def happen(self) -> None:
        """What would have happened at once."""
        if self.asked is not None:
            signal.raise_signal(self.asked)


class Lost(Messenger):
    """Finds the tasks whose densities, or the draws themselves, aren't finite."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.lost = torch.zeros(tasks, dtype=torch.bool)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and hasattr(msg["fn"], "log_prob"):
            value = msg["fn"].log_prob(msg["value"])
            if value.shape[-1:] == self.lost.shape:
                self.lost |= ~torch.isfinite(value).reshape(-1, len(self.lost)).all(0).cpu()


class Terms(Messenger):
    """Weighs the KL (sites that aren't observed) and whatever belongs to shots; adds up the log-likelihood."""

    def __init__(self, weight: float, by_shot: float, shots: int) -> None:
        super().__init__()
        self.weight, self.by_shot, self.shots, self.log_likelihood = weight, by_shot, shots, 0.0

    def _scale(self, msg: dict[str, Any]) -> float:
        """A shot's site has an axis of shots, among others unless it is observed; a task's has its components alone."""
        event = msg["fn"].event_shape
        return (
            self.by_shot
            if event[:1] == (self.shots,) and (len(event) > 1 or msg["is_observed"])
            else 1.0
        )

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
