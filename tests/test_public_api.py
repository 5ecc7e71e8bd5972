"""What `import pyro_hybrid as ph` offers: names, docstrings, messages, and nothing done behind one's back."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import HANGING

import pyro_hybrid as ph
from pyro_hybrid.data.segments import to_segments
from pyro_hybrid.diagnostics.ranks import LatentCalibration
from pyro_hybrid.inference import arviz_data as _arviz
from pyro_hybrid.inference.importance import ParetoK
from pyro_hybrid.scores.check import Check

ROOT = Path(__file__).parents[1]
DESIGNED = {
    "AmortizedGuide",
    "Certificate",
    "Episode",
    "Encoder",
    "GaussNewton",
    "HybridModel",
    "Mixing",
    "Posterior",
    "Residual",
    "SVI",
    "SetEncoder",
    "SupportPrior",
    "Tasks",
    "UnconditionalPrior",
    "certify",
    "disentangle",
    "draws",
    "families",
    "mcc",
    "meta_train",
    "predict",
    "solve",
    "systems",
    "to_arviz",
}
FAMILIES = ("Beta", "Gamma", "LogNormal", "Normal", "VonMises")
METHODS = {
    "Tasks": ("from_trajectories", "split", "batches", "episode"),
    "Episode": ("plate", "support", "query", "belief"),
    "Posterior": ("latents", "draws", "predict", "certify", "to_arviz", "report", "save", "load"),
    "Fit": ("loss",),
    "SVI": ("step", "evaluate_loss"),
    "Shots": ("values", "times", "initial", "observed", "scored", "inputs"),
    "SupportPrior": ("belief", "population"),
    "Certificate": ("verdict", "conditions", "plot", "to_dict"),
}
PUBLIC = {
    name: getattr(ph, name)
    for name in ph.__all__
    if not isinstance(getattr(ph, name), types.ModuleType)
}
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(ph.__path__, "pyro_hybrid.")
    if not m.name.endswith("__main__")
)


def in_order(names: list[str]) -> list[str]:
    """CONSTANTS, then Classes, then functions, each by the alphabet."""
    return sorted(
        names, key=lambda n: (0 if n.isupper() else 1 if n.lstrip("_")[0].isupper() else 2, n)
    )


def run(*arguments: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=HANGING,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- names and docstrings ------------------------------------------------------------------------


def test_every_name_of_the_design_is_there() -> None:
    assert set(ph.__all__) >= DESIGNED and all(hasattr(ph, name) for name in ph.__all__)
    assert all(hasattr(ph.families, name) for name in FAMILIES)


@pytest.mark.parametrize("name", METHODS)
def test_classes_have_the_members_of_the_design(name: str) -> None:
    given = {*dir(getattr(ph, name)), *getattr(getattr(ph, name), "__annotations__", ())}
    assert given >= set(METHODS[name])


@pytest.mark.parametrize("module", MODULES)
def test_no_package_shadows_its_submodules(module: str) -> None:
    """``import a.b.c as m`` follows attributes, and must end at a module."""
    found = ph
    for part in module.split(".")[1:]:
        found = getattr(found, part)
    assert isinstance(found, types.ModuleType) and found.__name__ == module


NAMED = [m for m in MODULES if hasattr(importlib.import_module(m), "__all__")]


def test_only_rooms_have_no_names() -> None:
    assert all(hasattr(importlib.import_module(m), "__path__") for m in set(MODULES) - set(NAMED))


@pytest.mark.parametrize("module", ["pyro_hybrid", *NAMED])
def test_names_are_sorted_and_exist(module: str) -> None:
    found = importlib.import_module(module)
    assert list(found.__all__) == in_order(list(found.__all__))
    assert all(hasattr(found, name) for name in found.__all__) and len(set(found.__all__)) == len(
        found.__all__
    )
    assert found.__doc__ and found.__doc__.strip().endswith((".", ":", "``"))


def test_the_package_file_holds_names_and_nothing_else() -> None:
    body = ast.parse((ROOT / "pyro_hybrid" / "__init__.py").read_text(encoding="utf-8")).body
    assert all(isinstance(node, ast.ImportFrom | ast.Assign | ast.Expr) for node in body)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_says_what_it_is_for(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    first = text.splitlines()[0] if text else ""
    assert first.endswith((".", ":", "?")) and len(first) > 15, f"{name}: {first!r}"


@pytest.mark.parametrize("name", sorted(n for n, v in PUBLIC.items() if inspect.isclass(v)))
def test_every_public_method_says_what_it_does(name: str) -> None:
    own = {
        key: value
        for key, value in vars(PUBLIC[name]).items()
        if not key.startswith("_")
        and key != "forward"
        and (inspect.isfunction(value) or isinstance(value, property | classmethod))
    }
    documented = {
        key: inspect.getdoc(value if isinstance(value, property) else getattr(PUBLIC[name], key))
        for key, value in own.items()
    }
    assert all(documented.values()), documented


# ---- imports -------------------------------------------------------------------------------------


def test_importing_changes_no_global_setting() -> None:
    code = """
import json, logging, random, sys, warnings
import numpy, torch, pyro, torchdiffeq, tqdm.auto
import pandas, scipy.stats, sklearn.decomposition, jaxtyping
def settings():
    return {
        "pyro": repr(sorted(pyro.settings.get().items())),
        "store": sorted(pyro.get_param_store().keys()),
        "handlers of Pyro": len(pyro.poutine.runtime._PYRO_STACK),
        "exceptions of NUTS": sorted(pyro.ops.integrator._EXCEPTION_HANDLERS),
        "dtype": str(torch.get_default_dtype()), "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "validation": torch.distributions.Distribution._validate_args,
        "random": [hash(random.getstate()), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()],
        "warnings": repr(warnings.filters), "numpy": repr(numpy.geterr()),
        "logging": [repr(logging.getLogger().handlers), logging.getLogger().level,
                    logging.getLogger("pyro_hybrid").handlers],
        "hooks": [repr(sys.excepthook), repr(sys.displayhook)],
    }
before = settings()
import pyro_hybrid
after = settings()
changed = [name for name in before if before[name] != after[name]]
print(json.dumps({"changed": changed, "plots": [m for m in ("arviz", "matplotlib.pyplot") if m in sys.modules]}))
"""
    out = run("-W", "error", "-c", code)
    assert json.loads(out) == {"changed": [], "plots": []}  # and nothing else was printed


# What only some functions need, and they import.
LATER = (
    "arviz",
    "h5netcdf",
    "h5py",
    "matplotlib",
    "pandas",
    "pooch",
    "scipy.integrate",
    "scipy.optimize",
    "scipy.stats",
    "sklearn",
    "torchdiffeq",
    "xarray",
)


def test_importing_leaves_to_functions_what_only_they_need() -> None:
    code = f"import json, sys, pyro_hybrid; print(json.dumps([m for m in {LATER} if m in sys.modules]))"
    assert json.loads(run("-W", "error", "-c", code)) == []


# ---- messages ------------------------------------------------------------------------------------


def episode(**changes: Any) -> ph.Episode:
    given: dict[str, Any] = {
        "times": torch.arange(3.0),
        "values": torch.zeros(2, 2, 3, 1),
        "initial": torch.zeros(2, 2, 1),
    }
    return ph.Episode(None, ph.Shots.from_tensors(**{**given, **changes}))


def encoder() -> ph.SetEncoder:
    return ph.SetEncoder(num_sensors=1, num_times=3, num_features=4)


def prior() -> ph.SupportPrior:
    return ph.SupportPrior(encoder(), omega=ph.families.Normal(1))


def tasks(values: torch.Tensor) -> ph.Tasks:
    return ph.Tasks.from_trajectories(torch.arange(3.0), values, num_support=1)


class Asked(ph.HybridModel):
    """A model with a prior and no program."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = prior()


def answer() -> ph.Posterior:
    model = Asked()
    return ph.Posterior(model, ph.AmortizedGuide(model, encoder()))


class Empty(ph.HybridModel):
    """A model whose author forgot the program."""


def arviz_data() -> Any:
    return _arviz.to_inference_data({"posterior": {"z": torch.zeros(1, 2).numpy()}}, {}, {}, {})


# What a newcomer gets wrong first, and the words that must come back.
MISUSES: dict[str, tuple[Callable[[], object], str]] = {
    "AmortizedGuide": (
        lambda: ph.AmortizedGuide(prior(), encoder()),
        r"expected a model whose attribute `prior` is a SupportPrior.*got SupportPrior with prior = NoneType",
    ),
    "Certificate": (
        lambda: ph.Certificate([Check("noise (i)", "holds")])["fit"],
        r"'fit' isn't among \['noise \(i\)'\]",
    ),
    "Episode": (
        lambda: to_segments(
            episode(values=torch.zeros(2, 2, 9, 1), times=torch.arange(9.0)).query, 2
        ),
        r"expected measured states at all times.*Pass initial= with a time axis to Tasks",
    ),
    "Gauge": (
        lambda: ph.Gauge(0),
        r"expected components of 1 or more; got 0\. Pass the number",
    ),
    "HybridField": (
        lambda: ph.HybridField(torch.ones(2), lambda unknown: unknown),  # type: ignore[arg-type]
        r"expected known and force that are functions; got Tensor and function\. Write known\(physics",
    ),
    "HybridModel": (lambda: Empty()(episode()), 'missing the required "forward" function'),
    "Encoder": (
        lambda: ph.Encoder(lambda shots: shots),  # type: ignore[arg-type]
        r"expected an encoder: a module with the attribute `num_features`.*got function\. Pass ph\.SetEncoder",
    ),
    "GaussNewton": (
        lambda: ph.GaussNewton(0),
        r"expected num_iterations as a whole number of 1 or more; got 0",
    ),
    "Posterior": (
        lambda: ph.Posterior(Empty(), encoder()),  # type: ignore[arg-type]
        r"expected a guide of this model; got SetEncoder\. Build it with ph\.AmortizedGuide",
    ),
    "Mixing": (
        lambda: ph.Mixing(3, 2)(torch.zeros(4, 2)),
        r"expected 3 components in the last axis; got \(4, 2\)\. Build the Mixing",
    ),
    "Ramp": (
        lambda: ph.Ramp(-1.0),
        r"expected final to be a number in \[0, inf\); got -1.0",
    ),
    "Residual": (
        lambda: ph.Residual(2, 3, 1).given(torch.zeros(4, 1, 2)),
        r"expected 3 latents in the last axis; got \(4, 1, 2\)",
    ),
    "SVI": (
        lambda: ph.SVI(lambda e: None, lambda e: None, torch.optim.SGD([torch.zeros(1)], 0.1)),
        r"expected a model that is an nn\.Module.*got function\. Derive it from ph\.HybridModel",
    ),
    "SetEncoder": (
        lambda: encoder()(episode(values=torch.zeros(2, 2, 4, 1), times=torch.arange(4.0)).query),
        r"expected trajectories of \(time, sensor\) = \(3, 1\); got \(4, 1\)\. Build the SetEncoder",
    ),
    "Shots": (
        lambda: ph.Shots.from_tensors(torch.arange(3.0)),
        r"expected values, initial states or inputs; got none of them\. Pass one of them",
    ),
    "SupportPrior": (
        lambda: ph.SupportPrior(encoder()),
        r"expected at least one site; got none\. Name one",
    ),
    "Tasks": (
        lambda: tasks(torch.full((2, 3, 3, 1), torch.nan)),
        r"expected finite values; got nan at index \(0, 0, 0, 0\).*pass observed=",
    ),
    "UnconditionalPrior": (
        lambda: ph.UnconditionalPrior(omega=torch.distributions.Normal(0.0, 1.0)),
        r"expected a family from ph\.families for 'omega'; got Normal\. For example omega=ph\.families\.Normal\(2\)",
    ),
    "CalibrationReport": (
        lambda: ph.CalibrationReport(
            [LatentCalibration("rate", "holds", "fine", (), (), 0.0, 1.0, 0.5)],
            Check("weights", "holds"),
            torch.zeros(1, 1).numpy(),
            ParetoK(torch.zeros(1).numpy(), torch.ones(1).numpy()),
            1,
            99,
        )["drag"],
        r"'drag' isn't among \['rate'\]",
    ),
    "certify": (
        lambda: ph.certify(Empty(), Empty(), tasks(torch.zeros(1, 3, 3, 1))),
        r"expected two tasks or more; got 1\. Identifiability is about what differs between systems",
    ),
    "check_calibration": (
        lambda: ph.check_calibration(Empty(), Empty(), episode()),  # type: ignore[arg-type]
        r"expected tasks to be a data set \(ph\.Tasks\); got Episode\. Make one with ph\.Tasks",
    ),
    "check_hybrid_model": (
        lambda: ph.check_hybrid_model(Empty(), Empty(), episode()),
        r"expected an episode of whole trajectories .*support: none.*Pass tasks\[:3\]\.episode\(\)",
    ),
    "disentangle": (
        lambda: ph.disentangle([1.0, 2.0]),
        r"to be a torch tensor or a numpy array; got list\. Convert it",
    ),
    "draws": (
        lambda: ph.draws(Empty(), Empty(), episode(), 0),
        "expected num_samples as a whole number of 1 or more; got 0",
    ),
    "families": (
        lambda: ph.families.Normal(0),
        r"expected Normal\(n\) with at least one component; got 0",
    ),
    "load": (
        lambda: ph.load("/nowhere", Empty(), Empty()),
        r"expected /nowhere with manifest\.json that can be read; got an error",
    ),
    "load_arviz": (lambda: ph.load_arviz("/nowhere/posterior.nc"), r"/nowhere/posterior\.nc"),
    "identify": (
        lambda: ph.identify(torch.nn.Linear(1, 1), tasks(torch.zeros(2, 3, 3, 1))),  # type: ignore[arg-type]
        "expected a HybridModel; got Linear. Derive the model from ph.HybridModel.",
    ),
    "fix_gauge": (
        lambda: ph.fix_gauge(answer(), tasks(torch.zeros(2, 3, 3, 1))),
        r"expected a model with one ph\.Gauge; got Asked with 0\. Assign it in __init__",
    ),
    "compute_evidence": (
        lambda: ph.compute_evidence(answer(), ph.GaussNewton(segments=[7])),  # type: ignore[arg-type]
        r"expected segments as a tuple of whole numbers of 1 or more; got \[7\]",
    ),
    "refine_weights": (
        lambda: ph.refine_weights(answer(), tasks(torch.zeros(2, 3, 3, 1))),
        r"expected a model with a network in its attribute 'residual'; got Asked\. Pass network=",
    ),
    "rescale_intervals": (
        lambda: ph.rescale_intervals(answer(), tasks(torch.zeros(2, 3, 3, 1))),
        r"expected a prior with computed evidence; got an encoder alone\. Compute evidence first",
    ),
    "interpolate": (
        lambda: ph.interpolate(torch.arange(3.0), torch.zeros(3)),
        r"expected times .* of as many times; got \(3,\) and \(3,\)\. Give each input an axis",
    ),
    "mcc": (
        lambda: ph.mcc(torch.randn(9, 2), torch.randn(8, 2)),
        r"one row per task in both estimate and true_latents; got 9 and 8 rows",
    ),
    "meta_train": (
        lambda: ph.meta_train(Empty(), Empty(), tasks(torch.zeros(2, 3, 3, 1)), num_steps=0),
        "expected num_steps to be an integer of 1 or more; got 0",
    ),
    "models": (
        lambda: ph.models.MetaHybridVAE(ph.systems.Pendulum())(
            replace(episode(), support=episode().query)
        ),
        r"expected trajectories of \(time, sensor\) = \(50, 2\); got \(3, 1\)",
    ),
    "projection_penalty": (
        lambda: ph.projection_penalty(torch.ones(4, 1, 2), [torch.ones(4, 1, 2)]),
        r"expected a correction .* of two samples or more; got \(4, 1, 2\)\. Evaluate both terms at many states",
    ),
    "pareto_k": (
        lambda: ph.pareto_k(Empty(), Empty(), episode(), 0),
        "expected num_samples as a whole number of 1 or more; got 0",
    ),
    "predict": (
        lambda: ph.predict(Empty(), episode(), 0),
        "expected num_samples as a whole number of 1 or more; got 0",
    ),
    "save_arviz": (
        lambda: ph.save_arviz(arviz_data(), "/nowhere/posterior.nc"),
        r"/nowhere/posterior\.nc",
    ),
    "solve": (
        lambda: ph.solve(lambda t, y: y, (torch.ones(2, 2),), torch.tensor([0.0, 2.0, 1.0])),
        r"expected two or more strictly increasing times; got \[0\.0, 2\.0, 1\.0\]\. Sort the times",
    ),
    "step_error": (
        lambda: ph.step_error(lambda episode: None, episode()),
        "expected a program that observes something; got no observed sample site",
    ),
    "summary": (
        lambda: ph.summary(arviz_data(), prob=90.0),
        r"expected prob between 0 and 1; got 90\.0\. For a 90% interval pass prob=0\.9",
    ),
    "systems": (
        lambda: ph.systems.Pendulum().simulate(1, 1, seed=0),
        "expected at least one task of two shots; got 1 of 1",
    ),
    "to_arviz": (
        lambda: ph.to_arviz(Empty(), Empty(), episode(values=None)),
        r"expected a query with values; got values=None\. There is no posterior without data",
    ),
}
RESULTS = {
    "Report",
    "CheckpointError",
    "ContractError",
    "Fit",
    "SolverError",
    "TrainingError",
}  # handed out, not called


def messages() -> None:
    """Commit every misuse and print what was said, as JSON."""
    said = {}
    for name, (misuse, _) in MISUSES.items():
        try:
            misuse()
        except Exception as error:  # whatever comes is what a user would see
            said[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(said))


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """The messages under ``python -O``, without the type checks that pytest adds."""
    return json.loads(
        run("-O", "-c", "import test_public_api; test_public_api.messages()").splitlines()[-1]
    )


def test_every_public_name_is_misused_below() -> None:
    assert set(MISUSES) | RESULTS == set(ph.__all__)


@pytest.mark.parametrize("name", sorted(MISUSES))
def test_a_misuse_is_answered_with_what_was_expected_what_came_and_what_to_do(
    name: str, said: dict[str, str]
) -> None:
    assert name in said, f"{name} accepted its misuse"
    assert re.search(MISUSES[name][1], said[name], re.DOTALL), said[name]
    assert not said[name].startswith("AssertionError")
