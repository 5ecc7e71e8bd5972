"""Every public operation leaves a model that keeps its contracts, and whose state has the same names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pyro_hybrid as ph

Operation = Callable[[ph.Posterior, ph.Tasks], ph.Posterior]


def pendulum() -> tuple[ph.HybridModel, ph.Tasks]:
    system = ph.systems.Pendulum()
    system.points = 8
    model = ph.models.MetaHybridVAE(system, width=4, depth=1)
    return model, system.simulate(6, 4, seed=0)


def rod() -> tuple[ph.HybridModel, ph.Tasks]:
    system = ph.systems.AdvectionDiffusion(size=6)
    system.points = 8
    model = ph.models.MetaHybridVAE(system, width=4, depth=1)
    return model, system.simulate(6, 4, seed=0)


MODELS = {"pendulum": pendulum, "rod": rod}


def train(posterior: ph.Posterior, tasks: ph.Tasks) -> ph.Posterior:
    copy = posterior.copy()
    ph.meta_train(copy.model, copy.guide, tasks, num_steps=2, batch_size=4, progress=False)
    return copy


def refine(posterior: ph.Posterior, tasks: ph.Tasks) -> ph.Posterior:
    return ph.refine_weights(posterior, tasks, num_steps=1, batch_size=4, progress=False)


def compute(posterior: ph.Posterior, tasks: ph.Tasks) -> ph.Posterior:
    return ph.compute_evidence(posterior, ph.GaussNewton(1), ph.GaussNewton(1))


def rescale(posterior: ph.Posterior, tasks: ph.Tasks) -> ph.Posterior:
    return ph.rescale_intervals(compute(posterior, tasks), tasks)


def certify(posterior: ph.Posterior, tasks: ph.Tasks) -> ph.Posterior:
    posterior.certify(tasks, progress=False)
    return posterior


OPERATIONS: dict[str, Operation] = {
    "train": train,
    "refine weights": refine,
    "fix gauge": ph.fix_gauge,
    "compute evidence": compute,
    "rescale intervals": rescale,
    "certify": certify,
}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_keeps_every_contract_and_the_names_of_the_state(
    model: str, operation: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    program, tasks = MODELS[model]()
    before = ph.Posterior(program, program.guide())
    names = set(before.model.state_dict()), set(before.guide.state_dict())
    values = {name: value.clone() for name, value in before.model.state_dict().items()}
    after = OPERATIONS[operation](before, tasks)
    assert (set(after.model.state_dict()), set(after.guide.state_dict())) == names
    assert all(torch.equal(values[n], value) for n, value in before.model.state_dict().items())
    ph.check_hybrid_model(after.model, after.guide, tasks[:3].episode())

    after.save(tmp_path / "posterior")
    again, _ = MODELS[model]()
    loaded = ph.Posterior.load(tmp_path / "posterior", again, again.guide())
    episode = tasks[:2].episode()
    results = []
    for posterior in (after, loaded):
        torch.manual_seed(1)
        results.append(posterior.draws(episode, 3) | posterior.predict(episode, 3))
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())
