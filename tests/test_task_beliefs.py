"""What a program believes of its tasks: the same numbers whoever wrote the prior, and words where there are none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.testing import assert_close
from toys import TOGETHER, Line, make_tasks

import pyro_hybrid as ph
from pyro_hybrid.beliefs.families import (
    Beta,
    Family,
    FullNormal,
    Gamma,
    LogNormal,
    Normal,
    VonMises,
)
from pyro_hybrid.identifiability import task_beliefs as module
from pyro_hybrid.identifiability.task_beliefs import (
    TaskBeliefs,
    copy_in_double,
    infer_tasks,
    latent_names,
)

FAMILIES: list[Callable[[int], Family]] = [Normal, LogNormal, Gamma, Beta, VonMises, FullNormal]


def stated(episode: ph.Episode) -> None:
    """A prior by hand: the support's own mean and length; and everything that isn't a task's latent."""
    assert episode.support is not None and episode.support.values is not None
    known = episode.support.values.mean((1, 2))
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with episode.plate:
        z = pyro.sample("z", dist.Normal(known, 0.5).to_event(1))
        rate = pyro.sample("rate", dist.Gamma(1.0 + known.abs(), 2.0).to_event(1))
        start = pyro.sample("start", dist.Normal(episode.query.initial, 0.1).to_event(2))
        mean = level + z[:, None, None] + rate[:, None, None] + start.unsqueeze(2)
        x = mean.expand(-1, -1, len(episode.query.times), -1)
        pyro.sample("x", dist.Normal(x, 1.0).to_event(3), obs=episode.query.values)


def data(tasks: int = 9, shots: int = 6, num_support: int = 2, seed: int = 0) -> ph.Tasks:
    values = torch.randn(
        tasks, shots, 5, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return ph.Tasks.from_trajectories(
        torch.arange(5.0, dtype=torch.float64), values, num_support=num_support
    )


def quietly(
    program: Callable[[ph.Episode], object], tasks: ph.Tasks, num_support: int | None = None
) -> TaskBeliefs:
    return infer_tasks(program, tasks, num_support=num_support, progress=False)


# ---- what is read --------------------------------------------------------------------------------


def test_a_prior_by_hand_is_read_from_disjoint_supports() -> None:
    tasks = data()
    found = quietly(stated, tasks)
    means = torch.stack([tasks.values[:, 2 * i : 2 * i + 2].mean((1, 2)) for i in range(3)])
    assert found.num_support == 2 and found.families == {"z": Normal(1), "rate": Gamma(1)}
    assert_close(found.natural["z"], torch.stack([means / 0.25, torch.full_like(means, -2.0)], -1))
    assert_close(
        found.natural["rate"], torch.stack([means.abs(), torch.full_like(means, -2.0)], -1)
    )


def test_latents_of_shots_and_of_no_task_are_not_the_task_s() -> None:
    assert set(quietly(stated, data()).natural) == {"z", "rate"}


@pytest.mark.parametrize(
    "make",
    [
        lambda n: dist.Normal(torch.zeros(n), 1.0).to_event(1),
        lambda n: dist.Normal(torch.zeros(n), 1.0),
        lambda n: dist.Normal(torch.zeros(n, 2), 1.0).to_event(2),
    ],
    ids=["vector", "batch", "matrix"],
)
def test_latents_of_no_task_are_not_the_task_s_even_if_they_are_as_many_as_tasks(
    make: Callable[[int], dist.Distribution],
) -> None:
    def program(episode: ph.Episode) -> None:
        pyro.sample("shared", make(episode.query.shape[0]))
        stated(episode)

    assert set(quietly(program, data()).natural) == {"z", "rate"}


def test_latents_of_shots_in_a_plate_of_their_own_are_not_the_task_s() -> None:
    def program(episode: ph.Episode) -> None:
        with (
            pyro.plate("system", episode.query.shape[0], dim=-2),
            pyro.plate("trial", episode.query.shape[1], dim=-1),
        ):
            pyro.sample("kick", dist.Normal(0.0, 1.0))
        stated(episode)

    assert set(quietly(program, data()).natural) == {"z", "rate"}


@pytest.mark.parametrize(
    ("shots", "num_support", "chosen", "supports"),
    [
        (6, 2, None, 3),
        (7, 2, None, 3),  # the last shot stays unread
        (6, 5, None, 2),  # two supports of five there are not
        (6, 2, 6, 1),
        (6, 2, 1, 6),
    ],
)
def test_supports_are_as_large_as_in_training_where_two_of_them_fit(
    shots: int, num_support: int, chosen: int | None, supports: int
) -> None:
    found = quietly(stated, data(4, shots, num_support), chosen)
    assert found.natural["z"].shape == (supports, 4, 1, 2)
    assert found.num_support == (chosen or min(num_support, shots // 2))


def test_a_support_prior_and_the_same_prior_by_hand_give_the_same() -> None:
    tasks, model = make_tasks(6, 8, num_support=4), Line(ph.GaussNewton(3)).double()

    def by_hand(episode: ph.Episode) -> None:
        mean, scale = model.prior.belief(episode.support, model).moments()
        with episode.plate:
            pyro.sample("slope", dist.Normal(mean[:, :1], scale[:, :1]).to_event(1))
            pyro.sample("bend", dist.Normal(mean[:, 1:], scale[:, 1:]).to_event(1))

    one, other = quietly(model, tasks), quietly(by_hand, tasks)
    assert one.natural.keys() == other.natural.keys()
    assert_close(one.flat, other.flat, rtol=1e-12, atol=1e-12)
    assert one.names == other.names == ["slope", "bend[0]", "bend[1]"]


def test_a_module_with_latents_of_shots_is_read_like_any_other() -> None:
    found = quietly(
        Line(ph.GaussNewton(3), inferred=True).double(),
        make_tasks(4, 4, num_support=2, inferred=True),
    )
    assert list(found.natural) == ["slope", "bend"]


def test_masked_values_are_not_read() -> None:
    mask = torch.rand(6, 8, 6, 1, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[:, :, 0] = True
    tasks, model = make_tasks(6, 8, num_support=4, mask=mask), Line(ph.GaussNewton(3)).double()
    wild = ph.Tasks.from_trajectories(
        tasks.times, tasks.values.where(mask, 1e6), num_support=4, observed=mask
    )
    assert torch.equal(quietly(model, tasks).flat, quietly(model, wild).flat)
    assert not torch.equal(
        quietly(model, tasks).flat, quietly(model, make_tasks(6, 8, num_support=4)).flat
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_known_by_the_distribution_s_type(family: Callable[[int], Family]) -> None:
    members = family(2)
    natural = members.from_raw(0.3 * torch.randn(9, members.n, members.k, dtype=torch.float64))

    def program(episode: ph.Episode) -> None:
        with episode.plate:
            pyro.sample("z", members.distribution(natural))

    found = quietly(program, data())
    assert found.families == {"z": members}
    assert_close(found.natural["z"], natural.expand(3, -1, -1, -1), rtol=1e-5, atol=1e-6)


def test_a_module_s_own_word_on_its_family_counts() -> None:
    families = {"slope": Normal(1, loc=0.5, scale=2.0), "bend": Normal(2)}
    assert quietly(Line(sites=families).double(), make_tasks(3, 4)).families == families
    found = quietly(Line(sites=TOGETHER).double(), make_tasks(3, 4))
    assert found.families == TOGETHER and found.natural["both"].shape == (4, 3, 3, 4)


@pytest.mark.parametrize("batch", [1, 4, 9])
def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    lines, model = make_tasks(9, 4, num_support=2), Line(ph.GaussNewton(3)).double()
    whole, exact = quietly(model, lines), quietly(stated, data())
    monkeypatch.setattr(module, "BATCH", batch)
    assert_close(quietly(model, lines).flat, whole.flat, rtol=1e-6, atol=1e-6)
    assert torch.equal(quietly(stated, data()).flat, exact.flat)


def test_float32_programs_are_kept_in_float64() -> None:
    tasks = data()
    single = ph.Tasks.from_trajectories(tasks.times.float(), tasks.values.float(), num_support=2)
    found = quietly(stated, single)
    assert found.flat.dtype == torch.float64
    assert_close(found.flat, quietly(stated, tasks).flat, rtol=1e-5, atol=1e-5)


def test_nobody_outside_sees_the_runs() -> None:
    with poutine.trace() as trace:
        quietly(stated, data())
    assert set(trace.trace.nodes) <= {"_INPUT", "_RETURN"}


# ---- what follows from it ------------------------------------------------------------------------


def test_numbers_stand_in_the_order_of_their_names() -> None:
    families: dict[str, Family] = {"a": LogNormal(1), "b": VonMises(2)}
    natural = {
        "a": torch.arange(2.0).view(1, 1, 1, 2),
        "b": torch.arange(10.0, 14.0).view(1, 1, 2, 2),
    }
    found = TaskBeliefs(families, natural, num_support=1)
    assert found.names == ["a", "b[0]", "b[1]"]
    assert found.terms == [
        "a: log z",
        "a: log² z",
        "b[0]: cos z",
        "b[0]: sin z",
        "b[1]: cos z",
        "b[1]: sin z",
    ]
    assert found.flat.tolist() == [[[0.0, 1.0, 10.0, 11.0, 12.0, 13.0]]]


def test_a_full_normal_has_terms_for_all_its_products() -> None:
    found = TaskBeliefs({"z": FullNormal(2)}, {"z": torch.zeros(1, 1, 2, 3)}, num_support=1)
    assert len(found.terms) == found.flat.shape[-1] == 6
    assert found.terms[:3] == ["z[0]: z", "z[0]: z z[0]", "z[0]: z z[1]"]


def test_a_site_of_one_component_goes_by_its_own_name() -> None:
    assert latent_names({"omega": 1, "unknown": 3}) == [
        "omega",
        "unknown[0]",
        "unknown[1]",
        "unknown[2]",
    ]


def test_coordinates_and_their_spread_are_those_of_all_that_is_believed() -> None:
    families: dict[str, Family] = {"a": LogNormal(1), "b": Beta(2)}
    mean = torch.randn(3, 50, 3, dtype=torch.float64)
    scale = 0.2 + torch.rand(3, 50, 3, dtype=torch.float64)
    natural = {
        "a": families["a"].from_gaussian(mean[..., :1], scale[..., :1]),
        "b": families["b"].from_gaussian(mean[..., 1:], scale[..., 1:]),
    }
    found = TaskBeliefs(families, natural, num_support=1)
    assert_close((found.mean, found.sd), (mean, scale), rtol=1e-6, atol=1e-6)
    draws = (mean + scale * torch.randn(4000, 3, 50, 3, dtype=torch.float64)).flatten(0, 2)
    assert_close(
        (found.population_mean, found.population_sd),
        (draws.mean(0), draws.std(0)),
        rtol=0.01,
        atol=0.01,
    )


def test_constrained_latents_are_each_family_s_own() -> None:
    found = TaskBeliefs({"a": LogNormal(1), "b": Beta(1), "c": Normal(1)}, {}, num_support=1)
    z = found.constrained(torch.tensor([[0.3, -0.7, 1.1]], dtype=torch.float64))
    assert z.flatten().tolist() == pytest.approx([math.exp(0.3), 1 / (1 + math.exp(0.7)), 1.1])


def test_in_double_copies_a_module_and_leaves_a_function_as_it_is() -> None:
    model = nn.Linear(2, 1)
    copy = copy_in_double(model)
    assert copy.weight.dtype == torch.float64 and model.weight.dtype == torch.float32
    assert copy.weight.tolist() == model.weight.tolist()
    assert copy_in_double(stated) is stated


# ---- what it refuses -----------------------------------------------------------------------------


def latent(make: Callable[[Tensor], dist.Distribution]) -> Callable[[ph.Episode], None]:
    def program(episode: ph.Episode) -> None:
        assert episode.support is not None and episode.support.values is not None
        with episode.plate:
            pyro.sample("z", make(episode.support.values.mean((1, 2))))

    return program


def test_a_prior_outside_exponential_families_is_refused_by_name() -> None:
    program = latent(lambda known: dist.Uniform(known - 1.0, known + 1.0).to_event(1))
    with pytest.raises(
        TypeError,
        match=r"a prior from an exponential family for 'z'; got Uniform\. Use one of "
        r"ph\.families",
    ):
        quietly(program, data())


def test_latents_without_a_component_axis_are_refused_with_the_remedy() -> None:
    program = latent(lambda known: dist.Normal(known[:, 0], 1.0))
    with pytest.raises(
        ValueError,
        match=r"latent 'z' of shape \(task, component\); got \(9,\)\. Give it a component",
    ):
        quietly(program, data())


def test_a_program_without_latents_of_tasks_is_refused() -> None:
    def program(episode: ph.Episode) -> None:
        pyro.sample("level", dist.Normal(0.0, 1.0))

    with pytest.raises(
        ValueError,
        match="a program with latents of tasks.*got none. Sample them inside `with episode",
    ):
        quietly(program, data())


def test_tasks_on_which_the_prior_fails_are_counted_and_the_first_is_named() -> None:
    tasks = data()

    def lost(known: Tensor) -> dist.Distribution:
        bad = torch.isin(known, tasks.values[3:6:2, :2].mean((1, 2)))
        return dist.Normal(known.masked_fill(bad, torch.nan), 1.0).to_event(1)

    with pytest.raises(
        ValueError,
        match="finite natural parameters of 'z'; got NaN or Inf in 2 tasks, the first being task 3",
    ):
        quietly(latent(lost), tasks)


def test_a_task_on_which_the_prior_has_no_mean_is_named() -> None:
    def improper(known: Tensor) -> dist.Distribution:
        return dist.Gamma(
            torch.ones_like(known).index_fill(0, torch.tensor(4), 1e-300), 1.0
        ).to_event(1)

    with pytest.raises(
        ValueError,
        match="a finite mean and standard deviation of 'z'; got NaN or Inf in 1 task, the first being task 4",
    ):
        quietly(latent(improper), data())


def test_tasks_of_one_shot_are_refused() -> None:
    tasks = data()
    first = {
        name: getattr(tasks, name)[:, :1]
        for name in ("values", "observed", "scored", "initial", "states")
        if getattr(tasks, name) is not None
    }
    one = replace(tasks, **first)
    with pytest.raises(
        ValueError, match="expected two shots or more of every task; got 1. One support alone"
    ):
        quietly(stated, one)


@pytest.mark.parametrize("shots", [0, 7, -1])
def test_supports_larger_than_a_task_or_empty_are_refused(shots: int) -> None:
    with pytest.raises(
        ValueError, match=rf"num_support as a whole number from 1 to 6; got {shots}"
    ):
        quietly(stated, data(), shots)
