"""Condition (i): characteristic functions by formula and by sample, and what of a program's noise can't be judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import gamma, kv
from toys import Line, alone, make_tasks

import pyro_hybrid as ph
from pyro_hybrid.identifiability.noise import CHARACTERISTIC, Noise, inspect_noise, judge_noise

Complex = NDArray[np.complex128]
SCALE, NU, TURN = 0.7, 3.5, torch.tensor([[1.0, 0.0], [0.4, 0.3]])
FREQUENCIES = np.concatenate([np.linspace(-12.0, 12.0, 240), np.linspace(-0.9, 0.9, 60)])


def student(t: NDArray[np.float64]) -> Complex:
    x = math.sqrt(NU) * SCALE * np.abs(t)
    return kv(NU / 2, x) * x ** (NU / 2) / (gamma(NU / 2) * 2 ** (NU / 2 - 1)) + 0j


def both(t: NDArray[np.float64]) -> Complex:
    """Of two correlated components, along (1, 1)."""
    direction = TURN.numpy().T @ np.ones(2)
    return np.exp(-0.5 * (direction @ direction) * t**2) + 0j


KNOWN: dict[type, tuple[dist.Distribution, Callable[[NDArray[np.float64]], Complex]]] = {
    torch.distributions.Normal: (
        dist.Normal(0.0, SCALE),
        lambda t: np.exp(-0.5 * (SCALE * t) ** 2) + 0j,
    ),
    torch.distributions.MultivariateNormal: (
        dist.MultivariateNormal(torch.zeros(2), TURN @ TURN.mT),
        both,
    ),
    torch.distributions.LowRankMultivariateNormal: (
        dist.LowRankMultivariateNormal(torch.zeros(2), TURN[:, :1], torch.tensor([1e-9, 0.09])),
        both,
    ),
    torch.distributions.Laplace: (
        dist.Laplace(0.0, SCALE),
        lambda t: 1 / (1 + (SCALE * t) ** 2) + 0j,
    ),
    dist.AsymmetricLaplace: (
        dist.AsymmetricLaplace(0.0, SCALE, 1.6),
        lambda t: 1 / ((1 - 1j * SCALE * t / 1.6) * (1 + 1j * SCALE * t * 1.6)),
    ),
    dist.SoftLaplace: (
        dist.SoftLaplace(0.0, SCALE),
        lambda t: gamma(0.5 + 0.5j * SCALE * t) * gamma(0.5 - 0.5j * SCALE * t) / np.pi,
    ),
    dist.Logistic: (
        dist.Logistic(0.0, SCALE),
        lambda t: np.pi * SCALE * t / np.sinh(np.pi * SCALE * t) + 0j,
    ),
    torch.distributions.Gumbel: (dist.Gumbel(0.0, SCALE), lambda t: gamma(1 - 1j * SCALE * t)),
    torch.distributions.Cauchy: (
        dist.Cauchy(0.0, SCALE),
        lambda t: np.exp(-SCALE * np.abs(t)) + 0j,
    ),
    torch.distributions.StudentT: (dist.StudentT(NU, 0.0, SCALE), student),
    dist.Stable: (
        dist.Stable(1.5, 0.4, SCALE, 0.0, coords="S"),
        lambda t: np.exp(
            -(np.abs(SCALE * t) ** 1.5) * (1 - 0.4j * np.sign(t) * math.tan(0.75 * math.pi))
        ),
    ),
    torch.distributions.Uniform: (
        dist.Uniform(-SCALE, SCALE),
        lambda t: np.sin(SCALE * t) / (SCALE * t) + 0j,
    ),
}
every_noise = pytest.mark.parametrize("kind", list(KNOWN), ids=lambda kind: kind.__name__)


# ---- the table -----------------------------------------------------------------------------------


def test_the_table_has_no_noise_that_is_not_tested_here() -> None:
    assert set(CHARACTERISTIC) == set(KNOWN)


@every_noise
def test_the_formula_is_the_characteristic_function_of_samples(kind: type) -> None:
    draws, formula = 200_000, KNOWN[kind][1]
    t = np.array([-4.0, -1.3, -0.4, 0.1, 0.7, 2.0, 5.0])
    sample = KNOWN[kind][0].sample((draws,)).double().numpy()
    along = sample.sum(-1) if sample.ndim > 1 else sample
    measured = np.exp(1j * np.outer(t, along)).mean(1)
    assert np.abs(measured - formula(t)).max() < 4.5 / math.sqrt(draws)


@every_noise
def test_the_formula_has_the_zeros_that_the_table_says(kind: type) -> None:
    size = np.abs(KNOWN[kind][1](FREQUENCIES))
    assert (size > 0.0).all()
    if "nowhere zero" in CHARACTERISTIC[kind]:
        smooth = np.log(np.abs(KNOWN[kind][1](np.linspace(0.01, 12.0, 20_000))))
        assert np.abs(np.diff(smooth)).max() < 0.5  # log|φ| would plunge at a zero
    else:
        assert "isolated" in CHARACTERISTIC[kind]
        phi = KNOWN[kind][1](np.linspace(0.01, 40.0, 100_000)).real
        zeros = np.linspace(0.01, 40.0, 100_000)[1:][np.diff(np.sign(phi)) != 0]
        assert (
            zeros == pytest.approx(np.pi / SCALE * np.arange(1, len(zeros) + 1), abs=1e-3)
            and len(zeros) == 8
        )


# ---- programs ------------------------------------------------------------------------------------


def observing(
    make: Callable[[torch.Tensor, torch.Tensor], dist.Distribution],
) -> Callable[[ph.Episode], None]:
    """A program whose observations are distributed as ``make(mean, latent)`` says."""

    def program(episode: ph.Episode) -> None:
        tasks, shots = episode.query.shape
        with episode.plate:
            z = pyro.sample("z", dist.Normal(torch.zeros(tasks, 1), 1.0).to_event(1))[
                ..., None, None, :
            ]
            fn = make(z + torch.zeros(tasks, shots, len(episode.query.times), 1), z)
            pyro.sample("x", fn.to_event(3 - len(fn.event_shape)), obs=episode.query.values)

    return program


def judged(
    make: Callable[[torch.Tensor, torch.Tensor], dist.Distribution],
    values: torch.Tensor | None = None,
) -> Any:
    values = torch.zeros(3, 2, 6, 1) if values is None else values
    return judge_noise(
        inspect_noise(observing(make), alone(torch.arange(6.0), values, (torch.zeros(3, 2),)))
    )


def correlated(rho: torch.Tensor) -> torch.Tensor:
    """Two components of variance 1."""
    return torch.eye(2) + rho[..., None, None] * (1.0 - torch.eye(2))


ADDITIVE: dict[str, Callable[[torch.Tensor, torch.Tensor], dist.Distribution]] = {
    "Normal": lambda mean, z: dist.Normal(mean, 0.1),
    "StudentT": lambda mean, z: dist.StudentT(4.0, mean, 0.1),
    "Laplace": lambda mean, z: dist.Laplace(mean, 0.1),
    "Cauchy": lambda mean, z: dist.Cauchy(mean, 0.1),
    "Gumbel": lambda mean, z: dist.Gumbel(mean, 0.1),
    "Logistic": lambda mean, z: dist.Logistic(mean, 0.1),
    "SoftLaplace": lambda mean, z: dist.SoftLaplace(mean, 0.1),
    "AsymmetricLaplace": lambda mean, z: dist.AsymmetricLaplace(mean, 0.1, 1.3),
    "Stable": lambda mean, z: dist.Stable(1.5, 0.0, 0.1, mean),
    "MultivariateNormal": lambda mean, z: dist.MultivariateNormal(mean, 0.01 * torch.eye(1)),
    "LowRankMultivariateNormal": lambda mean, z: dist.LowRankMultivariateNormal(
        mean, torch.ones(1, 1), torch.ones(1)
    ),
    "Uniform": lambda mean, z: dist.Uniform(
        1e3 * mean - 0.1, 1e3 * mean + 0.1
    ),  # rounding moves its width
}


@pytest.mark.parametrize("kind", sorted(ADDITIVE))
def test_additive_noise_holds_and_is_named_with_its_characteristic_function(kind: str) -> None:
    check = judged(ADDITIVE[kind])
    assert check.status == "holds"
    assert check.why.startswith(f"x: {kind}, ") and "zero" in check.why and not check.remedy


def test_each_sensor_may_have_its_own_noise() -> None:
    assert (
        judged(lambda mean, z: dist.Normal(mean, torch.linspace(0.1, 0.2, 6)[:, None])).status
        == "holds"
    )


def test_wrappers_and_masks_do_not_hide_what_the_noise_is() -> None:
    episode = make_tasks(3, 4, num_support=2).episode()
    found = inspect_noise(Line().double(), episode)
    assert found.kinds == {"x": torch.distributions.Normal} and found.moving == {"x": False}


@pytest.mark.parametrize(
    "make",
    [
        lambda mean, z: dist.Poisson(mean.exp()),
        lambda mean, z: dist.Bernoulli(logits=mean),
        lambda mean, z: dist.LogNormal(mean, 0.1),  # additive for log x only
        lambda mean, z: dist.VonMises(mean, 2.0),
    ],
)
def test_what_is_not_additive_is_not_checked(
    make: Callable[[torch.Tensor, torch.Tensor], dist.Distribution],
) -> None:
    check, kind = (
        judged(make, torch.ones(3, 2, 6, 1)),
        type(make(torch.zeros(1), torch.zeros(1))).__name__,
    )
    assert check.status == "not checked"
    assert check.why == (
        f"The observations 'x' are distributed as {kind}, which is none of the additive noise that this "
        "check knows."
    )
    assert check.remedy == "Observe with additive noise, such as dist.Normal(prediction, noise)."


@pytest.mark.parametrize(
    "make",
    [
        lambda mean, z: dist.Normal(mean, z.exp() + torch.zeros_like(mean)),
        lambda mean, z: dist.Laplace(mean, 0.1 + mean.abs()),
        lambda mean, z: dist.Uniform(mean - z.abs() - 1.0, mean + 1.0),
        lambda mean, z: dist.Uniform(mean - 0.1, mean + 0.1 + 1e-4 * z.abs()),
        lambda mean, z: dist.MultivariateNormal(mean, (1.0 + mean**2).unsqueeze(-1)),
        lambda mean, z: dist.MultivariateNormal(
            mean.expand(-1, -1, -1, 2), correlated(torch.tanh(z[..., 0]))
        ),
        lambda mean, z: dist.LowRankMultivariateNormal(mean, z.unsqueeze(-1), torch.ones(1)),
        lambda mean, z: dist.StudentT(1.0 + z.abs(), mean, 0.1),
        lambda mean, z: dist.AsymmetricLaplace(mean, 0.1, z.exp()),
        lambda mean, z: dist.Stable(1.0 + z.sigmoid(), 0.0, 0.1, mean),
        lambda mean, z: dist.Stable(1.5, z.tanh(), 0.1, mean),
    ],
)
def test_noise_that_moves_with_the_latents_is_not_checked(
    make: Callable[[torch.Tensor, torch.Tensor], dist.Distribution],
) -> None:
    check = judged(make)
    assert check.status == "not checked"
    assert check.why == (
        "The noise of 'x' depends on the latents, so that x = F(z) + noise does not hold."
    )


def test_a_run_that_diverges_says_nothing_of_the_noise() -> None:
    check = judged(lambda mean, z: dist.Uniform((1e3 * mean).exp() - 0.1, (1e3 * mean).exp() + 0.1))
    assert check.status == "holds"


def test_a_program_that_observes_nothing_is_not_checked() -> None:
    episode = alone(torch.arange(6.0), None, (torch.zeros(3, 2),))
    check = judge_noise(inspect_noise(observing(ADDITIVE["Normal"]), episode))
    assert (check.status, check.remedy) == ("not checked", "Pass obs=episode.query.values.")


def test_one_observation_that_cannot_be_judged_is_enough() -> None:
    kinds = {"x": torch.distributions.Normal, "count": dist.Poisson}
    assert judge_noise(Noise(kinds, {"x": False, "count": False})).status == "not checked"
    kinds["count"] = torch.distributions.Laplace
    assert judge_noise(Noise(kinds, {"x": False, "count": False})).status == "holds"
