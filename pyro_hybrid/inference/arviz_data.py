"""The one module that knows that ArviZ is two libraries: InferenceData on 0.x, xarray's DataTree on 1.x.

It takes numpy arrays and imports neither torch nor the rest of the package, so that it can be tested under both.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "GROUPS",
    "NEARLY_EQUAL",
    "Grouped",
    "import_arviz",
    "load",
    "pareto_k",
    "plot_ranks",
    "relative_ess",
    "save",
    "summary",
    "to_inference_data",
]

Array = NDArray[Any]

GROUPS = {
    "posterior": True,
    "posterior_predictive": True,
    "log_likelihood": True,
    "prior": True,
    "prior_predictive": True,
    "observed_data": False,
    "constant_data": False,
}
"""The groups in ArviZ's order; True where arrays have the leading axes (chain, draw)."""

SAMPLE_AXES = ("chain", "draw")
NEGLIGIBLE = -700.0  # log weights this far below the largest count as zero
NEARLY_EQUAL = 0.999  # effective sample size, as a share of the draws


@runtime_checkable
class Grouped(Protocol):
    """The interface shared by ``InferenceData`` and ``DataTree``: ``data["posterior"]["omega"]`` is a DataArray."""

    attrs: Any

    def __getitem__(self, key: str) -> Any: ...

    def to_netcdf(self, *args: Any, **kwargs: Any) -> Any: ...


def to_inference_data(
    groups: Mapping[str, Mapping[str, Array]],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any] | Array],
    attrs: Mapping[str, str | int | float],
) -> Grouped:
    """Hand arrays to ArviZ: an ``InferenceData`` on ArviZ 0.x, a ``DataTree`` on 1.x, with the same content.

    Arguments:
        groups: arrays by group (see ``GROUPS``) and variable; a group without variables is omitted.
        dims: the axes of each variable after (chain, draw). A log-likelihood has the leading axes that remain after
            summing, e.g. (task, shot) of (task, shot, time, sensor): ``arviz.loo`` then leaves out one shot at a time.
        coords: the labels along each axis; an axis without labels is numbered from 0.
        attrs: facts for the reader of the file (seed, versions); stored with the file and with each group.
    """
    present = {name: dict(groups[name]) for name in GROUPS if groups.get(name)}
    _check_groups(groups)
    _check_axes(present, dims, coords)
    _check_attrs(attrs)
    axes = {name: list(names) for name, names in dims.items()}
    labels = {axis: np.asarray(values) for axis, values in coords.items()}
    arviz = import_arviz()
    data: Grouped
    if _is_old(arviz):
        data = arviz.from_dict(**present, dims=axes, coords=labels)
    else:
        data = arviz.from_dict(present, dims=axes, coords=labels)
    for node in (data, *(data[name] for name in present)):
        node.attrs.update({**attrs, "inference_library": "pyro_hybrid"})
    return data


def summary(
    data: Grouped,
    var_names: Sequence[str] | None = None,
    prob: float = 0.9,
    *,
    group: str = "posterior",
) -> pd.DataFrame:
    """Tabulate mean, standard deviation and equal-tailed interval of every latent, one row an entry.

    The intervals are computed here because ArviZ's defaults differ between versions. Draws from a guide are
    independent, so the table has no R-hat and no effective sample size.

    Arguments:
        data: the result of ``to_inference_data`` or ``load``.
        var_names: the variables to show; all of them by default.
        prob: the probability inside the interval.
        group: ``"posterior"`` or ``"prior"``.
    """
    _require(0 < prob < 1, "prob between 0 and 1", prob, "For a 90% interval pass prob=0.9.")
    draws = data[group]
    present = list(draws.data_vars)
    names = present if var_names is None else list(var_names)
    missing = [name for name in names if name not in present]
    is_known = bool(names) and not missing
    _require(is_known, f"var_names among {present}", missing, f"Group {group!r} has those.")
    tails = ((1 - prob) / 2, (1 + prob) / 2)
    columns = ["mean", "sd", *(f"eti_{100 * tail:.4g}%" for tail in tails)]
    pandas = _require_package("pandas", extra="tables")
    rows = np.concatenate([_moments(draws[name], tails) for name in names])
    labels = [label for name in names for label in _labels(draws[name])]
    table: pd.DataFrame = pandas.DataFrame(rows, labels, columns)
    return table


def save(data: Grouped, path: str | Path) -> None:
    """Write ``data`` as netCDF, readable under either version of ArviZ."""
    _require_package("h5netcdf", extra="netcdf")
    data.to_netcdf(str(path), engine="h5netcdf")


def load(path: str | Path) -> Grouped:
    """Read a file written by ``save`` into memory and close it, so that it can be overwritten."""
    _require_package("h5netcdf", extra="netcdf")
    arviz = import_arviz()
    data: Grouped
    if _is_old(arviz):
        with arviz.rc_context({"data.load": "eager"}):
            data = arviz.from_netcdf(str(path), engine="h5netcdf")
    else:
        with arviz.from_netcdf(str(path), engine="h5netcdf") as tree:
            data = tree.load()
    return data


def pareto_k(log_weights: Array) -> Array:
    """Compute the PSIS k-hat of log importance weights ``(..., draw)``.

    The result is 0 where weights are nearly equal, since the shape of their tail then says nothing about the
    approximation, and infinite where hardly any draw has weight.
    """
    num_draws = log_weights.shape[-1]
    weights = np.where(np.isnan(log_weights), -np.inf, log_weights)
    with np.errstate(
        all="ignore"
    ):  # weights may all be zero; some tails fit no Pareto distribution
        weights = np.maximum(weights - weights.max(-1, keepdims=True), NEGLIGIBLE)
        counts = weights > NEGLIGIBLE
        k = np.where(counts.sum(-1) < 3.0 * num_draws**0.5, np.inf, 0.0)
        share = relative_ess(weights) * num_draws / counts.sum(-1)  # of the draws that count
        has_tail = (share < NEARLY_EQUAL) & (k == 0.0)
        if has_tail.any():
            k[has_tail] = np.nan_to_num(_psis(weights[has_tail]), nan=np.inf, posinf=np.inf)
    return k


def relative_ess(log_weights: Array) -> Array:
    """Compute the effective sample size of importance weights ``(..., draw)``, as a share of all draws.

    The result is 1 where all weights are equal, and 0 where none counts or one is infinite.
    """
    log_weights = np.where(np.isnan(log_weights), -np.inf, log_weights)
    largest = log_weights.max(-1, keepdims=True)
    is_finite = np.isfinite(largest)
    shifted = log_weights - np.where(is_finite, largest, 0.0)
    weights = np.exp(np.where(is_finite, shifted, -np.inf))
    squares = np.maximum((weights**2).sum(-1), np.finfo(float).tiny)
    return np.asarray(weights.sum(-1) ** 2 / squares / log_weights.shape[-1])


def _psis(log_weights: Array) -> Array:
    """Smooth importance weights with ArviZ: 0.x takes log weights, 1.x their negatives."""
    arviz = import_arviz()
    if _is_old(arviz):
        return np.asarray(arviz.psislw(log_weights)[1])
    import xarray

    labelled = xarray.DataArray(-log_weights, dims=["task", "draw"])
    return np.asarray(labelled.azstats.psislw(dim="draw")[1].values)


def plot_ranks(ranks: Array, axis: Any, color: str) -> None:
    """Draw how far the ECDF of ranks between 0 and 1 lies above the diagonal, into a matplotlib axis."""
    arviz = import_arviz()
    if _is_old(arviz):
        arviz.plot_ecdf(
            ranks,
            cdf=np.asarray,
            eval_points=np.linspace(0.0, 1.0, 201),
            difference=True,
            ax=axis,
            plot_kwargs={"color": color},
            show=False,
            backend="matplotlib",
        )
    else:
        _plot_ranks_as_tree(arviz, ranks, axis, color)


def _plot_ranks_as_tree(arviz: ModuleType, ranks: Array, axis: Any, color: str) -> None:
    """Draw the same with ArviZ 1.x, which wants figure and axis as a tree of arrays."""
    import xarray

    def as_array(artist: Any) -> Any:
        cell = np.empty((), dtype=object)
        cell[()] = artist
        return xarray.DataArray(cell)

    data = arviz.from_dict({"prior_sbc": {"rank": ranks[None]}})
    canvas = xarray.DataTree.from_dict(
        {
            "/": xarray.Dataset({"figure": as_array(axis.figure)}),
            "plot": xarray.Dataset({"rank": as_array(axis)}),
        }
    )
    plots = arviz.PlotCollection(data["prior_sbc"].dataset, canvas, backend="matplotlib")
    texts = ("suspicious_points", "p_value_text", "xlabel", "ylabel", "title")
    visuals = {**dict.fromkeys(texts, False), "ecdf_lines": {"color": color}}
    arviz.plot_ecdf_pit(data, plot_collection=plots, visuals=visuals)


def import_arviz() -> ModuleType:
    """Import ArviZ on first use (it takes seconds), without 0.x's daily advertisement of 1.x."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"\s*ArviZ is undergoing a major refactor", category=FutureWarning
        )
        import arviz
    return arviz


def _is_old(arviz: ModuleType) -> bool:
    """Decide by version number: ``arviz.InferenceData`` exists on both, and 0.x accepts a call meant for 1.x."""
    return int(arviz.__version__.partition(".")[0]) < 1


def _moments(variable: Any, tails: tuple[float, float]) -> Array:
    """Compute mean, sd and the quantiles at ``tails`` over all chains and draws, shape (entries, 4)."""
    values = variable.transpose(*SAMPLE_AXES, ...).values.astype(float)
    draws = values.reshape(values.shape[0] * values.shape[1], -1)
    expected = f"at least two draws of {variable.name!r}"
    _require(len(draws) > 1, expected, len(draws), "Pass a larger num_samples.")
    quantiles = np.quantile(draws, tails, axis=0)
    return np.stack([draws.mean(0), draws.std(0, ddof=1), *quantiles], axis=-1)


def _labels(variable: Any) -> list[str]:
    """List ``omega[0, damping]``, name and coordinates of each entry, in the order of the array."""
    axes = [axis for axis in variable.dims if axis not in SAMPLE_AXES]
    if not axes:
        return [str(variable.name)]
    names = [[str(label) for label in variable[axis].values] for axis in axes]
    labels = []
    for entry in np.ndindex(*(len(along) for along in names)):
        parts = [along[i] for along, i in zip(names, entry, strict=True)]
        labels.append(f"{variable.name}[{', '.join(parts)}]")
    return labels


def _require(condition: bool, expected: str, got: object, remedy: str) -> None:
    """Raise in the one form of message; ``pyro_hybrid.errors`` has it too, but imports torch."""
    if not condition:
        raise ValueError(f"expected {expected}; got {got}. {remedy}")


def _require_package(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package, as ``pyro_hybrid.errors.require_package`` does."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        remedy = f"Install it: pip install 'pyro_hybrid[{extra}]'."
        raise ImportError(f"expected the module {module}; got {error}. {remedy}") from error


def _check_groups(groups: Mapping[str, Mapping[str, Array]]) -> None:
    unknown = sorted(set(groups) - set(GROUPS))
    remedy = "Rename them, or put arrays into constant_data."
    _require(not unknown, f"groups among {list(GROUPS)}", unknown, remedy)
    is_filled = any(groups.values())
    _require(is_filled, "at least one array", "none", "Pass groups={'posterior': {...}}.")
    for group, variables in groups.items():
        for name, value in variables.items():
            _require(
                isinstance(value, np.ndarray),
                f"{group}[{name!r}] to be a numpy array",
                type(value).__name__,
                "Convert it: tensor.detach().cpu().numpy().",
            )


def _check_axes(
    groups: dict[str, dict[str, Array]],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any] | Array],
) -> None:
    """Require one length of an axis in all groups: xarray would pad with NaN, and ArviZ rename the axis, silently."""
    lengths = {axis: len(labels) for axis, labels in coords.items()}
    for group, variables in groups.items():
        sample_lengths: dict[str, int] = {}  # prior and posterior may differ in chains and draws
        for name, value in variables.items():
            axes = _axes(group, name, value, dims.get(name, ()))
            for axis, length in zip(axes, value.shape, strict=True):
                known_lengths = sample_lengths if axis in SAMPLE_AXES else lengths
                expected = known_lengths.setdefault(axis, length)
                _require(
                    length == expected,
                    f"{expected} along axis {axis!r} of {group}[{name!r}]",
                    length,
                    "That is its length in coords or in the arrays before it.",
                )


def _axes(group: str, name: str, value: Array, dims: Sequence[str]) -> tuple[str, ...]:
    axes = (*SAMPLE_AXES, *dims) if GROUPS[group] else tuple(dims)
    if group == "log_likelihood":
        axes = axes[: max(value.ndim, len(SAMPLE_AXES))]
    _require(
        value.ndim == len(axes) > 0,
        f"{group}[{name!r}] with axes {axes}",
        f"shape {value.shape}",
        f"Name its axes in dims[{name!r}], without chain and draw; a single number belongs in attrs.",
    )
    return axes


def _check_attrs(attrs: Mapping[str, str | int | float]) -> None:
    for name, value in attrs.items():
        is_storable = isinstance(value, str | int | float) and not isinstance(value, bool)
        _require(
            is_storable,
            f"attrs[{name!r}] as text or number",
            type(value).__name__,
            "netCDF attributes hold nothing else: pass str(value), or int(value) for a bool.",
        )
