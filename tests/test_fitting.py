"""Posterior and the steps after training: values that are computed, saved and never changed."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from toys import (
    BEND,
    NOISE,
    SEPARATE,
    SYSTEMS,
    TOGETHER,
    Line,
    Shared,
    encoder,
    exact,
    make_tasks,
    shared,
    without_type_checks,
)

import pyro_hybrid as ph
from pyro_hybrid.beliefs.belief import Gaussian
from pyro_hybrid.evidence.encoder import Then
from pyro_hybrid.evidence.protocol import Evidence, Fixed
from pyro_hybrid.evidence.settings import describe, restore
from pyro_hybrid.inference.intervals import measure_interval_scale

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def build(
    support: ph.GaussNewton | None = None, query: Evidence | None = None, **options: Any
) -> ph.Posterior:
    """An untrained posterior of the toy, learned unless evidence is given, in float64."""
    torch.manual_seed(0)
    model = Line(support, **options).double()
    guide = ph.AmortizedGuide(model, ph.Encoder(encoder()) if query is None else query).double()
    return ph.Posterior(model, guide)


def shared_posterior(noise: float = 0.6) -> ph.Posterior:
    torch.manual_seed(0)
    model = Shared(noise=noise).double()
    return ph.Posterior(model, ph.AmortizedGuide(model, ph.GaussNewton(2)).double())


def refine(posterior: ph.Posterior, tasks: ph.Tasks, **options: Any) -> ph.Posterior:
    settings = {"num_steps": 2, "batch_size": 10, "prior_sd": 1.0, "progress": False} | options
    return ph.refine_weights(posterior, tasks, **settings)


# ---- stages are values ---------------------------------------------------------------------------


def snapshot(posterior: ph.Posterior) -> dict[str, Any]:
    """Everything about a posterior that a step could change."""
    return {
        "model": {name: x.clone() for name, x in posterior.model.state_dict().items()},
        "guide": {name: x.clone() for name, x in posterior.guide.state_dict().items()},
        "support": getattr(posterior.model.prior, "evidence", None),
        "query": posterior.guide.evidence,
        "stages": posterior.stages,
        "training": [module.training for module in posterior.model.modules()],
        "frozen": [x.requires_grad for x in posterior.model.parameters()],
        "attributes": [set(vars(module)) for module in posterior.model.modules()],
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for part in ("model", "guide"):
        assert before[part].keys() == after[part].keys()
        for name, value in before[part].items():
            assert torch.equal(value, after[part][name]), name
    for part in ("support", "query", "stages", "training", "frozen", "attributes"):
        assert before[part] == after[part], part


def pendulum() -> tuple[ph.Posterior, ph.Tasks]:
    torch.manual_seed(0)
    system = SYSTEMS["pendulum"]()
    model = ph.models.MetaHybridVAE(system, width=3)
    return ph.Posterior(model, model.guide()), system.simulate(4, 3, seed=0)


STAGES: dict[str, Callable[[], tuple[ph.Posterior, ph.Tasks, Callable[..., ph.Posterior]]]] = {
    "compute evidence": lambda: (
        build(),
        make_tasks(4, 4),
        lambda posterior, tasks: ph.compute_evidence(posterior),
    ),
    "refine weights": lambda: (shared_posterior(), shared(10), refine),
    "rescale intervals": lambda: (
        build(ph.GaussNewton(2)),
        make_tasks(12, 4),
        ph.rescale_intervals,
    ),
    "fix gauge": lambda: (*pendulum(), ph.fix_gauge),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_returns_a_new_posterior_and_leaves_the_old_one_as_it_was(name: str) -> None:
    posterior, tasks, stage = STAGES[name]()
    posterior.model.train()
    before = snapshot(posterior)
    state = torch.get_rng_state()
    changed = stage(posterior, tasks)
    assert_unchanged(before, snapshot(posterior))
    assert torch.equal(torch.get_rng_state(), state)
    assert changed.model is not posterior.model
    assert changed.guide.model is changed.model
    assert not changed.model.training
    shared_storage = {x.data_ptr() for x in posterior.model.state_dict().values()}
    assert not shared_storage & {x.data_ptr() for x in changed.model.state_dict().values()}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_noted_with_its_settings(name: str) -> None:
    posterior, tasks, stage = STAGES[name]()
    changed = stage(stage(posterior, tasks), tasks)
    assert [stage.name for stage in changed.stages] == [name, name]
    json.dumps([stage._asdict() for stage in changed.stages])


@pytest.mark.parametrize("name", ["compute evidence", "refine weights", "fix gauge"])
def test_intervals_are_those_of_the_evidence_after_a_stage_that_changes_it(name: str) -> None:
    posterior, tasks, stage = STAGES[name]()
    posterior.model.prior.interval_scale.fill_(7.0)
    assert (stage(posterior, tasks).model.prior.interval_scale == 1.0).all()
    assert (posterior.model.prior.interval_scale == 7.0).all()


def test_a_copy_is_independent() -> None:
    posterior = build(ph.GaussNewton(2))
    before = snapshot(posterior)
    other = posterior.copy()
    with torch.no_grad():
        for parameter in {*other.model.parameters(), *other.guide.parameters()}:
            parameter.add_(1.0)
    other.model.prior.evidence = ph.GaussNewton(1)
    assert_unchanged(before, snapshot(posterior))


# ---- compute_evidence ----------------------------------------------------------------------------


def test_computed_evidence_makes_an_untrained_posterior_exact() -> None:
    episode = make_tasks(4, 6, num_support=3).episode()
    posterior = ph.compute_evidence(build(), ph.GaussNewton(8), ph.GaussNewton(8))
    mean, sd = posterior.guide.belief(episode).moments()
    truth = exact(episode.support, episode)
    assert_close(mean, truth.mean[:, :3], **CLOSE)
    assert_close(sd, truth.covariance.diagonal(dim1=-2, dim2=-1)[:, :3].sqrt(), **CLOSE)


def test_computed_evidence_goes_on_where_encoders_point_and_replaces_what_was_computed() -> None:
    first = ph.compute_evidence(build(), ph.GaussNewton(4), ph.GaussNewton(5))
    second = ph.compute_evidence(first, ph.GaussNewton(6), ph.GaussNewton(7))
    for posterior, numbers in ((first, (4, 5)), (second, (6, 7))):
        parts = (posterior.model.prior.evidence, posterior.guide.evidence)
        for evidence, number in zip(parts, numbers, strict=True):
            assert isinstance(evidence, Then)
            assert isinstance(evidence.first, ph.Encoder)
            assert evidence.second == ph.GaussNewton(number)


def test_computed_evidence_needs_no_encoder() -> None:
    torch.manual_seed(0)
    model = Line(prior=ph.SupportPrior(ph.GaussNewton(1), **SEPARATE)).double()
    posterior = ph.Posterior(model, ph.AmortizedGuide(model, ph.GaussNewton(1)))
    changed = ph.compute_evidence(posterior, ph.GaussNewton(4), ph.GaussNewton(5))
    assert changed.model.prior.evidence == ph.GaussNewton(4)
    assert changed.guide.evidence == ph.GaussNewton(5)


def test_an_unconditional_prior_only_has_its_query_read() -> None:
    model = Line(prior=ph.UnconditionalPrior(**SEPARATE)).double()
    posterior = ph.Posterior(model, ph.AmortizedGuide(model, encoder()).double())
    changed = ph.compute_evidence(posterior, query=ph.GaussNewton(8))
    episode = make_tasks(4, 5, num_support=2).episode()
    mean, _ = changed.guide.belief(episode).moments()
    assert_close(mean, exact(episode).mean[:, :3], **CLOSE)


# ---- refine_weights ------------------------------------------------------------------------------


def test_refined_weights_are_near_the_truth_and_so_is_the_noise() -> None:
    posterior = refine(shared_posterior(), shared(40), batch_size=20)
    assert (posterior.model.residual.weight - BEND).abs().max() < 0.1
    assert posterior.model.noise.item() == pytest.approx(NOISE, rel=0.1)
    costs = posterior.stages[-1].numbers["cost"]
    assert len(costs) == 2
    assert all(math.isfinite(cost) for cost in costs)


def test_the_settings_of_refined_weights_are_noted() -> None:
    evidence = ph.GaussNewton(3, segments=(2,))
    posterior = refine(shared_posterior(), shared(10), evidence=evidence, seed=5)
    settings = posterior.stages[-1].settings
    assert settings["seed"] == 5
    assert settings["network"] == "residual"
    assert ph.GaussNewton(**settings["evidence"]) == evidence


def test_frozen_weights_stay_as_they_are() -> None:
    posterior = shared_posterior()
    posterior.model.prior.requires_grad_(False)
    posterior.model.residual.requires_grad_(False)
    with pytest.raises(ValueError, match="weights that are not frozen; got Linear"):
        refine(posterior, shared(10))


def test_the_network_goes_by_the_name_of_its_attribute() -> None:
    message = r"a model with a network in its attribute 'force'; got Shared\. Pass network="
    with pytest.raises(ValueError, match=message):
        refine(shared_posterior(), shared(10), network="force")
    posterior = shared_posterior()
    posterior.model.force = posterior.model.residual
    changed = refine(posterior, shared(20), network="force")
    assert (changed.model.force.weight - BEND).abs().max() < 0.2


# ---- rescale_intervals ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_shots", [2, 3])
@pytest.mark.parametrize("noise", [0.3, 2.0], ids=["strong evidence", "strong population"])
@pytest.mark.parametrize("inferred", [False, True])
def test_exact_intervals_keep_their_width_however_informative_the_population(
    num_shots: int, noise: float, inferred: bool
) -> None:
    torch.manual_seed(0)
    model = Line(ph.GaussNewton(2), noise=noise, inferred=inferred).double()
    tasks = make_tasks(1500, num_shots, noise=noise, inferred=inferred)
    scale = measure_interval_scale(model, tasks)
    # The quantile of 1500 tasks has a standard error of 0.022.
    assert ((scale - 1.0).abs() < 0.07).all()
    assert abs(float(scale.mean()) - 1.0) < 0.04


def test_intervals_that_are_half_as_wide_as_they_should_be_become_twice_as_wide() -> None:
    posterior = build(ph.GaussNewton(8), noise=0.025)
    tasks = make_tasks(1000, 7, num_support=6, noise=0.05)
    changed = ph.rescale_intervals(posterior, tasks)
    assert ((changed.model.prior.interval_scale - 2.0).abs() < 0.15).all()
    shots = tasks.episode().support
    truth = torch.cat(list(tasks.true_latents.values()), -1)

    def coverage(model: ph.HybridModel) -> Tensor:
        mean, sd = model.prior.belief(shots, model).moments()
        return ((truth - mean).abs() < 1.645 * sd).double().mean(0)

    assert (coverage(posterior.model) < 0.75).all()
    assert ((coverage(changed.model) - 0.9).abs() < 0.03).all()


@pytest.mark.parametrize("prob", [0.5, 0.8, 0.95])
def test_any_probability_gives_the_same_scale_if_errors_are_normal(prob: float) -> None:
    model = build(ph.GaussNewton(2)).model
    scale = measure_interval_scale(model, make_tasks(1500, 2), prob)
    assert ((scale - 1.0).abs() < 0.12).all()


def test_rescaling_twice_is_rescaling_once() -> None:
    tasks = make_tasks(40, 4)
    once = ph.rescale_intervals(build(ph.GaussNewton(2), noise=0.1), tasks)
    twice = ph.rescale_intervals(once, tasks)
    scales = [posterior.model.prior.interval_scale for posterior in (once, twice)]
    assert torch.equal(*scales)
    assert twice.stages[-1].numbers["scale"] == once.stages[-1].numbers["scale"]


def test_rescaling_moves_no_mean() -> None:
    posterior = build(ph.GaussNewton(4), noise=0.1)
    tasks = make_tasks(12, 4, num_support=2)
    changed = ph.rescale_intervals(posterior, tasks)
    before, after = (
        x.model.prior.belief(tasks.episode().support, x.model).moments()
        for x in (posterior, changed)
    )
    assert_close(before[0], after[0])
    assert (after[1] > before[1]).all()


@pytest.mark.parametrize("prob", [0.0, 1.0, -0.1, 1.5, math.nan, 0, 1, "0.9", None])
def test_probabilities_that_make_no_sense_are_refused(prob: object) -> None:
    with without_type_checks(), pytest.raises(ValueError, match="prob as a number between 0 and 1"):
        ph.rescale_intervals(build(ph.GaussNewton(1)), make_tasks(4, 4), prob)


def test_intervals_of_learned_evidence_are_not_rescaled() -> None:
    message = r"a prior with computed evidence; got an encoder alone\. Compute evidence first"
    with pytest.raises(TypeError, match=message):
        ph.rescale_intervals(build(), make_tasks(4, 4))


def test_intervals_of_an_unconditional_prior_are_not_rescaled() -> None:
    model = Line(prior=ph.UnconditionalPrior(**SEPARATE)).double()
    posterior = ph.Posterior(model, ph.AmortizedGuide(model, ph.GaussNewton(1)))
    with pytest.raises(TypeError, match="a model with a SupportPrior; got UnconditionalPrior"):
        ph.rescale_intervals(posterior, make_tasks(4, 4))


# ---- what a posterior answers --------------------------------------------------------------------


def test_latents_are_summarized_with_their_intervals() -> None:
    posterior = build(ph.GaussNewton(6), ph.GaussNewton(6), sites=TOGETHER)
    tasks = make_tasks(3, 5, num_support=2)
    latents = posterior.latents(tasks, prob=0.8, num_samples=20_000)
    episode = tasks.episode()
    truth = exact(episode.support, episode, loc=(0.0, 0.0, 0.0), scale=(1.0, 1.0, 1.0))
    sd = truth.covariance.diagonal(dim1=-2, dim2=-1)[:, :3].sqrt()
    mean = truth.mean[:, :3]
    assert ((latents.mean["both"] - mean) / sd).abs().max() < 0.05
    assert (latents.sd["both"] / sd - 1.0).abs().max() < 0.04
    assert ((latents.low["both"] - (mean - 1.2816 * sd)) / sd).abs().max() < 0.06
    assert ((latents.high["both"] - (mean + 1.2816 * sd)) / sd).abs().max() < 0.06


def test_tasks_and_an_episode_of_them_give_the_same_draws() -> None:
    posterior = build(ph.GaussNewton(2), ph.GaussNewton(2))
    tasks = make_tasks(3, 5, num_support=2)
    for method in (posterior.draws, posterior.predict):
        torch.manual_seed(1)
        first = method(tasks, 4)
        torch.manual_seed(1)
        second = method(tasks.episode(), 4)
        assert all(torch.equal(first[name], second[name]) for name in second)


def test_a_posterior_converts_to_arviz_data() -> None:
    posterior = build(ph.GaussNewton(2), ph.GaussNewton(2))
    names = {"bend": ["sine", "square"]}
    data = posterior.to_arviz(make_tasks(3, 5, num_support=2), 4, names=names)
    assert data["posterior"]["bend"].shape == (1, 4, 3, 2)
    assert list(data["posterior"].bend_component.values) == ["sine", "square"]


# ---- saved and loaded ----------------------------------------------------------------------------

SUPPORT = ph.GaussNewton(3, segments=(2, 3), num_restarts=1, damping=1e-2, max_step_sd=2.0)
QUERY = ph.GaussNewton(4, num_restarts=2)
READ = """
import json, sys
import torch
import pyro_hybrid as ph
from toys import Line, encoder, make_tasks

torch.manual_seed(99)
model = Line().double()
guide = ph.AmortizedGuide(model, ph.Encoder(encoder())).double()
posterior = ph.Posterior.load(sys.argv[1], model, guide)
tasks = make_tasks(3, 5, num_support=2)
torch.manual_seed(5)
values = {**posterior.draws(tasks, 4), **posterior.predict(tasks, 4)}
print(json.dumps({name: value.flatten().tolist() for name, value in values.items()}))
"""


def saved(folder: Path) -> ph.Posterior:
    """A posterior with all that can be saved: settings, intervals, stages."""
    posterior = ph.compute_evidence(build(), SUPPORT, QUERY)
    posterior = ph.rescale_intervals(posterior, make_tasks(12, 4))
    posterior.save(folder)
    return posterior


def test_a_new_process_loads_the_same_posterior(tmp_path: Path) -> None:
    posterior = saved(tmp_path / "posterior")
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    process = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "posterior")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    values = json.loads(process.stdout)
    tasks = make_tasks(3, 5, num_support=2)
    torch.manual_seed(5)
    expected = {**posterior.draws(tasks, 4), **posterior.predict(tasks, 4)}
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name] == value.flatten().tolist(), name


def test_evidence_intervals_and_stages_survive(tmp_path: Path) -> None:
    posterior = saved(tmp_path / "posterior")
    loaded = ph.Posterior.load(tmp_path / "posterior", *parts(build()))
    assert describe(loaded.model.prior.evidence) == describe(posterior.model.prior.evidence)
    assert describe(loaded.guide.evidence) == describe(posterior.guide.evidence)
    assert loaded.model.prior.evidence.second == SUPPORT
    assert loaded.guide.evidence.second == QUERY
    scale = posterior.model.prior.interval_scale
    assert torch.equal(loaded.model.prior.interval_scale, scale)
    assert [stage.name for stage in loaded.stages] == ["compute evidence", "rescale intervals"]
    assert loaded.stages[1].numbers["scale"] == scale.tolist()
    assert not loaded.model.training


def parts(posterior: ph.Posterior) -> tuple[ph.HybridModel, ph.AmortizedGuide]:
    return posterior.model, posterior.guide


def test_a_guide_without_an_encoder_need_not_be_built_to_load(tmp_path: Path) -> None:
    posterior = build(SUPPORT, QUERY)
    posterior.save(tmp_path / "posterior")
    loaded = ph.Posterior.load(tmp_path / "posterior", build(ph.GaussNewton(1)).model)
    assert loaded.guide.evidence == QUERY
    tasks = make_tasks(3, 5, num_support=2)
    results = []
    for each in (posterior, loaded):
        torch.manual_seed(5)
        results.append(each.draws(tasks, 4))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_saving_changes_nothing(tmp_path: Path) -> None:
    posterior = build(ph.GaussNewton(2))
    before = snapshot(posterior)
    posterior.save(tmp_path / "posterior")
    assert_unchanged(before, snapshot(posterior))


def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    posterior = build(ph.GaussNewton(2))
    posterior.save(tmp_path / "posterior")
    with pytest.raises(ph.CheckpointError, match="posterior"):
        posterior.save(tmp_path / "posterior")


def with_own_evidence() -> ph.Posterior:
    own = Fixed(Gaussian.around(SEPARATE, torch.zeros(1, 3, dtype=torch.float64), 1.0))
    return build(query=own)


def test_evidence_of_one_s_own_is_not_saved_and_leaves_nothing_behind(tmp_path: Path) -> None:
    posterior = with_own_evidence()
    message = (
        r"evidence made of ph\.Encoder and ph\.GaussNewton, .*; got Fixed\. "
        r"Save the weights alone with ph\.Fit\(\)\.save\(folder, model, guide\)"
    )
    with pytest.raises(TypeError, match=message):
        posterior.save(tmp_path / "deep" / "posterior")
    assert list(tmp_path.iterdir()) == []


def test_weights_are_saved_and_loaded_beside_evidence_of_one_s_own(tmp_path: Path) -> None:
    posterior = with_own_evidence()
    ph.Fit().save(tmp_path / "weights", *parts(posterior))
    other = with_own_evidence()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.1)
    ph.load(tmp_path / "weights", *parts(other))
    for name, value in posterior.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ([], r"an encoder, of computed evidence, or of both in this order; got \[\]\. Load what"),
        ([{"kind": "gauss_newton"}, {"kind": "encoder"}], r"got \['GaussNewton', 'Encoder'\]"),
        ([{"kind": "other"}], r"evidence of a known kind; got {'kind': 'other'}\. Load it with"),
    ],
)
def test_a_description_of_evidence_that_was_never_saved_is_refused(
    description: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        restore(description, ph.Encoder(encoder()))


def assert_load_refused(folder: Path, posterior: ph.Posterior, message: str) -> None:
    """Loading raises with words, and leaves model and guide as they were."""
    before = snapshot(posterior)
    with pytest.raises((ph.CheckpointError, ValueError), match=message):
        ph.Posterior.load(folder, *parts(posterior))
    assert_unchanged(before, snapshot(posterior))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert_load_refused(tmp_path / "nothing", build(), "nothing")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert_load_refused(tmp_path, build(), str(tmp_path))


def test_a_training_s_folder_is_refused(tmp_path: Path) -> None:
    posterior = build()
    ph.Fit().save(tmp_path / "fit", *parts(posterior))
    assert_load_refused(tmp_path / "fit", build(), "posterior.*Load what Posterior.save wrote")


def test_a_posterior_is_no_training(tmp_path: Path) -> None:
    build().save(tmp_path / "posterior")
    with pytest.raises(ph.CheckpointError, match="with fit to be"):
        ph.load(tmp_path / "posterior", *parts(build()))


def test_weights_that_were_changed_are_refused(tmp_path: Path) -> None:
    build().save(tmp_path / "posterior")
    largest = max((tmp_path / "posterior").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-5] ^= 1
    largest.write_bytes(content)
    assert_load_refused(tmp_path / "posterior", build(), "checksum|changed|written")


def test_a_model_of_other_sizes_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "posterior")
    assert_load_refused(tmp_path / "posterior", build(sites=TOGETHER), "of shape")


def test_a_model_in_another_precision_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "posterior")
    other = build()
    other.model.float()
    assert_load_refused(tmp_path / "posterior", other, "float32")


def test_a_model_without_the_encoder_that_was_saved_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "posterior")
    model = Line(prior=ph.SupportPrior(ph.GaussNewton(1), **SEPARATE)).double()
    other = ph.Posterior(model, ph.AmortizedGuide(model, encoder()).double())
    message = "the encoder that was saved; got one without an encoder"
    assert_load_refused(tmp_path / "posterior", other, message)


def test_a_guide_with_an_encoder_must_be_built_to_load(tmp_path: Path) -> None:
    build().save(tmp_path / "posterior")
    message = "the encoder that was saved; got one without an encoder"
    with pytest.raises(ValueError, match=message):
        ph.Posterior.load(tmp_path / "posterior", build().model)


@pytest.mark.parametrize("is_conditional", [True, False])
def test_a_prior_of_the_other_kind_is_refused(tmp_path: Path, is_conditional: bool) -> None:
    priors = [
        ph.SupportPrior(ph.GaussNewton(1), **SEPARATE),
        ph.UnconditionalPrior(**SEPARATE),
    ]
    models = [Line(prior=prior).double() for prior in priors]
    posteriors = [
        ph.Posterior(model, ph.AmortizedGuide(model, ph.GaussNewton(1))) for model in models
    ]
    first, second = posteriors if is_conditional else posteriors[::-1]
    first.save(tmp_path / "posterior")
    message = r"expected a model with an? \w+Prior, as .*; got \w+Prior\. Build the model as"
    assert_load_refused(tmp_path / "posterior", second, message)


# ---- what it refuses -----------------------------------------------------------------------------


def test_a_model_that_is_no_hybrid_model_is_refused() -> None:
    posterior = build()
    with (
        without_type_checks(),
        pytest.raises(TypeError, match="expected a HybridModel; got Linear"),
    ):
        ph.Posterior(nn.Linear(2, 2), posterior.guide)


def test_a_guide_of_another_model_is_refused() -> None:
    posterior = build()
    message = r"expected a guide of this model; got AmortizedGuide\. Build it with"
    with pytest.raises(TypeError, match=message):
        ph.Posterior(copy.deepcopy(posterior.model), posterior.guide)
    with without_type_checks(), pytest.raises(TypeError, match="a guide of this model; got Linear"):
        ph.Posterior(posterior.model, nn.Linear(2, 2))


@pytest.mark.parametrize("method", ["draws", "predict", "latents", "to_arviz"])
def test_what_is_neither_tasks_nor_an_episode_is_refused(method: str) -> None:
    message = r"expected tasks, or an episode of them; got Tensor\. Make tasks with ph\.Tasks\."
    with without_type_checks(), pytest.raises(TypeError, match=message):
        getattr(build(), method)(torch.zeros(3))


@pytest.mark.parametrize("prob", [0.0, 1.0, -1.0, math.nan])
def test_intervals_without_a_probability_are_refused(prob: float) -> None:
    with pytest.raises(ValueError, match="expected prob between 0 and 1; got"):
        build().latents(make_tasks(3, 4), prob)
