"""What the benchmarks compare does the same; what the performance page says is what they wrote."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import load

import pyro_hybrid as ph

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "tests" / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark's modules by name; they import each other as scripts do."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    before = set(sys.modules)
    yield lambda name: importlib.import_module(name)
    for name in set(sys.modules) - before:
        if (SCRIPTS / f"{name}.py").exists():
            del sys.modules[name]


@pytest.mark.parametrize("script", ["elbo_step", "grid_step"])
def test_all_torch_rows_have_the_same_loss(
    scripts: Any, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = scripts(script)
    monkeypatch.setattr(module, "jax_rows", lambda *arguments: {})
    problem = module.Problem(4, 0 if script == "elbo_step" else module.trained(0), "cpu")
    builds = {name: build for name, build in module.rows(problem).items() if "compiled" not in name}
    losses = {name: build()() / 4 for name, build in builds.items()}
    first = next(iter(losses.values()))
    assert len(losses) >= 4 and all(
        loss == pytest.approx(first, rel=0.01) for loss in losses.values()
    ), losses


def test_jax_has_the_same_loss_and_gradients(scripts: Any) -> None:
    pytest.importorskip("numpyro", reason="needs the extra bench (make bench installs it)")
    found = scripts("meta_rivals_jax").agreement(tasks=3)
    assert max(found["jax"].values()) < 1e-10
    assert max(found["naive"].values()) < 1e-2
    assert max(found["naive refined"].values()) < 1e-6


def test_the_naive_program_has_the_librarys_loss(scripts: Any) -> None:
    import torch

    rivals, system = scripts("meta_rivals"), ph.systems.Pendulum()
    torch.manual_seed(0)
    model = ph.models.MetaHybridVAE(system, latents=4, linear=False, substeps=4).double()
    guide, episode = model.guide().double(), system.simulate(3, 4, seed=0).episode().double()
    sizes = {"omega": (3, 1), "unknown": (3, 4), "initial": episode.query.initial.shape}
    noise = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    rival = rivals.Naive(model, 1e-8)
    ours, theirs = (
        rivals.loss_and_gradients(*pair, episode, noise)
        for pair in ((model, guide), (rival, rival.guide(guide)))
    )
    assert theirs[0] == pytest.approx(ours[0], rel=1e-6)
    for name, gradient in ours[1].items():
        torch.testing.assert_close(
            theirs[1][name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())
        )


# ---------------------------------------------------------------------------------------------------- the page's tables

page = load(ROOT / "docs" / "results" / "performance.py")


@pytest.mark.parametrize("name", page.TABLES)
def test_a_table_of_the_performance_page_is_what_the_benchmarks_wrote(name: str) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert f"<!-- table: {name} -->\n\n{page.markdown(name)}\n\n<!-- /table -->" in text


def test_the_benchmarks_were_run_as_they_are_by_default() -> None:
    for path in (ROOT / "docs" / "results" / "performance").glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["settings"]["threads"] == (2 if "threads_2" in path.stem else 1)
        if path.stem.startswith("time_to_identify"):
            assert (
                found["seed"] == int(path.stem[-1])
                and found["tasks"] == 1000
                and len(found["rows"]) == 4
            )


def test_filling_the_page_changes_nothing_but_its_tables() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text) == text


# ---- strangers' systems --------------------------------------------------------------------------


def test_the_page_shows_what_was_found_on_strangers_systems(scripts: Any) -> None:
    module = scripts("strangers")
    text = (ROOT / "docs" / "identify.md").read_text(encoding="utf-8")
    table = module.table(json.loads(module.FILE.read_text(encoding="utf-8")))
    assert f"<!-- strangers -->\n\n{table}\n\n<!-- /strangers -->" in text


def test_a_program_that_is_told_the_truth_reads_latents_from_counts(scripts: Any) -> None:
    module = scripts("strangers")
    case = module.CASES["epidemic"]
    found = module.reachable(case, case.simulate(0)[:30])
    assert min(value for values in found.values() for value in values) > 0.8
