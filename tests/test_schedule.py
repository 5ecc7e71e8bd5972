"""The schedule and the settings of a training: pure functions, checked arguments, descriptions by value."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import jaxtyping
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from test_training import SHORT, TASKS, pair, same, state
from torch import Tensor
from toys import Line

import pyro_hybrid as ph
from pyro_hybrid.training.json_values import from_json, parse_json, to_json
from pyro_hybrid.training.schedule import Schedule
from pyro_hybrid.training.settings import described


@pytest.fixture(autouse=True)
def types_unchecked() -> Iterator[None]:
    """Wrong types as users pass them, without the checks that pytest adds."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def schedule(**changes: Any) -> Schedule:
    plain = {
        "num_steps": 40,
        "learning_rate": 0.01,
        "curriculum": ((0.0, 2), (0.25, (3, 5)), (0.5, None)),
        "warmup": 0.5,
        "average_last": 0.25,
        "penalty_weights": {"projection": ph.Ramp(8.0, power=3), "nonlinearity": 0.3},
    }
    return Schedule(**{**plain, **changes})


# ---- values --------------------------------------------------------------------------------------


def test_a_ramp_is_a_power_of_the_progress() -> None:
    ramp = ph.Ramp(1000.0, power=2)
    assert [ramp(progress) for progress in (0.0, 0.5, 1.0)] == [0.0, 250.0, 1000.0]
    assert ph.Ramp(4.0)(0.25) == 1.0


def test_a_ramp_is_a_frozen_value() -> None:
    assert ph.Ramp(3.0, 2) == ph.Ramp(final=3.0, power=2) != ph.Ramp(3.0)
    with pytest.raises(FrozenInstanceError):
        ph.Ramp(3.0).final = 4.0
    assert ph.Ramp(**json.loads(json.dumps(to_json(ph.Ramp(3.0, 2))))) == ph.Ramp(3.0, 2)


def test_every_value_is_a_function_of_the_step_alone() -> None:
    forwards = [schedule().at(step) for step in range(40)]
    again = schedule()
    assert [again.at(step) for step in reversed(range(40))] == forwards[::-1]


def test_the_values_are_those_that_were_asked_for() -> None:
    values = [schedule().at(step) for step in range(40)]
    assert [value.length for value in values] == [2] * 10 + [(3, 5)] * 10 + [None] * 20
    assert [value.is_averaged for value in values] == [False] * 30 + [True] * 10
    assert [value.kl_weight for value in values[:2]] == [1 / 20, 2 / 20]
    assert {value.kl_weight for value in values[20:]} == {1.0} and values[19].kl_weight == 1.0
    assert values[20].penalty_weights == {"projection": 1.0, "nonlinearity": 0.3}
    assert values[0].penalty_weights["projection"] == 0.0
    assert max(value.learning_rate for value in values) == values[1].learning_rate


# ---- what is refused -----------------------------------------------------------------------------

NOT_COUNTS = (0, -1, 1.5, 2.0, True, "3", None, math.nan)
WRONG: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, f"expected {name} to be an integer of 1 or more; got {value!r}")
        for name in ("num_steps", "batch_size", "eval_every", "max_skips", "keep_last")
        for value in NOT_COUNTS
    ),
    *(
        ({name: value, "held_out": TASKS}, f"expected {name} to be an integer of 1 or more; got ")
        for name in ("segments_per_shot", "patience")
        for value in NOT_COUNTS
        if value is not None
    ),
    *(({"seed": seed}, "seed to be an integer of 64 bits; got") for seed in (1.5, None, 2**63)),
    *(
        ({"learning_rate": value}, r"learning_rate to be a number in \(0, inf\); got ")
        for value in (0.0, 0, -1e-3, math.nan, math.inf, "fast", True, None)
    ),
    *(
        ({"warmup": value}, r"warmup to be a number in \[0, 1\]; got ")
        for value in (-0.1, 1.1, math.nan, "half")
    ),
    *(
        ({"average_last": value}, r"average_last to be a number in \[0, 1\); got ")
        for value in (-0.1, 1.0, 1.5, math.nan)
    ),
    *(
        ({"clip": value}, r"clip to be a number in \(0, inf\]; got ")
        for value in (0.0, -4.0, math.nan, None)
    ),
    *(
        ({"curriculum": {0.0: length}}, "a length from 0.0 on, which is an integer of 1 or more, N")
        for length in (0, -2, 1.5, True, "2", math.nan, (2,), (2, 3, 4), (0, 3), (2, 0), (2, None))
    ),
    *(
        (
            {"curriculum": {0.0: 2, at: 3}},
            r"a fraction of the curriculum to be a number in \[0, 1\)",
        )
        for at in (-0.5, 1.0, 7, math.nan, "half")
    ),
    ({"curriculum": {0.5: 2}}, "a curriculum that says what to do from 0.0 on; got"),
    ({"curriculum": {}}, "a curriculum that says what to do from 0.0 on; got"),
]


@pytest.mark.parametrize(("options", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_a_setting_that_makes_no_sense_is_refused_by_name_and_changes_nothing(
    options: dict[str, Any], words: str
) -> None:
    both = pair()
    before = state(*both)
    with pytest.raises(ValueError, match=words):
        ph.meta_train(*both, TASKS, **{**SHORT, **options})
    assert same(state(*both), before)


def test_a_curriculum_is_a_dictionary() -> None:
    with pytest.raises(
        TypeError, match=r"a curriculum, \{fraction of the steps: length\}; got \[2"
    ):
        ph.meta_train(*pair(), TASKS, **{**SHORT, "curriculum": [2, 3]})


@pytest.mark.parametrize(
    ("final", "power"),
    [(-1.0, 1.0), (math.inf, 1.0), (math.nan, 1.0), ("a", 1.0), (1.0, 0.0), (1.0, -1), (1.0, None)],
)
def test_a_ramp_that_makes_no_sense_is_refused(final: Any, power: Any) -> None:
    with pytest.raises(ValueError, match="to be a number in .*0, inf.; got .* For example Ramp"):
        ph.Ramp(final, power)


@pytest.mark.parametrize("clip", [1e-6, math.inf])
def test_settings_at_their_limits_train(clip: float) -> None:
    fit = ph.meta_train(
        *pair(), TASKS, clip=clip, warmup=1.0, average_last=0.999, **{**SHORT, "seed": -3}
    )
    assert fit.skipped == 0 and all(map(math.isfinite, fit.loss))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients_is_refused(mode: Any) -> None:
    both = pair()
    with mode(), pytest.raises(RuntimeError, match="gradients to train with; got a call inside"):
        ph.meta_train(*both, TASKS, **SHORT)


# ---- penalty weights -----------------------------------------------------------------------------


class Penalized(Line):
    """A program with two penalties, which notes their weights at every step."""

    def __init__(self, evidence: ph.GaussNewton | None = None) -> None:
        super().__init__(evidence)
        self.penalty_weights = {"size": 0.5, "bend": 0.0}
        self.seen: list[dict[str, float]] = []

    def forward(self, episode: ph.Episode) -> Tensor:
        if episode.is_training:
            self.seen.append(dict(self.penalty_weights))
            pyro.factor("size", -self.penalty_weights["size"] * self.noise_unconstrained.square())
        return super().forward(episode)


@dataclass(frozen=True)
class Late:
    """A schedule of a user's own: nothing, then all of a weight."""

    final: float

    def __call__(self, progress: float) -> float:
        return self.final if progress >= 0.5 else 0.0


def test_penalty_weights_follow_their_schedule_and_return_to_what_they_were() -> None:
    model, guide = pair(model=Penalized)
    weights = {"bend": ph.Ramp(36.0, power=2)}
    ph.meta_train(model, guide, TASKS, penalty_weights=weights, **SHORT)
    assert [seen["bend"] for seen in model.seen] == [36.0 * (step / 6) ** 2 for step in range(6)]
    assert {seen["size"] for seen in model.seen} == {0.5}
    assert model.penalty_weights == {"size": 0.5, "bend": 0.0}


def test_numbers_are_constants_and_any_frozen_function_is_a_schedule() -> None:
    model, guide = pair(model=Penalized)
    ph.meta_train(model, guide, TASKS, penalty_weights={"size": 2, "bend": Late(3.0)}, **SHORT)
    assert [(seen["size"], seen["bend"]) for seen in model.seen] == [(2.0, 0.0)] * 3 + [
        (2.0, 3.0)
    ] * 3


def test_without_penalty_weights_the_models_own_hold() -> None:
    model, guide = pair(model=Penalized)
    ph.meta_train(model, guide, TASKS, **SHORT)
    assert model.seen == [{"size": 0.5, "bend": 0.0}] * 6


def test_penalty_weights_return_after_an_error_too() -> None:
    model, guide = pair(model=Penalized)

    def stop(step: int, fit: ph.Fit) -> None:
        if step == 3:
            raise KeyError

    with pytest.raises(KeyError):
        ph.meta_train(model, guide, TASKS, penalty_weights={"bend": 7.0}, callback=stop, **SHORT)
    assert model.seen[-1]["bend"] == 7.0 and model.penalty_weights == {"size": 0.5, "bend": 0.0}


def test_a_penalty_enters_the_loss() -> None:
    fits = []
    for weight in (0.0, 4.0):
        model, guide = pair(model=Penalized)
        options = {**SHORT, "num_steps": 1}
        fits.append(ph.meta_train(model, guide, TASKS, penalty_weights={"size": weight}, **options))
    assert 8 * (fits[1].loss[0] - fits[0].loss[0]) == pytest.approx(
        4.0 * math.log(0.3) ** 2, rel=1e-3
    )


@pytest.mark.parametrize(
    ("model", "weights", "error", "words"),
    [
        (Penalized, {"sise": 1.0}, ValueError, "the model has, size, bend; got 'sise'. Add 'sise'"),
        (Line, {"size": 1.0}, ValueError, "the model has, of which there are none; got 'size'"),
        (Penalized, {"size": -1.0}, ValueError, r"the penalty weight 'size' to be a number in \[0"),
        (Penalized, {"size": math.nan}, ValueError, "the penalty weight 'size' to be a number in"),
        (Penalized, {"size": "large"}, ValueError, "the penalty weight 'size' .* or ph.Ramp"),
        (Penalized, {"size": lambda progress: 1.0}, ValueError, "the penalty weight 'size' .*Ramp"),
    ],
)
def test_penalty_weights_that_make_no_sense_are_refused(
    model: type[Line], weights: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ph.meta_train(*pair(model=model), TASKS, penalty_weights=weights, **SHORT)


def test_penalty_weights_of_a_model_are_a_dictionary() -> None:
    model, guide = pair()
    model.penalty_weights = 3.0
    with pytest.raises(
        TypeError, match="whose penalty_weights is a dictionary, .*; got float. Set"
    ):
        ph.meta_train(model, guide, TASKS, **SHORT)


# ---- descriptions by value -----------------------------------------------------------------------


def test_losses_are_described_by_class_and_configuration() -> None:
    assert described(Trace_ELBO()) == described(Trace_ELBO(num_particles=1))
    assert described(Trace_ELBO(max_plate_nesting=1)) == described(Trace_ELBO())  # which it guesses
    different = [
        Trace_ELBO(),
        TraceMeanField_ELBO(),
        Trace_ELBO(num_particles=2),
        Trace_ELBO(num_particles=2, vectorize_particles=True),
    ]
    descriptions = [json.dumps(described(loss), allow_nan=False) for loss in different]
    assert len(set(descriptions)) == 4 and not any("0x" in text for text in descriptions)


def test_other_values_are_described_without_addresses() -> None:
    class Plain:
        def __init__(self) -> None:
            self.number, self.inner, self._hidden = 3, object(), 4

    values = [
        ph.GaussNewton(2, segments=(2, 7)),
        Plain(),
        described,
        Line,
        Line(),
        torch.ones(2),
        Late(1.0),
    ]
    text = json.dumps(described(values), allow_nan=False)
    assert text == json.dumps(described([*values[:1], Plain(), *values[2:]])) and "0x" not in text
    assert described(Plain()) == {"class": Plain.__qualname__, "number": 3}
    assert described(Late(math.inf)) == {"class": "Late", "final": "inf"}


# ---- JSON ----------------------------------------------------------------------------------------


def test_a_record_comes_back_from_json_as_it_was() -> None:
    fit = ph.Fit([0.1, math.inf], [1 / 3, -math.inf], [1e-300, 2.0], [(3, 0.5)], 1, {7: 2})
    again = from_json(ph.Fit, parse_json(json.dumps(to_json(fit), allow_nan=False).encode()), "fit")
    assert again == fit and type(again.held_out[0]) is tuple
    (value,) = from_json(ph.Fit, to_json(ph.Fit([math.nan])), "fit").loss
    assert math.isnan(value)


@pytest.mark.parametrize("text", [b"NaN", b"[Infinity]", b"1e999", b"[" * 10**6, b"{", b"\xff"])
def test_what_is_not_json_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("value", ["-1", "1.0", "٣", "9" * 30, ""])
def test_keys_are_whole_numbers(value: str) -> None:
    with pytest.raises(ValueError, match="skipped_tasks with whole numbers as keys; got"):
        from_json(ph.Fit, to_json(ph.Fit()) | {"skipped_tasks": {value: 1}}, "fit")
