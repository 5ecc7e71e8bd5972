"""certify must say no, and why: programs whose verdict is known, one flaw at a time, and forty drawn at random."""

from __future__ import annotations

import copy
import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from certified import EQUATIONS, Case, drawn, forty
from torch import Tensor

import pyro_hybrid as ph
from pyro_hybrid.families import Normal


def own(name: str):
    return lambda latents: latents[name]


def waves(**changes) -> Case:
    """x' = source - k x, recorded for different lengths."""
    how = {"noise": 0.02, "uneven": "lengths", "tasks": 400, "support": 1, "shots": 3} | changes
    slots = {"k": own("k"), "source": lambda latents: torch.tensor(0.3)}
    return Case(EQUATIONS["decay"], {"k": ph.families.LogNormal(1, loc=0.0, scale=0.4)}, slots, **how)


class Repeated(Normal):
    """Statistics that say the same thing twice."""

    def statistics(self, z: Tensor) -> Tensor:
        return torch.stack([z, 2.0 * z + 1.0], -1)


class Folded(Normal):
    """Statistics that are independent on the line, and dependent on half of it."""

    def statistics(self, z: Tensor) -> Tensor:
        return torch.stack([z, z.abs()], -1)


class Known(ph.HybridModel):
    """A straight line whose slope the support gives away, by a prior written by hand."""

    def __init__(self, family: Normal, spread: str = "varies") -> None:
        super().__init__()
        self.family, self.spread = family, spread
        self.prior = ph.UnconditionalPrior(slope=family)

    def forward(self, episode: ph.Episode) -> Tensor:
        return line(episode, self.spread)


def line(episode: ph.Episode, spread: str = "varies") -> Tensor:
    """x = slope t: a plain program with a plain prior."""
    shots = episode.support.query[..., 0]
    times = episode.times
    mean = (shots * times).sum((1, 2)) / (shots.shape[1] * times.square().sum())
    scale = 0.02 + 0.05 * shots[:, 0, 1].abs() if spread == "varies" else torch.full_like(mean, 0.05)
    if spread == "alone":
        mean, scale = torch.zeros_like(mean), 0.2 + shots[:, 0, 1].abs()
    with episode.plate:
        slope = pyro.sample("slope", dist.Normal(mean[:, None], scale[:, None]).to_event(1))
        x = (slope.unsqueeze(-1) * times).expand(*slope.shape[:-1], episode.shape[1], len(times))
        return pyro.sample("x", dist.Normal(x.unsqueeze(-1), 0.1).to_event(3), obs=episode.query)


def aside(episode: ph.Episode) -> None:
    """A guide that reads the query."""
    shots = episode.query[..., 0]
    mean = (shots * episode.times).sum((1, 2)) / (shots.shape[1] * episode.times.square().sum())
    with episode.plate:
        pyro.sample("slope", dist.Normal(mean[:, None], torch.full_like(mean, 0.02)[:, None]).to_event(1))


def lines(tasks: int = 300) -> ph.Tasks:
    generator = torch.Generator().manual_seed(0)
    slope, times = torch.randn(tasks, 1, 1, generator=generator), torch.linspace(0.0, 2.0, 8)
    values = slope * times + 0.1 * torch.randn(tasks, 4, 8, generator=generator)
    return ph.Tasks.from_trajectories(times, values.unsqueeze(-1), num_support=2, initial=(torch.zeros(tasks, 4),),
                                      truth={"slope": slope[:, :, 0]})


@pytest.mark.slow
def test_of_forty_programs_none_is_wrongly_certified_none_wrongly_refused_and_few_are_undecided() -> None:
    made = [(case, case.certify()) for case in forty(0)]
    assert [case.expected for case, _ in made].count("holds") == 20 and len(made) == 40
    wrong = [(case.name, case.flaw, certificate.verdict) for case, certificate in made
             if certificate.verdict not in (case.expected, "undecided")]
    assert not wrong
    undecided = [(case.name, case.flaw) for case, certificate in made if certificate.verdict == "undecided"]
    assert len(undecided) <= 4, undecided
    for case, certificate in made:
        if case.flaw and certificate.verdict == "fails":
            check = certificate[case.condition]
            assert check.status == "fails", (case.flaw, str(certificate))
            assert all(name in check.why for name in case.culprits), (case.culprits, check.why)


@pytest.mark.parametrize("flaw", ["product", "ignored latent", "sign symmetry", "unconditional prior", "two tasks"])
def test_each_flaw_is_refused_by_its_own_condition_and_names_the_latents(flaw: str) -> None:
    case = drawn(3, flaw=flaw)
    made = case.certify()
    assert made.verdict == "fails" and made[case.condition].status == "fails"
    assert all(name in made[case.condition].why for name in case.culprits)


def test_a_program_that_is_identifiable_holds() -> None:
    made = waves().certify()
    assert made.verdict == "holds", str(made)
    assert made["ambiguity against the truth"].value > 0.95


@pytest.mark.parametrize("how", ["shots", "trajectories"])
def test_one_system_repeated_is_refused_by_its_means(how: str) -> None:
    made = waves(repeated=how, tasks=256).certify()
    assert made.verdict == "fails" and made["variability of means"].status == "fails"
    assert "k" in made["variability of means"].why


def test_too_few_systems_to_tell_is_undecided_and_says_how_many_would_do() -> None:
    made = waves(tasks=12).certify()
    assert made.verdict == "undecided" and made["variability (iv)"].status == "undecided"
    assert "systems like these would do" in made["variability (iv)"].remedy


def test_an_untrained_model_is_refused() -> None:
    torch.manual_seed(0)
    system = ph.systems.Pendulum()
    model = ph.models.MetaHybridVAE(system, ph.Linearised(1), noise=3.0)
    made = ph.certify(model, model.guide(ph.Linearised(1)), system.simulate(30, 4, 0), progress=False)
    assert made.verdict == "fails" and made["fit"].status == "fails"


@pytest.mark.parametrize("family", [Repeated, Folded])
def test_repeated_statistics_are_refused_and_named(family: type[Normal]) -> None:
    made = ph.certify(Known(family(1)), aside, lines(), progress=False)
    assert made.verdict == "fails" and made["statistics"].status == "fails" and "slope" in made["statistics"].why
    assert made["variability (iv)"].status == "not checked"


def test_a_plain_function_with_a_prior_by_hand_is_certified() -> None:
    made = ph.certify(line, aside, lines(1000), progress=False)
    assert made.verdict == "holds", str(made)


def test_only_means_vary_is_rank_one_of_two() -> None:
    made = ph.certify(lambda episode: line(episode, "fixed"), aside, lines(), progress=False)
    check = made["variability (iv)"]
    assert made.verdict == "fails" and check.status == "fails" and "1 directions have more" in check.why
    assert made["variability of means"].status == "holds"


def test_only_spreads_vary_is_refused_by_its_means() -> None:
    made = ph.certify(lambda episode: line(episode, "alone"), aside, lines(), progress=False)
    assert made.verdict == "fails" and made["variability of means"].status == "fails"


def test_certify_changes_nothing_and_says_the_same_again() -> None:
    case = waves(tasks=40)
    model, guide = case.build()
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    one = ph.certify(model, guide, case.data(), progress=False)
    two = ph.certify(model, guide, case.data(), progress=False)
    assert torch.equal(torch.random.get_rng_state(), state) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    first, second = ({**made.to_dict(), "seconds": 0} for made in (one, two))
    assert json.dumps(first, allow_nan=False) == json.dumps(second, allow_nan=False)


def test_restarts_are_compared_with_each_other() -> None:
    case = waves(tasks=60)
    model, guide = case.build()
    made = ph.certify(model, guide, case.data(), restarts=[case.build(1)[0]], progress=False)
    assert made["ambiguity against restart 1"].status == "holds"


def test_a_single_system_is_refused_with_words() -> None:
    with pytest.raises(ValueError, match="expected two tasks or more; got 1"):
        ph.certify(line, aside, lines(2)[:1])
