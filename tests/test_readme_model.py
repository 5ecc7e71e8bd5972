"""The README's model: one Pyro program for training, simulation, handlers, particles and NUTS."""

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
    """Estimate the loss from many particles, so that it has little noise."""
    loss = TraceMeanField_ELBO(num_particles=40, vectorize_particles=True)
    return ph.SVI(*both, torch.optim.SGD(both[0].parameters(), 0.0), loss).evaluate_loss(episode)


@pytest.mark.slow
def test_what_the_readme_does_with_its_model_runs_as_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    use = USE
    for large, small in SMALLER.items():
        assert use.count(large) == 1
        use = use.replace(large, small)
    exec(compile(use, "README.md", "exec"), printed | {})
    table = capsys.readouterr().out
    assert all(word in table for word in ("omega[0, 0]", "omega[1, 0]", "eti_5%"))


@KINDS
def test_it_trains_with_meta_train(kind: type[ph.HybridModel]) -> None:
    both = pair(kind)
    before = many_particles(both, TASKS.episode())
    fit = ph.meta_train(
        *both, TASKS, num_steps=15, batch_size=4, learning_rate=1e-2, progress=False
    )
    assert fit.skipped == 0
    assert all(math.isfinite(value) for value in fit.loss)
    assert many_particles(both, TASKS.episode()) < before


@KINDS
@pytest.mark.parametrize(
    "loss",
    [None, Trace_ELBO(num_particles=3, vectorize_particles=True)],
    ids=["default", "particles"],
)
def test_it_trains_step_by_step(kind: type[ph.HybridModel], loss: Any) -> None:
    both = pair(kind)
    episode = TASKS.episode()
    svi = ph.SVI(*both, pyro.optim.Adam({"lr": 5e-3}), loss)
    before = many_particles(both, episode)
    assert all(math.isfinite(svi.step(episode)) for _ in range(9))
    assert many_particles(both, episode) < before
    assert math.isfinite(svi.evaluate_loss(episode))


@KINDS
def test_particles_in_one_run_estimate_the_same_loss_as_one_by_one(
    kind: type[ph.HybridModel],
) -> None:
    both = pair(kind)
    optim = torch.optim.SGD(both[0].parameters(), 0.0)
    losses = []
    for is_vectorized in (True, False):
        loss = TraceMeanField_ELBO(num_particles=20, vectorize_particles=is_vectorized)
        losses.append(ph.SVI(*both, optim, loss).evaluate_loss(TASKS.episode()))
    assert losses[0] == pytest.approx(losses[1], rel=0.3)


@KINDS
@pytest.mark.parametrize("parallel", [False, True])
def test_it_simulates_under_predictive(kind: type[ph.HybridModel], parallel: bool) -> None:
    model, guide = pair(kind)
    episode = TASKS.episode().simulation()
    samples = Predictive(model, num_samples=3, parallel=parallel)(episode)
    shapes = {name: tuple(value.shape) for name, value in samples.items()}
    assert shapes == {"omega": (3, 4, 1), "unknown": (3, 4, 3), "x": (3, 4, 2, POINTS, 2)}
    after = Predictive(model, guide=guide, num_samples=3, parallel=parallel)(episode)
    assert after["x"].shape == (3, 4, 2, POINTS, 2)
    assert (after["omega"] > 0).all()


@KINDS
def test_it_simulates_if_the_query_has_no_values(kind: type[ph.HybridModel]) -> None:
    model, _ = pair(kind)
    trace = poutine.trace(model).get_trace(TASKS.episode().simulation())
    x = trace.nodes["x"]
    assert not x["is_observed"]
    assert x["value"].shape == (4, 2, POINTS, 2)
    start = TASKS.episode().query.initial
    assert (x["value"][:, :, 0] - start).abs().max() < 6 * 0.1
    assert poutine.trace(model).get_trace(TASKS.episode()).nodes["x"]["is_observed"]


@KINDS
def test_it_obeys_handlers(kind: type[ph.HybridModel]) -> None:
    model, guide = pair(kind)
    episode = TASKS.episode()
    omega = torch.full((4, 1), 2.0)
    trace = poutine.trace(poutine.condition(model, {"omega": omega})).get_trace(episode)
    assert trace.nodes["omega"]["is_observed"]
    assert torch.equal(trace.nodes["omega"]["value"], omega)
    ours = poutine.trace(guide).get_trace(episode)
    theirs = poutine.trace(poutine.replay(model, trace=ours)).get_trace(episode)
    assert torch.equal(theirs.nodes["unknown"]["value"], ours.nodes["unknown"]["value"])
    hidden = poutine.trace(poutine.block(model, hide=["unknown"])).get_trace(episode)
    assert "unknown" not in hidden.nodes
    assert "omega" in hidden.nodes
    free = poutine.trace(poutine.uncondition(model)).get_trace(episode)
    assert not torch.equal(free.nodes["x"]["value"], episode.query.values)
    scaled = poutine.trace(poutine.scale(poutine.replay(model, trace=ours), 0.5)).get_trace(episode)
    expected = 0.5 * theirs.log_prob_sum().item()
    assert scaled.log_prob_sum().item() == pytest.approx(expected, rel=1e-5)


@KINDS
def test_an_intervention_changes_what_is_simulated(kind: type[ph.HybridModel]) -> None:
    model, _ = pair(kind)
    episode = TASKS.episode().simulation()
    swings = []
    for value in (0.1, 3.0):
        torch.manual_seed(0)
        latents = {"omega": torch.full((4, 1), value), "unknown": torch.zeros(4, 3)}
        fixed = poutine.do(model, latents)
        swings.append(poutine.trace(fixed).get_trace(episode).nodes["x"]["value"])
    assert (swings[0] - swings[1]).abs().max() > 0.3


@KINDS
@pytest.mark.parametrize("is_conditioned", [False, True], ids=["as it is", "conditioned"])
def test_nuts_runs_over_its_latents(kind: type[ph.HybridModel], is_conditioned: bool) -> None:
    model, _ = pair(kind)
    model.noise = torch.tensor(1.0)  # so that a few steps get somewhere
    model.requires_grad_(False)
    episode = model.with_belief(TASKS[:2].episode())  # or every step would compute it anew
    program = model
    if is_conditioned:
        program = poutine.condition(model, {"x": episode.query.values})
        episode = episode.simulation()
    kernel = NUTS(program, init_strategy=init_to_median, max_tree_depth=3)
    with local_parameters():
        mcmc = MCMC(kernel, num_samples=4, warmup_steps=4, disable_progbar=True)
        mcmc.run(episode)
    samples = mcmc.get_samples()
    shapes = {name: tuple(value.shape) for name, value in samples.items()}
    assert shapes == {"omega": (4, 2, 1), "unknown": (4, 2, 3)}
    assert (samples["omega"] > 0).all()
    assert all(torch.isfinite(value).all() for value in samples.values())
    assert len(samples["omega"].unique()) > 2  # it moved


def test_nuts_needs_no_preparation() -> None:
    model, _ = pair(ComputedPendulum)
    model.noise = torch.tensor(1.0)
    kernel = NUTS(model, init_strategy=init_to_median, max_tree_depth=2)
    mcmc = MCMC(kernel, num_samples=2, warmup_steps=1, disable_progbar=True)
    mcmc.run(TASKS[:2].episode())
    assert mcmc.get_samples()["omega"].shape == (2, 2, 1)


@KINDS
def test_the_log_density_under_nuts_is_that_of_the_program(kind: type[ph.HybridModel]) -> None:
    model, _ = pair(kind)
    episode = TASKS[:2].episode()
    values = {"omega": torch.tensor([[1.5], [2.5]]), "unknown": torch.zeros(2, 3)}
    trace = poutine.trace(poutine.condition(model, values)).get_trace(episode)
    p = model.prior(model.with_belief(episode))
    prior = sum(p[name].log_prob(value).sum() for name, value in values.items())
    likelihood = trace.nodes["x"]["fn"].log_prob(episode.query.values).sum()
    assert trace.log_prob_sum().item() == pytest.approx((prior + likelihood).item(), rel=1e-5)


@KINDS
def test_its_posterior_converts_to_arviz_data(kind: type[ph.HybridModel]) -> None:
    data = ph.to_arviz(*pair(kind), TASKS.episode(), 5, names={"x": ["angle", "speed"]})
    assert data["posterior"]["unknown"].shape == (1, 5, 4, 3)
    assert list(data["observed_data"].sensor.values) == ["angle", "speed"]


def test_trajectories_are_predicted_from_the_support_alone() -> None:
    model, _ = pair(DampedPendulum)
    assert ph.predict(model, TASKS.episode(), 4)["x"].shape == (4, 4, 2, POINTS, 2)
