"""One optimum or many: mean losses whose answer is known, the usual wrong statements, and Pyro programs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor
from torch.testing import assert_close
from toys import NOISE, POINTS, SEPARATE, features, make_tasks

import pyro_hybrid as ph
from pyro_hybrid.identifiability.agreement import measure_agreement
from pyro_hybrid.identifiability.meta_parameters import (
    LARGEST,
    MetaParameters,
    judge_meta_parameters,
    measure_meta_parameters,
)
from pyro_hybrid.identifiability.weight_losses import WeightLosses, weight_losses

Losses = Callable[[Tensor], Tensor]
CENTRE = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
TARGETS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
AB = {"a": (), "b": (), "c": ()}


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratics(matrices: Tensor, centre: Tensor = CENTRE) -> Losses:
    """One for each matrix: half the square of its product with the distance from the centre."""
    return lambda p: 0.5 * (matrices @ (p - centre)).square().sum(-1)


def products(p: Tensor) -> Tensor:
    """The first two parameters are seen only as their product; the third is seen by itself."""
    return (p[0] * p[1] - TARGETS) ** 2 + (p[2] - TARGETS) ** 2


def judged(losses: Losses, at: Tensor, **options: Any) -> tuple[MetaParameters, str, str]:
    numbers = measure_meta_parameters(losses, at, **options)
    check = judge_meta_parameters(numbers)
    assert check.condition == "meta-parameters" and "ocally, at this point" in check.why
    assert (check.remedy == "") == (check.status == "holds")
    return numbers, check.status, check.why


def optimum(losses: Losses, at: Tensor, steps: int = 200) -> Tensor:
    at = at.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [at], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-8
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = losses(at).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return at.detach()


# ---- the usual statements, and why they are wrong ------------------------------------------------


def test_ten_identical_quadratics_have_one_optimum_though_their_scores_have_no_covariance() -> None:
    numbers, status, _ = judged(quadratics(normal(4, 4).expand(10, 4, 4)), CENTRE)
    assert status == "holds"
    assert numbers.score_rank == 0 and numbers.rank == 4


def test_ten_lines_that_cancel_have_no_optimum_though_their_scores_covariance_has_full_rank() -> (
    None
):
    slopes = normal(10, 4)
    slopes = slopes - slopes.mean(0)
    numbers, status, why = judged(lambda p: slopes @ p, CENTRE)
    assert status == "fails" and "stays level" in why
    assert numbers.score_rank == 4 and numbers.rank == 0 and numbers.jacobian_rank == 0
    assert len(numbers.directions) == 4


def test_three_quadratics_in_four_dimensions_have_one_optimum_though_none_alone_has() -> None:
    matrices = normal(3, 2, 4)
    numbers, status, _ = judged(
        quadratics(matrices), CENTRE, residuals=lambda p: matrices @ (p - CENTRE)
    )
    assert status == "holds"
    assert (
        numbers.num_tasks == 3
        and numbers.rank == 4
        and numbers.jacobian_rank == 4
        and numbers.score_rank == 0
    )
    for matrix in matrices:
        alone, status, _ = judged(quadratics(matrix.unsqueeze(0)), CENTRE)
        assert (
            status == "fails"
            and alone.rank == alone.jacobian_rank == 2
            and len(alone.directions) == 2
        )


def test_the_mean_loss_is_not_injective_where_its_optimum_is_the_only_one() -> None:
    losses = quadratics(normal(5, 4, 4))
    numbers, status, _ = judged(losses, CENTRE)
    moves = [
        numbers.eigenvectors[:, 0],
        -numbers.eigenvectors[:, 0],
        numbers.eigenvectors[:, 3] * (numbers.eigenvalues[0] / numbers.eigenvalues[3]).sqrt(),
    ]
    values = torch.stack([losses(CENTRE + move).mean() for move in moves])
    assert status == "holds"
    assert_close(values, values[:1].expand(3))
    assert values[0] > losses(CENTRE).mean() + 0.01


# ---- closed forms --------------------------------------------------------------------------------


def test_spectra_and_gain_of_quadratics_are_their_closed_forms() -> None:
    matrices, at = normal(6, 3, 4), CENTRE + 0.5
    numbers = measure_meta_parameters(
        quadratics(matrices), at, residuals=lambda p: matrices @ (p - CENTRE)
    )
    hessians = matrices.mT @ matrices
    gradient = hessians.mean(0) @ (at - CENTRE)
    assert_close(numbers.eigenvalues, torch.linalg.eigvalsh(hessians.mean(0)), atol=1e-8, rtol=0.0)
    assert_close(numbers.hessian, hessians.mean(0), atol=1e-8, rtol=0.0)
    assert numbers.gradient == pytest.approx(float(gradient.norm()), abs=1e-8)
    assert numbers.gain == pytest.approx(float(quadratics(matrices)(at).mean()), abs=1e-8)
    assert_close(numbers.singular_values, torch.linalg.svdvals(matrices.flatten(0, 1)) / 6**0.5)
    scores = hessians @ (at - CENTRE)
    assert_close(
        numbers.score_eigenvalues,
        torch.linalg.eigvalsh(scores.T @ scores / 6).flip(0),
        atol=1e-8,
        rtol=0.0,
    )


def test_without_residuals_the_stacked_jacobian_is_that_of_the_gradients() -> None:
    matrices = normal(3, 2, 4)
    numbers = measure_meta_parameters(quadratics(matrices), CENTRE)
    assert_close(
        numbers.singular_values,
        torch.linalg.svdvals((matrices.mT @ matrices).flatten(0, 1)) / 3**0.5,
    )


def test_the_order_of_tasks_does_not_matter() -> None:
    matrices, lines = normal(5, 2, 4), normal(5, 4, seed=1)
    lines = lines - lines.mean(0)
    order = torch.tensor([3, 0, 4, 1, 2])

    def losses(p: Tensor) -> Tensor:
        return quadratics(matrices)(p) + torch.cos(lines @ (p - CENTRE))

    one, other = (measure_meta_parameters(f, CENTRE) for f in (losses, lambda p: losses(p)[order]))
    assert one.interval[0] < one.smallest < one.interval[1]
    for name in set(one._fields) - {"given", "eigenvectors", "directions"}:
        a, b = (torch.as_tensor(getattr(numbers, name)) for numbers in (one, other))
        assert_close(a, b, atol=1e-12, rtol=1e-9, msg=name)


# ---- fails ---------------------------------------------------------------------------------------


def test_two_parameters_seen_as_their_product_are_named() -> None:
    numbers, status, why = judged(products, double(1.0, 2.0, 2.0), names=AB)
    assert status == "fails" and "stays level along b (+0.89), a (-0.45)" in why
    assert numbers.directions == ("b (+0.89), a (-0.45)",) and numbers.rank == 2


@pytest.mark.parametrize("away", [1e-7, 1e-5, 1e-3, 1e-2])
@pytest.mark.parametrize("a", [0.05, 1.0, 30.0])
def test_a_flat_direction_is_found_from_beside_the_optimum_where_it_looks_curved(
    a: float, away: float
) -> None:
    at = double(a, 2.0 / a, 2.0) * (1.0 + away * double(1.0, -0.5, 0.7))
    numbers, status, _ = judged(products, at, names=AB)
    assert status == "fails" and "c" not in numbers.directions[0]


def test_a_chain_of_linear_layers_is_flat_in_as_many_directions_as_it_can_be_rescaled() -> None:
    inputs = normal(12, 15, 2)
    outputs = inputs @ normal(2, 2, seed=1) + 0.3 * normal(12, 15, 2, seed=2)

    def residuals(p: Tensor) -> Tensor:
        return (inputs @ p[:4].view(2, 2) @ p[4:].view(2, 2) - outputs).flatten(1)

    def losses(p: Tensor) -> Tensor:
        return 0.5 * residuals(p).square().sum(1)

    names, start = {"first": (2, 2), "last": (2, 2)}, normal(8, seed=3)
    numbers, status, _ = judged(losses, optimum(losses, start), names=names, residuals=residuals)
    assert (
        status == "fails"
        and numbers.rank == numbers.jacobian_rank == 4
        and len(numbers.directions) == 4
    )
    assert all("first[" in direction and "last[" in direction for direction in numbers.directions)
    assert measure_meta_parameters(losses, start, residuals=residuals).jacobian_rank == 4


def test_a_dead_parameter_is_named_alone() -> None:
    numbers, status, _ = judged(quadratics(normal(5, 4, 2), CENTRE[:2]), CENTRE[:2])
    assert status == "holds" and numbers.rank == 2
    numbers, status, _ = judged(
        lambda p: quadratics(normal(5, 4, 2), CENTRE[:2])(p[:2]), CENTRE[:3]
    )
    assert status == "fails" and numbers.directions == ("parameter[2] (+1.00)",)


@pytest.mark.parametrize("away", [0.0, 0.01])
def test_a_saddle_falls_along_the_direction_that_is_named(away: float) -> None:
    numbers, status, why = judged(
        lambda p: products(p) - 3.0 * (p[2] - 2.0) ** 2 + (p[0] - 1.0) ** 2,
        double(1.0, 2.0, 2.0 + away),
        names=AB,
    )
    assert status == "fails" and "falls along c" in why
    assert numbers.smallest < -0.1 and numbers.rank == 3


def test_a_slope_without_curvature_falls_along_it() -> None:
    numbers, status, why = judged(
        lambda p: (p[0] - TARGETS) ** 2 - 0.3 * p[1] + 0.4 * p[2], double(2.0, 1.0, 1.0)
    )
    assert status == "fails" and "falls along parameter[2] (-0.80), parameter[1] (+0.60)" in why
    assert (
        numbers.slope == pytest.approx(0.5) and numbers.rank == 1 and len(numbers.directions) == 2
    )


# ---- undecided -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "losses",
    [quadratics(normal(5, 4, 4)), lambda p: products(p[:3]) + p[3] ** 2],
    ids=["unique", "flat"],
)
def test_away_from_an_optimum_nothing_follows_and_it_says_so(losses: Losses) -> None:
    numbers, status, why = judged(losses, double(3.0, 3.0, 3.0, 3.0))
    assert status == "undecided" and "no optimum yet" in why and f"{numbers.gain:.2g} nats" in why
    assert_close(numbers.at, double(3.0, 3.0, 3.0, 3.0))


def test_near_a_quadratics_optimum_newton_steps_go_there() -> None:
    numbers, status, _ = judged(quadratics(normal(5, 4, 4)), CENTRE + 1e-3)
    assert status == "holds"
    assert_close(numbers.at, CENTRE)


def test_a_quartic_optimum_has_no_curvature_but_no_way_out() -> None:
    numbers, status, why = judged(lambda p: (p[0] - TARGETS) ** 2 + p[1] ** 4, double(2.0, 0.0))
    assert status == "undecided" and "may or may not" in why
    assert numbers.rank == 1 and numbers.walked > 1e-3


def test_curvature_that_is_gone_where_newton_steps_lead_is_no_yes() -> None:
    numbers, status, _ = judged(
        lambda p: torch.relu(p[0]) ** 4 + 0.0 * TARGETS, double(0.2)
    )  # all below 0 is flat
    assert status == "undecided" and numbers.smallest > 0.9


def test_curvature_without_margin_is_no_yes() -> None:
    for size, expected in ((1e-5, "holds"), (1e-8, "undecided"), (1e-11, "fails")):
        assert (
            judged(lambda p, s=size: (p[0] - TARGETS) ** 2 + s * p[1] ** 2, double(2.0, 0.0))[1]
            == expected
        )


@pytest.mark.parametrize("shift", [-0.02, 0.0, 0.02])
def test_curvature_whose_sign_depends_on_the_weights_of_tasks_is_neither_a_yes_nor_a_no(
    shift: float,
) -> None:
    signs = double(1.0, -1.0, 1.0, -1.0) + shift
    numbers, status, _ = judged(lambda p: p[0] ** 2 + signs * p[1] ** 2, double(0.0, 0.0))
    assert status == "undecided" and numbers.interval[0] < -0.1 and numbers.interval[1] > 0.1


def test_other_weights_of_tasks_are_judged_at_their_own_optimum() -> None:
    def losses(p: Tensor) -> Tensor:
        return (p[0] * p[1] - TARGETS) ** 2 + (p[0] - 1.0) ** 2

    def smallest(at: Tensor, weights: Tensor) -> float:
        hessian = torch.autograd.functional.hessian(lambda p: weights @ losses(p), at)
        return float(torch.linalg.eigvalsh(hessian)[0])

    numbers, status, _ = judged(losses, double(1.0, 2.0))
    assert status == "holds"
    weights = double(0.6, 0.3, 0.1)  # their optimum is at a product of 1.5
    assert smallest(double(1.0, 2.0), weights) < 0.0 < smallest(double(1.0, 1.5), weights)


# ---- restarts ------------------------------------------------------------------------------------


def test_restarts_that_agree_differ_by_nothing() -> None:
    losses = quadratics(normal(5, 4, 4))
    ends = [
        measure_meta_parameters(losses, CENTRE + 1e-3 * normal(4, seed=seed)).at
        for seed in range(3)
    ]
    apart = measure_agreement(ends, measure_meta_parameters(losses, CENTRE).hessian)
    assert apart.gap < 1e-20 and apart.difference < 1e-12


def test_restarts_along_a_flat_direction_differ_at_no_cost() -> None:
    one, other = double(1.0, 2.0, 2.0), double(1.01, 2.0 / 1.01, 2.0)
    apart = measure_agreement([one, other], measure_meta_parameters(products, one).hessian)
    assert apart.gap < 1e-6 and apart.difference > 5e-3


def test_a_flipped_tanh_unit_is_another_optimum_and_both_are_locally_unique() -> None:
    inputs = normal(8, 20)
    outputs = 1.5 * torch.tanh(0.8 * inputs) + 0.1 * normal(8, 20, seed=1)

    def losses(p: Tensor) -> Tensor:
        return 50.0 * (p[0] * torch.tanh(p[1] * inputs) - outputs).square().sum(1)

    ends = [optimum(losses, sign * double(1.5, 0.8)) for sign in (1.0, -1.0)]
    numbers = [judged(losses, end)[0] for end in ends]
    assert [judge_meta_parameters(n).status for n in numbers] == ["holds", "holds"]
    assert_close(ends[0], -ends[1])
    apart = measure_agreement(ends, numbers[0].hessian)
    assert apart.difference == pytest.approx(2.0) and apart.gap > 10.0


# ---- Pyro programs -------------------------------------------------------------------------------


class Drift(ph.HybridModel):
    """The toy with a drift that all tasks share, written as one parameter or as a product of two."""

    def __init__(self, evidence: ph.GaussNewton | None = None) -> None:
        super().__init__()
        reading: Any = ph.Encoder(ph.SetEncoder(1, POINTS, 8, width=16))
        if evidence is not None:
            reading = reading.then(evidence)
        self.prior = ph.SupportPrior(reading, **SEPARATE)
        self.left, self.right = (torch.nn.Parameter(torch.tensor(v)) for v in (0.5, 0.4))
        self.noise = PyroParam(torch.tensor(NOISE), constraints.positive)

    def forward(self, episode: ph.Episode) -> Tensor:
        p = self.prior(episode)
        with episode.plate:
            z = torch.cat([pyro.sample(name, p[name]) for name in p], -1)
            grown = (features(episode.query.times) * z[..., None, None, :]).sum(-1)
            mean = episode.query.initial + grown + self.left * self.right * episode.query.times**3
            x = dist.Normal(mean.unsqueeze(-1), self.noise).mask(episode.query.scored)
            return pyro.sample("x", x.to_event(3), obs=episode.query.values)


EPISODE = make_tasks(3, 3, num_support=1).episode()


def program(evidence: ph.GaussNewton | None = None) -> tuple[Drift, ph.AmortizedGuide]:
    torch.manual_seed(0)
    model = Drift(evidence)
    return model, ph.AmortizedGuide(model, evidence or ph.SetEncoder(1, POINTS, 8, width=16))


def measured(weights: WeightLosses, at: Tensor) -> tuple[MetaParameters, str, str]:
    return judged(weights.losses, at, names=weights.names, given=weights.given)


def test_a_programs_redundant_parameters_are_named_and_one_of_them_alone_has_one_optimum() -> None:
    model, guide = program()
    both = weight_losses(model, guide, EPISODE, ["left", "right", "noise"], num_particles=4)
    at = optimum(both.losses, both.at)
    numbers, status, why = measured(both, at)
    assert (
        status == "fails"
        and "left (" in why
        and "right (" in why
        and "noise" not in numbers.directions[0]
    )
    assert re.search(r"with \d+ other parameter tensors of model and guide held fixed", why)
    with torch.no_grad():
        model.left.copy_(at[0]), model.right.copy_(at[1])
    alone = weight_losses(model, guide, EPISODE, ["left", "noise"], num_particles=4)
    assert measured(alone, alone.at)[1] == "undecided"
    alone.at[1] = at[2]
    assert measured(alone, alone.at)[1] == "holds"


@pytest.mark.parametrize("evidence", [None, ph.GaussNewton(2)], ids=["learned", "computed"])
def test_the_hessian_of_a_program_is_the_slope_of_its_gradient(
    evidence: ph.GaussNewton | None,
) -> None:
    weights = weight_losses(*program(evidence), EPISODE)
    assert weights.names == {"left": (), "right": (), "noise": (), "prior.raw": (6,)}
    numbers = measure_meta_parameters(weights.losses, weights.at)

    def gradient(at: Tensor) -> Tensor:
        at = at.requires_grad_()
        return torch.autograd.grad(weights.losses(at).mean(), at)[0]

    moves = 1e-5 * torch.eye(9, dtype=torch.float64)[:3]
    slopes = torch.stack(
        [(gradient(weights.at + m) - gradient(weights.at - m)) / 2e-5 for m in moves]
    )
    assert_close(numbers.hessian[:3], slopes, atol=1e-4, rtol=1e-5)


def test_a_programs_loss_is_its_elbo_and_neither_model_nor_random_state_are_touched() -> None:
    model, guide = program()
    before, random = (
        {k: v.clone() for k, v in model.state_dict().items()},
        torch.random.get_rng_state(),
    )
    weights = weight_losses(model, guide, EPISODE, seed=5)
    values = weights.losses(weights.at)
    assert torch.equal(weights.losses(weights.at), values)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(
        torch.equal(v, before[k]) and v.dtype == before[k].dtype
        for k, v in model.state_dict().items()
    )
    elbo = pyro.infer.TraceMeanField_ELBO(
        num_particles=10, vectorize_particles=True, max_plate_nesting=1
    )
    model, guide = model.double(), guide.double()
    torch.manual_seed(5)
    svi = ph.SVI(model, guide, torch.optim.SGD(model.parameters(), 0.0), elbo)
    assert values[0].item() == pytest.approx(svi.evaluate_loss(EPISODE.select_tasks(0)), rel=1e-12)


def test_a_residual_inside_a_vector_field_has_second_derivatives() -> None:
    pendulum = ph.systems.Pendulum()
    pendulum.points = 6
    torch.manual_seed(0)
    model = ph.models.MetaHybridVAE(pendulum, width=2).eval()
    episode = pendulum.simulate(2, 3, seed=0).episode()
    weights = weight_losses(model, model.guide(), episode, ["residual"], num_particles=2)
    assert set(weights.names) == {
        f"residual.{n}"
        for n in ("straight", "first.weight", "first.bias", "last.weight", "last.bias")
    }
    numbers = measure_meta_parameters(**weights._asdict())
    assert numbers.rank > 10 and judge_meta_parameters(numbers).status == "undecided"


def test_the_guides_parameters_can_be_named_too() -> None:
    weights = weight_losses(*program(), EPISODE, ["noise", "guide.network.head.1"])
    assert list(weights.names) == [
        "noise",
        "guide.network.head.1.weight",
        "guide.network.head.1.bias",
    ]


# ---- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "at", "options", "message"),
    [
        (products, torch.ones(3, dtype=torch.int64), {}, "expected at in float32 or float64"),
        (products, torch.ones(3, 1), {}, r"expected at of shape \(parameters,\); got \(3, 1\)"),
        (products, double(1.0, torch.nan, 1.0), {}, "expected finite at"),
        (
            products,
            torch.ones(3),
            {"names": {"a": (2,)}},
            "expected names of 3 parameters; got 2 by",
        ),
        (products, torch.ones(LARGEST + 1), {}, f"expected at most {LARGEST} parameters"),
        (
            lambda p: products(p).mean(),
            torch.ones(3),
            {},
            r"expected losses of shape \(tasks,\); got \(\)",
        ),
        (lambda p: products(p).log(), double(1.0, 1.0, 1.0), {}, "expected finite losses"),
        (lambda p: p[0] * TARGETS.float(), torch.ones(3), {}, "expected losses in float64"),
        (
            lambda p: p[0] + torch.randn(3).double(),
            torch.ones(3),
            {},
            "expected the same losses at the same point",
        ),
        (
            lambda p: (p * TARGETS).abs().sqrt(),
            double(0.0, 1.0, 1.0),
            {},
            "expected finite second derivatives",
        ),
        (
            products,
            torch.ones(3),
            {"residuals": lambda p: p},
            r"expected residuals of shape \(tasks, number\)",
        ),
    ],
)
def test_what_can_not_be_measured_is_refused(
    losses: Losses, at: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        measure_meta_parameters(losses, at, **options)


def test_restarts_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected two points or more of shape \(2,\)"):
        measure_agreement([double(1.0, 2.0)], torch.eye(2))


def test_programs_that_can_not_be_judged_are_refused() -> None:
    model, guide = program()
    with pytest.raises(ValueError, match=r"expected parameters among .*'left'.*; got \['lft'\]"):
        weight_losses(model, guide, EPISODE, ["lft"])
    with pytest.raises(ValueError, match="expected num_particles as a whole number of 1 or more"):
        weight_losses(model, guide, EPISODE, num_particles=0)
    with pytest.raises(ValueError, match="expected a parameter or more"):
        weight_losses(model, guide, EPISODE, [])
    model.large = torch.nn.Parameter(torch.zeros(LARGEST))
    with pytest.raises(
        ValueError, match=f"expected at most {LARGEST} parameters.*'large'.*name some"
    ):
        weight_losses(model, guide, EPISODE)
