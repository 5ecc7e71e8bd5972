"""Known inputs u(t): exact between their times, held beyond them, and integrated without error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import pyro_hybrid as ph

TIMES = torch.tensor([0.0, 0.5, 0.7, 2.0], dtype=torch.float64)
VALUES = torch.tensor([[1.0, -1.0], [3.0, 0.0], [-2.0, 4.0], [5.0, 5.0]], dtype=torch.float64)
EXACT = {"rtol": 0.0, "atol": 1e-12}
METHODS = ["rk4", "dopri5", "dopri8"]

every_kind = pytest.mark.parametrize("kind", ["linear", "constant"])


def at(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


def expected(times: Tensor, values: Tensor, kind: str, t: float) -> Tensor:
    """The documented formula, at one time of one trajectory."""
    if t < times[0]:
        return values[0]
    if t >= times[-1]:
        return values[-1]
    i = int((times <= t).sum()) - 1
    if kind == "constant":
        return values[i]
    weight = (t - times[i]) / (times[i + 1] - times[i])
    return values[i] + weight * (values[i + 1] - values[i])


@every_kind
@pytest.mark.parametrize("t", [-9.0, 0.0, 0.2, 0.5, 0.6, 0.7, 1.9999, 2.0, 7.0])
def test_inputs_are_the_documented_ones(kind: str, t: float) -> None:
    u = ph.interpolate(TIMES, VALUES, kind)
    assert_close(u(at(t)), expected(TIMES, VALUES, kind, t), **EXACT)


@every_kind
def test_inputs_at_their_own_times_and_beyond_are_their_values_to_the_last_bit(kind: str) -> None:
    values = torch.randn(4, 2, dtype=torch.float64)
    u = ph.interpolate(TIMES, values, kind)
    assert torch.equal(u(TIMES), values)
    assert torch.equal(u(at(2.5)), values[-1]) and torch.equal(u(at(-0.1)), values[0])


CLOCKS = {"one": (), "by shot": (3,), "by task": (2, 1), "by task and shot": (2, 3)}


@every_kind
@pytest.mark.parametrize("of_inputs", CLOCKS)
@pytest.mark.parametrize("of_states", CLOCKS)
def test_each_trajectory_has_its_own_inputs_by_its_own_clock(
    of_inputs: str, of_states: str, kind: str
) -> None:
    lead = CLOCKS[of_inputs]
    times = TIMES * (1.0 + torch.rand((*lead, 1), dtype=torch.float64) * bool(lead))
    times = times.reshape(*lead, 4)
    values = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    t = 3.0 * torch.rand(CLOCKS[of_states], dtype=torch.float64) - 0.5
    inputs = ph.interpolate(times, values, kind)(t)
    assert inputs.shape == (2, 3, 2)
    clocks = times.expand(2, 3, 4)
    moments = t.expand(2, 3)
    for task in range(2):
        for shot in range(3):
            own = expected(clocks[task, shot], values[task, shot], kind, float(moments[task, shot]))
            assert_close(inputs[task, shot], own, **EXACT)


@every_kind
def test_inputs_of_all_trajectories_follow_the_clock_of_each(kind: str) -> None:
    t = torch.rand(2, 3, dtype=torch.float64)
    inputs = ph.interpolate(TIMES, VALUES, kind)(t)
    assert inputs.shape == (2, 3, 2)
    assert_close(inputs[1, 2], expected(TIMES, VALUES, kind, float(t[1, 2])), **EXACT)


def integral(times: Tensor, values: Tensor, kind: str) -> Tensor:
    """Of inputs from the first time to each, ``(time, input)``."""
    lengths = torch.diff(times).unsqueeze(-1)
    areas = (
        values[:-1] * lengths if kind == "constant" else 0.5 * (values[:-1] + values[1:]) * lengths
    )
    return torch.cat([torch.zeros_like(values[:1]), areas.cumsum(0)])


@every_kind
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("offset", [0.0, 7.3])
def test_inputs_that_change_at_output_times_are_integrated_exactly(
    offset: float, method: str, kind: str
) -> None:
    times, start = TIMES + offset, torch.zeros(2, 3, dtype=torch.float64)
    u = ph.interpolate(times, VALUES, kind)

    def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return u(t)[..., 0], u(t)[..., 1]

    states = ph.solve(field, (start, start), times, method=method)
    assert_close(states, integral(times, VALUES, kind).expand(2, 3, 4, 2), rtol=0.0, atol=1e-9)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_each_trajectory_integrates_its_own_inputs(
    method: str, dtype: torch.dtype, kind: str
) -> None:
    clocks = torch.stack([TIMES, 2.0 * TIMES - 5.0, TIMES**2 + 0.1]).to(dtype)
    values = torch.randn(2, 3, 4, 1).to(dtype)
    u = ph.interpolate(clocks, values, kind)
    start = torch.zeros(2, 3, dtype=dtype)
    states = ph.solve(lambda t, y: (u(t)[..., 0],), (start,), clocks, method=method)
    for task in range(2):
        for shot in range(3):
            own = integral(clocks[shot], values[task, shot], kind)
            tolerance = 1e-9 if dtype == torch.float64 else 1e-4
            assert_close(states[task, shot], own, rtol=0.0, atol=tolerance)


@every_kind
def test_inputs_of_a_field_on_a_grid_broadcast_with_its_points(kind: str) -> None:
    clocks = torch.stack([TIMES, 2.0 * TIMES - 5.0, TIMES**2 + 0.1])
    values = torch.randn(2, 3, 4, 1, dtype=torch.float64)
    for times in (TIMES, clocks, clocks.expand(2, 3, 4)):
        u = ph.interpolate(times, values, kind, grid=True)
        start = torch.zeros(2, 3, 5, dtype=torch.float64)
        states = ph.solve(lambda t, y, u=u: u(t)[..., 0].expand_as(y), start, times)
        own = integral(times.expand(2, 3, 4)[1, 2], values[1, 2], kind)
        assert_close(states[1, 2], own.expand(4, 5), rtol=0.0, atol=1e-9)


def test_inputs_work_under_vmap_and_in_recomputed_steps() -> None:
    u = ph.interpolate(TIMES, VALUES)
    one = torch.ones(1, 1, dtype=torch.float64)

    def end(rate: Tensor) -> Tensor:
        states = ph.solve(lambda t, y: (u(t)[..., 0] - rate * y[0],), (one,), TIMES, substeps=60)
        return states[0, 0, -1, 0]

    rates = torch.tensor([0.3, 1.0], dtype=torch.float64, requires_grad=True)
    together = torch.vmap(end)(rates)
    alone = torch.stack([end(rate) for rate in rates])
    assert_close(together, alone, **EXACT)
    assert_close(
        torch.autograd.grad(together.sum(), rates)[0], torch.autograd.grad(alone.sum(), rates)[0]
    )


BAD = {
    "another kind": ({"kind": "cubic"}, ValueError, 'kind "linear" or "constant"; got \'cubic\''),
    "no axis of inputs": (
        {"values": VALUES[:, 0]},
        ValueError,
        r"values \(..., time, input\) of as many times; got \(4,\) and \(4,\). Give each input an",
    ),
    "fewer times": ({"times": TIMES[:3]}, ValueError, r"of as many times; got \(3,\) and \(4, 2\)"),
    "one time": (
        {"times": TIMES[:1], "values": VALUES[:1]},
        ValueError,
        "two or more strictly increasing times",
    ),
    "unsorted times": ({"times": TIMES.flip(0)}, ValueError, "two or more strictly increasing"),
    "gaps": (
        {"values": VALUES.where(VALUES > 0.0, torch.nan)},
        ValueError,
        "expected finite values; got nan at index",
    ),
    "integers": ({"values": VALUES.long()}, TypeError, "values in float32 or float64; got"),
    "mixed dtypes": (
        {"values": VALUES.float()},
        TypeError,
        "values in torch.float64, as the times; got torch.float32",
    ),
    "other trajectories": (
        {"times": TIMES.expand(3, 4), "values": VALUES.expand(2, 2, 4, 2)},
        ValueError,
        r"times of the trajectories of values; got \(3, 4\) and \(2, 2, 4, 2\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_inputs_that_make_no_sense_are_refused_with_words(case: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ph.interpolate(**{"times": TIMES, "values": VALUES} | change)
