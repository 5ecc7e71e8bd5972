"""Start every test from the same random numbers, and fail a test that changes global settings."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pyro
import pytest
import torch
from hypothesis import HealthCheck, settings

FIGURES = pytest.StashKey[dict[str, dict[str, float]]]()
Note = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--figures",
        type=Path,
        help="write the measurements of the reliability tests to this JSON file",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = {}
    settings.register_profile(
        "no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("no clock")  # machines are shared


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--figures")
    if path:
        versions = {
            "torch": torch.__version__,
            "pyro-ppl": pyro.__version__,
            "numpy": np.__version__,
        }
        rows = dict(sorted(session.config.stash[FIGURES].items()))
        path.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n")


@pytest.fixture
def without_jaxtyping() -> Iterator[None]:
    """Check shapes and dtypes by the library's own words alone, as for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Note:
    """Note measurements for the docs: ``figure("row", kills=200, worst=0.3)``.

    Whole numbers are added up over tests; of others the largest is kept.
    """

    def note(row: str, **numbers: float) -> None:
        figures = request.config.stash[FIGURES].setdefault(row, {})
        for name, value in numbers.items():
            if isinstance(value, int):
                figures[name] = figures.get(name, 0) + value
            else:
                figures[name] = max(figures.get(name, value), value)

    return note


def global_settings() -> dict[str, Any]:
    """Read the settings that tests and library may read but not change."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "number of threads": torch.get_num_threads(),
        "number of interop threads": torch.get_num_interop_threads(),
        "gradients on": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "validation of torch distributions": torch.distributions.Distribution._validate_args,
        "handlers in force": len(pyro.poutine.runtime._PYRO_STACK),
        "parameters in the store": sorted(pyro.get_param_store().keys()),
        **{f"pyro {name}": value for name, value in pyro.settings.get().items()},
    }


def restore(settings: dict[str, Any]) -> None:
    """Restore settings, so that a test which changed them doesn't fail the tests after it."""
    torch.set_default_dtype(settings["default dtype"])
    torch.set_default_device(settings["default device"])
    torch.set_num_threads(settings["number of threads"])
    torch.set_grad_enabled(settings["gradients on"])
    torch.autograd.set_detect_anomaly(settings["anomaly detection"])
    torch.use_deterministic_algorithms(settings["deterministic algorithms"])
    torch.distributions.Distribution.set_default_validate_args(
        settings["validation of torch distributions"]
    )
    pyro.settings.set(
        **{name[5:]: value for name, value in settings.items() if name.startswith("pyro ")}
    )
    pyro.clear_param_store()


@pytest.fixture(autouse=True)
def leaves_no_trace() -> Iterator[None]:
    """Seed before a test, restore random states after it, and fail it if a setting of torch or Pyro has changed."""
    before = global_settings()
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.random.get_rng_state()
    pyro.set_rng_seed(0)
    yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.random.set_rng_state(torch_state)
    after = global_settings()
    changed = {
        name: f"{before[name]} -> {after[name]}" for name in before if after[name] != before[name]
    }
    if changed:
        restore(before)
        pytest.fail(f"the test changed global settings and left them so: {changed}", pytrace=False)
