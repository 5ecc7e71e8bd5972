"""check_hybrid_model: what is good passes, and every contract has a program that breaks it and nothing else."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.mask_messenger import MaskMessenger
from test_readme_model import ComputedPendulum, DampedPendulum
from torch import Tensor, nn
from toys import POINTS, SYSTEMS, Line, features, in_float32, make_tasks, with_query

import pyro_hybrid as ph
from pyro_hybrid.data.segments import to_segments
from pyro_hybrid.diagnostics.contract import STAGES
from pyro_hybrid.evidence.encoder import Then

EPISODE = in_float32(make_tasks(3, 5, num_support=2)).episode()
NAMES = [contract.__name__.replace("_", " ") for stage in STAGES for contract in stage]
SITES = {"slope": ph.families.Normal(1), "bend": ph.families.Normal(2)}


def encoder(sensors: int = 1, steps: int = POINTS, features: int = 4) -> ph.SetEncoder:
    return ph.SetEncoder(sensors, steps, features, width=8)


def guide_of(model: Any, encoder: ph.SetEncoder | None = None) -> ph.AmortizedGuide:
    """A guide of the same kind as the model's prior, or one that reads with another encoder."""
    if encoder is not None:
        return ph.AmortizedGuide(model, encoder)
    evidence = model.prior.evidence
    if isinstance(evidence, Then):
        return ph.AmortizedGuide(model, evidence.second)
    if isinstance(evidence, ph.GaussNewton):
        return ph.AmortizedGuide(model, evidence)
    return ph.AmortizedGuide(model, copy.deepcopy(evidence.encoder))


# ---- good programs -------------------------------------------------------------------------------


READINGS = {"learned": None, "computed": ph.GaussNewton(1)}
PREFERENCES: dict[str, Any] = {"correction": 1.0, "straightness": 1.0, "linear": False}
MODELS: list[tuple[str, dict[str, Any]]] = [
    *((name, options) for name in SYSTEMS for options in ({}, PREFERENCES)),
    *(("pendulum", options) for options in ({"substeps": 2}, {"step": 0.2})),
]


@pytest.mark.slow
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize(
    ("name", "options"), MODELS, ids=[f"{name} {'-'.join(o)}".strip() for name, o in MODELS]
)
def test_the_models_of_the_library_keep_every_contract(
    name: str, options: dict[str, Any], reading: str
) -> None:
    system = SYSTEMS[name]()
    model = ph.models.MetaHybridVAE(system, READINGS[reading], width=4, **options)
    lines = ph.check_hybrid_model(model, guide_of(model), system.simulate(2, 4, seed=0).episode())
    assert [line.split(":")[0] for line in lines] == NAMES
    assert not any("not checked" in line for line in lines)


def test_a_model_with_an_unconditional_prior_keeps_every_contract() -> None:
    system = SYSTEMS["pendulum"]()
    model = ph.models.MetaHybridVAE(system, width=4, conditional=False)
    guide = guide_of(model, encoder=model.encoder())
    assert len(ph.check_hybrid_model(model, guide, system.simulate(2, 4, seed=0).episode())) == len(
        NAMES
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DampedPendulum, ComputedPendulum], ids=[*READINGS])
def test_the_model_of_the_readme_keeps_every_contract(kind: Any) -> None:
    model, tasks = kind(6), SYSTEMS["pendulum"]().simulate(2, 4, seed=0)
    assert len(ph.check_hybrid_model(model, guide_of(model), tasks.episode())) == len(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("inferred", [False, True])
def test_the_line_keeps_every_contract(inferred: bool, reading: str) -> None:
    tasks = in_float32(make_tasks(3, 5, num_support=2, inferred=inferred))
    model = Line(READINGS[reading], inferred=inferred)
    assert len(ph.check_hybrid_model(model, guide_of(model), tasks.episode())) == len(NAMES)


@pytest.mark.parametrize("reading", READINGS)
def test_a_program_in_float64_with_gaps_in_its_data_keeps_every_contract(reading: str) -> None:
    mask = torch.rand(3, 5, POINTS, 1) > 0.3
    tasks = make_tasks(3, 5, num_support=2, mask=mask)
    model = Line(READINGS[reading])
    guide = guide_of(model)
    model.double(), guide.double()
    assert len(ph.check_hybrid_model(model, guide, tasks.episode())) == len(NAMES)


def own_clocks(tasks: ph.Tasks, *, by_task: bool) -> ph.Tasks:
    """The same values by clocks of the shots' own; one shot of each task ends two times before the others."""
    shape = tasks.values.shape[:2] if by_task else tasks.values.shape[1:2]
    stretch = 1.0 + 0.1 * torch.arange(float(shape.numel())).view(*shape, 1)
    observed = torch.ones_like(tasks.values, dtype=torch.bool)
    observed[:, 1, -2:] = False
    return ph.Tasks.from_trajectories(
        stretch * tasks.times, tasks.values, num_support=2, initial=tasks.states, observed=observed
    )


def assert_keeps_every_contract(model: Any, tasks: ph.Tasks) -> None:
    lines = ph.check_hybrid_model(model, guide_of(model), tasks.episode())
    assert [line.split(":")[0] for line in lines] == NAMES
    assert not any("not checked" in line for line in lines)


@pytest.mark.parametrize("by_task", [False, True], ids=["by shot", "by task"])
def test_a_line_with_clocks_and_lengths_of_its_own_keeps_every_contract(by_task: bool) -> None:
    tasks = own_clocks(in_float32(make_tasks(3, 5, num_support=2)), by_task=by_task)
    assert_keeps_every_contract(Line(), tasks)


@pytest.mark.slow
def test_a_pendulum_with_clocks_and_lengths_of_its_own_keeps_every_contract() -> None:
    system = SYSTEMS["pendulum"]()
    tasks = own_clocks(system.simulate(2, 4, seed=0), by_task=True)
    model = ph.models.MetaHybridVAE(system, ph.GaussNewton(1), width=4)
    assert_keeps_every_contract(model, tasks)


# ---- broken ones ---------------------------------------------------------------------------------


class Program:
    """A line again, in methods: each is a place where something can be broken."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = ph.SupportPrior(encoder(), **SITES)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.noise = PyroParam(torch.tensor(0.3), constraints.positive)

    def forward(self, episode: ph.Episode) -> Tensor:
        p = self.prior(episode)
        with episode.plate:
            slope, bend = self.latents(p)
            mean = self.mean(torch.cat([self.slope(slope, episode), bend], -1), episode)
            return self.observe(mean.unsqueeze(-1), episode)

    def latents(self, p: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return pyro.sample("slope", p["slope"]), pyro.sample("bend", p["bend"])

    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        return slope

    def start(self, episode: ph.Episode) -> Tensor:
        return episode.query.initial

    def mean(self, z: Tensor, episode: ph.Episode) -> Tensor:
        grown = features(episode.query.times) - features(episode.query.times[..., :1])
        return self.start(episode) + self.gain * (grown * z[..., None, None, :]).sum(-1)

    def observe(self, mean: Tensor, episode: ph.Episode) -> Tensor:
        x = dist.Normal(mean, self.noise).mask(episode.query.scored)
        return pyro.sample("x", x.to_event(3), obs=episode.query.values)


class Good(Program, ph.HybridModel):
    pass


class NamesAFunction(Good):
    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        return pyro.deterministic("twice", 2.0 * slope, event_dim=1) / 2.0


def test_a_function_of_latents_may_have_a_name() -> None:
    model = NamesAFunction()
    assert len(ph.check_hybrid_model(model, guide_of(model), EPISODE)) == len(NAMES)


class SharesByName(Program, PyroModule):
    pass


class InTheStore(Program, nn.Module):
    def observe(self, mean: Tensor, episode: ph.Episode) -> Tensor:
        x = dist.Normal(mean, pyro.param("spread", torch.tensor(0.3))).mask(episode.query.scored)
        return pyro.sample("x", x.to_event(3), obs=episode.query.values)


class AsksTheStore(Good):
    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        return slope * pyro.param("scale", torch.tensor(1.0))


class Everywhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))

    def __deepcopy__(self, memo: object) -> Everywhere:
        return self


class SharesAPart(Good):
    def __init__(self) -> None:
        super().__init__()
        self.part = Everywhere()


class HasOneMoreLatent(Good):
    def latents(self, p: dict[str, Any]) -> tuple[Tensor, Tensor]:
        pyro.sample("more", p["slope"])
        return super().latents(p)


class KnowsNoPlate(Good):
    def forward(self, episode: ph.Episode) -> Tensor:
        p = self.prior(episode)
        mean = self.mean(torch.cat(self.latents(p), -1), episode)
        return self.observe(mean.unsqueeze(-1), episode)


class ObservesByAFactor(Good):
    def observe(self, mean: Tensor, episode: ph.Episode) -> Tensor:
        x = dist.Normal(mean, self.noise).mask(episode.query.scored).to_event(3)
        if episode.query.values is None:
            return pyro.sample("x", x)
        return pyro.factor("x", x.log_prob(episode.query.values))


class ObservesHalfOfIt(Good):
    def observe(self, mean: Tensor, episode: ph.Episode) -> Tensor:
        x = dist.Normal(mean[..., 1:, :], self.noise).to_event(3)
        return pyro.sample(
            "x", x, obs=None if episode.query.values is None else episode.query.values[..., 1:, :]
        )


class KeepsAConstant(Good):
    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        return slope @ torch.tensor([[2.0]])


class CountsItsRuns(Good):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))

    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        self.runs += 1
        return slope


class ChangesASetting(Good):
    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        pyro.settings.set(cholesky_relative_jitter=7.0)
        return slope


class MasksInPlace(Good):
    def forward(self, episode: ph.Episode) -> Tensor:
        episode.query.scored[:, :, 1] = False
        return super().forward(episode)


class ForgetsTheMask(Good):
    def observe(self, mean: Tensor, episode: ph.Episode) -> Tensor:
        return pyro.sample("x", dist.Normal(mean, self.noise).to_event(3), obs=episode.query.values)


class MasksBySight(Good):
    def observe(self, mean: Tensor, episode: ph.Episode) -> Tensor:
        return super().observe(mean, with_query(episode, scored=episode.query.observed))


class LosesItsLoss(Good):
    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        if self.training:
            pyro.factor("preference", slope.new_tensor(-torch.inf))
        return slope


def with_a_trap(value: Tensor) -> Tensor:
    """The value, with NaN for a gradient."""
    return torch.where(value.abs() < torch.inf, value, (-1.0 - value.square()).sqrt())


class HasATrapInTraining(Good):
    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        return slope * with_a_trap(self.gain) if self.training else slope


class HasATrapInUse(Good):
    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        return slope if self.training else with_a_trap(slope)


class Numpy(dist.Normal):
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.loc + self.scale * torch.as_tensor(np.random.randn(*self.loc.shape)).to(
            self.loc
        )

    rsample = sample


class DrawsWithNumpy(Good):
    def observe(self, mean: Tensor, episode: ph.Episode) -> Tensor:
        x = Numpy(mean, self.noise.expand(mean.shape)).mask(episode.query.scored)
        return pyro.sample("x", x.to_event(3), obs=episode.query.values)


class BelievesTheFirstShot(Good):
    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        return (
            slope
            if episode.support is None
            else slope + 0.1 * episode.support.values[:, 0].mean((-1, -2))[:, None]
        )


class WeighsItsShots(Good):
    def start(self, episode: ph.Episode) -> Tensor:
        start = super().start(episode)
        return start * torch.arange(1.0, 1 + start.shape[1]).to(start).unsqueeze(-1)


class ComparesTasks(Good):
    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        return slope - slope.mean(-2, keepdim=True)


class AveragesOverTasks(Good):
    def start(self, episode: ph.Episode) -> Tensor:
        start = super().start(episode)
        return start - 0.1 * start.mean(0)


class NumbersTasks(Good):
    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        return slope + torch.arange(slope.shape[-2]).to(slope).unsqueeze(-1)


class DividesByTasks(Good):
    def observe(self, mean: Tensor, episode: ph.Episode) -> Tensor:
        with pyro.poutine.scale(scale=1.0 / mean.shape[-4]):
            return super().observe(mean, episode)


class ObservesItsMean(Good):
    def observe(self, mean: Tensor, episode: ph.Episode) -> Tensor:
        return super().observe(
            mean,
            with_query(episode, values=mean.detach()) if episode.query.values is None else episode,
        )


class Endless(dist.Normal):
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return super().sample(sample_shape) * torch.inf

    rsample = sample


class SimulatesTheEndless(Good):
    def observe(self, mean: Tensor, episode: ph.Episode) -> Tensor:
        if episode.query.values is not None:
            return super().observe(mean, episode)
        return pyro.sample(
            "x", Endless(mean, self.noise.expand(mean.shape), validate_args=False).to_event(3)
        )


class TurnsParticlesRound(Good):
    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        return slope.flip(0) if slope.dim() > 2 else slope


class FearsHandlers(Good):
    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        if any(isinstance(handler, MaskMessenger) for handler in pyro.poutine.runtime._PYRO_STACK):
            raise RuntimeError("what is this?")
        return slope


class HidesItsNoise(Good):
    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        return slope + 0.1 * torch.randn(())


class KnowsOneClock(Good):
    def start(self, episode: ph.Episode) -> Tensor:
        assert episode.query.times.shape == (POINTS,)
        return super().start(episode)


class SqueezesTasks(Good):
    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        return slope.squeeze(-2)


class ComparesShots(Good):
    def start(self, episode: ph.Episode) -> Tensor:
        start = super().start(episode)
        return start + 0.0 / (start.shape[1] - 1)


class ForgetsAScale(Good):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def slope(self, slope: Tensor, episode: ph.Episode) -> Tensor:
        return self.scale * slope


class TakesANameOfArviZ(Good):
    def __init__(self) -> None:
        super().__init__()
        self.prior = ph.SupportPrior(
            encoder(), draw=ph.families.Normal(1), bend=ph.families.Normal(2)
        )

    def latents(self, p: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return pyro.sample("draw", p["draw"]), pyro.sample("bend", p["bend"])


class Blind(ph.SetEncoder):
    """It reads what wasn't seen."""

    def shots(self, shots: ph.Shots) -> Tensor:
        return super().shots(replace(shots, observed=torch.ones_like(shots.observed)))


class Asked(nn.Module):
    """A prior that belongs to another model."""

    def __init__(self, sites: dict[str, ph.families.Family]) -> None:
        super().__init__()
        self.prior = ph.SupportPrior(encoder(), **sites)

    def forward(self, episode: ph.Episode) -> None:
        """Sample nothing else: the guide asks for latents of shots."""


def another_guide(**sites: ph.families.Family) -> ph.AmortizedGuide:
    return ph.AmortizedGuide(Asked(sites), encoder())


Broken = tuple[Callable[[], Any], Callable[[Any], Any], str]
BROKEN: dict[str, list[Broken]] = {
    "parameters": [
        (SharesByName, guide_of, "SharesByName, which shares them by name"),
    ],
    "copies": [
        (SharesAPart, guide_of, r"got \['model\.part\.gain'\]\. Keep parameters on the instance")
    ],
    "runs": [
        (
            Good,
            lambda model: guide_of(model, encoder=encoder(steps=9)),
            r"got ValueError: expected trajectories of \(time, sensor\) = \(9, 1\)",
        ),
        (
            AsksTheStore,
            guide_of,
            "got NotImplementedError: Support for global pyro.param statements",
        ),
    ],
    "latents": [
        (HasOneMoreLatent, guide_of, r"expected a guide of \{'more': \(3, 1\).*got \{'slope'"),
        (Good, lambda model: another_guide(slope=SITES["slope"]), r"got \{'slope': \(3, 1\)\}"),
        (Good, lambda model: another_guide(**SITES, more=SITES["slope"]), "'more'"),
        (
            Good,
            lambda model: another_guide(**SITES | {"bend": ph.families.Normal(3)}),
            r"got .*'bend': \(3, 3\)",
        ),
    ],
    "plates": [
        (
            KnowsNoPlate,
            guide_of,
            r"'slope' of batch shape \(3,\) in a plate .*\[\(-1, 3\)\]; got .* in \[\]",
        )
    ],
    "observation": [
        (ObservesByAFactor, guide_of, r"expected one of shape \(3, 3, 6, 1\); got none observed"),
        (
            ObservesHalfOfIt,
            guide_of,
            r"got \{'x': \(3, 3, 5, 1\)\}\. End the program with pyro\.sample",
        ),
    ],
    "double": [(KeepsAConstant, guide_of, "got RuntimeError: .*dtype")],
    "untouched": [
        (InTheStore, guide_of, r"got changes of \[\"parameters in Pyro's store\"\]"),
        (CountsItsRuns, guide_of, r"got changes of \['model\.runs', 'guide\.model\.runs'\]"),
        (ChangesASetting, guide_of, r"got changes of \['cholesky_relative_jitter'\]"),
        (MasksInPlace, guide_of, r"got changes of \['query\.scored'\]"),
    ],
    "mask": [
        (
            ForgetsTheMask,
            guide_of,
            r"in the program's\. Observe .*\.mask\(episode\.query\.scored\)",
        ),
        (MasksBySight, guide_of, "in the program's"),
        (
            Good,
            lambda model: guide_of(model, encoder=Blind(1, POINTS, 4, width=8)),
            "in the guide's",
        ),
    ],
    "elbo": [(LosesItsLoss, guide_of, "expected a finite loss; got nan")],
    "gradients": [(HasATrapInTraining, guide_of, r"got NaN or Inf for \['model\.gain'\]")],
    "seed": [(DrawsWithNumpy, guide_of, "got different ones. Draw everything random with")],
    "support order": [
        (BelievesTheFirstShot, guide_of, "relative difference of .* in the program's. Read a set")
    ],
    "query order": [(WeighsItsShots, guide_of, "relative difference of .* in the program's")],
    "tasks": [
        (kind, guide_of, "in the program's. Mix nothing over the axis of tasks")
        for kind in (ComparesTasks, AveragesOverTasks, NumbersTasks, DividesByTasks)
    ],
    "simulation": [
        (ObservesItsMean, guide_of, r"expected no observed site; got \['x'\]"),
        (SimulatesTheEndless, guide_of, "a finite log density of what it simulated; got"),
    ],
    "particles": [(TurnsParticlesRound, guide_of, "in the program's. Count axes from the last")],
    "predictive": [(FearsHandlers, guide_of, r"got RuntimeError: what is this\?")],
    "condition": [
        (HidesItsNoise, guide_of, "in the program's. Draw what is random with pyro.sample")
    ],
    "nuts": [(HasATrapInUse, guide_of, r"NaN or Inf for \['slope'\]")],
    "segments": [(KnowsOneClock, guide_of, "got AssertionError")],
    "one task": [(SqueezesTasks, guide_of, "got RuntimeError")],
    "one shot": [(ComparesShots, guide_of, "got")],
    "state dict": [(ForgetsAScale, guide_of, "got differences up to .* Register what is learned")],
    "arviz": [(TakesANameOfArviZ, guide_of, "got")],
}
CASES = [
    pytest.param(name, *case, id=f"{name}, {i}")
    for name, cases in BROKEN.items()
    for i, case in enumerate(cases)
]


def test_the_program_that_the_others_break_keeps_every_contract() -> None:
    model = Good()
    assert len(ph.check_hybrid_model(model, guide_of(model), EPISODE)) == len(NAMES)


def test_every_contract_has_a_program_that_breaks_it() -> None:
    assert list(BROKEN) == NAMES


@pytest.mark.parametrize(("name", "model", "guide", "message"), CASES)
def test_who_breaks_a_contract_is_refused_by_its_name(
    name: str, model: Any, guide: Any, message: str
) -> None:
    made = model()
    with pytest.raises(ph.ContractError, match=message) as caught:
        ph.check_hybrid_model(made, guide(made), EPISODE)
    follow = {"predictive", "arviz"} if name == "simulation" else set()  # they simulate too
    assert {name} <= set(caught.value.failed) <= {name} | follow
    assert f"\n- {name}. " in str(caught.value)


# ---- reports -------------------------------------------------------------------------------------


class SimulatesMore(Good):
    def observe(self, mean: Tensor, episode: ph.Episode) -> Tensor:
        return super().observe(
            torch.cat([mean, mean], -1) if episode.query.values is None else mean, episode
        )


class BreaksTwo(ForgetsTheMask, FearsHandlers):
    pass


def test_a_simulation_of_another_shape_is_named() -> None:
    model = SimulatesMore()
    with pytest.raises(ph.ContractError) as caught:
        ph.check_hybrid_model(model, guide_of(model), EPISODE)
    assert (
        "expected 'x' of shape (3, 3, 6, 1); got (3, 3, 6, 2)" in caught.value.failed["simulation"]
    )


def test_all_that_fails_is_in_one_error_with_the_traceback_of_the_first_crash() -> None:
    model = BreaksTwo()
    with pytest.raises(
        ph.ContractError, match=f"^2 of {len(NAMES)} contracts don't hold:\n- mask"
    ) as caught:
        ph.check_hybrid_model(model, guide_of(model), EPISODE)
    assert list(caught.value.failed) == ["mask", "predictive"]
    assert (
        isinstance(caught.value.__cause__, RuntimeError)
        and caught.value.__cause__.__traceback__ is not None
    )


def test_what_builds_on_a_broken_contract_is_not_checked_and_that_is_said() -> None:
    model = KnowsNoPlate()
    with pytest.raises(
        ph.ContractError, match="^1 of 7 contracts don't hold, and 18 that build on them weren't"
    ):
        ph.check_hybrid_model(model, guide_of(model), EPISODE)


def lines_of(episode: ph.Episode, model: Any = None) -> dict[str, str]:
    model = model or Good()
    return dict(
        line.split(": ", 1) for line in ph.check_hybrid_model(model, guide_of(model), episode)
    )


@pytest.mark.slow
def test_what_cannot_be_checked_is_said_in_its_line() -> None:
    tasks = in_float32(make_tasks(2, 3, num_support=1))
    assert lines_of(tasks.episode())["support order"].startswith(
        "not checked, one shot has no order"
    )
    assert "not checked" not in lines_of(tasks.episode())["query order"]
    assert lines_of(tasks.episode(2))["query order"].startswith(
        "not checked, one shot has no order"
    )
    assert lines_of(tasks[:1].episode())["tasks"].startswith("not checked, there is one task only")
    uncut = with_query(EPISODE, states=None)
    assert lines_of(uncut)["segments"].startswith("not checked, the episode can't be cut")


def test_what_the_docs_show_is_what_is_said() -> None:
    page = (Path(__file__).parents[1] / "docs" / "write_a_model.md").read_text(encoding="utf-8")
    program, check = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:2]
    (shown,) = re.findall(r"```text\nContractError: (.*?)```", page, re.DOTALL)
    with pytest.raises(ph.ContractError) as caught:
        exec(program.replace(".mask(shots.scored)", "") + check, {"__name__": "page"})
    texts = (" ".join(text.split()) for text in (str(caught.value), shown))
    assert len({re.sub(r"difference of \S+", "difference", text) for text in texts}) == 1


def test_parameters_that_no_gradient_reaches_are_named() -> None:
    model = Good()
    model.idle = nn.Parameter(torch.zeros(2))
    model.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    assert (
        lines_of(EPISODE, model)["gradients"]
        == "Gradients of the ELBO are finite (none reaches model.idle)"
    )
    assert lines_of(EPISODE)["gradients"] == "Gradients of the ELBO are finite"


@pytest.mark.slow
def test_nothing_is_changed_by_the_check_not_even_by_a_broken_program(
    request: pytest.FixtureRequest,
) -> None:
    request.addfinalizer(pyro.clear_param_store)
    for kind in (Good, MasksInPlace, ChangesASetting, CountsItsRuns, DrawsWithNumpy):
        model, episode = kind(), copy.deepcopy(EPISODE)
        guide = guide_of(model)
        pyro.get_param_store().setdefault("mine", torch.tensor(3.0))
        guide.eval(), model.train()  # a guide holds its model
        weights = copy.deepcopy([model.state_dict(), guide.state_dict()])
        states = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        settings = dict(pyro.settings.get())
        try:
            ph.check_hybrid_model(model, guide, episode)
        except ph.ContractError:
            assert kind is not Good
        assert states == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        assert settings == pyro.settings.get() and pyro.get_param_store()["mine"] == 3.0
        assert model.training and not guide.training
        for before, module in zip(weights, (model, guide), strict=True):
            assert all(
                torch.equal(value, before[name]) for name, value in module.state_dict().items()
            )
            assert all(p.grad is None for p in module.parameters())
        for name in ("values", "scored", "initial"):
            assert torch.equal(getattr(episode.query, name), getattr(EPISODE.query, name))


def test_it_says_the_same_again() -> None:
    model = ComparesTasks()
    guide, said = guide_of(model), []
    for _ in range(2):
        with pytest.raises(ph.ContractError) as caught:
            ph.check_hybrid_model(model, guide, EPISODE)
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("episode", "came"),
    [
        (EPISODE.simulation(), "query: no values"),
        (replace(EPISODE, support=None), "support: none"),
        (EPISODE.map_shots(lambda shots: to_segments(shots, 2)), "query: segments"),
        (
            replace(EPISODE, support=to_segments(EPISODE.support, 2)),
            "query: whole trajectories, support: segments",
        ),
    ],
)
def test_an_episode_that_says_too_little_is_refused(episode: ph.Episode, came: str) -> None:
    model = Good()
    with pytest.raises(
        ValueError, match=f"expected an episode of whole trajectories .*{came}.*Pass tasks"
    ):
        ph.check_hybrid_model(model, guide_of(model), episode)


@pytest.mark.parametrize(
    "thing", [in_float32(make_tasks(3, 5, num_support=2)), EPISODE.query, None]
)
def test_what_is_no_episode_is_answered_with_how_to_make_one(
    without_jaxtyping: None, thing: object
) -> None:
    model = Good()
    with pytest.raises(
        TypeError, match=r"an episode \(ph\.Episode\); got \w+\. Pass .*tasks\[:3\]\.episode\(\)"
    ):
        ph.check_hybrid_model(model, guide_of(model), thing)  # type: ignore[arg-type]


def test_a_program_that_is_no_module_is_answered_with_what_to_derive_it_from(
    without_jaxtyping: None,
) -> None:
    with pytest.raises(ph.ContractError, match="got function. Derive it from ph.HybridModel"):
        ph.check_hybrid_model(lambda episode: None, guide_of(Good()), EPISODE)  # type: ignore[arg-type]


# ---- rounding ------------------------------------------------------------------------------------


class Counts(ph.HybridModel):
    """Counts of a million, whose rate a network says: derivatives by differences are off by rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = ph.SupportPrior(
            ph.GaussNewton(2),
            rate=ph.families.Normal(1),
            decay=ph.families.Normal(1),
        )
        self.network = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, episode: ph.Episode) -> Tensor:
        p = self.prior(episode)
        with episode.plate:
            z = torch.cat([pyro.sample(name, p[name]) for name in p], -1)
            growth = self.network(z)[..., None, None, :] * episode.query.times.unsqueeze(-1)
            mean = self.rate(growth, episode)
            return pyro.sample(
                "x",
                dist.Poisson(mean).mask(episode.query.scored).to_event(3),
                obs=episode.query.values,
            )

    def rate(self, growth: Tensor, episode: ph.Episode) -> Tensor:
        return 1e6 * growth.exp() * torch.ones_like(episode.query.initial).unsqueeze(-2)


class MixedCounts(Counts):
    """The same, its rate being compared with the mean over tasks."""

    def rate(self, growth: Tensor, episode: ph.Episode) -> Tensor:
        return super().rate(growth - 1e-3 * growth.mean(-4, keepdim=True), episode)


def counts() -> ph.Episode:
    generator = torch.Generator().manual_seed(0)
    times = torch.linspace(0.0, 2.0, 12)
    decay = torch.rand(3, 1, 1, 1, generator=generator)
    rate = 1e6 * (-decay * times.unsqueeze(-1)).exp() * torch.ones(3, 4, 1, 1)
    values = torch.poisson(rate, generator=generator)
    return ph.Tasks.from_trajectories(times, values, num_support=2).episode()


def test_a_poisson_program_is_not_accused_of_what_rounding_does() -> None:
    torch.manual_seed(0)
    model = Counts()
    assert len(ph.check_hybrid_model(model, guide_of(model), counts())) == len(NAMES)


def test_a_poisson_program_that_mixes_tasks_is_still_found() -> None:
    torch.manual_seed(0)
    model = MixedCounts()
    with pytest.raises(ph.ContractError) as caught:
        ph.check_hybrid_model(model, guide_of(model), counts())
    assert "Mix nothing over the axis of tasks" in caught.value.failed["tasks"]


class InSingle(Good):
    """A line that computes in float32 whatever it is given."""

    def mean(self, z: Tensor, episode: ph.Episode) -> Tensor:
        times = episode.query.times
        grown = features(times) - features(times[..., :1])
        mean = (grown.float() @ z.float()[..., None, :, None]).squeeze(-1)
        return super().start(episode).float() + self.gain.float() * mean

    def observe(self, mean: Tensor, episode: ph.Episode) -> Tensor:
        x = dist.Normal(mean, self.noise.float() / 30.0).mask(episode.query.scored)
        return pyro.sample("x", x.to_event(3), obs=episode.query.values)


def test_a_program_that_computes_in_float32_is_compared_in_float32() -> None:
    model = InSingle()
    assert len(ph.check_hybrid_model(model, guide_of(model), EPISODE)) == len(NAMES)
