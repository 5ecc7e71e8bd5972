"""Global injectivity: twins that are known to exist are found, and where there are none none is claimed."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor
from toys import SEPARATE, Line, alone, make_tasks, with_query

import pyro_hybrid as ph
from pyro_hybrid.beliefs.families import Family, LogNormal, Normal
from pyro_hybrid.evidence.least_squares import fisher_information
from pyro_hybrid.identifiability import injectivity as module
from pyro_hybrid.identifiability.fisher import FisherInformation, least_squares_at
from pyro_hybrid.identifiability.injectivity import (
    EquivalentLatents,
    equivalent_latents,
    judge_equivalent_latents,
)
from pyro_hybrid.identifiability.task_beliefs import TaskBeliefs
from pyro_hybrid.programs.run import Program
from pyro_hybrid.scores.check import Check

CLOCK = torch.linspace(0.0, 2.0, 9, dtype=torch.float64)
NAN, INF = torch.nan, torch.inf


def believed(families: dict[str, Family], points: Tensor) -> TaskBeliefs:
    """Two supports that are both sure of the same points (task, latent)."""
    natural, at = {}, 0
    for name, family in families.items():
        part = points[:, at : at + family.n].expand(2, -1, -1).contiguous()
        natural[name], at = family.from_gaussian(part, torch.full_like(part, 1e-3)), at + family.n
    return TaskBeliefs(families, natural, num_support=1)


def at(program: Program, episode: ph.Episode, beliefs: TaskBeliefs) -> FisherInformation:
    """Fisher information at the points themselves."""
    points = beliefs.mean[0]
    spread = beliefs.population_sd
    scaled = (
        fisher_information(least_squares_at(program, episode, beliefs, points), points)
        * spread
        * spread.unsqueeze(-1)
    )
    singular = torch.linalg.eigvalsh(scaled).clamp(min=0.0).sqrt()
    return FisherInformation(
        beliefs.names, points[None], scaled[None], singular[None], torch.ones(points.shape[1])
    )


def hunt(
    states: Callable[..., Tensor], families: dict[str, Family], points: Tensor, noise: float = 0.05
) -> EquivalentLatents:
    """For twins of these points under x = states(latents, times) + noise."""
    episode = alone(
        CLOCK, torch.zeros(len(points), 2, 9, 1).double(), (torch.zeros(len(points), 2).double(),)
    )

    def program(episode: ph.Episode) -> None:
        num_tasks = episode.query.shape[0]
        with episode.plate:
            raw = {
                name: torch.zeros(num_tasks, family.n, family.k).double()
                for name, family in families.items()
            }
            z = {
                name: pyro.sample(name, family.distribution(family.from_raw(raw[name])))[
                    ..., None, None, :
                ]
                for name, family in families.items()
            }
            mean = states(**z, t=episode.query.times.unsqueeze(-1)) + torch.zeros(
                num_tasks, 2, 9, 1
            )
            pyro.sample("x", dist.Normal(mean, noise).to_event(3), obs=episode.query.values)

    beliefs = believed(families, points)
    return equivalent_latents(
        program, episode, beliefs, at(program, episode, beliefs), progress=False
    )


def both_signs(tasks: int) -> Tensor:
    """From 1 to 2, and from -2 to -1."""
    sign = torch.where(torch.arange(tasks) % 2 == 0, 1.0, -1.0).double()
    return (sign * torch.linspace(1.0, 2.0, tasks, dtype=torch.float64)).unsqueeze(-1)


def gaussian(tasks: int, n: int) -> Tensor:
    return torch.randn(tasks, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---- what is there is found ----------------------------------------------------------------------


def test_of_a_square_the_twin_is_the_negative() -> None:
    points = both_signs(20)
    found = hunt(lambda z, t: z**2 * t, {"z": Normal(1)}, points)
    assert (found.second + points).abs().max() < 1e-3 and (found.distance < 1e-2).all()
    check = judge_equivalent_latents(found)
    assert check.status == "fails" and check.value == 0.0
    assert check.why.startswith(
        "20 of 20 systems have other latents with the same trajectories: `z` "
    )
    assert "a positive family, a fixed sign or order" in check.remedy


def test_of_a_symmetric_function_the_twin_has_its_arguments_exchanged() -> None:
    points = torch.stack(
        [torch.linspace(-2.0, -1.0, 12), torch.linspace(2.0, 0.5, 12)], -1
    ).double()
    families: dict[str, Family] = {"a": LogNormal(1), "b": LogNormal(1)}
    shifted = points * torch.where(torch.arange(12) % 2 == 0, 1.0, -1.0).unsqueeze(-1)
    found = hunt(lambda a, b, t: (-a * t).exp() + (-b * t).exp(), families, shifted)
    assert (found.distance < 1e-2).all()
    assert (found.second.log() - shifted.flip(-1)).abs().max() < 1e-3


def test_a_twin_that_is_no_mirror_image_is_found_from_elsewhere() -> None:
    """(z - 2)(z + 0.5) has the same value at 1.5 - z."""
    points = (
        torch.cat([torch.linspace(-1.0, -0.3, 10), torch.linspace(1.8, 2.5, 10)])
        .double()
        .unsqueeze(-1)
    )
    found = hunt(lambda z, t: (z - 2.0) * (z + 0.5) * t, {"z": Normal(1)}, points)
    assert (found.second - (1.5 - points)).abs().max() < 1e-3


def test_only_the_latents_that_differ_are_told() -> None:
    points = torch.cat([both_signs(20), gaussian(20, 1)], -1)
    found = hunt(lambda z, t: z[..., :1] ** 2 * t + z[..., 1:] * t**2, {"z": Normal(2)}, points)
    assert (found.second[:, 1] - points[:, 1]).abs().max() < 1e-3
    assert (
        "`z[0]` " in judge_equivalent_latents(found).why
        and "z[1]" not in judge_equivalent_latents(found).why
    )


@pytest.mark.parametrize("weight", [0.0, 1e-3], ids=["ignored", "hardly seen"])
def test_a_latent_that_is_not_seen_has_a_twin_wherever_it_is_else(weight: float) -> None:
    found = hunt(
        lambda z, t: z[..., :1] * t + weight * z[..., 1:] * t**2, {"z": Normal(2)}, gaussian(40, 2)
    )
    check = judge_equivalent_latents(found)
    assert check.status == "fails" and check.value == 0.0 and (found.distance < 0.5).all()
    assert "`z[1]` " in check.why and "z[0]" not in check.why


# ---- what isn't there isn't claimed --------------------------------------------------------------


@pytest.mark.parametrize(
    "states",
    [
        lambda z, t: z * t,
        lambda z, t: z.exp() * t,
        lambda z, t: z * t + z**3 * t**2,
    ],
)
def test_a_monotone_map_has_no_twins(states: Callable[..., Tensor]) -> None:
    found = hunt(states, {"z": Normal(1)}, gaussian(40, 1))
    check = judge_equivalent_latents(found)
    assert check.status == "holds" and check.value == 1.0 and not check.remedy
    assert (found.distance > 1.0).all() and found.num_searches >= module.STARTS


def test_a_linear_program_with_latents_of_shots_has_no_twins() -> None:
    tasks = make_tasks(40, 3, num_support=1, inferred=True)
    truth = torch.cat(list((tasks.true_latents or {}).values()), -1)
    episode, beliefs = tasks.episode(), believed(SEPARATE, truth)
    model = Line(inferred=True, noise=0.03).double()
    found = equivalent_latents(model, episode, beliefs, at(model, episode, beliefs), progress=False)
    assert judge_equivalent_latents(found).status == "holds"


@pytest.mark.parametrize("held", [0, 8])
def test_twins_are_found_past_latents_of_shots_moved_or_held(
    monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr(module, "HELD", held)
    points = both_signs(10)

    def program(episode: ph.Episode) -> None:
        with episode.plate:
            zero = torch.zeros(episode.query.shape[0], 1).double()
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))[..., None, None, :]
            start = pyro.sample("start", dist.Normal(episode.query.initial, 0.1).to_event(2))
            mean = start.unsqueeze(-2) + z**2 * episode.query.times.unsqueeze(-1)
            pyro.sample("x", dist.Normal(mean, 0.05).to_event(3), obs=episode.query.values)

    episode = alone(CLOCK, torch.zeros(10, 2, 9, 1).double(), (torch.ones(10, 2).double(),))
    beliefs = believed({"z": Normal(1)}, points)
    found = equivalent_latents(
        program, episode, beliefs, at(program, episode, beliefs), progress=False
    )
    assert (found.second + points).abs().max() < 1e-3 and (found.distance < 1e-2).all()


def test_what_is_observed_does_not_matter_but_what_could_be() -> None:
    points, states = both_signs(10), {"z": Normal(1)}

    def program(episode: ph.Episode) -> None:
        with episode.plate:
            zero = torch.zeros(episode.query.shape[0], 1).double()
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))[..., None, None, :]
            mean = z**2 * episode.query.times.unsqueeze(-1) + torch.zeros(1, 2, 9, 1)
            pyro.sample(
                "x",
                dist.Normal(mean, 0.05).mask(episode.query.scored).to_event(3),
                obs=episode.query.values,
            )

    episode = alone(CLOCK, torch.zeros(10, 2, 9, 1).double(), (torch.zeros(10, 2).double(),))
    other = with_query(episode, values=torch.full_like(episode.query.values, 5.0))
    beliefs = believed(states, points)
    one, two = (
        equivalent_latents(program, e, beliefs, at(program, e, beliefs), progress=False)
        for e in (episode, other)
    )
    assert (one.second - two.second).abs().max() < 1e-6


def test_what_is_nearer_than_a_spread_is_no_twin() -> None:
    """z² has its twin at -z, which is near where z is small compared with the spread."""
    points = (
        torch.cat([torch.linspace(0.01, 0.2, 10), torch.tensor([3.0, -3.0, 2.0, -2.0])])
        .double()
        .unsqueeze(-1)
    )
    found = hunt(lambda z, t: z**2 * t, {"z": Normal(1)}, points)
    assert (found.distance[:10] > module.ALIKE).all() and (found.distance[10:] < module.ALIKE).all()


def test_what_is_far_from_all_systems_is_no_twin() -> None:
    """(z - 3)² has its twin at 6 - z, more than three spreads from zero."""
    points = torch.linspace(-2.0, 2.0, 40, dtype=torch.float64).unsqueeze(-1)
    found = hunt(lambda z, t: (z - 3.0) ** 2 * t, {"z": Normal(1)}, points)
    assert judge_equivalent_latents(found).status == "holds"


# ---- the verdict ---------------------------------------------------------------------------------


def pairs(distance: list[float]) -> EquivalentLatents:
    first = torch.arange(float(len(distance))).unsqueeze(-1)
    far = torch.tensor(distance)
    second = torch.where(torch.isfinite(far).unsqueeze(-1), first + 2.0, NAN)
    return EquivalentLatents(["z"], first, second, second - first, far, num_searches=12)


def judged(alike: int, tasks: int) -> Check:
    return judge_equivalent_latents(pairs([0.1] * alike + [INF] * (tasks - alike)))


@pytest.mark.parametrize(
    ("alike", "tasks"), [(0, 10), (10, 10), (2, 10), (1, 40), (0, 1), (17, 40)]
)
def test_the_interval_is_clopper_and_pearson_s(alike: int, tasks: int) -> None:
    expected = binomtest(tasks - alike, tasks).proportion_ci(0.95, method="exact")
    check = judged(alike, tasks)
    assert check.interval == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-12)
    assert check.value == pytest.approx(1.0 - alike / tasks)


def test_the_interval_of_ten_out_of_ten_is_the_textbook_s() -> None:
    assert judged(0, 10).interval == pytest.approx((0.6915, 1.0), abs=1e-4)
    assert judged(2, 10).interval == pytest.approx((0.4439, 0.9748), abs=1e-4)


@pytest.mark.parametrize(
    ("alike", "tasks", "status"),
    [
        (0, 40, "holds"),
        (0, 20, "undecided"),
        (2, 40, "undecided"),
        (1, 1, "undecided"),
        (12, 40, "fails"),
        (40, 40, "fails"),
    ],
)
def test_few_systems_say_little_and_many_say_more(alike: int, tasks: int, status: str) -> None:
    assert judged(alike, tasks).status == status


def test_pairs_whose_trajectories_can_be_told_apart_are_reported_and_not_counted() -> None:
    check = judge_equivalent_latents(pairs([INF] * 20 + [4.0, 7.0] + [INF] * 20))
    assert check.status == "holds"
    assert check.why == (
        "Of 12 searches for each of 42 systems, none found other latents with the same trajectories. "
        "The closest pair: `z` 20 and 22, whose trajectories differ by 4 standard deviations of the noise."
    )


def test_one_system_with_a_twin_is_told_in_the_singular() -> None:
    assert judged(1, 40).why.startswith(
        "1 of 40 systems has other latents with the same trajectories: `z` "
    )


def test_where_nothing_was_found_it_says_so() -> None:
    assert judged(0, 40).why == (
        "All of 12 searches for other latents with the same trajectories, for each of 40 systems, led "
        "back to the system's own."
    )


def test_how_far_twins_are_apart_is_in_spreads_in_unconstrained_coordinates() -> None:
    points = (
        torch.cat([torch.linspace(-2.0, -1.0, 10), torch.linspace(1.0, 2.0, 10)])
        .double()
        .unsqueeze(-1)
    )
    found = hunt(lambda z, t: z.log() ** 2 * t, {"z": LogNormal(1)}, points)
    spread = believed({"z": LogNormal(1)}, points).population_sd
    assert (found.apart + 2.0 * points / spread).abs().max() < 1e-3
    assert (
        found.first - points.exp()
    ).abs().max() < 1e-9  # the pair itself as the program knows it
    assert (found.second * found.first - 1.0).abs().max() < 1e-3
