"""Pictures of a training."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

__all__ = ["loss_figure"]

BLUE, GREY = "#2a6fbb", "#8a8a8a"


def loss_figure(losses: Sequence[float]) -> Figure:
    """Plot the loss of every step; its scale changes where the curriculum lengthens the segments."""
    figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
    loss = np.array(losses)
    axis.plot(loss, lw=0.4, color=GREY)
    width = max(1, len(loss) // 50)
    smooth = np.convolve(loss, np.ones(width) / width, "valid")
    axis.plot(np.arange(width - 1, len(loss)), smooth, color=BLUE)
    limits = (np.nanmin(loss) - 50, np.nanquantile(loss, 0.97))
    axis.set(xlabel="step", ylabel="loss per task", ylim=limits)
    return figure
