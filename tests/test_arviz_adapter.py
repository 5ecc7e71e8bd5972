"""The ArviZ adapter, under the version installed here and, in a subprocess, under ArviZ 1.x without torch.

The adapter is loaded by its path, so this file runs under any Python that has ArviZ, h5netcdf and pytest.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scripts import HANGING

ROOT = Path(__file__).parents[1]
INNER = "PYRO_HYBRID_ARVIZ1_INNER"  # set in the subprocess, so that it doesn't start one itself
LOAD = "import sys; sys.path.insert(0, sys.argv[1]); import arviz_data"  # as a top-level module: without the package
TASKS, SHOTS, STEPS, DRAWS = 3, 4, 5, 200

pytestmark = pytest.mark.filterwarnings(
    "ignore:Estimated shape parameter of Pareto distribution:UserWarning"
)


def load_adapter() -> ModuleType:
    """The adapter without its package: what it imports is all it gets."""
    spec = importlib.util.spec_from_file_location(
        "_arviz_by_path", ROOT / "pyro_hybrid" / "inference" / "arviz_data.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(python: str, *arguments: str, cache: Path | None = None) -> str:
    """Standard output of a run of ``python`` that must succeed."""
    environment = {**os.environ, INNER: "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if cache is not None:
        environment["XDG_CACHE_HOME"] = str(cache)
    done = subprocess.run(
        [python, *arguments], capture_output=True, text=True, env=environment, timeout=HANGING
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


adapter = load_adapter()
arviz = adapter.import_arviz()


def make_arguments() -> dict[str, Any]:
    """A small posterior with every group; the prior has fewer draws."""
    random = np.random.default_rng(0)
    observed = random.normal(size=(TASKS, SHOTS, STEPS, 2))
    draws = (1, DRAWS, TASKS)
    latents = {
        "omega": random.lognormal(size=(*draws, 1)),
        "unknown": random.normal(size=(*draws, 2)),
    }
    predicted = observed + 0.1 * random.normal(size=(1, DRAWS, *observed.shape))
    groups = {
        "observed_data": {"x": observed},
        "constant_data": {"times": np.linspace(0, 1, STEPS), "mask": observed > 0},
        "posterior": latents,
        "prior": {name: value[:, :50] for name, value in latents.items()},
        "posterior_predictive": {"x": predicted.astype(np.float32)},
        "prior_predictive": {"x": predicted[:, :50]},
        "log_likelihood": {"x": -0.5 * ((predicted - observed) ** 2).sum((-1, -2))},
    }
    axes = ["task", "shot", "time", "sensor"]
    dims = {
        "omega": ["task", "physics"],
        "unknown": ["task", "neural"],
        "x": axes,
        "mask": axes,
        "times": ["time"],
    }
    coords = {
        "task": np.arange(10, 10 + TASKS),
        "physics": ["omega"],
        "neural": ["damping", "push"],
        "sensor": ["angle", "speed"],
        "time": np.linspace(0, 1, STEPS),
    }
    return {
        "groups": groups,
        "dims": dims,
        "coords": coords,
        "attrs": {"seed": 7, "model": "DampedPendulum"},
    }


@pytest.fixture
def arguments() -> dict[str, Any]:
    return make_arguments()


@pytest.fixture
def data(arguments: dict[str, Any]) -> Any:
    return adapter.to_inference_data(**arguments)


def assert_same_content(data: Any, arguments: dict[str, Any]) -> None:
    for group, variables in arguments["groups"].items():
        assert set(data[group].data_vars) == set(variables)
        for name, value in variables.items():
            np.testing.assert_array_equal(data[group][name].values, value)
            assert data[group][name].dtype == value.dtype


def test_every_group_holds_the_arrays_it_was_given(data: Any, arguments: dict[str, Any]) -> None:
    assert_same_content(data, arguments)


def test_type_is_the_one_of_the_installed_arviz(data: Any) -> None:
    expected = "InferenceData" if arviz.__version__.startswith("0.") else "DataTree"
    assert type(data).__name__ == expected
    assert isinstance(data, adapter.Grouped)


def test_axes_and_coordinates_are_named(data: Any) -> None:
    assert data["posterior"]["unknown"].dims == ("chain", "draw", "task", "neural")
    assert data["posterior_predictive"]["x"].dims == (
        "chain",
        "draw",
        "task",
        "shot",
        "time",
        "sensor",
    )
    assert data["observed_data"]["x"].dims == ("task", "shot", "time", "sensor")
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "task", "shot")
    assert list(data["posterior"]["unknown"]["neural"].values) == ["damping", "push"]
    assert list(data["log_likelihood"]["x"]["task"].values) == [10, 11, 12]
    assert list(data["log_likelihood"]["x"]["shot"].values) == [0, 1, 2, 3]


def test_groups_come_in_one_order_on_both_versions(data: Any) -> None:
    groups = (
        data.groups() if callable(data.groups) else [g.strip("/") for g in data.groups if g != "/"]
    )
    assert set(groups) == set(adapter.GROUPS)
    assert groups.index("posterior") < groups.index("log_likelihood") < groups.index("prior")


def test_file_and_groups_say_which_library_made_them(data: Any) -> None:
    for node in (data, data["posterior"], data["observed_data"]):
        assert node.attrs["inference_library"] == "pyro_hybrid"
        assert node.attrs["seed"] == 7


def test_arguments_are_not_changed(arguments: dict[str, Any]) -> None:
    adapter.to_inference_data(**arguments)
    fresh = make_arguments()
    assert arguments["attrs"] == fresh["attrs"]
    assert arguments["dims"] == fresh["dims"]
    assert list(arguments["groups"]) == list(fresh["groups"])


def test_groups_without_variables_are_left_out(arguments: dict[str, Any]) -> None:
    data = adapter.to_inference_data(
        **{**arguments, "groups": {**arguments["groups"], "prior": {}}}
    )
    assert "prior" not in (data.groups() if callable(data.groups) else data.children)


def test_a_single_draw_of_a_single_number_is_kept() -> None:
    data = adapter.to_inference_data({"posterior": {"noise": np.ones((1, 1))}}, {}, {}, {})
    assert data["posterior"]["noise"].shape == (1, 1)


def test_summary_shows_moments_and_equal_tails_and_no_convergence_diagnostic(data: Any) -> None:
    table = adapter.summary(data, prob=0.8)
    assert list(table.columns) == ["mean", "sd", "eti_10%", "eti_90%"]
    assert list(table.index[:4]) == [
        "omega[10, omega]",
        "omega[11, omega]",
        "omega[12, omega]",
        "unknown[10, damping]",
    ]
    draws = data["posterior"]["unknown"].values[0, :, 1, 0]
    expected = [draws.mean(), draws.std(ddof=1), *np.quantile(draws, [0.1, 0.9])]
    np.testing.assert_allclose(table.loc["unknown[11, damping]"], expected, rtol=1e-12)


def test_summary_takes_variables_and_group(data: Any) -> None:
    table = adapter.summary(data, ["unknown"], group="prior")
    assert table.shape == (2 * TASKS, 4)
    assert table.columns[2:].tolist() == ["eti_5%", "eti_95%"]
    assert not np.allclose(table, adapter.summary(data, ["unknown"]))


def test_summary_pools_chains_and_labels_scalars_by_name() -> None:
    draws = np.arange(20.0).reshape(2, 10)
    data = adapter.to_inference_data({"posterior": {"noise": draws}}, {}, {}, {})
    table = adapter.summary(data)
    assert table.index.tolist() == ["noise"]
    assert table["sd"].item() == pytest.approx(draws.std(ddof=1))


def test_loo_leaves_out_one_shot_at_a_time(data: Any) -> None:
    result = arviz.loo(data, var_name="x", pointwise=True)
    assert result.n_data_points == TASKS * SHOTS
    assert np.isfinite(result.elpd_loo if hasattr(result, "elpd_loo") else result.elpd)


def test_netcdf_round_trip_keeps_everything(
    data: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    adapter.save(data, tmp_path / "posterior.nc")
    again = adapter.load(tmp_path / "posterior.nc")
    assert type(again) is type(data)
    assert_same_content(again, arguments)
    assert again["posterior"]["unknown"].dims == data["posterior"]["unknown"].dims
    assert list(again["posterior"]["unknown"]["neural"].values) == ["damping", "push"]
    assert again.attrs["model"] == again["posterior"].attrs["model"] == "DampedPendulum"


def test_a_loaded_file_can_be_overwritten(data: Any, tmp_path: Path) -> None:
    adapter.save(data, tmp_path / "posterior.nc")
    again = adapter.load(tmp_path / "posterior.nc")
    adapter.save(again, tmp_path / "posterior.nc")
    (tmp_path / "posterior.nc").unlink()
    assert adapter.summary(again).equals(adapter.summary(data))


def test_loading_the_adapter_imports_neither_torch_nor_arviz() -> None:
    heavy = f"{LOAD}; print({{'torch', 'arviz'}} & set(sys.modules))"
    assert (
        run(sys.executable, "-c", heavy, str(ROOT / "pyro_hybrid" / "inference")).strip() == "set()"
    )


def test_importing_arviz_warns_of_nothing(tmp_path: Path) -> None:
    # ArviZ 0.x notes in the user's cache that it has warned today
    run(
        sys.executable,
        "-W",
        "error",
        "-c",
        f"{LOAD}; arviz_data.import_arviz()",
        str(ROOT / "pyro_hybrid" / "inference"),
        cache=tmp_path,
    )


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [
        ("h5netcdf", "netcdf", lambda data: adapter.save(data, "posterior.nc")),
        ("h5netcdf", "netcdf", lambda data: adapter.load("posterior.nc")),
        ("pandas", "tables", adapter.summary),
    ],
    ids=["save", "load", "summary"],
)
def test_a_missing_package_is_named_with_the_extra_that_installs_it(
    module: str, extra: str, call: Any, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"expected the module {module}; .*\[{extra}\]"):
        call(data)


def test_pareto_k_says_nothing_of_weights_that_are_nearly_equal() -> None:
    random = np.random.default_rng(0)
    log_weights = 1e-3 * random.standard_cauchy(size=(50, 200)).clip(-10.0, 10.0)
    weights = np.exp(log_weights)
    assert (weights.sum(-1) ** 2 / (weights**2).sum(-1) > 0.9998 * 200).all()
    assert (adapter.pareto_k(log_weights) == 0.0).all()
    assert (adapter.pareto_k(1e3 * log_weights) > 0.7).mean() > 0.5  # the same tail, and it matters


def spoil(arguments: dict[str, Any], group: str, name: str, value: Any) -> dict[str, Any]:
    """The same arguments with one array replaced."""
    groups = arguments["groups"]
    return {**arguments, "groups": {**groups, group: {**groups.get(group, {}), name: value}}}


@pytest.mark.parametrize(
    ("group", "name", "value", "message"),
    [
        ("posteriors", "omega", np.ones((1, 9)), r"groups among .*'posteriors'.*Rename"),
        (
            "posterior",
            "omega",
            [[1.0]],
            r"posterior\['omega'\] to be a numpy array; got list\. Convert",
        ),
        (
            "posterior",
            "omega",
            np.ones((DRAWS, TASKS, 1)),
            r"axes \('chain', 'draw', 'task', 'physics'\); got shape",
        ),
        (
            "posterior",
            "omega",
            np.ones((1, DRAWS, 9, 1)),
            r"3 along axis 'task' of posterior\['omega'\]; got 9",
        ),
        (
            "posterior",
            "omega",
            np.ones((1, 9, TASKS, 1)),
            r"along axis 'draw' of posterior\['unknown'\]; got 200",
        ),
        (
            "log_likelihood",
            "x",
            np.ones((1, DRAWS, TASKS, 9)),
            r"4 along axis 'shot' of log_likelihood\['x'\]; got 9",
        ),
        ("log_likelihood", "x", np.ones(DRAWS), r"axes \('chain', 'draw'\); got shape \(200,\)"),
        ("constant_data", "noise", np.array(0.1), r"a single number belongs in attrs"),
    ],
)
def test_a_wrong_array_is_named_with_what_to_do(
    arguments: dict[str, Any], group: str, name: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        adapter.to_inference_data(**spoil(arguments, group, name, value))


def test_nothing_to_hand_over_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one array; got none"):
        adapter.to_inference_data({"posterior": {}}, {}, {}, {})


@pytest.mark.parametrize("value", [None, True, [1]])
def test_an_attribute_that_netcdf_cannot_store_is_refused(
    arguments: dict[str, Any], value: object
) -> None:
    with pytest.raises(
        ValueError, match=rf"attrs\['seed'\] as text or number; got {type(value).__name__}"
    ):
        adapter.to_inference_data(**{**arguments, "attrs": {"seed": value}})


def test_summary_names_what_is_wrong(data: Any) -> None:
    with pytest.raises(ValueError, match=r"prob between 0 and 1; got 90"):
        adapter.summary(data, prob=90)
    with pytest.raises(
        ValueError, match=r"var_names among \['omega', 'unknown'\]; got \['gamma'\]"
    ):
        adapter.summary(data, ["gamma"])
    single = adapter.to_inference_data({"posterior": {"noise": np.ones((1, 1))}}, {}, {}, {})
    with pytest.raises(ValueError, match="at least two draws of 'noise'; got 1"):
        adapter.summary(single)


# The other ArviZ


@pytest.fixture
def other_python() -> str:
    """The interpreter that has ArviZ 1.x and no torch."""
    if INNER in os.environ:
        pytest.skip("this is the subprocess under ArviZ 1.x already")
    named = os.environ.get("PYRO_HYBRID_ARVIZ1_PYTHON")
    path = Path(named) if named else ROOT / ".venv-arviz1" / "bin" / "python"
    if not path.exists():
        pytest.skip(
            f"no Python with ArviZ 1.x at {path}: run `make test-arviz1`, or set PYRO_HYBRID_ARVIZ1_PYTHON"
        )
    return str(path)


EXCHANGE = """
import sys
sys.path.insert(0, sys.argv[1])
import test_arviz_adapter as t
assert int(t.arviz.__version__.split(".")[0]) >= 1 and "torch" not in sys.modules
theirs = t.adapter.load(sys.argv[2])
t.assert_same_content(theirs, t.make_arguments())
assert theirs["posterior"].attrs["inference_library"] == "pyro_hybrid"
t.adapter.save(t.adapter.to_inference_data(**t.make_arguments()), sys.argv[3])
t.adapter.summary(theirs).to_csv(sys.argv[4], float_format="%.17g")
"""


def test_all_of_this_file_holds_under_arviz_one_without_torch(other_python: str) -> None:
    major = run(
        other_python,
        "-c",
        "import arviz, importlib.util as u; print(arviz.__version__, u.find_spec('torch'))",
    )
    assert int(major.split(".")[0]) >= 1, major
    assert major.split()[1] == "None", major
    pytest_alone = [
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "-c",
        os.devnull,
        "-p",
        "no:cacheprovider",
        "-W",
        "error",
    ]
    report = run(other_python, *pytest_alone, f"--rootdir={ROOT}", __file__)
    assert "passed" in report


def test_both_versions_read_each_others_files_and_print_the_same_table(
    data: Any, arguments: dict[str, Any], other_python: str, tmp_path: Path
) -> None:
    pandas = pytest.importorskip("pandas")
    ours, theirs, table = (str(tmp_path / name) for name in ("ours.nc", "theirs.nc", "table.csv"))
    adapter.save(data, ours)
    run(
        other_python, "-W", "error", "-c", EXCHANGE, str(Path(__file__).parent), ours, theirs, table
    )
    assert_same_content(adapter.load(theirs), arguments)
    expected = adapter.summary(data)
    pandas.testing.assert_frame_equal(pandas.read_csv(table, index_col=0), expected, rtol=1e-14)
