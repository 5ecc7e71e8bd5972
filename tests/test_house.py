"""Rules of the house: sizes, openings of docstrings, layers, private names, and errors that are raised."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from house import PACKAGE, Figure, Source, hidden_state, main, measure, num_lines, odd_docstrings

ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))

# ---- the figures -----------------------------------------------------------------------------


@pytest.mark.parametrize("figure", measure(), ids=lambda figure: figure.name)
@pytest.mark.xfail(reason="being reached room by room", strict=False)
def test_a_figure_of_the_package_is_within_its_limit(figure: Figure) -> None:
    assert figure.is_met, str(figure)


EXAMPLE = '''
"""A module."""

CONSTANT = 1  # a comment is no code


def long(x):
    """Double a number.

    In as many words as it takes.
    """
    y = (
        2 * x
    )
    return y
'''


def test_sizes_count_neither_docstrings_nor_comments_nor_layout() -> None:
    source = Source("example.py", EXAMPLE)
    (function,) = source.functions()
    assert num_lines(function) == 4
    assert source.num_tokens(function) == len("def long ( x ) : y = ( 2 * x ) return y".split())
    assert len(source.tokens) == 3 + source.num_tokens(function)
    assert len(set(source.tokens)) == 1 + 5


@pytest.mark.parametrize(
    ("opening", "is_odd"),
    [
        ("Stop after this many steps.", False),
        ("Population of a task's latents.", False),
        ("Iterate over tasks.", False),
        ("Theory of the family.", False),
        ("What Normal and LogNormal share.", True),
        ("Inside, nothing is read twice.", True),
        ("How far two vectors depend on each other.", True),
        ("All that is known.", True),
        ("Its mean.", True),
        ("of the weights", True),
    ],
)
def test_a_docstring_begins_with_a_verb_or_a_noun(opening: str, is_odd: bool) -> None:
    source = Source("x.py", f'def f():\n    """{opening}"""\n\n\nclass A:\n    """Thing."""\n')
    number, odd = odd_docstrings(source)
    assert number == 2 and odd == ([f"x.py: {opening}"] if is_odd else [])


def test_hidden_state_is_found_by_its_line() -> None:
    text = "import torch\n\nx = ContextVar('x')\nself.__dict__['y'] = 1\nvars(self)\n"
    assert hidden_state(Source("x.py", text)) == ["x.py:3: ContextVar(", "x.py:4: __dict__["]


def test_the_script_prints_every_figure_with_its_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.py").write_text(
        '"""Module."""\n\n\ndef f():\n    """Do it."""\n    return 1\n'
    )
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and all(line.startswith("ok ") for line in lines)
    (tmp_path / "odd.py").write_text('"""What it is."""\n')
    assert main([str(tmp_path), "--odd"]) == 1
    printed = capsys.readouterr().out
    assert "NO  docstrings that begin oddly" in printed and "odd.py: What it is." in printed
    with pytest.raises(SystemExit, match="expected Python files"):
        main([str(tmp_path / "empty")])


# ---- rooms ---------------------------------------------------------------------------------------


def test_rooms_import_only_from_rooms_below_them() -> None:
    script = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([script, "--no-cache"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- private names ---------------------------------------------------------------------------

# Private names of other packages that a file uses. None of the package's own crosses a module.
PRIVATE: dict[str, set[str]] = {
    "dynamics/slopes.py": {"_C", "_functorch"},  # torch: is this call being transformed?
    "programs/module.py": {"_PyroModuleMeta", "_pyro_context"},  # the one door to Pyro's own
    "programs/sites.py": {"_mask"},  # Pyro: the mask of a masked distribution
    "training/loop.py": {"_foreach_lerp_"},  # torch: averages all parameters in one call
    "training/refinement.py": {
        "_backward_hooks",
        "_post_accumulate_grad_hooks",
    },  # torch: freezing
}
OWN = {"self", "cls", "super()"}  # a subclass may use what its base class has
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in OF_NAMED_TUPLES


def own_names(tree: ast.Module) -> Iterator[str]:
    """Yield every private name that a module defines, attributes of its classes included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr


def private_names(text: str) -> set[str]:
    """Find the private names of other modules that a module imports or reaches for."""
    tree = ast.parse(text)
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in OWN:
            names.add(node.attr)
    return {name for name in names - set(own_names(tree)) if is_private(name)}


def test_private_names_are_found_however_they_are_reached() -> None:
    text = """
from pyro_hybrid.scores.mcc import _strong, mcc
import torch
class A:
    def __init__(self):
        self._own = torch._foreach_lerp_
    def f(self, other):
        return self._own, other._own, other._theirs, other._replace(x=1), other.__dict__
"""
    assert private_names(text) == {"_strong", "_foreach_lerp_", "_theirs"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_private_name_crosses_a_module(path: Path) -> None:
    used = private_names(path.read_text(encoding="utf-8"))
    listed = PRIVATE.get(path.relative_to(PACKAGE).as_posix(), set())
    assert used <= listed, f"private names of other modules: {sorted(used - listed)}"
    assert listed <= used, f"no longer used; take them off the list: {sorted(listed - used)}"


# ---- checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_checks_are_raised_and_not_asserted(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not lines, f"lines {lines} assert, which python -O leaves out: call errors.require"


def test_the_hooks_before_a_commit_are_what_lint_runs_and_fetch_nothing() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lint = makefile.partition("\nlint:")[2].partition("\n\n")[0]
    for tool in ("ruff check", "ruff format", "mypy", "lint-imports"):
        assert f".venv/bin/{tool}" in hooks and f"$(BIN)/{tool}" in lint, tool
    assert re.findall(r"repo: (.*)", hooks) == ["local"] and "://" not in hooks


def test_types_are_checked_strictly_and_only_other_packages_are_excepted() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert settings["strict"] is True
    excepted = [name for section in settings["overrides"] for name in section["module"]]
    assert not [name for name in excepted if name.startswith("pyro_hybrid")]
