"""Nothing in the repository loads a pickle, every dependency is pinned, and an audit that checked nothing fails."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from scripts import HANGING, load

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for folder in ("pyro_hybrid", "examples", "docs")
    for path in (ROOT / folder).rglob("*.py")
    if "_build" not in path.parts
)
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
audit = load(ROOT / "tests" / "audit.py")

# ---- what a file may not do: run code that another file holds ------------------------------------

PICKLERS = ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
ALWAYS = (
    "eval",
    "exec",
    "pandas.read_pickle",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "yaml.unsafe_load_all",
    "yaml.full_load_all",
)


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The full name of what is called, whatever it was imported as."""
    head, dot, rest = ast.unparse(node).partition(".")
    return names.get(head, head) + dot + rest


def imported(tree: ast.Module) -> dict[str, str]:
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                one.asname or one.name.partition(".")[0]: one.name
                if one.asname
                else one.name.partition(".")[0]
                for one in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return names


def given(call: ast.Call, name: str) -> object:
    """A keyword's value if it is written out, ... if it is computed, None if it isn't there."""
    for keyword in call.keywords:
        if keyword.arg in (name, None):
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
    return None


def unsafe(call: ast.Call, names: dict[str, str]) -> bool:
    name = dotted(call.func, names)
    if name in ALWAYS or name.partition(".")[0] in PICKLERS:
        return True
    if name == "torch.load":
        return given(call, "weights_only") is not True
    if name in ("numpy.load", "numpy.lib.format.read_array"):
        return given(call, "allow_pickle") not in (None, False) or len(call.args) > 2
    if name == "yaml.load":
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        return not any(ast.unparse(value).endswith("SafeLoader") for value in values)
    owner, _, method = name.rpartition(".")
    return method == "load" and re.search(r"param_?store|optim", owner, re.IGNORECASE) is not None


def findings(source: str) -> list[int]:
    """Lines that load, or import what loads, a pickle, or run a string."""
    tree = ast.parse(source)
    names, lines = imported(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [one.name for one in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            if not isinstance(node, ast.ImportFrom) or not node.level:
                lines += [node.lineno for module in modules if module.partition(".")[0] in PICKLERS]
        elif isinstance(node, ast.Call) and unsafe(node, names):
            lines.append(node.lineno)
    return sorted(set(lines))


UNSAFE = """
import pickle
import joblib as jl
from dill import loads
import torch, yaml, pyro
import torch as t
import numpy as np
from torch import load as read
from numpy import load
from pyro.params.param_store import ParamStoreDict
a = pickle.load(file)
b = pickle.loads(data)
c = jl.load("model")
d = loads(data)
e = torch.load("model.pt")
f = torch.load("model.pt", weights_only=False)
g = t.load("model.pt", map_location="cpu", weights_only=safe)
h = read("model.pt")
i = torch.load("model.pt", **options)
j = np.load("x.npz", allow_pickle=True)
k = load("x.npz", None, True)
l = np.load("x.npz", allow_pickle=pickles)
m = yaml.load(text)
n = yaml.load(text, Loader=yaml.Loader)
o = yaml.unsafe_load(text)
p = eval("1 + 1")
exec(code)
pyro.get_param_store().load("store")
ParamStoreDict().load("store")
store = pyro.get_param_store(); param_store = store; param_store.load("store")
optimizer.load("state")
adam_optim = pyro.optim.Adam({}); adam_optim.load("state")
"""
SAFE = """
import json
import numpy as np
import pickletools
import torch
import yaml
from torch import load
from . import pickle
a = torch.load("model.pt", weights_only=True)
b = load("model.pt", map_location="cpu", weights_only=True)
c = np.load("x.npz")
d = np.load("x.npz", allow_pickle=False)
e = yaml.safe_load(text)
f = yaml.load(text, Loader=yaml.SafeLoader)
g = json.load(file)
model.eval()
optimizer.load_state_dict(state)
h = "pickle.load(file)"  # pickle.load(file)
"""


def test_there_are_files_to_look_at() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert names > {
        "pyro_hybrid/training/loop.py",
        "examples/pendulum.py",
        "docs/conf.py",
        "docs/results/table.py",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_loads_a_pickle_or_runs_a_string(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    found = [
        f"{path.relative_to(ROOT)}:{n}: {source.splitlines()[n - 1].strip()}"
        for n in findings(source)
    ]
    assert not found, "\n".join(["unsafe to read from a file:", *found])


def test_every_planted_line_is_found_by_its_number() -> None:
    harmless = ("import torch", "import numpy", "from torch", "from numpy", "from pyro")
    planted = [
        n for n, line in enumerate(UNSAFE.splitlines(), 1) if line and not line.startswith(harmless)
    ]
    assert findings(UNSAFE) == planted


def test_safe_lines_are_left_alone() -> None:
    assert findings(SAFE) == []


def test_a_planted_line_fails_by_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted.py").write_text(
        "import torch\n\nstate = torch.load('state.pt')\n", encoding="utf-8"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    with pytest.raises(AssertionError, match=r"planted\.py:3: state = torch\.load\('state\.pt'\)"):
        test_no_file_loads_a_pickle_or_runs_a_string(tmp_path / "planted.py")


# ---- what is installed ---------------------------------------------------------------------------

Requirements = list[tuple[str, str]]


def requirements() -> Requirements:
    listed = [
        *PROJECT["dependencies"],
        *(one for extra in PROJECT["optional-dependencies"].values() for one in extra),
    ]
    others = [one for one in listed if not one.startswith("pyro_hybrid[")]  # an extra of its own
    return [re.fullmatch(r"([\w.-]+)(.*)", one).groups() for one in others]


def test_constraints_are_exact_versions_each_name_once() -> None:
    assert len(audit.pins(CONSTRAINTS)) > 50
    for bad, message in (
        ("torch>=2", "line 1: expected name==version"),
        ("a==1\nA==2", "line 2: A is pinned twice"),
        ("torch==2.*", "expected name==version"),
        ("-e .", "expected name==version"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            audit.pins(bad)


@pytest.mark.parametrize(("name", "versions"), requirements())
def test_every_dependency_is_pinned_within_its_range(name: str, versions: str) -> None:
    from packaging.specifiers import SpecifierSet

    pinned = audit.pins(CONSTRAINTS)
    assert audit.canonical(name) in pinned, (
        f"{name} is in pyproject.toml and not in constraints.txt"
    )
    assert pinned[audit.canonical(name)] in SpecifierSet(versions), (
        f"{name} is pinned outside of {versions}"
    )


def test_the_extras_are_all_looked_at() -> None:
    names = {name for name, _ in requirements()}
    assert names > {"torch", "safetensors", "pytest", "jax", "sphinx", "pip-audit"}


# ---- the audit -----------------------------------------------------------------------------------

PINNED = {"torch": "2.13.0", "pyro-ppl": "1.9.2"}


def report(**changes: object) -> str:
    torch = {"name": "torch", "version": "2.13.0", "vulns": []}
    pyro = {"name": "pyro_ppl", "version": "1.9.2", "vulns": []}
    return json.dumps({"dependencies": [torch, pyro | changes], "fixes": []})


def test_an_audit_that_looked_everything_up_and_found_nothing_passes() -> None:
    assert audit.complaints(report(), "", PINNED) == []


def test_an_audit_names_what_is_vulnerable() -> None:
    found = report(
        vulns=[{"id": "PYSEC-1", "fix_versions": ["2.0"]}, {"id": "PYSEC-2", "fix_versions": []}]
    )
    assert audit.complaints(found, "", PINNED) == [
        "pyro-ppl==1.9.2: PYSEC-1, mended in 2.0.",
        "pyro-ppl==1.9.2: PYSEC-2, mended in no version yet.",
    ]


@pytest.mark.parametrize(
    ("output", "errors", "said"),
    [
        ("", "Traceback ...\nrequests.exceptions.ProxyError: no route", "ProxyError: no route"),
        (
            "",
            "ERROR:pip_audit._cli:torch: Dependency not found",
            "so none counts as checked: ERROR:pip_audit",
        ),
        ("", "", "nothing was said"),
        (
            '{"dependencies": [], "fixes": []}',
            "No known vulnerabilities found",
            "torch==2.13.0 was not looked up.",
        ),
        (
            '{"dependencies": [{"name": "torch", "skip_reason": "not found"}]}',
            "",
            "torch==2.13.0 was not looked up.",
        ),
        (report(version="1.9.1"), "", "pyro-ppl==1.9.2 was not looked up."),
    ],
    ids=["no network", "not found", "silence", "nothing", "skipped", "another version"],
)
def test_an_audit_that_did_not_look_everything_up_fails(
    output: str, errors: str, said: str
) -> None:
    assert any(said in line for line in audit.complaints(output, errors, PINNED))


def command(pip_audit: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`make audit` with another pip-audit."""
    (folder / "pip_audit.py").write_text(pip_audit, encoding="utf-8")
    return subprocess.run(
        [sys.executable, ROOT / "tests" / "audit.py"],
        capture_output=True,
        text=True,
        timeout=HANGING,
        env={"PYTHONPATH": str(folder)},
    )


@pytest.mark.parametrize(
    "pip_audit", ["print('No known vulnerabilities found')", "raise OSError('no network')"]
)
def test_the_command_fails_where_pip_audit_checks_nothing(pip_audit: str, tmp_path: Path) -> None:
    done = command(pip_audit, tmp_path)
    assert done.returncode == 1 and done.stdout.startswith(
        "Not every version could be looked up"
    ), done.stdout


def test_the_command_says_how_many_versions_were_looked_up(tmp_path: Path) -> None:
    pinned = audit.pins(CONSTRAINTS)
    found = {
        "dependencies": [
            {"name": name, "version": version, "vulns": []} for name, version in pinned.items()
        ]
    }
    done = command(f"print({json.dumps(found)!r})", tmp_path)
    assert done.returncode == 0
    assert done.stdout == f"{len(pinned)} pinned versions looked up: no known vulnerabilities.\n"
    failed = command(f"print({json.dumps(found)!r}); raise SystemExit(2)", tmp_path)
    assert failed.returncode == 1 and failed.stdout.startswith("pip-audit ended with 2")


def test_make_help_says_that_the_audit_needs_a_network() -> None:
    (line,) = re.findall(
        r"^audit:.*## (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert "needs a network" in line


def test_the_security_page_names_no_place_on_this_machine_and_no_registry() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert not re.search(
        r"https?://|\w\.org\b|\w\.com\b|(?<![\w.])/(work|home|tmp|opt|usr)\b", page
    )
    assert all(
        word in page for word in ("safetensors", "weights_only=True", "SHA-256", "make audit")
    )
