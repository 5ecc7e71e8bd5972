"""SetEncoder: exchangeable trajectories -> features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_hybrid.data.shots import Shots, require_shots
from pyro_hybrid.errors import fail, require

__all__ = ["SetEncoder"]


class SetEncoder(nn.Module):
    r"""Any number of a task's shots, in any order, to one vector of features.

    .. math:: h(S) = \rho\Big(\tfrac{1}{|S|} \sum_{x \in S} \phi(x, m),\; \log |S| \Big)

    A missing observation enters as zero together with its mask :math:`m`. Trajectories are standardised by a running
    mean and scale of each sensor, which :func:`~pyro_hybrid.meta_train` sets from the training tasks.

    References:
        Deep Sets (Zaheer et al., 2017), https://arxiv.org/abs/1703.06114

    Arguments:
        sensors: number of observed quantities.
        steps: number of time points of a whole trajectory.
        features: size of the output.
        width: size of the hidden layers.
    """

    def __init__(self, sensors: int, steps: int, features: int = 64, width: int = 128) -> None:
        super().__init__()
        self.sensors, self.steps, self.features = sensors, steps, features
        self.register_buffer("centre", torch.zeros(sensors))
        self.register_buffer("scale", torch.ones(sensors))
        self.each = nn.Sequential(
            nn.Linear(2 * steps * sensors, width), nn.SiLU(), nn.Linear(width, features)
        )
        self.joint = nn.Sequential(
            nn.SiLU(), nn.Linear(features + 1, width), nn.SiLU(), nn.Linear(width, features)
        )

    def standardise(self, values: Tensor, mask: Tensor | bool) -> None:
        """Take centre and scale of each sensor from training trajectories ``(task, shot, time, sensor)``."""
        self._check(values)
        seen = torch.as_tensor(mask, device=values.device).expand_as(values)
        count = seen.sum((0, 1, 2)).clamp(min=1)
        self.centre = values.where(seen, 0.0).sum((0, 1, 2)) / count
        self.scale = (
            ((values - self.centre).where(seen, 0.0).square().sum((0, 1, 2)) / count)
            .sqrt()
            .clamp(min=1e-6)
        )

    def shots(self, shots: Shots) -> Tensor:
        """Features of each trajectory by itself, ``(task, shot, features)``."""
        require_shots(shots)
        whole = shots.whole or shots
        values = whole.values
        if values is None:
            fail(
                "shots with values",
                "values=None",
                "An encoder reads trajectories; simulate from the prior instead.",
            )
        self._check(values)
        seen = whole.observed
        standard = ((values - self.centre) / self.scale).where(seen, 0.0)
        return self.each(torch.cat([standard, seen.to(values.dtype)], -1).flatten(-2))

    def forward(self, shots: Shots) -> Tensor:
        """Features of the set, ``(task, features)``."""
        each = self.shots(shots)
        size = each.new_full((*each.shape[:-2], 1), each.shape[-2]).log()
        return self.joint(torch.cat([each.mean(-2), size], -1))

    def _check(self, values: Tensor) -> None:
        require(
            values.dim() >= 4 and tuple(values.shape[-2:]) == (self.steps, self.sensors),
            f"trajectories of (time, sensor) = ({self.steps}, {self.sensors})",
            tuple(values.shape[-2:]),
            "Build the SetEncoder with the steps and sensors of these trajectories.",
        )
        require(
            values.dtype == self.centre.dtype,
            f"trajectories in {self.centre.dtype}, as the encoder",
            values.dtype,
            "Convert the model with model.double() or .float(), or the values before they become tasks.",
            TypeError,
        )
        require(
            values.shape[-3] >= 1, "one shot or more", "an empty set", "The support can't be empty."
        )
