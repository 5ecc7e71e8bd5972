"""Penalties of the models: factors of the steps of a training, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

import pyro_hybrid as ph
from pyro_hybrid.evidence.least_squares import LeastSquares
from pyro_hybrid.models import APHYNITY, HybridVAE, MetaHybridVAE, OriginalAPHYNITY
from pyro_hybrid.programs.module import local_parameters


class Row(NamedTuple):
    """A model with penalties, and the names of their sites."""

    build: Callable[[Any], Any]
    sites: set[str]


MODELS = {
    "APHYNITY": Row(lambda system: APHYNITY(system, width=4), {"least"}),
    "OriginalAPHYNITY": Row(lambda system: OriginalAPHYNITY(system, width=4), {"least"}),
    "HybridVAE": Row(
        lambda system: HybridVAE(system, width=4), {"discrepancy", "unmixing", "recovery"}
    ),
    "MetaHybridVAE": Row(
        lambda system: MetaHybridVAE(
            system, ph.GaussNewton(1), linear=False, correction=1.0, straightness=1.0, width=4
        ),
        {"preference"},
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)
with_latents = pytest.mark.parametrize("name", [name for name in MODELS if name[0] != "O"])


class FactorSites(Messenger):
    """Collect the names of all factors of a program."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if hasattr(msg["fn"], "log_factor"):
            self.names.add(msg["name"])


def build(name: str) -> tuple[Any, nn.Module, ph.Tasks]:
    """A model in train() mode, its guide, and tasks."""
    torch.manual_seed(0)
    system = ph.systems.Pendulum()
    system.points = 6
    model = MODELS[name].build(system)
    return model, model.guide(), system.simulate(4, 4, seed=0)


def svi_of(model: nn.Module, guide: nn.Module) -> ph.SVI:
    return ph.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}))


@contextmanager
def no_factors() -> Iterator[None]:
    with FactorSites() as factors:
        yield
    assert not factors.names


@every_model
def test_a_step_of_a_training_has_the_penalties(name: str) -> None:
    model, guide, tasks = build(name)
    svi, episode = svi_of(model, guide), tasks.episode()
    for call in (svi.step, svi.backward, lambda data: svi.loss_and_grads(model, guide, data)):
        with FactorSites() as factors:
            call(episode)
        assert factors.names == MODELS[name].sites
    with FactorSites() as factors:
        ph.meta_train(model, guide, tasks, num_steps=1, batch_size=2, progress=False)
    assert factors.names == MODELS[name].sites


@every_model
def test_a_plain_elbo_of_pyro_has_the_penalties_if_the_episode_asks_for_them(name: str) -> None:
    model, guide, tasks = build(name)
    elbo, episode = TraceMeanField_ELBO(), tasks.episode()
    with local_parameters():
        with no_factors():
            elbo.differentiable_loss(model, guide, episode)
        with FactorSites() as factors:
            elbo.differentiable_loss(model, guide, replace(episode, is_training=True))
    assert factors.names == MODELS[name].sites


@every_model
def test_evaluate_loss_has_no_penalty_and_changes_nothing(name: str) -> None:
    model, guide, tasks = build(name)
    episode, svi = tasks.episode(), svi_of(model, guide)
    losses = []
    for look in (model.train, model.eval):
        look()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        torch.manual_seed(0)
        with no_factors():
            losses.append(svi.evaluate_loss(episode))
        after = model.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        assert all(parameter.grad is None for parameter in svi.parameters())
        assert model.training == (look == model.train)
    assert losses[0] == losses[1]


@every_model
def test_simulations_have_no_penalty(name: str) -> None:
    model, _, tasks = build(name)
    training = replace(tasks.episode(), is_training=True)
    with no_factors():
        model(training.simulation())
        ph.predict(model, training, 2)


@with_latents
def test_draws_have_no_penalty(name: str) -> None:
    model, guide, tasks = build(name)
    with no_factors():
        ph.draws(model, guide, tasks.episode(), 2)


@with_latents
def test_computed_evidence_has_no_penalty(name: str) -> None:
    model, _, tasks = build(name)
    shots, belief = tasks.shots(), model.prior.population().expand(len(tasks))
    with no_factors():
        ph.GaussNewton(1)(belief, shots, model)
        problem = LeastSquares(model, shots, belief)
        cost: Tensor = problem.cost_at(problem.mean)  # with gradients on, as in a training
    assert cost.isfinite().all()
