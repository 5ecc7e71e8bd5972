"""The fixture that guards global settings does fail those who change one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CULPRITS = {
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "number of threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "gradients on": "torch.set_grad_enabled(False)",
    "pyro validate_poutine": "pyro.enable_validation(False)",
    "pyro module_local_params": "pyro.settings.set(module_local_params=True)",
    "parameters in the store": "pyro.param('left', torch.ones(1))",
}


def test_who_changes_a_global_setting_fails_and_nobody_else_does(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    culprits = "\n".join(
        f"def test_culprit_{i}(): {code}" for i, code in enumerate(CULPRITS.values())
    )
    pytester.makepyfile(f"""
import random, numpy, pyro, torch
def draw(): return random.random(), numpy.random.rand(), torch.rand(()).item()
before = draw()
seen = []
{culprits}
def test_one(): seen.append(draw())
def test_two(): assert draw() == seen[0] != before
""")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=len(CULPRITS) + 2, errors=len(CULPRITS))
    for setting in CULPRITS:
        result.stdout.fnmatch_lines([f"*changed global settings*{setting}*"])
