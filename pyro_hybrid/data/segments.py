"""Multiple shooting: trajectories cut into segments, each of which starts at a measured state."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_hybrid.data.shots import Shots
from pyro_hybrid.errors import fail, require

__all__ = ["select_segments", "to_segments", "truncate"]


def truncate(shots: Shots, num_intervals: int) -> Shots:
    """Keep the first ``num_intervals`` time intervals; encoders go on reading the whole trajectories."""
    require(num_intervals >= 1, "1 interval or more", num_intervals, "Keep at least two times.")
    if num_intervals >= shots.times.shape[-1] - 1:
        return shots
    num_times = num_intervals + 1

    def beginning(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[:, :, :num_times]

    return replace(
        shots,
        times=shots.times[..., :num_times],
        values=beginning(shots.values),
        observed=shots.observed[:, :, :num_times],
        scored=shots.scored[:, :, :num_times],
        inputs=beginning(shots.inputs),
        states=beginning(shots.states),
        whole=shots.whole or shots,
        uncut=shots.uncut and truncate(shots.uncut, num_intervals),
    )


def to_segments(shots: Shots, num_intervals: int | None) -> Shots:
    """Cut every trajectory into segments of ``num_intervals`` time intervals, each a shot with its own clock.

    A segment starts from the measured state there, so that its first value no longer counts as an observation. Encoders
    go on reading the whole trajectories. The last segment is moved back so that it ends with the data, and the values
    that it shares with the segment before it are scored once. Shots that are short enough already stay as they are.
    None undoes an earlier cut.
    """
    require(
        num_intervals is None or num_intervals >= 1,
        "segments of 1 interval or more",
        num_intervals,
        "Pass None for whole trajectories.",
    )
    last = shots.times.shape[-1] - 1
    is_short = num_intervals is not None and num_intervals >= last
    if shots.uncut is not None:
        return shots if is_short else to_segments(shots.uncut, num_intervals)
    if num_intervals is None or is_short or shots.values is None:
        return shots
    if shots.states is None:
        fail(
            "measured states at all times, where segments can start",
            "initial states only",
            "Pass initial= with a time axis to Tasks, or meta_train(..., curriculum={0.0: None}).",
        )
    return _cut(shots, shots.states, num_intervals)


def select_segments(shots: Shots, rows: Tensor) -> Shots:
    """Select some of the segments by index, the same ones for every task."""
    require(
        shots.is_segmented,
        "shots that were cut into segments",
        "whole trajectories",
        "Cut them first, with to_segments.",
    )
    times = shots.times[..., rows, :]
    selected = shots.map_tensors(lambda value: value[:, rows], times)
    return replace(selected, uncut=None, is_sample=True)


def _cut(shots: Shots, states: Tensor, num_intervals: int) -> Shots:
    last = shots.times.shape[-1] - 1
    starts = [min(start, last - num_intervals) for start in range(0, last, num_intervals)]
    device = shots.times.device
    offsets = torch.arange(num_intervals + 1, device=device)
    index = torch.tensor(starts, device=device).unsqueeze(-1) + offsets
    num_shots = shots.shape[1]
    is_new = _is_new(len(starts), num_intervals, last).to(device)

    def segments(value: Tensor) -> Tensor:
        # (task, shot, time, ...) -> (task, shot * segment, num_intervals + 1, ...)
        return value[:, :, index].flatten(1, 2)

    return replace(
        shots,
        times=_segment_times(shots.times, index, num_shots),
        values=None if shots.values is None else segments(shots.values),
        initial=states[:, :, starts].flatten(1, 2),
        observed=segments(shots.observed),
        scored=segments(shots.scored) & is_new.repeat(num_shots, 1).unsqueeze(-1),
        inputs=None if shots.inputs is None else segments(shots.inputs),
        states=None,
        whole=shots.whole or shots,
        uncut=shots,
    )


def _segment_times(times: Tensor, index: Tensor, num_shots: int) -> Tensor:
    """Clocks of segments, (shot * segment, num_intervals + 1), with an axis of tasks before if these differ."""
    if times.dim() == 1:
        return times[index].repeat(num_shots, 1)
    return times[..., index].flatten(-3, -2)


def _is_new(num_segments: int, num_intervals: int, last: int) -> Tensor:
    """True where a segment's time is neither its start nor part of the segment before it, (segment, time)."""
    is_new = torch.ones(num_segments, num_intervals + 1, dtype=torch.bool)
    is_new[:, 0] = False
    is_new[-1, : num_segments * num_intervals - last + 1] = False
    return is_new
