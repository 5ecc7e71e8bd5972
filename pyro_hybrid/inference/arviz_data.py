"""The one module that knows that ArviZ is two libraries: InferenceData on 0.x, xarray's DataTree on 1.x.

It takes numpy arrays and imports neither torch nor the rest of the package, so that both sides can be tested.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

__all__ = [
    "GROUPS",
    "Grouped",
    "load",
    "pareto_k",
    "plot_ranks",
    "save",
    "summary",
    "to_inference_data",
]

GROUPS = {
    "posterior": True,
    "posterior_predictive": True,
    "log_likelihood": True,
    "prior": True,
    "prior_predictive": True,
    "observed_data": False,
    "constant_data": False,
}
"""The groups in ArviZ's order, and whether their arrays have the leading axes (chain, draw)."""

_SAMPLE_AXES = ("chain", "draw")
_NEGLIGIBLE, _EQUAL = (
    -700.0,
    1e-6,
)  # log weights below the largest, and apart, by which they don't matter


@runtime_checkable
class Grouped(Protocol):
    """What an ``InferenceData`` and a ``DataTree`` have in common: ``data["posterior"]["omega"]`` is a DataArray."""

    attrs: Any

    def __getitem__(self, key: str) -> Any: ...

    def to_netcdf(self, *args: Any, **kwargs: Any) -> Any: ...


def to_inference_data(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any] | np.ndarray],
    attrs: Mapping[str, str | int | float],
) -> Grouped:
    """Hand arrays to ArviZ: an ``InferenceData`` on ArviZ 0.x, a ``DataTree`` on 1.x, with the same content.

    Arguments:
        groups: arrays by group (see ``GROUPS``) and variable; a group without variables is left out.
        dims: the axes of each variable after (chain, draw). A log-likelihood has the leading ones that are left after
            summing, e.g. (task, shot) of (task, shot, time, sensor): what ``arviz.loo`` then leaves out is one shot.
        coords: the labels along each axis; an axis without is numbered from 0.
        attrs: what a reader of the file should know (seed, versions); goes to the file and to each of its groups.
    """
    known = {name: dict(groups[name]) for name in GROUPS if groups.get(name)}
    _check_groups(groups)
    _check_axes(known, dims, coords)
    _check_attrs(attrs)
    data = _from_dict(
        known, {k: list(v) for k, v in dims.items()}, {k: np.asarray(v) for k, v in coords.items()}
    )
    for node in (data, *(data[name] for name in known)):
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

    Computed here: ArviZ's own defaults differ between versions. Draws from a guide are independent, so there is no
    R-hat and no effective sample size to show.

    Arguments:
        data: what ``to_inference_data`` or ``load`` returned.
        var_names: the variables to show; all of them by default.
        prob: the probability inside the interval.
        group: ``"posterior"`` or ``"prior"``.
    """
    _require(0 < prob < 1, "prob between 0 and 1", prob, "For a 90% interval pass prob=0.9.")
    draws = data[group]
    present = list(draws.data_vars)
    names = present if var_names is None else list(var_names)
    missing = [name for name in names if name not in present]
    _require(
        not missing,
        f"var_names among {present}",
        missing,
        f"Those are the variables of group {group!r}.",
    )
    tails = ((1 - prob) / 2, (1 + prob) / 2)
    columns = ["mean", "sd", *(f"eti_{100 * tail:.4g}%" for tail in tails)]
    return pd.concat(
        [pd.DataFrame(_moments(draws[n], tails), _labels(draws[n]), columns) for n in names]
    )


def save(data: Grouped, path: str | Path) -> None:
    """Write ``data`` as netCDF (through h5netcdf), readable under either version of ArviZ."""
    data.to_netcdf(str(path), engine="h5netcdf")


def load(path: str | Path) -> Grouped:
    """Read what ``save`` wrote into memory; the file is closed again, so that it can be overwritten."""
    arviz = _backend()
    with arviz.rc_context({"data.load": "eager"}) if _is_old(arviz) else nullcontext():
        data: Grouped = arviz.from_netcdf(str(path), engine="h5netcdf")
    return data if _is_old(arviz) else _in_memory(data)


def pareto_k(log_weights: np.ndarray) -> np.ndarray:
    """PSIS k-hat of log importance weights ``(..., draw)``: 0 where all are equal, infinite where hardly any counts."""
    weights, few = (
        np.where(np.isnan(log_weights), -np.inf, log_weights),
        3.0 * log_weights.shape[-1] ** 0.5,
    )
    with np.errstate(
        all="ignore"
    ):  # all of them may be zero, one infinite, and some tails fit no Pareto distribution
        weights = np.maximum(weights - weights.max(-1, keepdims=True), _NEGLIGIBLE)
        counts = weights > _NEGLIGIBLE
        k = np.where(counts.sum(-1) < few, np.inf, 0.0)
        some = (counts & (weights < -_EQUAL)).any(-1) & (k == 0.0)
        if some.any():
            k[some] = np.nan_to_num(_psis(weights[some]), nan=np.inf, posinf=np.inf)
    return k


def _psis(weights: np.ndarray) -> np.ndarray:
    """0.x takes log weights, 1.x their negatives."""
    arviz = _backend()
    if _is_old(arviz):
        return np.asarray(arviz.psislw(weights)[1])
    import xarray

    return xarray.DataArray(-weights, dims=["task", "draw"]).azstats.psislw(dim="draw")[1].values


def plot_ranks(ranks: np.ndarray, axis: Any, color: str) -> None:
    """Draw into a matplotlib axis how far the ECDF of ranks between 0 and 1 is above the diagonal."""
    arviz = _backend()
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
        return
    import xarray

    def only(artist: Any) -> Any:
        cell = np.empty((), dtype=object)
        cell[()] = artist
        return xarray.DataArray(cell)

    data = arviz.from_dict({"prior_sbc": {"rank": ranks[None]}})
    where = xarray.DataTree.from_dict(
        {
            "/": xarray.Dataset({"figure": only(axis.figure)}),
            "plot": xarray.Dataset({"rank": only(axis)}),
        }
    )
    onto = arviz.PlotCollection(data["prior_sbc"].dataset, where, backend="matplotlib")
    hidden = dict.fromkeys(
        ("suspicious_points", "p_value_text", "xlabel", "ylabel", "title"), False
    )
    arviz.plot_ecdf_pit(
        data, plot_collection=onto, visuals={**hidden, "ecdf_lines": {"color": color}}
    )


def _backend() -> ModuleType:
    """ArviZ, imported when it is needed (it takes seconds) and without 0.x's daily advertisement of 1.x."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"\s*ArviZ is undergoing a major refactor", category=FutureWarning
        )
        import arviz
    return arviz


def _is_old(arviz: ModuleType) -> bool:
    """By version number: ``arviz.InferenceData`` exists on both, and 0.x takes the call of 1.x without a word."""
    return int(arviz.__version__.partition(".")[0]) < 1


def _from_dict(
    groups: dict[str, dict[str, np.ndarray]], dims: dict[str, Any], coords: dict[str, Any]
) -> Grouped:
    arviz = _backend()
    data: Grouped
    if _is_old(arviz):
        data = arviz.from_dict(**groups, dims=dims, coords=coords)
    else:
        data = arviz.from_dict(groups, dims=dims, coords=coords)
    return data


def _in_memory(tree: Any) -> Grouped:
    with tree:
        data: Grouped = tree.load()
    return data


def _moments(variable: Any, tails: tuple[float, float]) -> np.ndarray:
    """Mean, sd and the quantiles at ``tails`` over all chains and draws, shape (entries, 4)."""
    values = variable.transpose(*_SAMPLE_AXES, ...).values.astype(float)
    draws = values.reshape(values.shape[0] * values.shape[1], -1)
    _require(
        len(draws) > 1,
        f"at least two draws of {variable.name!r}",
        len(draws),
        "Pass a larger num_samples.",
    )
    return np.stack(
        [draws.mean(0), draws.std(0, ddof=1), *np.quantile(draws, tails, axis=0)], axis=-1
    )


def _labels(variable: Any) -> list[str]:
    """``omega[0, damping]``: the name and the coordinates of each entry, in the order of the array."""
    axes = [axis for axis in variable.dims if axis not in _SAMPLE_AXES]
    entries = np.ndindex(*(variable.sizes[axis] for axis in axes))
    labels = [[str(label) for label in variable[axis].values] for axis in axes]
    inside = (
        ", ".join(names[i] for names, i in zip(labels, entry, strict=True)) for entry in entries
    )
    return [f"{variable.name}[{text}]" if axes else str(variable.name) for text in inside]


def _require(condition: bool, expected: str, came: object, remedy: str) -> None:
    """The house's one form of message; ``_checks`` has it too, but imports torch."""
    if not condition:
        raise ValueError(f"expected {expected}; got {came}. {remedy}")


def _check_groups(groups: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    unknown = sorted(set(groups) - set(GROUPS))
    _require(
        not unknown,
        f"groups among {list(GROUPS)}",
        unknown,
        "Rename them, or put arrays into constant_data.",
    )
    _require(
        any(groups.values()),
        "at least one array",
        "none",
        "Pass groups={'posterior': {name: array}, ...}.",
    )
    for group, variables in groups.items():
        for name, value in variables.items():
            _require(
                isinstance(value, np.ndarray),
                f"{group}[{name!r}] to be a numpy array",
                type(value).__name__,
                "Convert it: tensor.detach().cpu().numpy().",
            )


def _check_axes(
    groups: dict[str, dict[str, np.ndarray]],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any] | np.ndarray],
) -> None:
    """One length an axis, in all groups: xarray would pad with NaN, ArviZ would rename the axis, both silently."""
    lengths = {axis: len(labels) for axis, labels in coords.items()}
    for group, variables in groups.items():
        own: dict[
            str, int
        ] = {}  # the number of chains and draws may differ between prior and posterior
        for name, value in variables.items():
            axes = _axes(group, name, value, dims.get(name, ()))
            for axis, length in zip(axes, value.shape, strict=True):
                expected = (own if axis in _SAMPLE_AXES else lengths).setdefault(axis, length)
                _require(
                    length == expected,
                    f"{expected} along axis {axis!r} of {group}[{name!r}]",
                    length,
                    "That is its length in coords or in the arrays before it.",
                )


def _axes(group: str, name: str, value: np.ndarray, dims: Sequence[str]) -> tuple[str, ...]:
    axes = (*_SAMPLE_AXES, *dims) if GROUPS[group] else tuple(dims)
    if group == "log_likelihood":
        axes = axes[: max(value.ndim, len(_SAMPLE_AXES))]
    _require(
        value.ndim == len(axes) > 0,
        f"{group}[{name!r}] with axes {axes}",
        f"shape {value.shape}",
        f"Name its axes in dims[{name!r}], without chain and draw; a single number belongs in attrs.",
    )
    return axes


def _check_attrs(attrs: Mapping[str, str | int | float]) -> None:
    for name, value in attrs.items():
        storable = isinstance(value, str | int | float) and not isinstance(value, bool)
        _require(
            storable,
            f"attrs[{name!r}] as text or number",
            type(value).__name__,
            "netCDF attributes hold nothing else: pass str(value), or int(value) for a bool.",
        )
