"""Local injectivity against the Fisher information of linear models, and directions that nothing observed moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.testing import assert_close
from toys import NOISE, SEPARATE, START_NOISE, TIMES, Line, alone, make_tasks

import pyro_hybrid as ph
from pyro_hybrid.beliefs.families import Family, LogNormal, Normal
from pyro_hybrid.identifiability.fisher import (
    FisherInformation,
    judge_information,
    least_squares_at,
    measure_information,
)
from pyro_hybrid.identifiability.task_beliefs import TaskBeliefs
from pyro_hybrid.scores.check import Check

Array = NDArray[np.float64]
Program = Callable[[ph.Episode], None]
CLOCK = torch.linspace(0.0, 2.0, 9, dtype=torch.float64)
CENTRES, SPREADS = torch.tensor([0.5, 0.0, 0.0]).double(), torch.tensor([2.0, 1.0, 0.5]).double()
T = np.asarray(TIMES)
DESIGN = np.stack([T, np.sin(3.0 * T), T**2], -1)  # zero at the first time
SHOTS = 4


def believed(
    families: dict[str, Family], points: Tensor, scale: float | Tensor = 1e-3
) -> TaskBeliefs:
    """Two supports that are both sure of the same points (task, latent)."""
    natural, at = {}, 0
    for name, family in families.items():
        part = points[:, at : at + family.n].expand(2, -1, -1).contiguous()
        natural[name], at = family.from_gaussian(part, torch.ones_like(part) * scale), at + family.n
    return TaskBeliefs(families, natural, num_support=1)


def guiding(families: dict[str, Family], points: Tensor) -> Program:
    """A guide that is sure of them as well."""

    def guide(episode: ph.Episode) -> None:
        with episode.plate:
            pieces = points.split([family.n for family in families.values()], -1)
            for (name, family), u in zip(families.items(), pieces, strict=True):
                pyro.sample(
                    name, family.distribution(family.from_gaussian(u, torch.full_like(u, 1e-6)))
                )

    return guide


def observing(
    states: Callable[..., Tensor], families: dict[str, Family], noise: float = 0.1
) -> Program:
    """x = states(latents, times) + noise."""

    def program(episode: ph.Episode) -> None:
        tasks, shots = episode.query.shape
        with episode.plate:
            raw = {
                name: torch.zeros(tasks, family.n, family.k).double()
                for name, family in families.items()
            }
            z = {
                name: pyro.sample(name, family.distribution(family.from_raw(raw[name])))[
                    ..., None, None, :
                ]
                for name, family in families.items()
            }
            mean = states(**z, t=episode.query.times.unsqueeze(-1)) + torch.zeros(
                tasks, shots, len(episode.query.times), 1
            )
            pyro.sample("x", dist.Normal(mean, noise).to_event(3), obs=episode.query.values)

    return program


def measured(
    states: Callable[..., Tensor], families: dict[str, Family], points: Tensor, noise: float = 0.1
) -> FisherInformation:
    """Fisher information of such a program at points (task, latent), from three shots of each task."""
    episode = alone(
        CLOCK, torch.zeros(len(points), 3, 9, 1).double(), (torch.zeros(len(points), 3).double(),)
    )
    program = observing(states, families, noise)
    return measure_information(
        program, guiding(families, points), episode, believed(families, points)
    )


def population(tasks: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(tasks, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- against closed forms ------------------------------------------------------------------------


def line(inferred: bool) -> tuple[FisherInformation, TaskBeliefs]:
    points = CENTRES + SPREADS * population(25, 3)
    beliefs = believed(SEPARATE, points)
    model = Line(inferred=inferred).double()
    episode = make_tasks(25, SHOTS + 1, num_support=1, inferred=inferred).episode()
    return measure_information(model, guiding(SEPARATE, points), episode, beliefs), beliefs


def closed_form(inferred: bool) -> Array:
    """ΦᵀΦ/σ² of all shots; where each shot's start is unknown, what is left once it is eliminated by hand."""
    design, weight = DESIGN[1:], np.eye(5) / NOISE**2
    if inferred:
        one = np.ones((5, 1))
        weight = weight - weight @ one @ one.T @ weight / (one.T @ weight @ one + START_NOISE**-2)
    return SHOTS * design.T @ weight @ design


@pytest.mark.parametrize("inferred", [False, True])
def test_information_of_a_linear_model_is_in_closed_form_in_units_of_the_population(
    inferred: bool,
) -> None:
    found, beliefs = line(inferred)
    spread = np.sqrt(beliefs.mean[0].numpy().var(0) + 1e-6)
    expected = closed_form(inferred) * np.outer(spread, spread)
    assert found.information.shape == (2, 25, 3, 3)
    assert np.abs(found.information.numpy() / expected - 1.0).max() < 1e-6
    assert found.singular[1, 7].tolist() == pytest.approx(
        np.sqrt(np.linalg.eigvalsh(expected)).tolist(), rel=1e-6
    )
    weakest = np.linalg.eigh(expected)[1][:, 0] ** 2
    assert found.weakest.tolist() == pytest.approx(weakest.tolist(), rel=1e-4)
    assert found.weakest.sum() == pytest.approx(1.0)


def test_a_singular_value_is_how_many_noises_a_spread_moves_the_observations() -> None:
    """x = z t: by one spread of z, all observations together move by spread · |t| / noise."""
    points = 3.0 * population(50, 1)
    found = measured(lambda z, t: z * t, {"z": Normal(1)}, points, noise=0.2)
    expected = points.std(correction=0) * np.sqrt(3.0 * float(CLOCK.square().sum())) / 0.2
    assert found.singular.flatten().tolist() == pytest.approx([float(expected)] * 100, rel=1e-5)


def test_positive_latents_are_measured_in_their_logarithm() -> None:
    points = 0.5 * population(20, 1)
    found = measured(lambda z, t: z * t, {"z": LogNormal(1)}, points)
    spread = (points.var(correction=0) + 1e-6).sqrt()
    expected = found.points[0].exp() * spread * (3.0 * CLOCK.square().sum()).sqrt() / 0.1
    assert_close(found.singular[0], expected, rtol=1e-5, atol=0.0)


def test_units_of_a_latent_do_not_matter() -> None:
    points, unit = population(20, 2), torch.tensor([50.0, 0.02]).double()
    singular = []
    for u in (torch.ones(2).double(), unit):

        def states(z: Tensor, t: Tensor, u: Tensor = u) -> Tensor:
            return z[..., :1] / u[0] * t + z[..., 1:] / u[1] * t**2

        episode = alone(CLOCK, torch.zeros(20, 3, 9, 1).double(), (torch.zeros(20, 3).double(),))
        families: dict[str, Family] = {"z": Normal(2)}
        beliefs = believed(families, points * u, 1e-3 * u)
        singular.append(
            measure_information(
                observing(states, families), guiding(families, points * u), episode, beliefs
            ).singular
        )
    assert_close(*singular, rtol=1e-4, atol=0.0)


def test_masked_observations_say_nothing() -> None:
    points, mask = population(6, 1), torch.ones(6, 3, 9, 1, dtype=torch.bool)
    mask[:, :, 5:] = False
    families: dict[str, Family] = {"z": Normal(1)}

    def program(episode: ph.Episode) -> None:
        with episode.plate:
            z = pyro.sample("z", dist.Normal(torch.zeros(6, 1).double(), 1.0).to_event(1))[
                ..., None, None, :
            ]
            mean = z * episode.query.times.unsqueeze(-1) + torch.zeros(6, 3, 9, 1)
            pyro.sample(
                "x",
                dist.Normal(mean, 0.1).mask(episode.query.scored).to_event(3),
                obs=episode.query.values,
            )

    episode = alone(
        CLOCK, torch.zeros(6, 3, 9, 1).double(), (torch.zeros(6, 3).double(),), scored=mask
    )
    found = measure_information(
        program, guiding(families, points), episode, believed(families, points)
    )
    spread = float(believed(families, points).population_sd)
    expected = spread * np.sqrt(3.0 * float(CLOCK[:5].square().sum())) / 0.1
    assert found.singular.flatten().tolist() == pytest.approx([expected] * 12, rel=1e-5)


def test_the_program_is_posed_in_float64_with_next_to_no_prior_and_left_as_it_was() -> None:
    model, tasks = Line(ph.GaussNewton(1)), make_tasks(3, 4, num_support=2)
    points = population(3, 3)
    problem = least_squares_at(model, tasks.episode(), believed(SEPARATE, points), points)
    assert problem.prior.precision.abs().max() < 1e-6 and problem.episode.support is None
    assert all(p.dtype == torch.float64 for p in problem.program.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())


# ---- three ways ----------------------------------------------------------------------------------


def judged(*arguments: object, **options: float) -> Check:
    return judge_information(measured(*arguments, **options))  # type: ignore[arg-type]


def test_latents_that_move_the_observations_hold() -> None:
    check = judged(
        lambda z, t: z[..., :1] * t + z[..., 1:] * torch.sin(3.0 * t),
        {"z": Normal(2)},
        population(20, 2),
    )
    assert check.status == "holds" and check.value > 3.0 and not check.remedy
    assert check.why.startswith("Weakest direction: `")


def test_a_product_of_two_latents_fails_and_both_are_named() -> None:
    families: dict[str, Family] = {"a": LogNormal(1), "b": LogNormal(1), "c": Normal(1)}
    points = population(40, 3)
    check = judged(lambda a, b, c, t: a * b * t + c, families, points)
    assert check.status == "fails" and check.value < 1e-3
    assert check.why.startswith(
        "1 of 3 directions of the latents moves the observations by less than the noise when it varies"
    )
    assert all(f"`{name}` (" in check.why for name in ("a", "b")) and "`c`" not in check.why
    assert "Fix or merge latents that only count together" in check.remedy


def test_a_sum_of_two_latents_fails_and_both_are_named() -> None:
    points = population(40, 2) * torch.tensor([1.0, 1.0]).double()
    check = judged(lambda a, b, t: (a + b) * t, {"a": Normal(1), "b": Normal(1)}, points)
    assert check.status == "fails" and "`a` (" in check.why and "`b` (" in check.why


def test_an_ignored_latent_fails_and_is_named() -> None:
    check = judged(
        lambda z, t: z[..., :1] * t + z[..., 2:] * t**2, {"z": Normal(3)}, population(20, 3)
    )
    assert check.status == "fails" and check.value < 1e-3
    assert check.why.startswith("1 of 3 directions")
    assert check.why.endswith("Weakest direction: `z[1]`.")


def test_two_lost_directions_are_counted() -> None:
    check = judged(lambda z, t: z.sum(-1, keepdim=True) * t, {"z": Normal(3)}, population(20, 3))
    assert check.why.startswith("2 of 3 directions")


def test_a_latent_that_moves_about_as_much_as_the_noise_is_left_open() -> None:
    strength = 2.0 * 0.1 / np.sqrt(3.0 * float(CLOCK.square().sum()))
    check = judged(lambda z, t: strength * z * t, {"z": Normal(1)}, population(30, 1))
    assert check.status == "undecided" and 1.0 < check.value < 3.0 and check.remedy


def test_where_systems_disagree_it_is_left_open() -> None:
    singular = torch.linspace(0.1, 20.0, 50, dtype=torch.float64).view(1, 50, 1)
    check = judge_information(
        FisherInformation(
            ["z"], torch.zeros(1, 50, 1), torch.zeros(1, 50, 1, 1), singular, torch.ones(1)
        )
    )
    assert check.status == "undecided" and check.interval[0] < 1.5 and check.interval[1] > 18.0


def test_a_run_too_steep_for_float64_does_not_hide_the_names() -> None:
    points = population(20, 2)
    points[0, 0] = 350.0  # exp(350) can be squared, its slope can't
    check = judged(
        lambda z, t: (0.5 * z[..., :1] * t).exp() / 1e-4 + 0.0 * z[..., 1:],
        {"z": Normal(2)},
        points,
    )
    assert check.why.startswith("1 of 2 directions") and "Weakest direction: `z[1]`" in check.why
    assert "nan" not in str(check)


def test_a_run_that_diverges_does_not_crash() -> None:
    points = torch.full((5, 1), 800.0).double()
    check = judged(lambda z, t: (z * t).exp(), {"z": Normal(1)}, points)
    assert check.status == "fails"
