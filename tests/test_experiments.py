"""Experiments: done once, resumed, judged by what is known in closed form, and shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from experiments import (
    command,
    identify,
    long_horizon,
    out_of_distribution,
    sample_size,
    seed_agreement,
)
from experiments import trained as trainer
from experiments.run import Choice, Run, carry_out, results
from experiments.settings import CASES, MODELS, OURS
from experiments.trained import (
    Program,
    Trained,
    build_program,
    load_or_train,
    simulate_exactly,
    simulate_tasks,
)
from matplotlib.figure import Figure
from scripts import HANGING, load
from toys import Line, exact, make_tasks

import pyro_hybrid as ph
from pyro_hybrid.beliefs.families import Normal

ROOT, SYSTEM = Path(__file__).parents[1], "double pendulum"
FEW = MODELS[::3]  # ours, and a rival
THREADS = (
    "--threads",
    str(torch.get_num_threads()),
)  # the command line would leave another number behind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests here: models are trained once."""
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Shorten trajectories from 50 points to 16, since a solver's time goes with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ph.systems.DoublePendulum, "points", 16)
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in command.NAMES:  # some read the settings when they are imported
        command.experiment(name)
    for name in set(CASES) - {SYSTEM}:
        monkeypatch.delitem(CASES, name)
    for module in (identify, long_horizon, out_of_distribution, seed_agreement):
        monkeypatch.setattr(module, "MODELS", FEW)


# ---- runs ----------------------------------------------------------------------------------------


def experiment(computed: list[str], fails: str = "") -> Any:
    def run(name: str) -> Run:
        def compute() -> dict[str, Any]:
            if name == fails:
                raise KeyboardInterrupt
            computed.append(name)
            return {"of": name}

        return Run(name, compute)

    return SimpleNamespace(
        __name__="package.toy",
        runs=lambda choice: [run("b"), run("a"), run("c")],
        table=str,
        figure=Figure,
    )


def test_what_was_done_is_not_done_again(tmp_path: Path) -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        carry_out(experiment(done, fails="c"), Choice(folder=tmp_path))
    assert (
        done == ["b", "a"]
        and [one["of"] for one in results(experiment(done), Choice(folder=tmp_path))] == done
    )
    found = carry_out(experiment(done), Choice(folder=tmp_path))
    assert done == ["b", "a", "c"] == [one["of"] for one in found]
    assert all(
        one["seconds"] >= 0.0 and one["versions"]["torch"] == torch.__version__ for one in found
    )
    assert sorted(path.name for path in (tmp_path / "toy").iterdir()) == [
        "a.json",
        "b.json",
        "c.json",
    ]


def test_a_damaged_result_is_not_taken_for_one(tmp_path: Path) -> None:
    carry_out(experiment([]), Choice(folder=tmp_path))
    (tmp_path / "toy" / "a.json").write_text('{"of"')
    with pytest.raises(json.JSONDecodeError):
        results(experiment([]), Choice(folder=tmp_path))


# ---- trained models ------------------------------------------------------------------------------


def test_the_program_reads_the_exact_posterior_from_wherever_the_encoder_points() -> None:
    prior = ph.UnconditionalPrior(slope=Normal(1), bend=Normal(2))
    model = Line(prior=prior).double()
    guide = ph.AmortizedGuide(model, ph.SetEncoder(1, 6, 8, width=16)).double()
    trained = Trained("any, sets", Program(model, guide), ph.Fit(), 0.0, ph.GaussNewton(8))
    episode = make_tasks(5, 4, num_support=3).episode()
    torch.manual_seed(0)
    latents = trained.sample_latents(episode.support, 20_000)
    samples = torch.cat([latents["slope"], latents["bend"]], -1)
    true = exact(episode.support, loc=(0.0, 0.0, 0.0), scale=(1.0, 1.0, 1.0))
    spread = true.covariance[:, :3, :3].diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((samples.mean(0) - true.mean[:, :3]).abs() < 0.05 * spread).all()
    assert ((samples.std(0) / spread - 1.0).abs() < 0.05).all()


@pytest.mark.parametrize("model", MODELS[2:])
def test_as_published_one_trajectory_is_read_and_with_sets_all_of_them(
    model: str, folder: Path
) -> None:
    trained = load_or_train(SYSTEM, model, 0, Choice(fast=True, folder=folder))
    _, held_out = simulate_tasks(SYSTEM, 0, Choice(fast=True))
    support = held_out.episode().support

    def read(shots: ph.Shots) -> torch.Tensor:
        torch.manual_seed(0)
        return trained.sample_latents(shots, 3)["unknown"]

    assert support is not None and support.values is not None
    changed = support.values.clone()
    changed[:, 1:] += 0.5
    same = torch.equal(read(support), read(replace(support, values=changed)))
    assert same == ("sets" not in model)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS[:2])
def test_reconstructions_begin_where_the_shots_say_and_not_where_they_were_measured(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ph.systems.DoublePendulum, "points", 32)  # few points say little
    trained = load_or_train(SYSTEM, model, 0, Choice(fast=True, folder=tmp_path))
    _, held_out = simulate_tasks(SYSTEM, 0, Choice(fast=True))
    episode = held_out.episode()
    begun = []

    def spy(
        self: Trained, latents: dict[str, torch.Tensor], episode: ph.Episode, num_samples: int
    ) -> torch.Tensor:
        begun.append(latents["initial"] - episode.query.initial)
        return begun[-1]

    monkeypatch.setattr(Trained, "mean_trajectories", spy)
    trained.reconstruct(episode, 50)
    trained.predict(episode, episode.query.initial, 50)
    measured = trained.model.start_noise.mean()
    assert (
        begun[0].std(0).mean() < 0.8 * measured
    )  # the shots know more than the measurement of their beginnings
    assert begun[0].mean(0).abs().mean() > 0.1 * measured  # and disagree with it
    assert (begun[1] == 0.0).all()


@pytest.mark.slow
def test_a_model_is_trained_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice(fast=True, folder=folder)
    one = load_or_train(SYSTEM, OURS, 0, choice)
    monkeypatch.setattr("experiments.trained.meta_train", None)
    other = load_or_train(SYSTEM, OURS, 0, choice)
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_our_own_models_end_by_second_order_and_rivals_as_published(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = CASES["rod"].setting(model)
    program = build_program(ph.systems.AdvectionDiffusion(), model, setting)
    tasks = program.model.system.simulate(8, 8, 0)
    refinements = []

    def spy(posterior: ph.Posterior, *data: Any, **settings: Any) -> ph.Posterior:
        refined = ph.refine_weights(posterior, *data, **settings)
        before = posterior.model.residual.parameters()
        after = refined.model.residual.parameters()
        changed = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
        refinements.append((all(changed), settings["prior_sd"], settings["evidence"]))
        return refined

    monkeypatch.setattr(trainer, "refine_weights", spy)
    trainer.train(program, tasks, setting, 0, fast=True)
    end = setting.refinement
    expected = [(True, end.prior_sd, end.evidence)] if model in MODELS[:2] else []
    assert refinements == expected


def test_exactly_is_what_was_simulated_without_the_noise() -> None:
    system = ph.systems.DoublePendulum()
    seen, clear = system.simulate(30, 4, 0), simulate_exactly(system, 30, 4, 0)
    assert all(
        torch.equal(value, clear.true_latents[name]) for name, value in seen.true_latents.items()
    )
    assert torch.allclose(
        (seen.values - clear.values).std((0, 1, 2)), torch.tensor(system.noise), rtol=0.05
    )


def test_who_knows_everything_misses_one_noise_variance_and_truth_misses_what_was_measured() -> (
    None
):
    system = ph.systems.DoublePendulum()
    tasks, clear = system.simulate(30, 4, 0), simulate_exactly(system, 30, 4, 0)

    class Knowing(Trained):
        def predict(self, *whatever: Any) -> Any:
            return clear.episode().query.values

        reconstruct = predict

    model = ph.models.MetaHybridVAE(system)
    trained = Knowing("all", Program(model, model.guide()), ph.Fit(), 0.0)
    errors = identify.errors(trained, tasks, clear)
    assert errors["prediction"] == errors["reconstruction"] == pytest.approx(1.0, abs=0.03)
    assert errors["truth_from_measured"] > errors["prediction"]


# ---- judgements ----------------------------------------------------------------------------------


def test_relative_errors_are_in_standard_deviations_and_nothing_is_drowned() -> None:
    seen = torch.randn(9, 4, 81, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 100.0]
    )
    off = seen + 0.3 * seen.std((0, 1, 2))
    off[0] = torch.nan
    assert float(long_horizon.relative(off, seen)) == pytest.approx(0.3, abs=1e-4)
    late = seen.clone()
    late[:, :, 41:] += 2.0 * seen.std((0, 1, 2))
    assert [float(x) for x in long_horizon.errors_by_stretch(late, seen)] == pytest.approx(
        [0.0, 0.0, 0.0, 2.0], abs=1e-4
    )


@pytest.mark.parametrize("rounding", [0.0, 1e-16])
def test_what_is_held_at_zero_does_not_count(rounding: float) -> None:
    torch.manual_seed(0)
    seen = torch.randn(30, 4, 50, 2) * torch.tensor([1.0, rounding])
    assert torch.equal(
        long_horizon.relative(seen * 1.1, seen),
        long_horizon.relative(seen[..., :1] * 1.1, seen[..., :1]),
    )


@pytest.mark.parametrize("name", CASES)
def test_beyond_is_where_training_never_was(name: str) -> None:
    before = dict(CASES[name].system().ranges)
    latents = {*CASES[name].system().physics, *CASES[name].system().unknown}
    for where, moved in (
        ("initial states beyond", set(before) - latents),
        ("latents beyond", latents),
    ):
        after = out_of_distribution.widen_ranges(CASES[name].system(), where).ranges
        assert {key for key in before if after[key] != before[key]} == moved
        assert all(after[key][0] >= before[key][1] for key in moved)
    assert CASES[name].system().ranges == before


def test_two_runs_agree_where_one_is_a_linear_map_of_the_other() -> None:
    random = torch.Generator().manual_seed(0)
    z, other = (torch.rand(400, 2, generator=random) for _ in range(2))
    mapped = seed_agreement.agreement(z, z @ torch.tensor([[1.0, 1.0], [-1.0, 2.0]]))
    assert mapped["linear_r"] > 0.999 and mapped["strong"] < 0.95 < mapped["strong_disentangled"]
    assert seed_agreement.agreement(z, other)["linear_r"] < 0.3


# ---- as a stranger runs them ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", [identify, long_horizon, out_of_distribution, sample_size, seed_agreement]
)
def test_a_fast_run_ends_in_a_table_and_a_figure(
    module: Any, folder: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    name = module.__name__.rpartition(".")[2]
    seeds = "2" if module is seed_agreement else "1"
    command.main([name, "--fast", "--seeds", seeds, "--out", str(folder), *THREADS])
    text = capsys.readouterr().out
    assert f"{name}.png" in text and (folder / f"{name}.png").stat().st_size > 5000
    rows = (folder / f"{name}.md").read_text(encoding="utf-8").splitlines()
    assert len({row.count("|") for row in rows}) == 1 and len(rows) == 2 + (
        3 if module is sample_size else len(FEW)
    )
    assert "nan" not in "\n".join(rows)


def test_the_threshold_is_that_of_the_theorem(folder: Path, small: None) -> None:
    (tasks, *_) = carry_out(sample_size, Choice((0,), True, folder))
    assert tasks["threshold"] == 4 * 2 + 1


def test_a_report_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["long_horizon", "--report", "--out", str(tmp_path), *THREADS])
    assert "no results" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_help_names_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in command.NAMES)


@pytest.mark.parametrize("script", ["examples/experiments", "docs/results/experiments.py"])
def test_a_script_starts_from_the_root_of_a_checkout(script: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, "--help"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=HANGING,
    )
    assert done.returncode == 0 and "--seeds" in done.stdout, done.stderr


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_shows_what_the_committed_results_say() -> None:
    script = load(ROOT / "docs" / "results" / "experiments.py")
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.filled(page) == page
    assert all(
        f"<!-- {name} -->" in page and f"<!-- /{name} -->" in page
        for name in (*command.NAMES, "aphynity")
    )
    for name in command.NAMES:
        found, image = script.kept(name), f"experiments_{name}.png"
        assert (image in page) == bool(found) == (script.IMAGES / image).exists()
        assert not any(one["fast"] for one in found)
        assert not found or f"\n{command.experiment(name).table(found)}\n" in page


def test_what_a_published_error_of_parameters_implies_is_what_the_page_says() -> None:
    script, choice = (
        load(ROOT / "docs" / "results" / "aphynity.py"),
        SimpleNamespace(period=6.0, seed=0, substeps=3),
    )
    said = json.loads((ROOT / "docs" / "results" / "aphynity.json").read_text(encoding="utf-8"))
    assert script.implied(choice, 0.39) == pytest.approx(
        said["log10_mse_implied_by_published_error"], abs=2e-3
    )
    assert script.implied(choice, 0.0)["worst"] < -9.0  # the solver's own


def test_tiny_runs_are_not_taken_for_results(folder: Path, small: None) -> None:
    command.main(["long_horizon", "--fast", "--seeds", "1", "--out", str(folder), *THREADS])
    with pytest.raises(SystemExit, match="expected full runs .*--fast"):
        load(ROOT / "docs" / "results" / "experiments.py").gathered("long_horizon", folder, 1)


def test_what_was_run_replaces_what_was_kept_and_the_rest_stays(tmp_path: Path) -> None:
    script = load(ROOT / "docs" / "results" / "experiments.py")
    before = script.kept("seed_agreement")
    new = {**next(one for one in before if one["pair"] == [0, 1]), "linear_r": 0.5}
    (tmp_path / "seed_agreement").mkdir()
    (tmp_path / "seed_agreement" / f"{new['run']}.json").write_text(
        json.dumps(new), encoding="utf-8"
    )
    expected = {one["run"]: one for one in (*before, new)}
    for seeds in (2, 3):  # two know of one pair of each model
        after = script.gathered("seed_agreement", tmp_path, seeds)
        assert {one["run"]: one for one in after} == expected and len(after) == len(before)
