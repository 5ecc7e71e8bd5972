"""Messages have one form, and optional packages are named with the extra that installs them."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from pyro_hybrid.errors import fail, is_installed, require, require_package

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CALL = re.compile(r"""require_package\(\s*["']([\w.]+)["'],\s*(?:extra=)?["'](\w+)["']""")
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where the name of the module is another


def test_a_message_says_what_was_expected_what_came_and_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"^expected a tensor; got list\. Convert it\.$"):
        fail("a tensor", "list", "Convert it.", TypeError)


def test_require_raises_only_where_the_condition_does_not_hold() -> None:
    require(True, "a number", "text", "Pass a number.")
    with pytest.raises(ValueError, match=r"^expected a number; got text\. Pass a number\.$"):
        require(False, "a number", "text", "Pass a number.")


def test_an_installed_package_is_imported() -> None:
    assert require_package("json.decoder", extra="tables").__name__ == "json.decoder"
    assert is_installed("json") and is_installed("colorsys")


def test_a_missing_package_is_named_with_the_extra_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    message = r"^expected the module pandas; got .*pandas.*\. Install it: pip install 'pyro_hybrid\[tables\]'\.$"
    with pytest.raises(ImportError, match=message):
        require_package("pandas", extra="tables")
    with pytest.raises(ImportError, match=r"'pyro_hybrid\[tables\]', or pass a tensor\.$"):
        require_package("pandas", "tables", "pass a tensor")
    assert not is_installed("pandas") and not is_installed("no_such_package")


def optional_imports() -> list[tuple[str, str]]:
    """Every module that the package requires by name, with the extra that it names."""
    calls = set()
    for path in (ROOT / "pyro_hybrid").rglob("*.py"):
        if path.name != "errors.py":
            calls.update(CALL.findall(path.read_text(encoding="utf-8")))
    return sorted(calls)


def test_there_are_optional_packages() -> None:
    modules = {module.partition(".")[0] for module, _ in optional_imports()}
    assert modules >= {"h5netcdf", "pandas", "pooch", "sklearn"}


@pytest.mark.parametrize(("module", "extra"), optional_imports())
def test_every_named_extra_installs_the_package(module: str, extra: str) -> None:
    top = module.partition(".")[0]
    installed = [re.split(r"[<>=\[]", one)[0] for one in EXTRAS[extra]]
    assert DISTRIBUTIONS.get(top, top) in installed
    assert not any(one.startswith(f"{top}>") for one in PROJECT["dependencies"])


def test_the_tests_need_every_optional_package() -> None:
    (everything,) = EXTRAS["all"]
    named = re.fullmatch(r"pyro_hybrid\[(.*)\]", everything)
    assert named is not None
    developers = {"all", "audit", "bench", "docs", "test"}
    assert set(named[1].split(",")) == set(EXTRAS) - developers
    assert "pyro_hybrid[all]" in EXTRAS["test"]
