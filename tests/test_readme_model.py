"""The model that the README prints: one Pyro program, for training, simulation, handlers, particles and NUTS alike."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import init_to_median
from torch import Tensor

import pyro_hybrid as ph
from pyro_hybrid.programs.module import local_parameters

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
MODEL, USE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SMALLER = {
    "tasks=1000": "tasks=6",
    "split(100)": "split(2)",
    "num_steps=1000": "num_steps=2",
    "batch_size=64": "batch_size=2",
}
POINTS = 12

printed: dict[str, Any] = {"__name__": "readme"}
exec(compile(MODEL, "README.md", "exec"), printed)
DampedPendulum = printed["DampedPendulum"]


class ComputedPendulum(DampedPendulum):
    """The same program with computed evidence."""

    def __init__(self, num_times: int) -> None:
        super().__init__(num_times)
        encoder = ph.Encoder(ph.SetEncoder(2, num_times))
        evidence = encoder.then(ph.GaussNewton(1))
        self.prior = ph.SupportPrior(evidence, **self.prior.families)


def make_tasks(tasks: int = 4, shots: int = 4) -> ph.Tasks:
    pendulum = ph.systems.Pendulum()
    pendulum.points = POINTS
    return pendulum.simulate(tasks, shots, seed=0)


TASKS = make_tasks()
KINDS = pytest.mark.parametrize(
    "kind", [DampedPendulum, ComputedPendulum], ids=["learned", "computed"]
)


def pair(kind: type[ph.HybridModel]) -> tuple[ph.HybridModel, ph.AmortizedGuide]:
    torch.manual_seed(0)
    model = kind(POINTS)
    if kind is ComputedPendulum:
        return model, ph.AmortizedGuide(model, ph.GaussNewton(1))
    return model, ph.AmortizedGuide(model, ph.SetEncoder(2, POINTS))


def many_particles(both: tuple[ph.HybridModel, ph.AmortizedGuide], episode: ph.Episode) -> float:
    """The loss with little noise."""
    loss = TraceMeanField_ELBO(num_particles=40, vectorize_particles=True)
    return ph.SVI(*both, torch.optim.SGD(both[0].parameters(), 0.0), loss).evaluate_loss(episode)


def test_what_the_readme_does_with_its_model_runs_as_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    use = USE
    for large, small in SMALLER.items():
        assert use.count(large) == 1
        use = use.replace(large, small)
    exec(compile(use, "README.md", "exec"), printed | {})
    table = capsys.readouterr().out
    assert "omega[0, 0]" in table and "omega[1, 0]" in table and "eti_5%" in table


@KINDS
def test_it_trains_with_meta_train(kind: type[ph.HybridModel]) -> None:
    both = pair(kind)
    before = many_particles(both, TASKS.episode())
    fit = ph.meta_train(
        *both, TASKS, num_steps=15, batch_size=4, learning_rate=1e-2, progress=False
    )
    assert fit.skipped == 0 and all(math.isfinite(value) for value in fit.loss)
    assert many_particles(both, TASKS.episode()) < before


@KINDS
@pytest.mark.parametrize(
    "loss",
    [None, Trace_ELBO(num_particles=3, vectorize_particles=True)],
    ids=["default", "particles"],
)
def test_it_trains_step_by_step(kind: type[ph.HybridModel], loss: Any) -> None:
    both, episode = pair(kind), TASKS.episode()
    svi, before = ph.SVI(*both, pyro.optim.Adam({"lr": 5e-3}), loss), many_particles(both, episode)
    assert all(math.isfinite(svi.step(episode)) for _ in range(9))
    assert many_particles(both, episode) < before and math.isfinite(svi.evaluate_loss(episode))


@KINDS
def test_particles_in_one_run_estimate_the_same_loss_as_one_by_one(
    kind: type[ph.HybridModel],
) -> None:
    both, episode = pair(kind), TASKS.episode()
    optim, losses = torch.optim.SGD(both[0].parameters(), 0.0), []
    for vectorised in (True, False):
        loss = TraceMeanField_ELBO(num_particles=20, vectorize_particles=vectorised)
        losses.append(ph.SVI(*both, optim, loss).evaluate_loss(episode))
    assert losses[0] == pytest.approx(losses[1], rel=0.3)


@KINDS
@pytest.mark.parametrize("parallel", [False, True])
def test_it_simulates_under_predictive(kind: type[ph.HybridModel], parallel: bool) -> None:
    model, guide = pair(kind)
    samples = Predictive(model, num_samples=3, parallel=parallel)(TASKS.episode().simulation())
    shapes = {name: tuple(value.shape) for name, value in samples.items()}
    assert shapes == {"omega": (3, 4, 1), "unknown": (3, 4, 3), "x": (3, 4, 2, POINTS, 2)}
    after = Predictive(model, guide=guide, num_samples=3, parallel=parallel)(
        TASKS.episode().simulation()
    )
    assert after["x"].shape == (3, 4, 2, POINTS, 2) and (after["omega"] > 0).all()


@KINDS
def test_it_simulates_when_there_is_no_query(kind: type[ph.HybridModel]) -> None:
    model, _ = pair(kind)
    trace = poutine.trace(model).get_trace(TASKS.episode().simulation())
    x = trace.nodes["x"]
    assert not x["is_observed"] and x["value"].shape == (4, 2, POINTS, 2)
    start = TASKS.episode().query.initial
    assert (x["value"][:, :, 0] - start).abs().max() < 6 * 0.1
    assert poutine.trace(model).get_trace(TASKS.episode()).nodes["x"]["is_observed"]


@KINDS
def test_it_obeys_handlers(kind: type[ph.HybridModel]) -> None:
    model, guide = pair(kind)
    episode, omega = TASKS.episode(), torch.full((4, 1), 2.0)
    trace = poutine.trace(poutine.condition(model, {"omega": omega})).get_trace(episode)
    assert trace.nodes["omega"]["is_observed"] and torch.equal(trace.nodes["omega"]["value"], omega)
    ours = poutine.trace(guide).get_trace(episode)
    theirs = poutine.trace(poutine.replay(model, trace=ours)).get_trace(episode)
    assert torch.equal(theirs.nodes["unknown"]["value"], ours.nodes["unknown"]["value"])
    hidden = poutine.trace(poutine.block(model, hide=["unknown"])).get_trace(episode)
    assert "unknown" not in hidden.nodes and "omega" in hidden.nodes
    uncond = poutine.trace(poutine.uncondition(model)).get_trace(episode)
    assert not torch.equal(uncond.nodes["x"]["value"], episode.query.values)
    scaled = poutine.trace(poutine.scale(poutine.replay(model, trace=ours), 0.5)).get_trace(episode)
    assert scaled.log_prob_sum().item() == pytest.approx(
        0.5 * theirs.log_prob_sum().item(), rel=1e-5
    )


@KINDS
def test_an_intervention_changes_what_is_simulated(kind: type[ph.HybridModel]) -> None:
    model, _ = pair(kind)
    episode, swings = TASKS.episode().simulation(), []
    for value in (0.1, 3.0):
        torch.manual_seed(0)
        fixed = poutine.do(
            model, {"omega": torch.full((4, 1), value), "unknown": torch.zeros(4, 3)}
        )
        swings.append(poutine.trace(fixed).get_trace(episode).nodes["x"]["value"])
    assert (swings[0] - swings[1]).abs().max() > 0.3


@KINDS
@pytest.mark.parametrize("outside", ["as it is", "conditioned, parameters fixed"])
def test_nuts_runs_over_its_latents(kind: type[ph.HybridModel], outside: str) -> None:
    model, _ = pair(kind)
    model.noise = torch.tensor(1.0)  # so that a few steps get somewhere
    episode, options = TASKS[:2].episode(), {"init_strategy": init_to_median, "max_tree_depth": 3}
    if outside == "as it is":
        mcmc = MCMC(NUTS(model, **options), num_samples=4, warmup_steps=4, disable_progbar=True)
        mcmc.run(episode)
    else:
        model.requires_grad_(False)
        program = poutine.condition(model, {"x": episode.query.values})
        with local_parameters():
            mcmc = MCMC(
                NUTS(program, **options), num_samples=4, warmup_steps=4, disable_progbar=True
            )
            mcmc.run(episode.simulation())
    samples = mcmc.get_samples()
    assert {name: tuple(value.shape) for name, value in samples.items()} == {
        "omega": (4, 2, 1),
        "unknown": (4, 2, 3),
    }
    assert (samples["omega"] > 0).all() and all(
        torch.isfinite(value).all() for value in samples.values()
    )
    assert len(samples["omega"].unique()) > 2  # it moved


@KINDS
def test_the_log_density_that_nuts_sees_is_the_programs(kind: type[ph.HybridModel]) -> None:
    model, _ = pair(kind)
    episode = TASKS[:2].episode()
    values = {"omega": torch.tensor([[1.5], [2.5]]), "unknown": torch.zeros(2, 3)}
    total = poutine.trace(poutine.condition(model, values)).get_trace(episode).log_prob_sum()
    p = model.prior(model.with_belief(episode))
    prior: Tensor = sum(p[name].log_prob(value).sum() for name, value in values.items())
    seen = poutine.trace(poutine.condition(model, values)).get_trace(episode).nodes["x"]
    assert total.item() == pytest.approx(
        (prior + seen["fn"].log_prob(episode.query.values).sum()).item(), rel=1e-5
    )


@KINDS
def test_what_comes_out_goes_to_arviz(kind: type[ph.HybridModel]) -> None:
    data = ph.to_arviz(*pair(kind), TASKS.episode(), 5, names={"x": ["angle", "speed"]})
    assert data["posterior"]["unknown"].shape == (1, 5, 4, 3)
    assert list(data["observed_data"].sensor.values) == ["angle", "speed"]


def test_trajectories_are_predicted_from_the_support_alone() -> None:
    model, _ = pair(DampedPendulum)
    assert ph.predict(model, TASKS.episode(), 4)["x"].shape == (4, 4, 2, POINTS, 2)
