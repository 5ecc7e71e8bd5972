"""Neural terms against the same formulas written naively, one point at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

import pyro_hybrid as ph
from pyro_hybrid.nets.correction import explained_share, projection_penalty

EXACT = {"rtol": 0.0, "atol": 1e-12}
INPUTS, LATENTS, SCALE = 2, 3, (0.5, 4.0)

both_forms = pytest.mark.parametrize("linear", [True, False], ids=["linear", "free"])


def residual(linear: bool, outputs: int = 1, depth: int = 2, periodic: bool = False) -> ph.Residual:
    term = ph.Residual(
        INPUTS, LATENTS, outputs, linear, width=5, depth=depth, scale=SCALE, periodic=periodic
    ).double()
    with torch.no_grad():
        for parameter in term.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return term


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def naive(term: ph.Residual, z: Tensor, *inputs: Tensor) -> Tensor:
    """The documented formula at one point: latents (latent,), inputs of no axes, outputs (output,)."""
    x = torch.stack(inputs) / torch.tensor(SCALE, dtype=torch.float64)
    u = x if term.linear else torch.cat([x, z, torch.outer(z, x).flatten()])
    unit = torch.sin if term.periodic else torch.tanh
    h = unit(term.first(u))
    for layer in term.hidden:
        h = unit(layer(h))
    phi = (term.straight @ u + term.last(h)).view(term.latents + 1, term.outputs)
    return phi[0] + z @ phi[1:]


def naively(term: ph.Residual, z: Tensor, *inputs: Tensor) -> Tensor:
    """The same for latents (..., task, 1, latent) and inputs (..., task, shot), point by point; outputs last."""
    shape = torch.broadcast_shapes(z.shape[:-1], *(x.shape for x in inputs))
    z, inputs = z.expand(*shape, -1), [x.expand(shape) for x in inputs]
    places = [tuple(place) for place in torch.ones(shape).nonzero().tolist()]
    return torch.stack([naive(term, z[i], *(x[i] for x in inputs)) for i in places]).view(
        *shape, term.outputs
    )


# ------------------------------------------------------------------------------------------------------------ Residual


@both_forms
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("periodic", [False, True])
def test_the_residual_is_the_documented_formula(linear: bool, depth: int, periodic: bool) -> None:
    term, z, x, y = (
        residual(linear, depth=depth, periodic=periodic),
        normal(4, 1, LATENTS),
        normal(4, 3),
        normal(4, 3),
    )
    pushed = term.given(z)(x, y)
    assert pushed.shape == (4, 3)
    assert_close(pushed, naively(term, z, x, y).squeeze(-1), **EXACT)


@both_forms
def test_several_outputs_come_as_a_tuple(linear: bool) -> None:
    term, z, x, y = residual(linear, outputs=2), normal(4, 1, LATENTS), normal(4, 3), normal(4, 3)
    pushed = term.given(z)(x, y)
    assert isinstance(pushed, tuple) and len(pushed) == 2
    assert_close(torch.stack(pushed, -1), naively(term, z, x, y), **EXACT)


# Batch axes of latents and of inputs; sizes agree with numbers of features, so that none may be taken for another.
BATCHES = {
    "one task": ((), ()),
    "time as a number": ((4, 1), ()),
    "a clock for each shot": ((4, 1), (3,)),
    "particles of latents alone": ((3, 4, 1), (4, 2)),
    "particles of as many as latents and inputs": ((2, 3, 1), (3, 2)),
    "particles of states alone": ((4, 1), (5, 4, 3)),
    "particles of both": ((5, 4, 1), (5, 4, 3)),
    "particles of particles": ((2, 5, 4, 1), (4, 3)),
    "fields on a grid": ((4, 1, 1), (4, 3, 6)),
    "particles of fields on a grid": ((3, 4, 1, 1), (4, 3, 6)),
}


@both_forms
@pytest.mark.parametrize("case", BATCHES)
def test_latents_and_inputs_broadcast(case: str, linear: bool) -> None:
    (of_latents, of_inputs), term = BATCHES[case], residual(linear, outputs=2)
    z, x, y = (
        normal(*of_latents, LATENTS),
        normal(*of_inputs),
        torch.tensor(0.3, dtype=torch.float64),
    )
    assert_close(torch.stack(term.given(z)(x, y), -1), naively(term, z, x, y), **EXACT)


def test_a_linear_residual_is_linear_in_its_latents() -> None:
    term, x, y = residual(linear=True), normal(4, 3), normal(4, 3)
    z, more, nothing = (
        normal(4, 1, LATENTS),
        normal(4, 1, LATENTS),
        torch.zeros(4, 1, LATENTS, dtype=torch.float64),
    )

    def part(latents: Tensor) -> Tensor:
        return term.given(latents)(x, y) - term.given(nothing)(x, y)

    assert_close(part(2.0 * z - 3.0 * more), 2.0 * part(z) - 3.0 * part(more), **EXACT)
    assert part(z).abs().max() > 0.1


def test_a_free_residual_is_not_linear_in_its_latents() -> None:
    term, x, y, z = residual(linear=False), normal(4, 3), normal(4, 3), normal(4, 1, LATENTS)
    ends, middle = term.given(z)(x, y) + term.given(-z)(x, y), term.given(0.0 * z)(x, y)
    assert (ends - 2.0 * middle).abs().max() > 0.1


@both_forms
def test_gradients_reach_latents_inputs_and_every_parameter(linear: bool) -> None:
    term = residual(linear, outputs=2)
    z, x, y = (v.requires_grad_() for v in (normal(2, 1, LATENTS), normal(2, 2), normal(2, 2)))
    names = [name for name, _ in term.named_parameters()]

    def pushed(z: Tensor, x: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
        state = {f"term.{name}": value for name, value in zip(names, parameters, strict=True)}
        return torch.stack(torch.func.functional_call(Given(term), state, (z, x, y)))

    assert gradcheck(pushed, (z, x, y, *term.parameters()))


@both_forms
@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("particles", [(), (3,)])
def test_gradients_in_float32_are_those_of_the_documented_formula(
    linear: bool, periodic: bool, particles: tuple[int, ...]
) -> None:
    exact = residual(linear, outputs=2, depth=3, periodic=periodic)
    term = ph.Residual(INPUTS, LATENTS, 2, linear, width=5, depth=3, scale=SCALE, periodic=periodic)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.float())
    term.load_state_dict(exact.state_dict())
    z, x, y = (
        v.float().requires_grad_()
        for v in (normal(*particles, 4, 1, LATENTS), normal(4, 3), normal(4, 3))
    )
    pushed = torch.stack(term.given(z)(x, y), -1)
    truth = naively(exact, *(v.double() for v in (z, x, y)))
    weights = normal(*truth.shape).float()
    found = torch.autograd.grad((weights * pushed).sum(), [z, x, y, *term.parameters()])
    expected = torch.autograd.grad((weights.double() * truth).sum(), [z, x, y, *exact.parameters()])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


class Given(torch.nn.Module):
    """given and its call as one, for ``functional_call``."""

    def __init__(self, term: ph.Residual) -> None:
        super().__init__()
        self.term = term

    def forward(self, z: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.term.given(z)(*inputs)


def test_the_scale_is_what_inputs_are_divided_by() -> None:
    scaled = residual(linear=True)
    plain = ph.Residual(INPUTS, LATENTS, 1, True, width=5).double()
    plain.load_state_dict(scaled.state_dict() | {"scale": torch.ones(INPUTS)})
    z, x, y = normal(4, 1, LATENTS), normal(4, 3), normal(4, 3)
    assert_close(scaled.given(z)(x, y), plain.given(z)(x / SCALE[0], y / SCALE[1]), **EXACT)


def test_two_residuals_share_nothing() -> None:
    one, two = residual(linear=True), residual(linear=True)
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in two.parameters()}


BAD_RESIDUALS = {
    "no inputs": (
        {"inputs": 0},
        r"width and depth of 1 or more; got \(0, 3, 1, 32, 2\). Where nothing is unknown",
    ),
    "no latents": ({"latents": 0}, r"width and depth of 1 or more; got \(2, 0, 1, 32, 2\)"),
    "no outputs": ({"outputs": 0}, r"width and depth of 1 or more; got \(2, 3, 0, 32, 2\)"),
    "no hidden layer": ({"depth": 0}, r"width and depth of 1 or more; got \(2, 3, 1, 32, 0\)"),
    "a scale too few": (
        {"scale": (1.0,)},
        r"2 positive scales; got \(1.0,\). Give the rough size of each input",
    ),
    "a scale of nothing": ({"scale": (1.0, 0.0)}, r"2 positive scales; got \(1.0, 0.0\)"),
}


@pytest.mark.parametrize("case", BAD_RESIDUALS)
def test_a_residual_that_makes_no_sense_is_refused_with_words(case: str) -> None:
    change, message = BAD_RESIDUALS[case]
    with pytest.raises(ValueError, match=message):
        ph.Residual(**{"inputs": INPUTS, "latents": LATENTS, "outputs": 1} | change)


def test_a_residual_called_otherwise_than_built_is_refused_with_words() -> None:
    term = residual(linear=True)
    with pytest.raises(
        ValueError, match=r"3 latents in the last axis; got \(4, 1, 2\). Build the Residual with"
    ):
        term.given(normal(4, 1, 2))
    with pytest.raises(ValueError, match="2 inputs; got 1. Call the term as it was built"):
        term.given(normal(4, 1, LATENTS))(normal(4, 3))


# -------------------------------------------------------------------------------------------------- projection_penalty


def test_projection_penalty_is_the_documented_quotient_of_pairs_of_samples() -> None:
    correction, tangents = normal(2, 4, 7, 3), [normal(2, 4, 7, 3), normal(4, 7, 3)]
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for tangent in tangents:
        products = (correction * tangent).sum(-1)
        pairs = torch.stack(
            [products[..., i] * products[..., j] for i in range(7) for j in range(7) if i != j]
        )
        expected += pairs.mean(0) / tangent.square().sum(-1).mean(-1)
    assert_close(projection_penalty(correction, tangents), expected, **EXACT)


def test_projection_penalty_of_what_the_physics_could_do_is_its_size_and_of_anything_else_zero() -> (
    None
):
    tangent, other = normal(2000, 50, 1).sign(), normal(2000, 50, 1)
    assert_close(
        projection_penalty(3.0 * tangent, [tangent]),
        torch.full((2000,), 9.0, dtype=torch.float64),
        **EXACT,
    )
    unrelated = projection_penalty(other, [tangent])
    assert (
        unrelated.mean().abs() < 5.0 * unrelated.std() / 2000**0.5
    )  # no bias from the samples' spread
    assert_close(projection_penalty(other, []), torch.zeros(2000, dtype=torch.float64))


# -------------------------------------------------------------------------------------------------------------- Mixing


@pytest.mark.parametrize("width", [0, 7])
@pytest.mark.parametrize("batch", [(), (3,), (2, 4, 3, 5)])
def test_mixing_is_the_documented_formula(width: int, batch: tuple[int, ...]) -> None:
    mixing, states = ph.Mixing(3, 2, width).double(), normal(*batch, 3)
    sensors = mixing(states)
    assert sensors.shape == (*batch, 2)
    expected = states @ mixing.straight.weight.T + mixing.straight.bias
    if width:
        inner, _, outer = mixing.bent
        expected = expected + torch.tanh(states @ inner.weight.T + inner.bias) @ outer.weight.T
    assert_close(sensors, expected, **EXACT)


@pytest.mark.parametrize(("width", "count"), [(0, 8), (7, 8 + 28 + 14)])
def test_mixing_has_no_parameter_that_another_could_stand_for(width: int, count: int) -> None:
    assert (
        sum(p.numel() for p in ph.Mixing(3, 2, width).parameters()) == count
    )  # one bias for each sensor, not two


def test_mixing_refuses_other_states_than_it_was_built_for_with_words() -> None:
    with pytest.raises(
        ValueError, match=r"3 components in the last axis; got \(4, 2\). Build the Mixing with"
    ):
        ph.Mixing(3, 2)(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"a width of 0 or more; got \(3, 0, 0\)"):
        ph.Mixing(3, 0)


# ----------------------------------------------------------------------------------------------------- explained_share


def test_what_the_physics_explains_of_a_mixture_are_its_shares() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 40, 5, dtype=torch.float64)).Q
    one, other, rest = basis[..., 0], basis[..., 0] + 2.0 * basis[..., 1], basis[..., 2:].sum(-1)
    tangents = [x.unflatten(-1, (20, 2)) for x in (one, other)]
    mixture = (2.0 * one - 3.0 * other + rest).unflatten(-1, (20, 2))
    expected = torch.tensor([2.0, -3.0], dtype=torch.float64).expand(5, 2)
    assert_close(explained_share([(mixture, tangents)]), expected, **EXACT)
    halves = [
        (mixture[:, part], [x[:, part] for x in tangents]) for part in (slice(0, 7), slice(7, 20))
    ]
    assert_close(explained_share(halves), expected, **EXACT)


def test_centered_shares_are_those_beside_a_constant_and_of_functions_of_other_components_none() -> (
    None
):
    torch.manual_seed(0)
    angle, clock = 0.3 + torch.rand(2, 1, 30, dtype=torch.float64)
    grid_angle, grid_clock = (
        x.flatten() for x in torch.meshgrid(angle[0], clock[0], indexing="ij")
    )  # independent
    tangent = grid_angle.sin().view(1, -1, 1)
    push = (2.0 + (7.0 * grid_clock).cos()).view(1, -1, 1)
    force, halves = push + 0.5 * tangent, (slice(400), slice(400, 900))
    pieces = [(force[:, half], [tangent[:, half]]) for half in halves]
    assert_close(
        explained_share(pieces, centered=True), torch.tensor([[0.5]], dtype=torch.float64), **EXACT
    )
    assert float(explained_share(pieces)) > 2.0  # a constant looks like a sine that is never zero
    two = (
        torch.randn(4, 50, 2, dtype=torch.float64),
        [torch.randn(4, 50, 2, dtype=torch.float64) for _ in range(2)],
    )
    ones = [
        torch.tensor([1.0, 0.0]).expand(4, 50, 2),
        torch.tensor([0.0, 1.0]).expand(4, 50, 2),
    ]  # by component
    assert_close(
        explained_share([two], centered=True),
        explained_share([(two[0], [*two[1], *ones])])[:, :2],
        **EXACT,
    )


def test_a_physics_latent_that_does_nothing_explains_nothing() -> None:
    zero = torch.zeros(3, 10, 1)
    assert torch.equal(explained_share([(torch.ones(3, 10, 1), [zero])]), torch.zeros(3, 1))


def test_nothing_can_be_explained_by_no_states() -> None:
    with pytest.raises(ValueError, match="expected one piece or more"):
        explained_share([])
