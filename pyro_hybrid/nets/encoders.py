"""SetEncoder: trajectories in any order to features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_hybrid.data.shots import Shots, require_shots
from pyro_hybrid.errors import fail, require

__all__ = ["SetEncoder"]

SMALLEST_SCALE = 1e-6  # of a sensor that never changes


class SetEncoder(nn.Module):
    r"""Map any number of a task's shots, in any order, to one vector of features.

    .. math:: h(S) = \rho\Big(\tfrac{1}{|S|} \sum_{x \in S} \phi(x, m),\; \log |S| \Big)

    A missing value enters as zero, together with its mask :math:`m`. A shot of which nothing was observed does not
    count, neither in the mean nor in :math:`|S|`. Trajectories are standardized by the mean and the standard deviation
    of each sensor, which :func:`~pyro_hybrid.meta_train` takes from the training tasks.

    The encoder ignores times and known inputs: two shots with equal values look equal to it, whatever their clocks and
    inputs are. Where shots have clocks or inputs of their own, compute the evidence (:class:`~pyro_hybrid.GaussNewton`)
    or write an encoder that reads ``expanded_times`` and ``inputs`` of ``shots.whole or shots``, too.

    References:
        Deep Sets (Zaheer et al., 2017), https://arxiv.org/abs/1703.06114

    Arguments:
        num_sensors: number of observed quantities.
        num_times: number of time points of a whole trajectory.
        num_features: size of the output.
        width: size of the hidden layers.

    >>> encoder = SetEncoder(num_sensors=2, num_times=3, num_features=8)
    >>> encoder(Shots.from_tensors(torch.arange(3.0), torch.zeros(5, 4, 3, 2))).shape
    torch.Size([5, 8])
    """

    center: Tensor
    scale: Tensor

    def __init__(
        self, num_sensors: int, num_times: int, num_features: int = 64, width: int = 128
    ) -> None:
        super().__init__()
        sizes = {
            "num_sensors": num_sensors,
            "num_times": num_times,
            "num_features": num_features,
            "width": width,
        }
        for name, size in sizes.items():
            require(
                isinstance(size, int) and size >= 1,
                f"{name}, an integer of 1 or more",
                repr(size),
                "Pass ph.SetEncoder(num_sensors, num_times), as the trajectories have them.",
            )
        self.num_sensors = num_sensors
        self.num_times = num_times
        self.num_features = num_features
        self.register_buffer("center", torch.zeros(num_sensors))
        self.register_buffer("scale", torch.ones(num_sensors))
        self.each = nn.Sequential(
            nn.Linear(2 * num_times * num_sensors, width), nn.SiLU(), nn.Linear(width, num_features)
        )
        self.joint = nn.Sequential(
            nn.SiLU(), nn.Linear(num_features + 1, width), nn.SiLU(), nn.Linear(width, num_features)
        )

    def standardize(self, values: Tensor, observed: Tensor) -> None:
        """Take the center and the scale of each sensor from training trajectories.

        Arguments:
            values: ``(task, shot, time, sensor)``.
            observed: True where a value was measured, in the same shape.
        """
        self._check(values)
        count = observed.sum((0, 1, 2)).clamp(min=1)
        center = values.where(observed, 0.0).sum((0, 1, 2)) / count
        squares = (values - center).where(observed, 0.0).square()
        self.center = center
        self.scale = (squares.sum((0, 1, 2)) / count).sqrt().clamp(min=SMALLEST_SCALE)

    def shots(self, shots: Shots) -> Tensor:
        """Return features of each trajectory by itself, ``(task, shot, features)``."""
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
        observed = whole.observed
        standard = ((values - self.center) / self.scale).where(observed, 0.0)
        inputs = torch.cat([standard, observed.to(values.dtype)], -1).flatten(-2)
        features: Tensor = self.each(inputs)
        return features

    def forward(self, shots: Shots) -> Tensor:
        """Return features of the set, ``(task, features)``."""
        each = self.shots(shots)
        observed = (shots.whole or shots).observed
        is_informed = observed.flatten(-2).any(-1, keepdim=True)
        size = is_informed.sum(-2).clamp(min=1).to(each.dtype)
        mean = each.where(is_informed, 0.0).sum(-2) / size
        features: Tensor = self.joint(torch.cat([mean, size.log()], -1))
        return features

    def _check(self, values: Tensor) -> None:
        expected = (self.num_times, self.num_sensors)
        require(
            values.dim() >= 4 and tuple(values.shape[-2:]) == expected,
            f"trajectories of (time, sensor) = {expected}",
            tuple(values.shape[-2:]),
            "Build the SetEncoder with the numbers of sensors and times of these trajectories.",
        )
        require(
            values.dtype == self.center.dtype,
            f"trajectories in {self.center.dtype}, as the encoder",
            values.dtype,
            "Convert the model with model.double() or .float(), or the values before they become tasks.",
            TypeError,
        )
        require(
            values.shape[-3] >= 1, "one shot or more", "an empty set", "The support can't be empty."
        )
