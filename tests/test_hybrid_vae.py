"""HybridVAE: a program that keeps every contract, with regularisers that are what the paper says, where it says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from toys import SYSTEMS, system, with_query

import pyro_hybrid as ph
from pyro_hybrid.data.segments import select_segments, to_segments
from pyro_hybrid.models import HybridVAE
from pyro_hybrid.programs.module import local_parameters

REGULARISERS = {"discrepancy", "unmixing", "recovery"}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"outside": 2},
    {"linear": True, "substeps": 2, "discrepancy": 0.0, "unmixing": 0.0, "recovery": 0.0},
]


def model_of(name: str = "pendulum", seed: int = 0, **options: Any) -> HybridVAE:
    torch.manual_seed(seed)
    model = HybridVAE(SYSTEMS[name](), width=4, **options)
    if model.correction is not None:  # as after some training
        torch.nn.init.normal_(model.correction.straight, std=0.1)
    return model.train()


def episode_of(name: str = "pendulum", shots: int = 4) -> ph.Episode:
    return SYSTEMS[name]().simulate(3, shots, seed=0).episode()


def factors(
    model: HybridVAE, episode: ph.Episode, values: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What each regulariser adds to the log density of each task, latents drawn from the guide or at ``values``."""
    torch.manual_seed(1)
    episode = replace(episode, is_training=True)
    with local_parameters():
        values = model.guide()(episode) if values is None else values
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(episode)
    return {name: trace.nodes[name]["fn"].log_factor for name in REGULARISERS & set(trace.nodes)}


def silent(residual: torch.nn.Module) -> None:
    for parameter in residual.parameters():
        torch.nn.init.zeros_(parameter)


# ---- a program like the others -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "published")
@pytest.mark.parametrize("name", SYSTEMS)
def test_it_keeps_every_contract(name: str, options: dict[str, Any]) -> None:
    model = model_of(name, **options)
    lines = ph.check_hybrid_model(
        model, model.guide(), SYSTEMS[name]().simulate(2, 4, seed=0).episode()
    )
    assert len(lines) == 25 and not any("not checked" in line for line in lines)


def test_negative_weights_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"expected weights and outside of 0 or more; got \(-1\.0, .*weight of 0"
    ):
        model_of(discrepancy=-1.0)


# ---- the guide -----------------------------------------------------------------------------------


def evidence(model: HybridVAE, episode: ph.Episode) -> dict[str, Tensor]:
    before = model.prior.population().natural
    return {
        name: natural - before[name]
        for name, natural in model.guide().natural_parameters(episode).items()
    }


def shot_of(episode: ph.Episode, number: int) -> ph.Episode:
    """The same tasks with one of their query shots."""
    chosen = torch.full((episode.query.shape[0], 1), number)
    return replace(episode, query=episode.query.select_shots(chosen))


def cut(episode: ph.Episode, num_intervals: int) -> ph.Episode:
    return episode.map_shots(lambda shots: to_segments(shots, num_intervals))


NONE = dict.fromkeys(("omega", "diffusion", "unknown"), torch.zeros(1))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(
        torch.allclose(value, other[name], rtol=1e-4, atol=1e-5) for name, value in one.items()
    )


def test_the_evidence_about_neural_latents_is_the_sum_of_that_of_single_trajectories() -> None:
    model, episode = model_of(), episode_of()
    shots = [shot_of(episode, k) for k in range(2)]
    one, other, both = (evidence(model, part)["unknown"] for part in (*shots, episode))
    assert torch.allclose(one + other, both, rtol=1e-4, atol=1e-5) and (both != 0.0).all()


def test_it_is_deaf_to_the_support() -> None:
    model, episode = model_of(), episode_of()
    assert same(evidence(model, episode), evidence(model, ph.Episode(None, episode.query)))


def test_cut_trajectories_are_read_whole() -> None:
    model, episode = model_of(), episode_of()
    assert same(evidence(model, cut(episode, 2)), evidence(model, episode))


@pytest.mark.parametrize("name", ["pendulum", "rod"])
def test_without_a_query_the_guide_is_the_prior(name: str) -> None:
    assert same(evidence(model_of(name), episode_of(name).simulation()), NONE)


def test_a_shot_of_which_nothing_counts_is_no_evidence() -> None:
    model, episode = model_of(), episode_of()
    mask = torch.ones_like(episode.query.values, dtype=torch.bool)
    mask[:, 1] = False
    first = shot_of(episode, 0)
    assert torch.allclose(
        evidence(model, with_query(episode, scored=mask))["unknown"],
        evidence(model, first)["unknown"],
        rtol=1e-4,
    )
    assert same(evidence(model, with_query(episode, scored=mask & False)), NONE)


# ---- regularisers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(REGULARISERS))
def test_a_weight_weighs_its_own_regulariser_and_zero_leaves_it_out(name: str) -> None:
    episode = episode_of()
    before = factors(model_of(), episode)
    twice = factors(model_of(**{name: 2.0 * getattr(model_of(), name)}), episode)
    assert all(
        torch.allclose(twice[key], (2.0 if key == name else 1.0) * before[key])
        for key in REGULARISERS
    )
    assert factors(model_of(**{name: 0.0}), episode).keys() == REGULARISERS - {name}


@pytest.mark.parametrize("name", SYSTEMS)
def test_without_a_neural_force_there_is_no_discrepancy(name: str) -> None:
    model, episode = model_of(name), episode_of(name)
    assert (factors(model, episode)["discrepancy"] < 0.0).all()
    silent(model.residual)
    assert (factors(model, episode)["discrepancy"] == 0.0).all()


def predicted(model: HybridVAE, episode: ph.Episode, values: dict[str, Tensor]) -> Tensor:
    trace = poutine.trace(poutine.condition(model.eval(), data=values)).get_trace(episode)
    return trace.nodes["x"]["fn"].base_dist.base_dist.loc


@pytest.mark.parametrize("left", ["residual", "correction"])
def test_discrepancy_is_the_divergence_from_what_the_physics_alone_predicts(left: str) -> None:
    model, episode = model_of(discrepancy=1.0, outside=2), episode_of()
    silent(model.correction if left == "residual" else model.residual)
    values = {name: value.detach() for name, value in model.guide()(episode).items()}
    found = factors(model, episode, values)["discrepancy"]
    full, noise = predicted(model, episode, values), model.noise.detach()
    silent(model.residual), silent(model.correction)
    bare = predicted(model, episode, values)
    assert torch.allclose(
        -found, kl_divergence(Normal(full, noise), Normal(bare, noise)).sum((1, 2, 3)), rtol=1e-4
    )


def test_discrepancy_of_segments_is_measured_on_the_scale_of_whole_trajectories() -> None:
    model, episode = model_of(), episode_of()
    values = {name: value.detach() for name, value in model.guide()(episode).items()}
    pieces = cut(episode, 1)
    halves = [select_segments(pieces.query, torch.arange(k, 10, 2)) for k in range(2)]
    some = [factors(model, replace(pieces, query=half), values)["discrepancy"] for half in halves]
    assert torch.allclose(
        0.5 * (some[0] + some[1]), factors(model, pieces, values)["discrepancy"], rtol=1e-4
    )


def test_nothing_is_left_to_unmix_where_the_physics_alone_made_the_data() -> None:
    model, episode = model_of(unmixing=1.0), episode_of()
    omega = torch.tensor([[1.0], [2.0], [3.0]])
    alone = model.system.known({"omega": omega}, model.zero_force)
    episode = with_query(
        episode,
        values=ph.solve(alone, episode.query.initial.unbind(-1), episode.query.times),
    )
    values = model.guide()(episode) | {"omega": omega}
    assert (factors(model, episode, values)["unmixing"] < -1e-3).all()
    silent(model.encoder.unmixer)
    assert (factors(model, episode, values)["unmixing"].abs() < 1e-6).all()
    assert (factors(model, episode, values | {"omega": omega + 0.5})["unmixing"] < -1e-3).all()


def test_recovery_is_perfect_for_an_encoder_that_inverts_the_physics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def by_energy(values: Tensor) -> dict[str, Tensor]:
        angle, speed = values.double().unbind(-1)
        gained, fallen = (0.5 * (x - x[..., :1]) for x in (speed.square(), 2.0 * angle.cos()))
        return {
            "omega": 0.5
            * (
                (gained * fallen).sum(-1, keepdim=True) / fallen.square().sum(-1, keepdim=True)
            ).log()
        }

    model, episode = model_of(recovery=1.0), episode_of()
    assert (factors(model, episode)["recovery"] < -0.1).all()
    monkeypatch.setattr(model.encoder, "recover_physics", by_energy)
    assert (factors(model, episode)["recovery"].abs() < 1e-3).all()


LEARNING = {
    "discrepancy": {
        "residual",
        "first",
        "second",
        "unmixer",
        "heads.unknown",
        "heads.omega",
        "raw",
    },
    "unmixing": {"first", "unmixer", "heads.unknown", "raw"},
    "recovery": {"second", "heads.omega"},
}


@pytest.mark.parametrize("name", LEARNING)
def test_each_regulariser_trains_what_the_paper_says(name: str) -> None:
    model = model_of()
    factors(model, episode_of())[name].sum().backward()
    parts = {key: getattr(parameter, "grad", None) for key, parameter in model.named_parameters()}
    moved = {key for key, slope in parts.items() if slope is not None and (slope != 0.0).any()}
    assert all(any(part in key for key in moved) for part in LEARNING[name]), moved
    assert all(any(part in key for part in LEARNING[name]) for key in moved), moved


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("num_support", [2, 3], ids=["of sets", "of one trajectory at a time"])
def test_a_short_training_lowers_the_loss_and_finds_the_physics(num_support: int) -> None:
    pendulum = system(ph.systems.Pendulum, 8)
    pendulum.step = 0.2
    train, held_out = pendulum.simulate(160, 4, seed=0, num_support=num_support).split(60)
    torch.manual_seed(0)
    model = HybridVAE(pendulum, noise=10.0)
    fit = ph.meta_train(model, model.guide(), train, num_steps=60, batch_size=32, progress=False)
    assert sum(fit.loss[-10:]) < sum(fit.loss[:10]) and not fit.skipped
    found = ph.draws(model, model.guide(), held_out.episode(), 20)["omega"].mean(0)
    assert (
        torch.corrcoef(torch.cat([found, held_out.true_latents["omega"]], -1).T)[0, 1] > 0.6
    )  # chance: 0.13


def test_model_and_guide_that_share_an_encoder_are_saved_and_loaded(tmp_path: Path) -> None:
    model, other = model_of(outside=1), model_of(outside=1, seed=1)
    fit = ph.meta_train(
        model,
        model.guide(),
        SYSTEMS["pendulum"]().simulate(4, 4, seed=0),
        num_steps=2,
        progress=False,
    )
    fit.save(tmp_path / "fit", model, model.guide())
    assert ph.load(tmp_path / "fit", other, other.guide()).loss == fit.loss
    values = {name: value.detach() for name, value in model.guide()(episode_of()).items()}
    assert torch.equal(*(predicted(each, episode_of(), values) for each in (model, other)))
    assert same(evidence(model, episode_of()), evidence(other, episode_of()))


def test_pyro_is_left_alone() -> None:
    factors(model_of(), episode_of())
    assert not pyro.get_param_store().keys()
