"""Draws, predictions, importance weights and ArviZ data, on a program with a known posterior."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from toys import (
    NOISE,
    POINTS,
    START_NOISE,
    TIMES,
    TOGETHER,
    Line,
    encoder,
    exact,
    features,
    in_float32,
    make_tasks,
    with_query,
    without_type_checks,
)

import pyro_hybrid as ph
from pyro_hybrid.scores.check import Check, Threshold

STANDARD = {"loc": (0.0, 0.0, 0.0), "scale": (1.0, 1.0, 1.0)}
NAMES = {"slope": ["rate"], "bend": ["sine", "square"], "x": ["angle"]}


def pair(*, inferred: bool = False, sites: dict | None = None) -> tuple[Line, ph.AmortizedGuide]:
    torch.manual_seed(0)
    model = Line(ph.GaussNewton(6), inferred=inferred, sites=sites).double()
    return model, ph.AmortizedGuide(model, ph.GaussNewton(6))


def episode(shots: int = 5, *, inferred: bool = False) -> ph.Episode:
    return make_tasks(3, shots, num_support=2, inferred=inferred).episode()


# ---- draws and predictions -----------------------------------------------------------------------


@pytest.mark.parametrize("inferred", [False, True])
def test_draws_have_every_latent_with_the_draw_first(inferred: bool) -> None:
    values = ph.draws(*pair(inferred=inferred), episode(inferred=inferred), 7)
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    assert shapes == {"slope": (7, 3, 1), "bend": (7, 3, 2)} | (
        {"start": (7, 3, 3, 1)} if inferred else {}
    )
    assert not any(value.requires_grad for value in values.values())


@pytest.mark.parametrize("inferred", [False, True])
def test_predictions_have_observations_too(inferred: bool) -> None:
    values = ph.predict(pair(inferred=inferred)[0], episode(inferred=inferred), 7)
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    assert shapes == {"slope": (7, 3, 1), "bend": (7, 3, 2), "x": (7, 3, 3, POINTS, 1)} | (
        {"start": (7, 3, 3, 1)} if inferred else {}
    )


def test_draws_come_from_the_exact_posterior() -> None:
    values = ph.draws(*pair(sites=TOGETHER), episode(), 20_000)["both"]
    truth = exact(episode().support, episode(), **STANDARD)
    scale = truth.covariance.diagonal(dim1=-2, dim2=-1)[:, :3].sqrt()
    assert ((values.mean(0) - truth.mean[:, :3]) / scale).abs().max() < 0.04
    assert (values.std(0) / scale - 1.0).abs().max() < 0.03


def test_predictions_come_from_the_support_alone_with_the_exact_spread() -> None:
    data = episode()
    model, _ = pair(sites=TOGETHER)
    values = ph.predict(model, data, 20_000)["x"].squeeze(-1)  # (draw, task, shot, time)
    truth = exact(data.support, **STANDARD)
    grown = features(data.query.times)
    center = data.query.initial + (truth.mean[:, :3] @ grown.T).unsqueeze(1)
    variance = torch.einsum("si,tij,sj->ts", grown, truth.covariance[:, :3, :3], grown) + NOISE**2
    sd = variance.sqrt().unsqueeze(1)
    assert ((values.mean(0) - center) / sd).abs().max() < 0.05
    assert (values.std(0) / sd - 1.0).abs().max() < 0.04
    other = with_query(data, values=data.query.values + 100.0)
    torch.manual_seed(4)
    first = ph.predict(model, data, 5)["x"]
    torch.manual_seed(4)
    assert torch.equal(ph.predict(model, other, 5)["x"], first)


def test_without_a_support_predictions_come_from_the_population() -> None:
    slope = ph.predict(pair()[0], replace(episode(), support=None), 4000)["slope"]
    assert slope.shape == (4000, 3, 1)
    assert slope.std().item() == pytest.approx(2.0, rel=0.05)
    assert slope.mean().item() == pytest.approx(0.5, abs=0.1)


def test_drawing_changes_nothing_global_and_follows_the_seed() -> None:
    both = pair()
    before = dict(pyro.settings.get())
    torch.manual_seed(3)
    first = ph.draws(*both, episode(), 5)
    torch.manual_seed(3)
    second = ph.draws(*both, episode(), 5)
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert dict(pyro.settings.get()) == before


@pytest.mark.parametrize("evidence", [None, ph.GaussNewton(2)], ids=["encoder", "computed"])
def test_reading_takes_no_random_number_so_that_draws_follow_the_seed(
    evidence: ph.GaussNewton | None,
) -> None:
    model = Line(evidence).double()
    state = torch.get_rng_state()
    model.with_belief(episode())
    assert torch.equal(torch.get_rng_state(), state)


# ---- importance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inferred", [False, True])
def test_pareto_k_is_low_where_the_guide_is_the_exact_posterior(inferred: bool) -> None:
    both = pair(inferred=inferred, sites=TOGETHER)
    weights = ph.pareto_k(*both, episode(inferred=inferred), 500)
    assert weights.k_hat.shape == (3,) and weights.k_hat.dtype == np.float64
    assert (weights.k_hat < 0.7).all() and weights.is_reliable.all()
    assert weights.relative_ess == pytest.approx(np.ones(3), abs=1e-6)


def test_pareto_k_is_high_where_the_guide_is_far_too_narrow() -> None:
    model, guide = pair(sites=TOGETHER)

    class Narrow(torch.nn.Module):
        def forward(self, data: ph.Episode) -> None:
            marginal = guide.belief(data).gaussian().task_marginal
            narrow = dist.MultivariateNormal(
                marginal.mean, precision_matrix=16.0 * marginal.precision
            )
            with data.plate:
                pyro.sample("both", narrow)

    weights = ph.pareto_k(model, Narrow(), episode(), 1000)
    assert (weights.k_hat > 0.7).all() and not weights.is_reliable.any()
    assert (weights.relative_ess < 0.5).all()


# ---- ArviZ ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> arviz.InferenceData:
    mask = torch.ones(3, 12, POINTS, 1, dtype=torch.bool)
    mask[0, 8, 3:] = False
    torch.manual_seed(1)
    tasks = make_tasks(3, 12, num_support=2, inferred=True, mask=mask)
    return ph.to_arviz(*pair(inferred=True), tasks.episode(), 300, names=NAMES)


@pytest.mark.parametrize(
    ("group", "variable", "dims", "shape"),
    [
        ("posterior", "slope", ("task", "slope_component"), (3, 1)),
        ("posterior", "bend", ("task", "bend_component"), (3, 2)),
        ("posterior", "start", ("task", "shot", "start_component"), (3, 10, 1)),
        ("prior", "bend", ("task", "bend_component"), (3, 2)),
        ("prior", "start", ("task", "shot", "start_component"), (3, 10, 1)),
        ("posterior_predictive", "x", ("task", "shot", "time", "sensor"), (3, 10, POINTS, 1)),
        ("log_likelihood", "x", ("task", "shot"), (3, 10)),
    ],
)
def test_every_group_of_draws_has_named_axes(
    data: arviz.InferenceData,
    group: str,
    variable: str,
    dims: tuple[str, ...],
    shape: tuple[int, ...],
) -> None:
    assert data[group][variable].dims == ("chain", "draw", *dims)
    assert data[group][variable].shape == (1, 300, *shape)
    assert np.isfinite(data[group][variable].values).all()


def test_data_have_named_axes_too(data: arviz.InferenceData) -> None:
    assert data["observed_data"]["x"].dims == ("task", "shot", "time", "sensor")
    assert data["constant_data"]["support"].dims == ("task", "support_shot", "time", "sensor")
    assert data["constant_data"]["initial_measured"].dims == ("task", "shot", "state")
    assert data["observed_data"]["x"].shape == (3, 10, POINTS, 1)
    assert data["constant_data"]["support"].shape == (3, 2, POINTS, 1)


def test_components_have_the_names_they_were_given(data: arviz.InferenceData) -> None:
    assert list(data["posterior"].bend_component.values) == ["sine", "square"]
    assert list(data["posterior"].slope_component.values) == ["rate"]
    assert list(data["observed_data"].sensor.values) == ["angle"]
    assert np.allclose(data["observed_data"].time.values, np.linspace(0.0, 1.5, POINTS))
    assert data.attrs["num_support"] == 2


def test_the_posterior_is_narrower_than_the_prior(data: arviz.InferenceData) -> None:
    after, before = (data[group]["slope"].std("draw").values for group in ("posterior", "prior"))
    assert (after < before).all()


def test_missing_observations_are_gaps(data: arviz.InferenceData) -> None:
    gaps = np.isnan(data["observed_data"]["x"].values[..., 0])
    assert gaps[0, 6, 3:].all()  # shot 8 is the seventh of the query
    assert gaps.sum() == 3


def test_the_log_likelihood_is_that_of_each_shot_at_each_draw(data: arviz.InferenceData) -> None:
    posterior = data["posterior"]
    x = data["observed_data"]["x"].values[..., 0]
    z = np.concatenate([posterior["slope"].values[0], posterior["bend"].values[0]], -1)
    grown = z @ features(TIMES).numpy().T  # (draw, task, time)
    mean = posterior["start"].values[0] + grown[:, :, None]
    terms = -0.5 * ((x - mean) / NOISE) ** 2 - math.log(NOISE) - 0.5 * math.log(2 * math.pi)
    terms[..., 0] = 0.0  # the first observation is the measurement of the start
    assert np.allclose(np.nansum(terms, -1), data["log_likelihood"]["x"].values[0], atol=1e-4)


def test_leave_one_shot_out_runs() -> None:
    loo = arviz.loo(ph.to_arviz(*pair(sites=TOGETHER), episode(12), 2000), pointwise=True)
    assert loo.n_data_points == 30
    assert np.isfinite(loo.elpd_loo)
    assert loo.p_loo > 0
    assert loo.loo_i.dims == ("task", "shot")
    assert (loo.pareto_k < 0.7).all()


def test_posterior_predictions_are_near_the_data(data: arviz.InferenceData) -> None:
    predicted = data["posterior_predictive"]["x"].values[0]
    x = data["observed_data"]["x"].values
    low, high = np.quantile(predicted, [0.05, 0.95], axis=0)
    inside = ((low < x) & (x < high))[..., 1:, :][~np.isnan(x[..., 1:, :])]
    assert inside.mean() > 0.85, inside.mean()


def test_a_summary_shows_no_r_hat_and_no_sample_size(data: arviz.InferenceData) -> None:
    table = ph.summary(data)
    assert list(table.columns) == ["mean", "sd", "eti_5%", "eti_95%"]
    assert {"bend[0, sine]", "start[2, 9, 0]"} <= set(table.index)
    expected = data["posterior"]["slope"].values[0, :, 1, 0].mean()
    assert np.isclose(table.loc["slope[1, rate]", "mean"], expected)


def test_arviz_data_survive_a_file(data: arviz.InferenceData, tmp_path: Path) -> None:
    ph.save_arviz(data, tmp_path / "posterior.nc")
    again = ph.load_arviz(tmp_path / "posterior.nc")
    for group in data.groups():
        for name, variable in data[group].data_vars.items():
            assert np.array_equal(again[group][name].values, variable.values, equal_nan=True)
            assert again[group][name].dims == variable.dims
    assert list(again["posterior"].bend_component.values) == ["sine", "square"]
    assert again.attrs["num_support"] == 2


CERTIFICATE = ph.Certificate(
    [
        Check(
            "fit",
            "holds",
            1.1,
            (1.0, 1.25),
            Threshold(2.0, 2.0, larger=False),
            "errors are as large as the noise",
        )
    ],
    [Check.skipped("efficiency", "σ², too few tasks", "Pass more tasks.")],
    {"reading": object()},
    300,
    4,
    12.34,
)


def test_a_certificate_goes_along_and_survives_a_file(tmp_path: Path) -> None:
    data = ph.to_arviz(*pair(), episode(), 4, certificate=CERTIFICATE)
    ph.save_arviz(data, tmp_path / "posterior.nc")
    for given in (data, ph.load_arviz(tmp_path / "posterior.nc")):
        assert given.attrs["identified"] == "holds"
        assert given.attrs["num_support"] == 2
        parsed = json.loads(given.attrs["certificate"], parse_constant=pytest.fail)
        assert parsed == CERTIFICATE.to_dict()


@pytest.mark.parametrize("status", ["fails", "undecided", "not checked"])
def test_a_posterior_whose_program_is_not_certified_says_so(status: str) -> None:
    refused = replace(CERTIFICATE, conditions=[*CERTIFICATE.conditions, Check("noise (i)", status)])
    attrs = ph.to_arviz(*pair(), episode(), 4, certificate=refused).attrs
    assert attrs["identified"] == refused.verdict != "holds"
    assert json.loads(attrs["certificate"])["conditions"][1]["status"] == status


def test_without_a_certificate_nothing_is_claimed(data: arviz.InferenceData) -> None:
    assert not {"identified", "certificate"} & set(data.attrs)


def test_without_names_components_are_numbered() -> None:
    data = ph.to_arviz(*pair(), episode(), 4)
    assert list(data["posterior"].bend_component.values) == [0, 1]
    assert list(data["observed_data"].sensor.values) == [0]
    assert "start" not in data["posterior"]


def test_float32_models_and_learned_guides_are_exported_as_well() -> None:
    model = Line()
    guide = ph.AmortizedGuide(model, encoder())
    data = ph.to_arviz(model, guide, in_float32(make_tasks(3, 5, num_support=2)).episode(), 4)
    assert data["posterior"]["slope"].dtype == np.float32


# ---- what it refuses -----------------------------------------------------------------------------


def test_without_values_there_is_no_posterior_to_export_or_to_judge() -> None:
    message = "expected a query with values; got values=None. There is no posterior without data"
    for function in (ph.to_arviz, ph.pareto_k):
        with pytest.raises(ValueError, match=message):
            function(*pair(), episode().simulation())


SAMPLERS = {
    "draws": lambda both, n: ph.draws(*both, episode(), n),
    "predict": lambda both, n: ph.predict(both[0], episode(), n),
    "to_arviz": lambda both, n: ph.to_arviz(*both, episode(), n),
    "pareto_k": lambda both, n: ph.pareto_k(*both, episode(), n),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_samples", [0, -3, 1.5, True, "7", None])
def test_numbers_of_draws_that_make_no_sense_are_refused(sampler: str, num_samples: object) -> None:
    message = "expected num_samples as a whole number of 1 or more; got "
    with without_type_checks(), pytest.raises(ValueError, match=message):
        SAMPLERS[sampler](pair(), num_samples)


@pytest.mark.parametrize("sampler", [ph.draws, ph.to_arviz, ph.pareto_k])
def test_what_is_no_episode_is_refused(sampler: object) -> None:
    message = r"expected an Episode; got Tasks\. Pass tasks\.episode\(\)"
    with without_type_checks(), pytest.raises(TypeError, match=message):
        sampler(*pair(), make_tasks(3, 4), 5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "call",
    [
        lambda both: ph.draws(*both, episode(), 4),
        lambda both: ph.predict(both[0], episode(), 4),
        lambda both: ph.to_arviz(*both, episode(), 4),
        lambda both: ph.pareto_k(*both, episode(), 4),
    ],
    ids=["draws", "predict", "to_arviz", "pareto_k"],
)
def test_parameters_that_are_not_finite_are_refused_by_name(
    call: Callable[[Any], object], value: float
) -> None:
    model, guide = pair()
    model.noise_unconstrained.data.fill_(value)
    with pytest.raises(
        ValueError,
        match=r"finite parameters of the model; got NaN or Inf in noise\. Load an earlier",
    ):
        call((model, guide))


def test_names_of_the_wrong_number_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 along axis 'bend_component'"):
        ph.to_arviz(*pair(), episode(), 4, names={"bend": ["one"]})


def test_names_of_what_is_no_site_are_refused() -> None:
    message = r"names of sites among \['bend', 'slope', 'x'\]; got \['unknown'\]"
    with pytest.raises(ValueError, match=message):
        ph.to_arviz(*pair(), episode(), 4, names={"unknown": ["a"]})


class TwoSites(ph.HybridModel):
    """Two sensors of two sites: values that count twice as often at one as at the other."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = ph.UnconditionalPrior(z=ph.families.Normal(2))

    def forward(self, episode: ph.Episode) -> None:
        p = self.prior(episode)
        shots = episode.query
        with episode.plate:
            z = pyro.sample("z", p["z"])
            for i, name in enumerate(("angle", "speed")):
                sensor = slice(i, i + 1)
                times = shots.times.expand(shots.shape[1], -1)
                mean = (z[..., i, None, None] * times).unsqueeze(-1)
                x = dist.Normal(mean, 0.1).mask(shots.scored[..., sensor])
                values = None if shots.values is None else shots.values[..., sensor]
                pyro.sample(name, x.to_event(3), obs=values)


def test_sensors_at_several_sites_are_exported_with_their_gaps() -> None:
    model = TwoSites().double()
    guide = ph.AmortizedGuide(model, ph.GaussNewton(2))
    values = torch.randn(3, 2, POINTS, 2, dtype=torch.float64)
    observed = torch.ones_like(values, dtype=torch.bool)
    observed[1, 0, 2, 1] = False
    shots = ph.Shots.from_tensors(TIMES, values, observed=observed)
    data = ph.to_arviz(model, guide, ph.Episode(None, shots), 4)
    for i, name in enumerate(("angle", "speed")):
        expected = values.where(observed, torch.nan)[..., i : i + 1].numpy()
        assert np.array_equal(data["observed_data"][name].values, expected, equal_nan=True)
        assert data["observed_data"][name].dims[-1] == f"{name}_sensor"
        assert data["log_likelihood"][name].shape == (1, 4, 3, 2)


class Flat(ph.HybridModel):
    """Observations without an axis of sensors."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = ph.UnconditionalPrior(slope=ph.families.Normal(1))

    def forward(self, data: ph.Episode) -> Tensor:
        p = self.prior(data)
        values = data.query.values
        with data.plate:
            slope = pyro.sample("slope", p["slope"])
            mean = slope[..., None] + torch.zeros(3, 3, POINTS, dtype=torch.float64)
            x = dist.Normal(mean, START_NOISE).to_event(2)
            return pyro.sample("x", x, obs=None if values is None else values[..., 0])


def test_observations_of_another_shape_are_refused_with_their_name() -> None:
    model = Flat().double()
    guide = ph.AmortizedGuide(model, ph.GaussNewton(1))
    message = r"observations 'x' with axes \(task, shot, time, sensor\)"
    with pytest.raises(ValueError, match=message):
        ph.to_arviz(model, guide, episode(), 4)
