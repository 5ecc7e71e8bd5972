"""meta_train and ph.SVI: reproducible, interruptible, and honest about what went wrong."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jaxtyping
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Note
from pyro.infer import SVI as StockSVI
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from toys import SEPARATE, Line, encoder, in_float32, make_tasks

import pyro_hybrid as ph
from pyro_hybrid.data.segments import to_segments
from pyro_hybrid.training import loop
from pyro_hybrid.training.batch import sampled_segments
from pyro_hybrid.training.guards import ElboTerms

TASKS = in_float32(make_tasks(20, 4, num_support=2))
SHORT: dict[str, Any] = {
    "num_steps": 6,
    "batch_size": 8,
    "progress": False,
    "curriculum": {0.0: None},
}
READINGS = pytest.mark.parametrize(
    "evidence", [None, ph.GaussNewton(1)], ids=["learned", "computed"]
)
quiet = pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")


def pair(
    evidence: ph.GaussNewton | None = None, model: type[Line] = Line, seed: int = 0, **options: Any
) -> tuple[Line, ph.AmortizedGuide]:
    torch.manual_seed(seed)
    program = model(evidence, **options)
    return program, ph.AmortizedGuide(program, evidence or encoder())


def frozen(both: tuple[Line, ph.AmortizedGuide]) -> tuple[Line, ph.AmortizedGuide]:
    """The pair with parameters that stay as they are."""
    for module in both:
        module.requires_grad_(False)
    return both


def state(*modules: nn.Module) -> list[Tensor]:
    return [value.clone() for m in modules for value in m.state_dict().values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )


# ---- same seed, same result ----------------------------------------------------------------------


@READINGS
def test_the_same_seed_gives_the_same_result_bit_for_bit(evidence: ph.GaussNewton | None) -> None:
    results = []
    for disturbance in (0, 123):
        both = pair(evidence)
        torch.manual_seed(disturbance)  # the state of the global generator doesn't matter
        fit = ph.meta_train(*both, TASKS, seed=5, **SHORT)
        results.append((state(*both), fit.loss, fit.log_likelihood, fit.kl))
    assert same(results[0][0], results[1][0]) and results[0][1:] == results[1][1:]


def test_another_seed_gives_another_result() -> None:
    first, second = pair(), pair()
    assert same(state(*first), state(*second))
    fits = [
        ph.meta_train(*both, TASKS, seed=seed, **SHORT) for both, seed in ((first, 1), (second, 2))
    ]
    assert not same(state(*first), state(*second)) and fits[0].loss != fits[1].loss


def test_the_global_random_state_is_left_as_it_was() -> None:
    both, before = pair(), torch.get_rng_state()
    ph.meta_train(*both, TASKS, **SHORT)
    assert torch.equal(torch.get_rng_state(), before)


class Stepper:
    """An SVI loop that keeps its random state to itself."""

    def __init__(self, both: tuple[Line, ph.AmortizedGuide], seed: int) -> None:
        self.svi = ph.SVI(
            *both, torch.optim.Adam({id(p): p for m in both for p in m.parameters()}.values(), 1e-2)
        )
        self.batches, self.random, self.losses = (
            TASKS.batches(8, seed),
            torch.Generator().manual_seed(seed).get_state(),
            [],
        )

    def __call__(self, *_: object) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.random)
            self.losses.append(self.svi.step(next(self.batches)))
            self.random = torch.get_rng_state()


@READINGS
def test_two_trainings_step_by_step_in_turns_equal_two_apart_bit_for_bit(
    evidence: ph.GaussNewton | None,
) -> None:
    apart = [pair(evidence, seed=s) for s in (1, 2)]
    alone = [Stepper(both, seed) for seed, both in enumerate(apart)]
    for stepper in alone:
        for _ in range(5):
            stepper()
    together = [pair(evidence, seed=s) for s in (1, 2)]
    turns = [Stepper(both, seed) for seed, both in enumerate(together)]
    for _ in range(5):
        for stepper in turns:
            stepper()
    for a, b, one, two in zip(apart, together, alone, turns, strict=True):
        assert same(state(*a), state(*b)) and one.losses == two.losses
    assert not same(state(*apart[0]), state(*apart[1]))


@READINGS
def test_a_training_inside_the_steps_of_another_equals_two_apart_bit_for_bit(
    evidence: ph.GaussNewton | None,
) -> None:
    apart = [pair(evidence, seed=s) for s in (1, 2, 3)]
    fits = [ph.meta_train(*apart[i], TASKS, seed=i, **SHORT) for i in (0, 1)]
    alone = Stepper(apart[2], 7)
    for _ in range(6):
        alone()
    together = [pair(evidence, seed=s) for s in (1, 2, 3)]
    stepper, inner = Stepper(together[2], 7), []

    def meanwhile(step: int, fit: ph.Fit) -> None:
        stepper()
        if step == 2:
            inner.append(ph.meta_train(*together[1], TASKS, seed=1, **SHORT))

    outer = ph.meta_train(*together[0], TASKS, seed=0, callback=meanwhile, **SHORT)
    assert (
        outer.loss == fits[0].loss
        and inner[0].loss == fits[1].loss
        and stepper.losses == alone.losses
    )
    for a, b in zip(apart, together, strict=True):
        assert same(state(*a), state(*b))


# ---- what comes out ------------------------------------------------------------------------------


@READINGS
def test_training_lowers_the_loss_and_keeps_a_record_of_every_step(
    evidence: ph.GaussNewton | None,
) -> None:
    both, seen = pair(evidence), []
    fit = ph.meta_train(
        *both,
        TASKS,
        num_steps=40,
        batch_size=10,
        learning_rate=2e-2,
        progress=False,
        callback=lambda step, fit: seen.append((step, len(fit.loss))),
    )
    assert seen == [(i, i + 1) for i in range(40)]
    assert len(fit.loss) == len(fit.log_likelihood) == len(fit.kl) == 40
    assert sum(fit.loss[-10:]) < sum(fit.loss[:10]) and fit.skipped == 0 and not fit.stopped_early
    assert all(
        kl == pytest.approx(loss + ll, abs=1e-3)
        for loss, ll, kl in zip(fit.loss, fit.log_likelihood, fit.kl, strict=True)
    )
    assert all(kl > 0 for kl in fit.kl)


def test_a_training_is_timed_from_its_start_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[float] = []

    def clock() -> float:
        readings.append(3.0 * len(readings) + 100.0)
        return readings[-1]

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=clock))
    fit = ph.meta_train(*pair(), TASKS, **SHORT)
    assert fit.seconds == readings[-1] - readings[0] > 0.0


def test_the_loss_is_that_of_pyros_elbo_per_task() -> None:
    both = frozen(pair())
    fit = ph.meta_train(*both, TASKS, seed=3, **{**SHORT, "num_steps": 1})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3 * 1_000_003 + 1)
        expected = ph.SVI(*both, torch.optim.SGD(both[0].parameters(), 0.0)).evaluate_loss(
            next(TASKS.batches(8, 3))
        )
    assert fit.loss == [pytest.approx(expected / 8, rel=1e-6)]


def test_several_particles_are_averaged_in_the_record_too() -> None:
    both = frozen(pair())
    options = {**SHORT, "num_steps": 3}
    one, many = (
        ph.meta_train(*both, TASKS, loss=TraceMeanField_ELBO(num_particles=n), **options)
        for n in (1, 5)
    )
    assert many.kl == [
        pytest.approx(value, rel=1e-3) for value in one.kl
    ]  # in closed form: no noise
    assert many.log_likelihood != one.log_likelihood


def test_the_encoders_are_standardized_with_the_training_tasks() -> None:
    model, guide = pair()
    ph.meta_train(model, guide, TASKS, **SHORT)
    for part in (model.prior.network.encoder, guide.network.encoder):
        assert part.center.item() == pytest.approx(TASKS.values.mean().item(), rel=1e-4)
        assert part.scale.item() == pytest.approx(TASKS.values.std().item(), rel=1e-2)


def test_support_and_query_are_drawn_anew_at_every_step() -> None:
    class Listening(Line):
        supports: list[tuple[float, ...]] = []

        def forward(self, episode: ph.Episode) -> Tensor:
            if episode.support is not None:
                self.supports.append(
                    tuple(sorted(episode.support.values.flatten(2).sum(-1).flatten().tolist()))
                )
            return super().forward(episode)

    ph.meta_train(*pair(model=Listening), TASKS[:1], **{**SHORT, "num_steps": 30})
    assert 3 < len(set(Listening.supports)) <= 6  # two of four shots


def test_the_progress_bar_says_how_it_goes_and_can_be_silent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ph.meta_train(*pair(), TASKS, **SHORT)
    assert capsys.readouterr() == ("", "")
    ph.meta_train(*pair(), TASKS, **{**SHORT, "progress": True})
    out, err = capsys.readouterr()
    assert out == "" and all(
        word in err for word in ("meta-training", "6/6", "loss", "log p", "KL")
    )


def test_the_device_may_be_named() -> None:
    model, guide = pair()
    assert math.isfinite(ph.meta_train(model, guide, TASKS, device="cpu", **SHORT).loss[-1])


# ---- KL warm-up, curriculum, clipping, learning rate ---------------------------------------------


def test_the_weight_of_the_kl_rises_to_one_over_the_warm_up() -> None:
    both, options = frozen(pair()), {**SHORT, "num_steps": 8}
    full = ph.meta_train(*both, TASKS, **options)
    risen = ph.meta_train(*both, TASKS, warmup=0.5, **options)
    weights = [a / b for a, b in zip(risen.kl, full.kl, strict=True)]
    assert weights == [
        pytest.approx(w, rel=1e-3) for w in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0)
    ]
    assert risen.log_likelihood == full.log_likelihood


class Recorder(Line):
    """Notes the lengths of the trajectories that it is trained on."""

    def __init__(self, evidence: ph.GaussNewton | None) -> None:
        super().__init__(prior=ph.UnconditionalPrior(**SEPARATE))
        self.lengths: list[tuple[int, int]] = []

    def forward(self, episode: ph.Episode) -> Tensor:
        if episode.support is not None:
            self.lengths.append((episode.query.times.shape[-1] - 1, episode.query.shape[1]))
        return super().forward(episode)


def lengths(points: int, **options: Any) -> list[tuple[int, int]]:
    both = pair(ph.GaussNewton(1), Recorder)
    times = torch.linspace(0, 1, points)
    tasks = ph.Tasks.from_trajectories(times, torch.randn(6, 4, points, 1), num_support=2)
    ph.meta_train(*both, tasks, **{**SHORT, "num_steps": 8, **options})
    return both[0].lengths[
        :8
    ]  # after the last step, the program runs to see what its solver's steps cost


def test_a_curriculum_cuts_trajectories_as_it_says() -> None:
    # the ELBO runs the program once a step: (segment length, two query shots times segments)
    assert (
        lengths(7, curriculum={0.0: 2, 0.25: 3, 0.75: None})
        == [(2, 6)] * 2 + [(3, 4)] * 4 + [(6, 2)] * 2
    )


def test_by_default_segments_grow_from_a_seventh_to_the_whole_horizon() -> None:
    assert lengths(15, curriculum=None) == [(2, 14)] * 2 + [(4, 8)] * 2 + [(14, 2)] * 4


def test_short_trajectories_are_left_whole_by_default() -> None:
    assert set(lengths(14, curriculum=None)) == {(13, 2)}


def test_a_curriculum_must_say_how_to_begin() -> None:
    with pytest.raises(
        ValueError, match=r"a curriculum that says what to do from 0\.0 on; got \{0\.5: 3\}"
    ):
        lengths(7, curriculum={0.5: 3})


class Loud(Line):
    """A loss that can be made louder."""

    volume = 1.0

    def forward(self, episode: ph.Episode) -> Tensor:
        pyro.factor(
            "loud", -self.volume * self.noise_unconstrained * float(episode.support is not None)
        )
        return super().forward(episode)


def test_a_gradient_much_longer_than_the_others_is_shortened() -> None:
    model, guide = pair(model=Loud)
    lengths = []

    def note(step: int, fit: ph.Fit) -> None:
        parameters = {id(p): p for m in (model, guide) for p in m.parameters()}.values()
        lengths.append(math.sqrt(sum(float(p.grad.square().sum()) for p in parameters)))
        model.volume = 1e9 if step == 9 else 1.0

    ph.meta_train(
        model,
        guide,
        TASKS,
        **{**SHORT, "num_steps": 12, "learning_rate": 1e-4},
        clip=2.0,
        callback=note,
    )
    assert lengths[10] <= 2.0 * max(lengths[:10]) * 1.001 and lengths[10] > 0.0
    assert lengths[11] <= 2.0 * max(lengths[:11])  # one outlier doesn't move what is usual


def test_the_learning_rate_rises_and_then_follows_a_cosine_to_a_fiftieth() -> None:
    rates, both = [], pair()

    class Spy(TraceMeanField_ELBO):
        def differentiable_loss(self, *args: Any) -> Tensor:
            rates.append(svis[0].optimizer.param_groups[0]["lr"])
            return super().differentiable_loss(*args)

    svis: list[ph.SVI] = []
    original = ph.SVI.__init__

    def remember(self: ph.SVI, *args: Any) -> None:
        original(self, *args)
        svis.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ph.SVI, "__init__", remember)
        ph.meta_train(*both, TASKS, **{**SHORT, "num_steps": 40}, learning_rate=0.01, loss=Spy())
    assert rates[0] == pytest.approx(0.5 * rates[1], rel=0.02) and max(rates) == pytest.approx(
        0.01, rel=0.02
    )
    assert rates[-1] == pytest.approx(0.01 / 50, rel=0.15)
    assert rates[1:] == sorted(rates[1:], reverse=True)


# ---- some segments of each shot ------------------------------------------------------------------

EMPTY = torch.Size()
# Of six times: cut into segments of two steps, three of each of the two query shots.
SOME = {**SHORT, "curriculum": {0.0: 2}}


def looked_at(segments: int | None, **options: Any) -> list[tuple[int, ...]]:
    """Which segments the program saw, by the beginnings of their clocks."""
    seen = []

    class Watching(Line):
        def forward(self, episode: ph.Episode) -> Tensor:
            if episode.support is not None and torch.is_grad_enabled():
                starts = episode.query.times[..., :1].flatten() / float(TASKS.times[1])
                seen.append(tuple(starts.round().int().tolist()))
            return super().forward(episode)

    ph.meta_train(*pair(model=Watching), TASKS, **{**SOME, **options}, segments_per_shot=segments)
    return seen


@pytest.mark.parametrize(("segments", "number"), [(1, 2), (2, 4), (3, 6), (99, 6), (None, 6)])
def test_so_many_segments_of_each_shot_are_looked_at_drawn_anew_at_every_step(
    segments: int, number: int
) -> None:
    seen = looked_at(segments)
    assert [len(starts) for starts in seen] == [number] * SHORT["num_steps"]
    assert (len({*seen}) > 1) == (number < 6)  # all of them come in their order
    assert looked_at(segments) == seen


def test_whole_trajectories_are_all_looked_at() -> None:
    assert {len(starts) for starts in looked_at(1, curriculum={0.0: None})} == {
        1
    }  # one clock for all
    some = [len(starts) for starts in looked_at(1, curriculum={0.0: 1, 0.5: None}, num_steps=4)]
    assert some == [2, 2, 1, 1]


@pytest.mark.parametrize("segments", [3, 99])
def test_as_many_segments_as_there_are_change_nothing(segments: int) -> None:
    some, everything = pair(), pair()
    fits = [
        ph.meta_train(*some, TASKS, segments_per_shot=segments, **SOME),
        ph.meta_train(*everything, TASKS, **SOME),
    ]
    assert fits[0].loss == fits[1].loss and same(state(*some), state(*everything))


@pytest.mark.parametrize("inferred", [False, True], ids=["starts known", "starts inferred"])
def test_over_all_choices_of_segments_loss_and_gradient_are_those_of_all_of_them(
    inferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, guide = pair(inferred=inferred)
    svi = ph.SVI(model, guide, pyro.optim.SGD({"lr": 0.0}))
    segments = TASKS.episode().map_shots(lambda shots: to_segments(shots, 2))

    def looked_at(by_segment: Tensor, episode: ph.Episode, share: float) -> Tensor:
        """Loss, log-likelihood and gradients; the latents are the same whatever segments are chosen."""
        torch.manual_seed(0)
        if inferred:
            monkeypatch.setattr(
                dist.Normal, "rsample", lambda fn, shape=EMPTY: drawn(fn, shape, by_segment)
            )
        with ElboTerms(1.0, 1.0 / share, episode.query.shape[1]) as terms:
            loss = svi.backward(episode)
        gradients = [
            model.noise_unconstrained.grad,
            *(p.grad.flatten() for p in guide.network.head.parameters()),
        ]
        return torch.cat(
            [
                torch.stack([loss, torch.tensor(terms.log_likelihood)]),
                *(g.view(-1) for g in gradients),
            ]
        )

    plain, noise = dist.Normal.rsample, torch.randn(20, segments.query.shape[1], 1)

    def drawn(fn: Any, shape: torch.Size, by_segment: Tensor) -> Tensor:
        return fn.loc + fn.scale * noise[:, by_segment] if fn.loc.dim() == 3 else plain(fn, shape)

    full = looked_at(torch.arange(6), segments, 1.0)
    choices, total = [*itertools.combinations(range(6), 2)], torch.zeros_like(full)
    for choice in choices:
        monkeypatch.setattr(torch, "randperm", lambda n, choice=choice: torch.tensor(choice))
        episode, share = sampled_segments(segments, 1)
        assert share == pytest.approx(1 / 3) and episode.query.shape == (20, 2)
        total += looked_at(torch.tensor(choice), episode, share) / len(choices)
    torch.testing.assert_close(total, full, rtol=1e-4, atol=1e-4 * float(full[2:].abs().max()))


class Weighed(Line):
    """Each task has been weighed, besides."""

    def forward(self, episode: ph.Episode) -> Tensor:
        zero = torch.zeros(episode.query.shape[0])
        with pyro.plate("scales", len(zero), dim=-1):
            pyro.sample("weight", dist.Normal(zero, 1.0), obs=zero)
        return super().forward(episode)


SCALES = {"x": 4.0, "start": 2.0, "slope": 0.5, "bend": 0.5, "weight": 1.0}


@pytest.mark.parametrize(("site", "scale"), SCALES.items())
def test_what_belongs_to_shots_is_scaled_up_and_what_belongs_to_tasks_is_not(
    site: str, scale: float
) -> None:
    model, _ = pair(model=Weighed, inferred=True)
    with ElboTerms(
        0.5, 4.0, TASKS.episode().query.shape[1]
    ):  # a KL of half the weight, a quarter of the segments
        trace = pyro.poutine.trace(model).get_trace(TASKS.episode())
    assert trace.nodes[site]["scale"] == scale


@pytest.mark.parametrize(
    ("segments", "evidence", "words"),
    [
        (
            0,
            None,
            "segments_per_shot to be an integer of 1 or more; got 0. Pass segments_per_shot=1",
        ),
        (
            2,
            ph.GaussNewton(1),
            "a guide that reads by its encoder.*got AmortizedGuide with computed",
        ),
    ],
)
def test_segments_of_nothing_or_with_computed_evidence_are_refused(
    segments: int, evidence: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        ph.meta_train(*pair(evidence), TASKS, segments_per_shot=segments, **SOME)


# ---- one belief a step ---------------------------------------------------------------------------


@READINGS
@pytest.mark.parametrize("particles", [1, 3])
def test_the_belief_given_the_support_is_computed_once_a_step(
    evidence: ph.GaussNewton | None, particles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, computed, plain = pair(evidence), [], ph.SupportPrior.belief
    loss = TraceMeanField_ELBO(num_particles=particles)
    svi, episode = ph.SVI(*both, pyro.optim.SGD({"lr": 1e-4}), loss), TASKS.episode()

    def belief(self: ph.SupportPrior, *args: Any, **kwargs: Any) -> Any:
        if args[0] is not None:  # the population costs nothing
            computed.append(args[0])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(ph.SupportPrior, "belief", belief)
    for call in (svi.step, svi.step, svi.evaluate_loss):
        computed.clear()
        call(episode)
        assert computed == [episode.support]


@READINGS
def test_a_belief_that_the_episode_brings_changes_no_loss_and_no_gradient(
    evidence: ph.GaussNewton | None,
) -> None:
    results, episode = [], TASKS.episode()
    for is_given in (False, True):
        model, guide = pair(evidence)
        svi = ph.SVI(model, guide, pyro.optim.SGD({"lr": 0.0}))
        given = model.with_belief(episode) if is_given else episode
        torch.manual_seed(1)
        results.append([svi.backward(given), *(p.grad for p in svi.parameters())])
    torch.testing.assert_close(*results, rtol=0.0, atol=0.0)


# ---- failures ------------------------------------------------------------------------------------


class Fragile(Line):
    """Fails on demand, as a neural term that blows up does."""

    failure: str | None = None

    def forward(self, episode: ph.Episode) -> Tensor:
        if self.failure == "solver" and episode.support is not None:
            raise ph.SolverError("the state stopped being finite", (1, 2), 0.7, 13)
        if self.failure == "nan":
            pyro.factor("nan", math.nan * self.noise_unconstrained)
        if self.failure == "gradient":
            pyro.factor(
                "gradient",
                (self.noise_unconstrained - self.noise_unconstrained.detach()).abs().sqrt(),
            )
        if self.failure == "noise":
            pyro.sample(
                "y",
                dist.Normal(torch.zeros(8), math.nan * self.noise).to_event(1),
                obs=torch.zeros(8),
            )
        if self.failure == "mistake":
            raise ValueError("the program is wrong")
        if self.failure == "plate":
            pyro.sample("y", dist.Normal(torch.zeros(8), self.noise), obs=torch.zeros(8))
        return super().forward(episode)


class Allergic(Line):
    """Its density is NaN for tasks whose trajectories are far from zero."""

    def forward(self, episode: ph.Episode) -> Tensor:
        far = (episode.query.whole or episode.query).values.abs().amax((1, 2, 3)) > 1e3
        with pyro.plate("again", episode.query.shape[0], dim=-1):
            pyro.factor("allergy", torch.where(far, torch.nan, 0.0) * self.noise)
        return super().forward(episode)


@quiet
@pytest.mark.parametrize("failure", ["nan", "solver", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(failure: str) -> None:
    model, guide = pair(model=Fragile)
    states = []

    def fail_at_two_and_three(step: int, fit: ph.Fit) -> None:
        states.append(state(model, guide))
        model.failure = failure if step in (1, 2) else None

    fit = ph.meta_train(model, guide, TASKS, callback=fail_at_two_and_three, **SHORT)
    assert fit.skipped == 2 and [math.isnan(value) for value in fit.loss] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert same(states[1], states[2]) and same(
        states[2], states[3]
    )  # parameters stand still meanwhile
    assert not same(states[3], states[4])
    assert all(torch.isfinite(value).all() for value in states[-1])


@quiet
@pytest.mark.parametrize(
    ("failure", "cause"),
    [
        ("nan", "the last loss was nan"),
        ("solver", r"the state stopped being finite in task \d+ at t = 0\.7 after 13 steps"),
    ],
)
def test_a_run_of_failures_restores_the_last_good_state_and_names_the_cause(
    failure: str, cause: str
) -> None:
    model, guide = pair(model=Fragile)
    good = []

    def break_down(step: int, fit: ph.Fit) -> None:
        if step == 1:
            model.failure = failure

    with pytest.raises(
        ph.TrainingError,
        match=f"5 steps in a row up to step 6 .*{cause}.*back at the last good state. Lower learning_rate",
    ):
        ph.meta_train(
            model, guide, TASKS, **{**SHORT, "num_steps": 20}, max_skips=5, callback=break_down
        )
    model.failure = None
    good = ph.SVI(model, guide, torch.optim.SGD(model.parameters(), 0.0)).evaluate_loss(
        TASKS.episode()
    )
    assert math.isfinite(good)


@quiet
@pytest.mark.long
def test_100_trainings_with_gradients_of_nan_at_random_steps_all_end_finite(figure: Note) -> None:
    for seed in range(100):
        dice, (model, guide) = random.Random(seed), pair(model=Fragile, seed=seed)
        ill = {step for step in range(8) if dice.random() < 0.4}

        def infect(step: int, fit: ph.Fit, model: Fragile = model, ill: set[int] = ill) -> None:
            model.failure = "gradient" if step + 1 in ill else None

        infect(-1, ph.Fit())
        fit = ph.meta_train(
            model, guide, TASKS, callback=infect, **{**SHORT, "num_steps": 8, "seed": seed}
        )
        assert fit.skipped == len(ill) == sum(map(math.isnan, fit.loss))
        assert all(torch.isfinite(value).all() for value in state(model, guide))
        figure("ill gradients", finite=1, skipped=fit.skipped)


class Explosive(Line):
    """x' = slope (x / 10)⁵, which blows up where it starts far from zero."""

    def forward(self, episode: ph.Episode) -> Tensor:
        p = self.prior(episode)
        with episode.plate:
            slope = pyro.sample("slope", p["slope"])
            pyro.sample("bend", p["bend"])

            def field(t: Tensor, state: tuple[Tensor]) -> tuple[Tensor]:
                return (slope.abs() * (0.1 * state[0]) ** 5,)

            shots = episode.query
            states = ph.solve(field, shots.initial.unbind(-1), shots.times)
            return pyro.sample(
                "x",
                dist.Normal(states, self.noise).mask(shots.scored).to_event(3),
                obs=shots.values,
            )


@quiet
@pytest.mark.parametrize("model", [Explosive, Allergic])
def test_a_task_that_fails_is_left_out_of_the_step_counted_and_named(
    model: type[Line], caplog: pytest.LogCaptureFixture
) -> None:
    values = TASKS.values.clone()
    values[[3, 11]] += 1e4
    both = pair(model=model)
    fit = ph.meta_train(
        *both,
        ph.Tasks.from_trajectories(TASKS.times, values, num_support=2),
        **{**SHORT, "num_steps": 10, "batch_size": 10},
    )
    assert fit.skipped == 0 and fit.skipped_tasks == {3: 5, 11: 5}
    assert (
        "Nothing was learned from 2 of 20 tasks, which failed whenever they were drawn: 3, 11. The last"
        in caplog.text
    )
    assert "Look at one with tasks[3:4]" in caplog.text
    assert ("the state stopped being finite in task" in caplog.text) == (model is Explosive)
    assert all(torch.isfinite(value).all() for value in state(*both))


@quiet
def test_numbers_that_fail_the_checks_of_the_first_step_are_skipped_too() -> None:
    model, guide = pair(model=Fragile)
    model.failure = "noise"

    def recover(step: int, fit: ph.Fit) -> None:
        model.failure = None

    fit = ph.meta_train(model, guide, TASKS, callback=recover, **SHORT)
    assert fit.skipped == 1 and [math.isnan(value) for value in fit.loss] == [True, *[False] * 5]
    model.failure = "noise"
    with pytest.raises(
        ph.TrainingError, match="up to step 1 .* Expected parameter scale .* invalid values: The"
    ):
        ph.meta_train(model, guide, TASKS, max_skips=2, **SHORT)


@pytest.mark.parametrize("failure", ["mistake", "plate"])
def test_mistakes_in_the_program_are_reported_in_their_own_words(failure: str) -> None:
    model, guide = pair(model=Fragile)
    model.failure = failure
    with pytest.raises(
        ValueError,
        match="the program is wrong" if failure == "mistake" else "invalid log_prob shape",
    ):
        ph.meta_train(model, guide, TASKS, **SHORT)


@quiet
def test_whichever_way_it_ends_the_model_is_left_ready_to_predict() -> None:
    model, guide = pair(model=Fragile)
    ph.meta_train(model, guide, TASKS, **SHORT)
    assert not model.training
    model.failure = "solver"
    with pytest.raises(ph.TrainingError):
        ph.meta_train(model, guide, TASKS, max_skips=2, **SHORT)
    assert not model.training


@quiet
def test_what_is_restored_is_a_state_whose_loss_was_finite() -> None:
    model, guide = pair()
    with pytest.raises(ph.TrainingError, match="in a row"):
        ph.meta_train(
            model, guide, TASKS, **{**SHORT, "num_steps": 100}, learning_rate=1e25, max_skips=5
        )
    loss = ph.SVI(model, guide, torch.optim.SGD(model.parameters(), 0.0)).evaluate_loss(
        TASKS.episode()
    )
    assert math.isfinite(loss)
    assert all(torch.isfinite(value).all() for value in state(model, guide))


@quiet
def test_failures_that_are_not_in_a_row_do_not_end_the_training() -> None:
    model, guide = pair(model=Fragile)

    def every_other(step: int, fit: ph.Fit) -> None:
        model.failure = None if step % 2 else "nan"

    fit = ph.meta_train(
        model, guide, TASKS, **{**SHORT, "num_steps": 10}, max_skips=2, callback=every_other
    )
    assert fit.skipped == 5


# ---- held-out tasks ------------------------------------------------------------------------------


def test_the_held_out_elbo_is_looked_at_now_and_then_and_at_the_end() -> None:
    train, held_out = TASKS.split(6)
    fit = ph.meta_train(
        *pair(), train, held_out=held_out, eval_every=3, **{**SHORT, "num_steps": 8}
    )
    assert [step for step, _ in fit.held_out] == [2, 5, 7] and all(
        math.isfinite(value) for _, value in fit.held_out
    )


def test_looking_at_held_out_tasks_does_not_change_the_training() -> None:
    train, held_out = TASKS.split(6)
    first, second = pair(), pair()
    ph.meta_train(*first, train, held_out=held_out, eval_every=2, **SHORT)
    ph.meta_train(*second, train, **SHORT)
    assert same(state(*first), state(*second))


def test_early_stopping_goes_back_to_the_best_look() -> None:
    train, held_out = TASKS.split(6)
    model, guide = pair()
    history: list[list[Tensor]] = []

    def spoil(step: int, fit: ph.Fit) -> None:
        if step >= 12:
            with torch.no_grad():
                model.noise_unconstrained.sub_(0.5)
        history.append(state(model, guide))

    fit = ph.meta_train(
        model,
        guide,
        train,
        held_out=held_out,
        eval_every=2,
        patience=3,
        callback=spoil,
        **{**SHORT, "num_steps": 60},
    )
    best = min(fit.held_out, key=lambda look: look[1])[0]
    assert fit.stopped_early and len(fit.loss) == fit.held_out[-1][0] + 1 < 60
    assert best == fit.held_out[-4][0] < 13
    assert same(state(model, guide), history[best]) and not same(state(model, guide), history[-1])


def test_without_a_reason_to_stop_it_goes_on_and_still_ends_at_the_best() -> None:
    train, held_out = TASKS.split(6)
    both = pair()
    fit = ph.meta_train(*both, train, held_out=held_out, eval_every=2, patience=50, **SHORT)
    assert not fit.stopped_early and len(fit.loss) == 6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        svi = ph.SVI(*both, torch.optim.SGD(both[0].parameters(), 0.0))
        assert svi.evaluate_loss(held_out.episode()) / 6 == pytest.approx(
            min(value for _, value in fit.held_out), rel=1e-6
        )


def test_held_out_tasks_that_diverge_count_as_bad_and_training_goes_on() -> None:
    class Diverging(Line):
        def forward(self, episode: ph.Episode) -> Tensor:
            if not torch.is_grad_enabled() and episode.support is not None:
                raise ph.SolverError("the state stopped being finite", (0, 0), 0.1, 1)
            return super().forward(episode)

    train, held_out = TASKS.split(6)
    fit = ph.meta_train(*pair(model=Diverging), train, held_out=held_out, eval_every=2, **SHORT)
    assert [value for _, value in fit.held_out] == [math.inf] * 3 and fit.skipped == 0


# ---- ph.SVI --------------------------------------------------------------------------------------


def sgd(both: tuple[nn.Module, nn.Module], rate: float = 1e-4) -> torch.optim.SGD:
    return torch.optim.SGD({id(p): p for m in both for p in m.parameters()}.values(), rate)


@pytest.mark.parametrize("optim", [sgd, lambda both: pyro.optim.SGD({"lr": 1e-4})])
def test_svi_is_a_pyro_svi_with_all_that_pyro_sets_up(optim: Any) -> None:
    both, episode = pair(), TASKS.episode()
    svi = ph.SVI(*both, optim(both))
    assert isinstance(svi, StockSVI) and isinstance(svi.optim, pyro.optim.PyroOptim)
    assert (svi.num_steps, svi.num_samples, svi.exec_traces) == (0, 0, [])
    torch.manual_seed(1)
    loss = svi.loss(*both, episode)
    torch.manual_seed(1)
    assert torch.equal(loss, svi.loss_and_grads(*both, episode))
    torch.manual_seed(1)
    assert svi.evaluate_loss(episode) == float(loss.detach())
    torch.manual_seed(1)
    assert svi.step(episode) == float(loss.detach())


class Noting(Line):
    """A program that notes which of its runs are steps of a training, those for computed evidence apart."""

    def __init__(self, evidence: ph.GaussNewton | None = None) -> None:
        super().__init__(evidence)
        self.runs: list[bool] = []
        self.runs_for_evidence: list[bool] = []

    def forward(self, episode: ph.Episode) -> Tensor:
        runs = self.runs_for_evidence if episode.support is None else self.runs
        runs.append(episode.is_training)
        return super().forward(episode)


@READINGS
def test_gradient_steps_are_steps_of_a_training_and_looks_are_not(
    evidence: ph.GaussNewton | None,
) -> None:
    both, episode = pair(evidence, Noting), TASKS.episode()
    model, training = both[0], replace(episode, is_training=True)
    svi = ph.SVI(*both, sgd(both))
    for given in (episode, training):
        svi.step(given), svi.backward(given), svi.loss_and_grads(*both, given)
    assert model.runs == [True] * 6
    model.runs.clear()
    for given in (episode, training):
        svi.evaluate_loss(given), svi.loss(*both, given)
    ph.draws(*both, episode, 2), ph.predict(model, training, 2)
    assert not any(model.runs) and len(model.runs) >= 5
    assert not any(model.runs_for_evidence)


def test_a_model_in_eval_mode_is_trained_without_penalties_unless_they_are_asked_for() -> None:
    both, episode = pair(model=Noting), TASKS.episode()
    svi = ph.SVI(*both, sgd(both))
    both[0].eval()
    svi.step(episode)
    svi.step(replace(episode, is_training=True))
    assert both[0].runs == [False, True]


def test_a_loss_by_hand_is_of_a_training_if_its_episode_says_so() -> None:
    both, episode = pair(model=Noting), TASKS.episode()
    svi = ph.SVI(*both, sgd(both))
    svi.differentiable_loss(*both, episode)
    svi.differentiable_loss(*both, replace(episode, is_training=True))
    assert both[0].runs == [False, True]


def test_every_step_of_meta_train_is_of_a_training_and_no_look_at_held_out_tasks_is() -> None:
    both = pair(model=Noting)
    train, held_out = TASKS.split(6)
    ph.meta_train(*both, train, held_out=held_out, eval_every=3, **SHORT)
    steps = [True] * 3 + [False]
    assert both[0].runs[:8] == steps * 2
    assert not any(both[0].runs[8:])  # the measurement of the solver's step


def test_loss_and_grads_adds_gradients_up_and_a_step_begins_without_any() -> None:
    both, episode = pair(), TASKS.episode()
    svi = ph.SVI(*both, sgd(both))
    gradients = []
    for call in (
        lambda: svi.loss_and_grads(*both, episode),
        lambda: svi.loss_and_grads(*both, episode),
        lambda: svi.step(episode),
    ):
        torch.manual_seed(1)
        call()
        gradients.append(both[1].network.head[1].weight.grad.clone())
    assert torch.equal(2.0 * gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


@pytest.mark.filterwarnings("ignore:The .* is deprecated:FutureWarning")
def test_run_takes_its_steps_and_draws_its_traces() -> None:
    (plain, drawn), episode = (pair(), pair()), TASKS.episode()
    for both, samples in ((plain, 0), (drawn, 4)):
        torch.manual_seed(1)
        svi = ph.SVI(*both, sgd(both), num_steps=3, num_samples=samples)
        assert svi.run(episode) is svi and len(svi.exec_traces) == samples
    assert svi.exec_traces[0].nodes["slope"]["value"].shape == (20, 1)
    stepwise = pair()
    by_hand = ph.SVI(*stepwise, sgd(stepwise))
    torch.manual_seed(1)
    for _ in range(3):
        by_hand.step(episode)
    assert same(state(*plain), state(*stepwise)) and same(state(*drawn), state(*stepwise))


def test_the_steps_are_those_of_a_stock_svi_whose_parameters_are_global() -> None:
    """One task, in plain Pyro: the same losses from the same random numbers."""

    def program(data: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.5))
        z = pyro.sample("z", dist.Normal(slope, 1.0))
        pyro.sample("x", dist.Normal(z, 0.3).expand([3]).to_event(1), obs=data)

    def reader(data: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("mean", torch.tensor(0.2)), 0.5))

    class Program(ph.HybridModel):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.5))

        def forward(self, data: Tensor) -> None:
            z = pyro.sample("z", dist.Normal(self.slope, 1.0))
            pyro.sample("x", dist.Normal(z, 0.3).expand([3]).to_event(1), obs=data)

    class Reader(ph.HybridModel):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.tensor(0.2))

        def forward(self, data: Tensor) -> None:
            pyro.sample("z", dist.Normal(self.mean, 0.5))

    losses, data = [], torch.tensor([1.0, 1.2, 0.9])
    with pyro.get_param_store().scope():
        for kind, model, guide in (
            (StockSVI, program, reader),
            (ph.SVI, Program(), Reader()),
        ):
            svi = kind(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=Trace_ELBO())
            torch.manual_seed(1)
            losses.append([svi.step(data) for _ in range(5)])
    assert losses[0] == [pytest.approx(value, rel=1e-6) for value in losses[1]]


class Penalized(ph.SVI):
    """An SVI with a second loss, which looks at the episode once before the ELBO."""

    def differentiable_loss(
        self, model: nn.Module, guide: nn.Module, *args: Any, **kwargs: Any
    ) -> Tensor:
        elbo = super().differentiable_loss(model, guide, *args, **kwargs)
        return elbo + model.noise_unconstrained.square()


def test_a_second_loss_is_added_in_one_place() -> None:
    both, other, episode = pair(), pair(), TASKS.episode()
    plain, penalized = ph.SVI(*both, sgd(both)), Penalized(*other, sgd(other))
    extra = math.log(0.3) ** 2
    for call in ("evaluate_loss", "step"):
        torch.manual_seed(1)
        expected = getattr(plain, call)(episode) + extra
        torch.manual_seed(1)
        assert getattr(penalized, call)(episode) == pytest.approx(expected, rel=1e-6)
    grown = other[0].noise_unconstrained.grad - both[0].noise_unconstrained.grad
    assert float(grown) == pytest.approx(2.0 * math.log(0.3), rel=1e-3)


def test_a_function_may_be_the_loss() -> None:
    both, episode = pair(), TASKS.episode()

    def loss(model: nn.Module, guide: nn.Module, episode: ph.Episode) -> Tensor:
        return 2.0 * Trace_ELBO().differentiable_loss(model, guide, episode)

    torch.manual_seed(1)
    twice = ph.SVI(*both, sgd(both), loss).evaluate_loss(episode)
    torch.manual_seed(1)
    once = ph.SVI(*both, sgd(both), Trace_ELBO()).evaluate_loss(episode)
    assert twice == pytest.approx(2.0 * once)


@pytest.fixture
def types_unchecked() -> Iterator[None]:
    """Wrong types as users pass them, without the checks that pytest adds."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (Trace_ELBO, "the class Trace_ELBO"),
        (RenyiELBO(0.5), "RenyiELBO"),
        ("elbo", "str"),
    ],
)
def test_a_loss_without_gradients_of_its_own_is_refused(loss: Any, got: str) -> None:
    both = pair()
    with pytest.raises(
        TypeError,
        match=f"a Pyro ELBO with a differentiable loss, or a function; got {got}. Pass an instance",
    ):
        ph.SVI(*both, sgd(both), loss)


@pytest.mark.usefixtures("types_unchecked")
def test_an_optimizer_of_another_library_is_refused() -> None:
    with pytest.raises(TypeError, match="a torch or a pyro.optim optimizer; got float. Pass"):
        ph.SVI(*pair(), 0.1)


@READINGS
@pytest.mark.parametrize("optim", ["torch", "pyro"])
@pytest.mark.parametrize(
    "loss",
    [
        None,
        Trace_ELBO(),
        TraceMeanField_ELBO(),
        Trace_ELBO(num_particles=3, vectorize_particles=True),
        TraceMeanField_ELBO(num_particles=3, vectorize_particles=True),
    ],
    ids=["default", "trace", "mean-field", "trace-vectorised", "mean-field-vectorised"],
)
@pytest.mark.parametrize("inferred", [False, True])
def test_it_steps_with_pyros_losses_and_with_torchs_and_pyros_optimizers(
    evidence: ph.GaussNewton | None, optim: str, loss: Any, inferred: bool
) -> None:
    both = pair(evidence, inferred=inferred)
    parameters = {id(p): p for m in both for p in m.parameters()}.values()
    svi = ph.SVI(
        *both,
        torch.optim.Adam(parameters, 1e-2)
        if optim == "torch"
        else pyro.optim.ClippedAdam({"lr": 1e-2}),
        loss,
    )
    before, episode = state(*both), TASKS.episode()
    assert math.isfinite(svi.evaluate_loss(episode)) and same(state(*both), before)
    values = [parameter.detach().clone() for parameter in svi.parameters()]
    assert math.isfinite(svi.step(episode))  # every parameter learns, from the first step on
    pairs = zip(values, svi.parameters(), strict=True)
    assert not any(torch.equal(value, parameter) for value, parameter in pairs)


@READINGS
def test_more_particles_estimate_the_same_loss(evidence: ph.GaussNewton | None) -> None:
    both, episode = pair(evidence, inferred=True), TASKS.episode()
    optim = torch.optim.SGD(both[0].parameters(), 0.0)
    single = ph.SVI(*both, optim)
    losses = [single.evaluate_loss(episode) for _ in range(40)]
    many = ph.SVI(
        *both, optim, TraceMeanField_ELBO(num_particles=300, vectorize_particles=True)
    ).evaluate_loss(episode)
    spread = torch.tensor(losses).std().item() / math.sqrt(40)
    assert abs(many - sum(losses) / 40) < 4 * spread * 1.2


def test_a_gradient_of_vectorised_particles_trains_the_proposals_as_one_particle_does() -> None:
    gradients = []
    for particles in (1, 5):
        model, guide = pair(ph.GaussNewton(1))
        loss = TraceMeanField_ELBO(num_particles=particles, vectorize_particles=True)
        ph.SVI(model, guide, torch.optim.SGD(model.parameters(), 0.0), loss).backward(
            TASKS.episode()
        )
        gradients.append(model.prior.network.encoder.each[0].weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_parameters_that_do_not_want_gradients_stay_as_they_are() -> None:
    model, guide = pair()
    model.noise_unconstrained.requires_grad_(False)
    before = model.noise_unconstrained.clone()
    ph.SVI(model, guide, pyro.optim.Adam({"lr": 0.1})).step(TASKS.episode())
    ph.meta_train(model, guide, TASKS, **SHORT)
    assert torch.equal(model.noise_unconstrained, before)


def test_a_copy_of_a_trained_pair_trains_on_by_itself() -> None:
    both = pair()
    ph.meta_train(*both, TASKS, **SHORT)
    twin, before = copy.deepcopy(both), state(*both)
    ph.meta_train(*twin, TASKS, **SHORT)
    assert same(state(*both), before) and not same(state(*twin), before)


# ---- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"batch_size": 0}])
def test_no_steps_and_empty_batches_are_refused(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"expected {name} to be an integer of 1 or more; got 0"):
        ph.meta_train(*pair(), TASKS, **{**SHORT, **wrong})


def test_early_stopping_without_held_out_tasks_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="expected held_out tasks for early stopping; got none. Pass held_out=tasks",
    ):
        ph.meta_train(*pair(), TASKS, patience=3, **SHORT)


def test_segments_without_measured_states_to_start_from_are_refused() -> None:
    tasks = ph.Tasks.from_trajectories(
        TASKS.times, TASKS.values, num_support=2, initial=TASKS.values[:, :, 0]
    )
    with pytest.raises(
        ValueError, match=r"measured states at all times, where segments can start.*curriculum="
    ):
        ph.meta_train(*pair(), tasks, **{**SHORT, "curriculum": {0.0: 2}})


@pytest.mark.parametrize(
    "optim",
    [
        pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0}),
        pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
        ),
        pyro.optim.Adam(lambda name: {"lr": 0.1}),
    ],
    ids=["clipping", "schedule", "by-name"],
)
def test_what_a_pyro_optimizer_adds_to_torchs_is_refused_and_not_dropped_silently(
    optim: pyro.optim.PyroOptim,
) -> None:
    with pytest.raises(
        ValueError,
        match="a pyro.optim optimizer with a dictionary of options only.*Pass a torch optimizer",
    ):
        ph.SVI(*pair(), optim)
