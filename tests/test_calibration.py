"""Calibration: what is exact passes; too narrow, shifted and blind are called so; and the random state stays."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Note
from matplotlib.figure import Figure
from pyro.infer import MCMC, NUTS
from scipy.stats import norm
from scripts import load
from torch import Tensor
from toys import POINTS, TIMES, TOGETHER, Line, exact, in_float32, make_tasks

import pyro_hybrid as ph
from pyro_hybrid.diagnostics.calibration import HEADLINES
from pyro_hybrid.diagnostics.ranks import (
    CELLS,
    LatentCalibration,
    ecdf,
    judge_ranks,
    uniform_band,
)
from pyro_hybrid.inference import arviz_data as _arviz
from pyro_hybrid.inference.importance import ParetoK
from pyro_hybrid.programs.module import local_parameters
from pyro_hybrid.scores.check import proportion_interval

NOISE = 0.3
DESIGN = torch.zeros(
    POINTS, 2, dtype=torch.float64
)  # orthogonal, so that the posterior is a product
DESIGN[1:, 0], DESIGN[1:, 1] = (
    torch.tensor([0.1, 0.2, 0.2, 0.2, 0.1]),
    torch.tensor([-0.2, -0.1, 0.0, 0.1, 0.2]),
)
SEEN = DESIGN.square().sum(0) / NOISE**2  # information of one shot
SHOTS, SUPPORT = 4, 2


def believed(*parts: ph.Shots, noise: float = NOISE) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of two latents, standard normal before, from all these shots."""
    errors = torch.cat([shots.values.squeeze(-1) - shots.initial for shots in parts], 1)
    precision = 1.0 + DESIGN.square().sum(0) * errors.shape[1] / noise**2
    return errors.sum(1) @ DESIGN / noise**2 / precision, precision.rsqrt().expand(len(errors), 2)


def program(episode: ph.Episode) -> None:
    """x = start + two orthogonal columns · z + noise."""
    loc, scale = believed(episode.support)
    with episode.plate:
        z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
        mean = episode.query.initial + (z @ DESIGN.T).unsqueeze(-2)
        x = dist.Normal(mean.unsqueeze(-1), NOISE).mask(episode.query.scored)
        pyro.sample("x", x.to_event(3), obs=episode.query.values)


def posterior(
    width: float = 1.0, shift: float = 0.0, *, blind: bool = False
) -> Callable[[ph.Episode], Tensor]:
    """A guide: the exact posterior, or so much wider, so many standard deviations to the right, or the prior."""

    def guide(episode: ph.Episode) -> Tensor:
        loc, scale = believed(*[episode.support] if blind else [episode.support, episode.query])
        with episode.plate:
            return pyro.sample("z", dist.Normal(loc + shift * scale, width * scale).to_event(1))

    return guide


def tasks(number: int = 25, seed: int = 0) -> ph.Tasks:
    random = torch.Generator().manual_seed(seed)
    z, start, noise = (
        torch.randn(number, *shape, generator=random, dtype=torch.float64)
        for shape in ((2,), (SHOTS, 1), (SHOTS, POINTS))
    )
    values = start + (z @ DESIGN.T).unsqueeze(1) + NOISE * noise
    values[..., 0] = start[..., 0]
    return ph.Tasks.from_trajectories(TIMES, values.unsqueeze(-1), num_support=SUPPORT)


def checked(guide: Any, **options: Any) -> ph.CalibrationReport:
    return ph.check_calibration(
        program, guide, tasks(), **{"num_draws": 199, "progress": False, **options}
    )


# ---- what is right, and in which ways it can be wrong --------------------------------------------


@pytest.fixture(scope="module")
def right() -> ph.CalibrationReport:
    return checked(posterior())


@pytest.fixture(scope="module")
def narrow() -> ph.CalibrationReport:
    return checked(posterior(width=0.8))


def test_the_exact_posterior_holds(right: ph.CalibrationReport, figure: Note) -> None:
    assert right.verdict == "holds" and [latent.finding for latent in right.latents] == [
        "fine",
        "fine",
    ]
    for latent in right.latents:
        assert all(
            low <= p <= high
            for p, (low, high) in zip((0.5, 0.8, 0.95), latent.intervals, strict=True)
        )
        assert latent.z_mean == pytest.approx(0.0, abs=0.1) and latent.z_sd == pytest.approx(
            1.0, abs=0.08
        )
    assert (right.pareto_k.k_hat < 0.7).all() and right.weights.value == 1.0
    assert len(right.ranks) == 1000 and right.tasks == 25 and right.diverged == 0
    figure(
        "sbc",
        exact=len(right.latents),
        exact_outside=sum(latent.status == "fails" for latent in right.latents),
    )


def test_the_exact_posterior_contracts_as_much_as_the_query_says(
    right: ph.CalibrationReport,
) -> None:
    expected = 1.0 - (1.0 + SUPPORT * SEEN) / (1.0 + SHOTS * SEEN)
    assert [latent.contraction for latent in right.latents] == pytest.approx(
        expected.tolist(), abs=0.03
    )


def test_a_posterior_that_is_a_fifth_too_narrow_is_called_so(
    narrow: ph.CalibrationReport, figure: Note
) -> None:
    assert (
        narrow.verdict == "fails"
        and [latent.finding for latent in narrow.latents] == ["too narrow"] * 2
    )
    expected = [2.0 * norm.cdf(0.8 * norm.ppf(0.5 + 0.5 * p)) - 1.0 for p in (0.5, 0.8, 0.95)]
    for latent in narrow.latents:
        assert latent.coverage == pytest.approx(
            expected, abs=0.05
        ) and latent.z_sd == pytest.approx(1.25, abs=0.1)
    figure(
        "sbc",
        narrow=len(narrow.latents),
        narrow_outside=sum(one.status == "fails" for one in narrow.latents),
    )


def test_a_posterior_that_is_too_wide_is_called_so() -> None:
    found = checked(posterior(width=1.4))
    assert [latent.finding for latent in found.latents] == ["too wide"] * 2
    assert found.weights.status == "holds"  # as a proposal, wide is good


@pytest.mark.parametrize(("shift", "says"), [(0.5, "biased high"), (-0.5, "biased low")])
def test_a_shifted_posterior_is_biased_and_to_that_side(shift: float, says: str) -> None:
    found = checked(posterior(shift=shift))
    assert found.verdict == "fails" and [latent.finding for latent in found.latents] == [says] * 2
    assert [latent.z_mean for latent in found.latents] == pytest.approx([shift] * 2, abs=0.1)
    assert [latent.z_sd for latent in found.latents] == pytest.approx([1.0] * 2, abs=0.08)


def test_a_guide_that_returns_the_prior_has_uniform_ranks_and_no_contraction() -> None:
    found = checked(posterior(blind=True))
    assert [latent.finding for latent in found.latents] == [
        "fine, but says no more than the prior"
    ] * 2
    assert [latent.contraction for latent in found.latents] == pytest.approx([0.0, 0.0], abs=0.03)


def test_a_guide_that_misses_most_of_the_real_posterior_has_large_k_hats() -> None:
    found = checked(posterior(width=0.2), simulations=50, num_draws=999)
    assert found.weights.status == "fails" and (found.pareto_k.k_hat > 0.7).mean() > 0.8


def test_real_queries_whose_k_hat_is_large_are_named() -> None:
    """By their number among all tasks, of which a hundred are looked at."""
    strange = tasks(199).values[[20, 50, 120], SUPPORT:, 1:]

    def guide(episode: ph.Episode) -> None:
        there = (episode.query.values[:, None, :, 1:] == strange).flatten(2).all(2).any(1)
        loc, scale = believed(episode.support, episode.query)
        with episode.plate:
            pyro.sample(
                "z", dist.Normal(loc + 4.0 * scale * there.unsqueeze(-1), scale).to_event(1)
            )

    found = ph.check_calibration(
        program, guide, tasks(199), simulations=199, num_draws=199, progress=False
    )
    assert ") in 97 of 100 tasks, but not in 20, 50, 120. Largest k-hat: " in found.weights.why


def nearly_exact(episode: ph.Episode) -> None:
    """The program with a density that is off by heavy-tailed rounding, of 0.001 nats at most."""
    loc, scale = believed(episode.support)
    with episode.plate:
        z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
        pyro.factor("rounding", 1e-5 * (1e4 * z[..., 0]).tan().clamp(-100.0, 100.0))
        mean = episode.query.initial + (z @ DESIGN.T).unsqueeze(-2)
        x = dist.Normal(mean.unsqueeze(-1), NOISE).mask(episode.query.scored)
        pyro.sample("x", x.to_event(3), obs=episode.query.values)


def test_almost_equal_weights_are_reliable_however_heavy_the_tail_of_their_rounding() -> None:
    torch.manual_seed(0)
    weights = ph.pareto_k(nearly_exact, posterior(), tasks().episode(), 999)
    assert weights.relative_ess.min() > 0.9998
    assert (weights.k_hat == 0.0).all() and weights.is_reliable.all()
    found = ph.check_calibration(nearly_exact, posterior(), tasks(), num_draws=199, progress=False)
    assert found.weights.status == "holds" and found.verdict == "holds"
    assert "in 25 of 25 tasks" in found.weights.why
    assert found.plot().axes[-1].get_title().endswith("(hollow: equal weights)")


def test_what_only_the_real_queries_show_is_in_the_k_hats_alone() -> None:
    """A guide that is right about what the program simulates, and wrong about what was measured."""
    real = tasks().values[:, SUPPORT:, 1:]

    def guide(episode: ph.Episode) -> None:
        measured = bool((episode.query.values[:, :, 1:, None].squeeze(-1) == real).all())
        posterior(0.2 if measured else 1.0)(episode)

    found = checked(guide, simulations=500)
    assert [latent.status for latent in found.latents] == ["holds"] * 2 and found.verdict == "fails"
    assert str(found).startswith(
        "NOT THE POSTERIOR: each latent is calibrated by itself, but the weights"
    )


def test_few_simulations_decide_nothing() -> None:
    found = checked(posterior(), simulations=25)
    assert found.verdict == "undecided" and found["z[0]"].finding == "too few simulations to tell"


def test_latents_of_shots_are_ranked_too() -> None:
    torch.manual_seed(0)
    model = Line(ph.GaussNewton(6), inferred=True, sites=TOGETHER).double()
    guide = ph.AmortizedGuide(model, ph.GaussNewton(6))
    data = make_tasks(25, 4, num_support=2, inferred=True)
    found = ph.check_calibration(model, guide, data, num_draws=199, progress=False)
    assert [latent.name for latent in found.latents] == ["both[0]", "both[1]", "both[2]", "start"]
    assert found.verdict == "holds" and found["start"].contraction > 0.5


def test_segments_restart_from_the_simulated_states() -> None:
    torch.manual_seed(0)
    evidence, seen = ph.GaussNewton(3, segments=(2, 2)), []
    model = Line(evidence, sites=TOGETHER).double()
    guide = ph.AmortizedGuide(model, evidence)

    def spy(episode: ph.Episode) -> object:
        seen.append(episode)
        return guide(episode)

    mask = torch.rand(20, 4, POINTS, 1) > 0.2
    mask[:, :, 0] = True
    data = make_tasks(20, 4, num_support=2, mask=mask)
    found = ph.check_calibration(model, spy, data, simulations=500, num_draws=199, progress=False)
    assert found.verdict == "holds"
    states, query = seen[0].query.states, data.episode().query
    there = query.observed
    assert torch.equal(states[there], seen[0].query.values[there])
    assert torch.equal(states[:, :, 0], query.initial) and not torch.equal(states, query.states)


def angle(natural: Tensor) -> Tensor:
    loc, concentration = (
        torch.atan2(natural[..., 1:], natural[..., :1]),
        natural.norm(dim=-1, keepdim=True),
    )
    return pyro.sample("angle", dist.VonMises(loc, concentration).to_event(1))


ABOUT_PI = torch.tensor([-2.0, 0.0], dtype=torch.float64).expand(25, 2)


def circle(episode: ph.Episode) -> None:
    """An angle that is seen through its cosine and sine."""
    with episode.plate:
        z = angle(ABOUT_PI[: episode.query.shape[0]])[..., None, None, :]
        mean = torch.cat([z.cos(), z.sin()], -1) + torch.zeros(2, POINTS, 2, dtype=torch.float64)
        pyro.sample(
            "x",
            dist.Normal(mean, 1.0).mask(episode.query.scored).to_event(3),
            obs=episode.query.values,
        )


def around(episode: ph.Episode) -> None:
    """Its posterior: a von Mises prior stays one, with x / σ² added to λ."""
    with episode.plate:
        angle(ABOUT_PI + (episode.query.values * episode.query.scored).sum((1, 2)))


def test_an_angle_about_pi_is_judged_on_its_circle() -> None:
    data = ph.Tasks.from_trajectories(
        TIMES, torch.randn(25, 4, POINTS, 2, dtype=torch.float64), num_support=2
    )
    found = ph.check_calibration(circle, around, data, num_draws=199, progress=False)
    assert found.verdict == "holds" and found["angle"].z_sd == pytest.approx(1.0, abs=0.08)
    assert found["angle"].contraction > 0.7


def test_amortised_guides_in_float32_are_checked_as_well() -> None:
    torch.manual_seed(0)
    model = Line()
    guide = ph.AmortizedGuide(model, ph.SetEncoder(1, POINTS, 8, width=16))
    found = ph.check_calibration(
        model, guide, in_float32(make_tasks(4, 4)), simulations=20, progress=False
    )
    assert [latent.name for latent in found.latents] == ["slope", "bend[0]", "bend[1]"]


# ---- what is simulated, and what stays -----------------------------------------------------------


def test_only_what_counts_as_an_observation_is_simulated() -> None:
    seen, data = [], tasks().episode()

    def spy(episode: ph.Episode) -> None:
        seen.append(episode)
        posterior()(episode)

    checked(spy, simulations=50)
    first, *_, last = seen
    for episode in (first, last):
        for name in ("times", "scored", "observed", "initial"):
            assert torch.equal(getattr(episode.query, name), getattr(data.query, name))
        assert torch.equal(episode.support.values, data.support.values)
    assert torch.equal(first.query.values[:, :, 0], data.query.values[:, :, 0])
    assert (first.query.values != data.query.values)[:, :, 1:].all() and torch.equal(
        last.query.values, data.query.values
    )


@pytest.mark.parametrize(
    ("number", "simulations", "expected"), [(7, 10, 14), (7, 7, 7), (30, 10, 10), (130, 200, 260)]
)
def test_every_task_is_simulated_equally_often(
    number: int, simulations: int, expected: int
) -> None:
    found = ph.check_calibration(
        program, posterior(), tasks(number), simulations=simulations, num_draws=50, progress=False
    )
    assert found.ranks.shape == (expected, 2) and found.tasks == min(number, simulations)
    assert len(found.pareto_k.k_hat) == min(number, 100)


def test_the_same_seed_gives_the_same_and_the_global_random_state_stays() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first, again, other = (checked(posterior(), simulations=50, seed=seed) for seed in (3, 3, 4))
    assert (
        torch.equal(torch.get_rng_state(), before[0])
        and np.random.get_state()[1].tolist() == before[1]
    )
    assert np.array_equal(first.ranks, again.ranks) and np.array_equal(
        first.pareto_k.k_hat, again.pareto_k.k_hat
    )
    assert first.to_dict() | {"seconds": 0} == again.to_dict() | {"seconds": 0}
    assert not np.array_equal(first.ranks, other.ranks)


def test_what_was_trained_is_not_changed() -> None:
    model = Line(ph.GaussNewton(1)).double().train()
    guide = ph.AmortizedGuide(model, ph.GaussNewton(1)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ph.check_calibration(
        model, guide, make_tasks(4, 4), simulations=4, num_draws=50, progress=False
    )
    assert model.training and guide.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_diverges_is_left_out_and_counted() -> None:
    def blows_up(episode: ph.Episode) -> None:
        loc, scale = believed(episode.support)
        with episode.plate:
            z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            mean = (episode.query.initial + (z @ DESIGN.T).unsqueeze(-2)).unsqueeze(-1)
            mean = mean.where(
                z[..., :1, None, None] < loc[:, :1, None, None] + scale[0, 0], torch.inf
            )
            pyro.sample(
                "x",
                dist.Normal(mean, NOISE).mask(episode.query.scored).to_event(3),
                obs=episode.query.values,
            )

    found = ph.check_calibration(blows_up, posterior(), tasks(), num_draws=99, progress=False)
    assert (
        found.diverged == pytest.approx(1000 * norm.sf(1.0), abs=50)
        and len(found.ranks) == 1000 - found.diverged
    )
    assert f"; {found.diverged} more diverged and were left out" in str(found)
    assert found["z[0]"].status == "fails"  # what is left isn't the prior any more


# ---- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("simulations", "latents"), [(100, 1), (1000, 1), (1000, 5)])
def test_uniform_ranks_leave_their_band_once_in_a_hundred_times(
    simulations: int, latents: int
) -> None:
    random, trials = np.random.default_rng(1), 4000
    _, low, high = uniform_band(simulations, latents)
    left = 0
    for _ in range(trials):
        share_below = ecdf(random.uniform(size=simulations))
        left += bool(((share_below < low) | (share_below > high)).any())
    assert 0.3 / latents < 100 * left / trials < 1.5 / latents + 0.2


def test_the_band_is_symmetric_and_shrinks_with_the_root_of_the_number() -> None:
    grid, low, high = uniform_band(1000)
    assert len(grid) == CELLS - 1 and (low < grid).all() and (grid < high).all()
    assert np.allclose(low, 1.0 - high[::-1], atol=0.0011)
    ratio = (uniform_band(400)[2] - uniform_band(400)[0])[50] / (
        uniform_band(6400)[2] - uniform_band(6400)[0]
    )[50]
    assert ratio == pytest.approx(4.0, rel=0.1)


def test_the_share_below_a_place_is_counted() -> None:
    assert ecdf(np.array([0.005, 0.5, 0.995]))[[0, 48, 50, 98]] == pytest.approx(
        [1 / 3, 1 / 3, 2 / 3, 2 / 3]
    )


def scored(scores: np.ndarray) -> LatentCalibration:
    return judge_ranks("z", norm.cdf(scores), -scores, np.full(len(scores), 0.9))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s, "fine"),
        (lambda s: 1.4 * s + 0.6, "biased low, too narrow"),
        (lambda s: 0.6 * s - 0.4, "biased high, too wide"),
        (lambda s: np.sign(s) * 0.95 + 0.3 * s, "too narrow"),
        (
            lambda s: (np.sign(s) * 0.9 + 0.35 * s) / np.std(np.sign(s) * 0.9 + 0.35 * s),
            "wrong in shape",
        ),
    ],
    ids=["right", "low and narrow", "high and wide", "narrow", "two peaks"],
)
def test_a_failure_is_put_into_words(change: Callable[[np.ndarray], np.ndarray], says: str) -> None:
    even = norm.ppf((np.arange(2000) + 0.5) / 2000)
    found = scored(change(even))
    assert found.finding == says and found.status == ("holds" if says == "fine" else "fails")


def test_a_yes_needs_a_margin() -> None:
    """Inside the band, and yet a bias of a quarter of a standard deviation can't be excluded."""
    even = norm.ppf((np.arange(300) + 0.5) / 300)
    assert scored(even).status == "holds" and scored(even + 0.12).status == "undecided"


def test_intervals_of_shares_hold_what_they_should() -> None:
    assert proportion_interval(0, 10)[0] == 0.0 and proportion_interval(10, 10)[1] == 1.0
    assert proportion_interval(0, 10)[1] == pytest.approx(1.0 - 0.025**0.1) and proportion_interval(
        10, 10
    )[0] == pytest.approx(0.025**0.1)


# ---- what ArviZ does -----------------------------------------------------------------------------


def test_pareto_k_is_the_index_of_the_tail() -> None:
    uniform = np.random.default_rng(0).uniform(size=(4, 20_000))
    weights = -np.array([[0.1], [0.5], [0.9], [1.5]]) * np.log(uniform)
    assert _arviz.pareto_k(weights) == pytest.approx([0.1, 0.5, 0.9, 1.5], abs=0.3)


def test_pareto_k_of_weights_that_have_no_tail() -> None:
    weights = np.random.default_rng(0).normal(size=(6, 500))
    weights[0], weights[1], weights[2] = 3.0, 1e-9 * weights[1], -np.inf
    weights[3, 20:], weights[4, :5] = np.nan, np.nan  # a draw that diverges counts for nothing
    weights[5, 0] = np.inf
    k = _arviz.pareto_k(weights)
    assert k[:4].tolist() == [0.0, 0.0, math.inf, math.inf] and k[4] < 0.7 and k[5] == math.inf
    assert _arviz.pareto_k(np.where(np.arange(500) < 400, 1.0, np.nan)[None]).tolist() == [0.0]


def test_the_effective_sample_size_is_that_of_the_weights() -> None:
    weights = np.random.default_rng(0).normal(size=(5, 500))
    weights[1], weights[2], weights[3, 100:] = 3.0, -np.inf, np.nan
    weights[3, :100] = 7.0
    weights[4, 0] = np.inf
    ess = _arviz.relative_ess(weights)
    expected = np.exp(weights[0]).sum() ** 2 / np.exp(2 * weights[0]).sum() / 500
    assert ess == pytest.approx([expected, 1.0, 0.0, 0.2, 0.0])
    assert _arviz.relative_ess(weights + 1e4)[:2] == pytest.approx(ess[:2])


def test_ranks_are_drawn_as_their_distance_from_the_diagonal() -> None:
    axis, ranks = Figure().subplots(), np.random.default_rng(0).uniform(size=300)
    _arviz.plot_ranks(ranks, axis, "#0072b2")
    (line,) = [line for line in axis.lines if line.get_color() == "#0072b2"]
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert np.abs(y - (np.searchsorted(np.sort(ranks), x, side="right") / 300 - x)).max() < 0.01


# ---- what a reader gets --------------------------------------------------------------------------


def test_the_table_says_what_a_person_needs(
    right: ph.CalibrationReport, narrow: ph.CalibrationReport
) -> None:
    for found, verdict, word in ((right, "holds", "fine"), (narrow, "fails", "TOO NARROW")):
        first, second, _, head, *rows, _, last = str(found).splitlines()
        assert first == HEADLINES[verdict] and second.startswith(
            "(1000 simulations of 25 tasks, 199 draws of each; "
        )
        assert re.split(r"  +", head) == [
            "latent",
            "truth inside 50%",
            "80%",
            "95%",
            "z mean",
            "z sd",
            "contraction",
            "verdict",
        ]
        assert [row.split()[0] for row in rows] == ["z[0]", "z[1]"] and all(
            row.endswith(f"  {word}") for row in rows
        )
        assert len({re.search(word, row).start() for row in rows} | {head.index("verdict")}) == 1
        assert re.fullmatch(
            r"weights  holds: The weights of the guide's draws are reliable \(k-hat below 0\.7\) in 25 of 25 "
            r"tasks\. Largest k-hat: "
            r"-?\d\.\d\d; smallest effective sample size: \d\S* of the draws\.",
            last,
        )


def test_its_dictionary_is_json(narrow: ph.CalibrationReport) -> None:
    found = json.loads(json.dumps(narrow.to_dict(), allow_nan=False))
    assert (
        found["verdict"] == "fails"
        and found["simulations"] == 1000
        and len(found["pareto_k"]) == 25
    )
    assert [row["finding"] for row in found["latents"]] == ["too narrow"] * 2
    assert (
        found["weights"]["condition"] == "weights" and len(found["latents"][0]["intervals"][2]) == 2
    )


def test_a_row_is_found_by_its_name(right: ph.CalibrationReport) -> None:
    assert right["z[1]"] is right.latents[1]
    with pytest.raises(KeyError, match=r"'z' isn't among \['z\[0\]', 'z\[1\]'\]"):
        right["z"]


def test_the_figure_shows_every_latent_and_says_what_is_good(narrow: ph.CalibrationReport) -> None:
    figure = narrow.plot()
    titles = [axis.get_title() for axis in figure.axes]
    assert (
        titles[:2] == ["z[0]: too narrow", "z[1]: too narrow"]
        and figure.get_suptitle() == HEADLINES["fails"]
    )
    assert [title.partition(":")[0] for title in titles[2:]] == [
        "coverage",
        "z",
        "contraction by the query",
        "real queries",
    ]
    line = np.asarray(figure.axes[0].lines[-1].get_ydata())
    grid, low, high = uniform_band(1000, 2)
    assert (
        np.abs(line).max() > np.abs(high - grid).max()
        and line.min() >= figure.axes[0].get_ylim()[0]
    )


@pytest.mark.parametrize("latents", [1, 5, 9])
def test_figures_have_room_for_any_number_of_latents(latents: int) -> None:
    random = np.random.default_rng(0)
    ranks = random.uniform(size=(300, latents))
    rows = [
        judge_ranks(f"z[{i}]", column, norm.ppf(column), np.full(300, 0.5), latents)
        for i, column in enumerate(ranks.T)
    ]
    weights = checked(posterior(), simulations=2, num_draws=50).weights
    figure = ph.CalibrationReport(
        rows, weights, ranks, ParetoK(np.full(3, 0.1), np.array([0.5, 0.8, 0.9995])), 3, 50
    ).plot()
    figure.draw_without_rendering()
    assert sum(bool(axis.get_title()) for axis in figure.axes) == latents + 4


def test_short_checks_show_no_bar(capfd: pytest.CaptureFixture[str]) -> None:
    checked(posterior(), simulations=20, progress=True)
    assert capfd.readouterr() == ("", "")


# ---- what it refuses -----------------------------------------------------------------------------


def unnamed(episode: ph.Episode) -> None:
    with episode.plate:
        pyro.sample("other", dist.Normal(torch.zeros(episode.query.shape[0], 2), 1.0).to_event(1))


def lost(episode: ph.Episode) -> None:
    with episode.plate:
        loc = torch.full((episode.query.shape[0], 2), torch.nan)
        pyro.sample("z", dist.Normal(loc, 1.0, validate_args=False).to_event(1))


def scalar(episode: ph.Episode) -> None:
    with episode.plate:
        z = pyro.sample("z", dist.Normal(torch.zeros(episode.query.shape[0]), 1.0))
        x = dist.Normal(z[..., None, None, None].expand(*z.shape, 2, POINTS, 1), 1.0)
        pyro.sample("x", x.to_event(3), obs=episode.query.values)


def twice(episode: ph.Episode) -> None:
    program(episode)
    pyro.sample("sum", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


def unseeing(episode: ph.Episode) -> None:
    with episode.plate:
        pyro.sample("z", dist.Normal(torch.zeros(episode.query.shape[0], 2), 1.0).to_event(1))


def endless(episode: ph.Episode) -> None:
    with episode.plate:
        z = pyro.sample("z", dist.Normal(torch.zeros(episode.query.shape[0], 2), 1.0).to_event(1))
        mean = torch.inf * z[..., :1, None, None].expand(*z.shape[:-1], 2, POINTS, 1)
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(3), obs=episode.query.values)


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (
            program,
            unnamed,
            r"expected a guide that samples every latent of the program; got none of \['z'\]",
        ),
        (
            program,
            lost,
            r"expected finite draws from the guide, that differ; got others in 25 simulations",
        ),
        (
            scalar,
            scalar,
            r"expected latents of shape \(task, component\) or \(task, shot, component\); got \(25,\)\. Give",
        ),
        (
            twice,
            posterior(),
            r"expected a program that observes episode\.query\.values as it is, at one site; got \['sum', 'x'\]",
        ),
        (unseeing, posterior(), r"at one site; got nothing observed\. Write obs=episode\.query"),
        (
            endless,
            posterior(),
            r"expected finite trajectories from the program; got 25 simulations that diverged",
        ),
    ],
    ids=["missing site", "no draws", "scalar", "two sites", "no site", "divergence"],
)
def test_misuses_are_answered(
    model: Callable[..., object], guide: Callable[..., object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ph.check_calibration(model, guide, tasks(), simulations=25, num_draws=50, progress=False)


@pytest.mark.parametrize("options", [{"simulations": 1}, {"num_draws": 49}])
def test_too_few_draws_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(
        ValueError, match=r"expected \w+ as a whole number of \d+ or more; got \d+. The defaults"
    ):
        checked(posterior(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"simulations": 100.5}, r"simulations as a whole number of 2 or more; got 100\.5"),
        ({"simulations": 0}, r"simulations as a whole number of 2 or more; got 0"),
        ({"num_draws": 99.0}, r"num_draws as a whole number of 50 or more; got 99\.0"),
        ({"seed": "0"}, r"seed as a whole number of 0 or more; got '0'"),
    ],
)
def test_settings_that_are_no_whole_numbers_are_refused(
    without_jaxtyping: None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        checked(posterior(), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (None, posterior(), tasks()),
            r"model to be callable; got NoneType\. Pass the trained Pyro",
        ),
        (
            (program, tasks(), posterior()),
            r"guide to be callable; got Tasks\. Pass the trained guide",
        ),
        (
            (program, posterior(), tasks().episode()),
            r"tasks to be a data set .*; got Episode\. Make",
        ),
    ],
    ids=["no model", "another order", "an episode"],
)
def test_wrong_objects_are_answered_with_what_to_pass(
    without_jaxtyping: None, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        ph.check_calibration(*arguments)


# ---- the page ------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_shows_files_that_are_there_and_numbers_that_are_in_them() -> None:
    page = (DOCS / "calibration.md").read_text(encoding="utf-8")
    found = json.loads((DOCS / "results" / "calibration.json").read_text(encoding="utf-8"))
    shown = re.findall(r"\((images/\w+\.png)\)|^```{literalinclude} (\S+)$", page, re.MULTILINE)
    assert len(shown) == 5 and all((DOCS / (image or text)).is_file() for image, text in shown)
    (drag,) = [row["drag"] for row in found["computed_suspects"] if row["spring"] == 93]
    assert (
        f"a drag of {drag['mean']:.2f} ± {drag['sd']:.2f}, and it is {drag['truth']:.2f}." in page
    )
    assert len(found["computed_suspects"]) == 3 and len(found["restarts_suspects"]) == 1
    assert [found[name]["verdict"] for name in ("encoder", "computed", "restarts")] == [
        "fails",
        "holds",
        "holds",
    ]


def test_the_script_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, threads = load(DOCS / "results" / "calibration.py"), torch.get_num_threads()
    monkeypatch.setattr("sys.argv", ["calibration.py", "--fast", "--out", str(tmp_path)])
    try:
        script.main()
    finally:
        torch.set_num_threads(threads)
    assert {path.name for path in tmp_path.rglob("*.*")} == {
        "calibration.json",
        "calibration_computed.png",
        "calibration_computed.txt",
        "calibration_encoder.png",
        "calibration_encoder.txt",
        "calibration_restarts.txt",
    }


# ---- against NUTS and closed forms ---------------------------------------------------------------


class Decay(ph.HybridModel):
    """x' = -rate x, observed with noise; the rate's posterior is not Gaussian, and integrated here."""

    def __init__(self) -> None:
        super().__init__()
        evidence = ph.Encoder(ph.SetEncoder(1, POINTS, 8)).then(ph.GaussNewton(4))
        self.prior = ph.SupportPrior(evidence, rate=ph.families.LogNormal(1))

    def forward(self, episode: ph.Episode) -> None:
        p = self.prior(episode)
        with episode.plate:
            rate = pyro.sample("rate", p["rate"])
            shots = episode.query
            states = ph.solve(lambda t, y: (-rate * y[0],), shots.initial.unbind(-1), shots.times)
            pyro.sample(
                "x", dist.Normal(states, 0.1).mask(shots.scored).to_event(3), obs=shots.values
            )


def decays() -> ph.Tasks:
    random = torch.Generator().manual_seed(0)
    rate, start, noise = (
        torch.randn(3, *shape, generator=random, dtype=torch.float64)
        for shape in ((1, 1), (4, 1), (4, POINTS))
    )
    values = start * torch.exp(-(0.3 * rate).exp() * TIMES) + 0.1 * noise
    values[..., 0] = start[..., 0]
    return ph.Tasks.from_trajectories(TIMES, values.unsqueeze(-1), num_support=2)


def integrated(model: Decay, episode: ph.Episode) -> dict[str, tuple[Tensor, Tensor]]:
    grid = torch.linspace(0.02, 6.0, 6000, dtype=torch.float64)
    expected = episode.query.initial[..., None] * torch.exp(
        -grid[:, None] * TIMES
    )  # (task, shot, grid, time)
    errors = (episode.query.values[..., 0].unsqueeze(2) - expected)[..., 1:] / 0.1
    prior = model.prior(model.with_belief(episode))["rate"].log_prob(grid[:, None, None]).T
    weight = torch.softmax(prior - 0.5 * errors.square().sum((1, 3)), 1)
    mean = weight @ grid
    return {"rate": (mean[:, None], (weight @ grid.square() - mean.square()).sqrt()[:, None])}


def solved(model: Line, episode: ph.Episode) -> dict[str, tuple[Tensor, Tensor]]:
    found = exact(
        episode.support, episode, inferred=model.inferred, loc=(0.0,) * 3, scale=(1.0,) * 3
    )
    mean, scale = found.mean, found.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    starts = {"start": tuple(x[:, -2:, None] for x in (mean, scale))} if model.inferred else {}
    return {"both": (mean[:, :3], scale[:, :3]), **starts}


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "data", "closed"),
    [
        (
            lambda: Line(ph.GaussNewton(6), sites=TOGETHER),
            lambda: make_tasks(3, 4, num_support=2),
            solved,
        ),
        (
            lambda: Line(ph.GaussNewton(6), sites=TOGETHER, inferred=True),
            lambda: make_tasks(3, 4, num_support=2, inferred=True),
            solved,
        ),
        (Decay, decays, integrated),
    ],
    ids=["starts known", "starts inferred", "decay"],
)
def test_guide_nuts_and_closed_form_agree(model: Any, data: Any, closed: Any, figure: Note) -> None:
    torch.manual_seed(0)
    model, data = model().double().eval().requires_grad_(False), data()
    guide, episode = (
        ph.AmortizedGuide(model, ph.GaussNewton(6)),
        data.episode().select_tasks(0),
    )
    with local_parameters():
        nuts = NUTS(model, full_mass=True, max_tree_depth=5)
        mcmc = MCMC(nuts, num_samples=800, warmup_steps=200, disable_progbar=True)
        mcmc.run(episode)
    expected = closed(model, episode)
    for found in (mcmc.get_samples(), ph.draws(model, guide, episode, 4000)):
        assert set(found) == set(expected)
        for name, (mean, scale) in expected.items():
            gap, ratio = (found[name].mean(0) - mean) / scale, found[name].std(0) / scale
            assert gap.abs().max() < 0.1 and (ratio - 1.0).abs().max() < 0.1
            figure("guides", mean=float(gap.abs().max()), sd=float((ratio - 1.0).abs().max()))
    check = ph.check_calibration(model, guide, data, simulations=300, progress=False)
    assert {latent.status for latent in check.latents} == {"holds"} and (
        check.pareto_k.k_hat < 0.7
    ).all()
    figure("guides", k=float(check.pareto_k.k_hat.max()))
