"""HybridModel: parameters belong to the instance, and nothing global changes."""

from __future__ import annotations

import ast
import copy
import re
import threading
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
from pyro.infer import SVI as StockSVI
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from toys import POINTS, Line, in_float32, make_tasks

import pyro_hybrid as ph
from pyro_hybrid.programs.module import local_parameters, one_thread, owns_parameters


def episode(tasks: int = 3) -> ph.Episode:
    return in_float32(make_tasks(tasks, 4, num_support=2)).episode()


def guide_of(model: Line) -> ph.AmortizedGuide:
    return ph.AmortizedGuide(model, ph.SetEncoder(1, POINTS, 8, width=16))


def state(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for m in modules for p in m.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )


def train(model: nn.Module, guide: nn.Module, steps: int = 2) -> None:
    optim = torch.optim.Adam({*model.parameters(), *guide.parameters()}, 0.05)
    svi = ph.SVI(model, guide, optim)
    for _ in range(steps):
        svi.step(episode())


def surroundings() -> dict[str, Any]:
    """Everything global that a library could change by accident."""
    return {
        "pyro": dict(pyro.settings.get()),
        "param store": sorted(pyro.get_param_store().keys()),
        "handlers": len(pyro.poutine.runtime._PYRO_STACK),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "validation": torch.distributions.Distribution._validate_args,
        "numpy": np.random.get_state()[1].tolist(),
    }


def test_two_instances_share_no_parameter() -> None:
    first, second = Line(), Line()
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert not {p.data_ptr() for p in first.parameters()} & {
        p.data_ptr() for p in second.parameters()
    }


def test_training_one_instance_leaves_another_as_it_was() -> None:
    first, second = Line(), Line()
    (
        first(episode().simulation()),
        second(episode().simulation()),
    )  # a default Pyro store would tie them here
    before = state(second)
    train(first, guide_of(first))
    assert same(state(second), before) and not same(state(first), before)
    assert float(second.noise.detach()) != float(first.noise.detach())


def test_setting_a_parameter_of_one_instance_leaves_another_as_it_was() -> None:
    first, second = Line(), Line()
    first.noise = torch.tensor(7.0)
    first(episode().simulation())
    assert first.noise.item() == pytest.approx(7.0) and second.noise.item() == pytest.approx(0.3)
    assert isinstance(
        first.noise_unconstrained, nn.Parameter
    )  # still a parameter, with its constraint


def test_a_deepcopy_is_independent() -> None:
    model = Line(ph.GaussNewton())
    model(episode())
    twin = copy.deepcopy(model)
    assert same(state(twin), state(model)) and twin.prior is not model.prior
    before = state(model)
    train(twin, guide_of(twin))
    assert same(state(model), before) and not same(state(twin), before)


def test_a_deepcopy_of_model_and_guide_together_stays_a_pair() -> None:
    model = Line()
    guide = guide_of(model)
    twin, other = copy.deepcopy((model, guide))
    assert other.prior is twin.prior and twin.prior is not model.prior


def test_a_copy_through_a_state_dict_says_the_same() -> None:
    first, second = Line(), Line()
    assert not same(state(first), state(second))
    second.load_state_dict(first.state_dict())
    assert same(state(first), state(second))
    assert set(first.state_dict()) >= {"noise_unconstrained", "prior.raw"}


@pytest.mark.parametrize("evidence", [None, ph.GaussNewton(1)], ids=["learned", "computed"])
def test_constructing_calling_and_training_change_nothing_global(
    evidence: ph.GaussNewton | None,
) -> None:
    before = surroundings()
    model = Line(evidence)
    assert surroundings() == before
    model(episode().simulation())
    assert surroundings() == before
    train(model, guide_of(model))
    assert surroundings() == before
    state_of_torch = torch.get_rng_state()
    ph.meta_train(
        model,
        guide_of(model).requires_grad_(),
        in_float32(make_tasks(4, 4)),
        num_steps=2,
        batch_size=2,
        progress=False,
    )
    guide_of(model)
    assert surroundings() == before and state_of_torch.shape == torch.get_rng_state().shape


def test_an_error_inside_the_program_leaves_nothing_global_behind() -> None:
    class Broken(ph.HybridModel):
        def forward(self, episode: ph.Episode) -> None:
            raise RuntimeError("broken on purpose")

    before = surroundings()
    with pytest.raises(RuntimeError, match="on purpose"):
        Broken()(episode())
    assert surroundings() == before


class WithNet(ph.HybridModel):
    """x = net(1) + noise, with a latent that the guide's own net centres."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.noise = PyroParam(torch.tensor(1.0), constraints.positive)

    def forward(self, data: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Normal(self.net(torch.ones(1)) + z, self.noise), obs=data)


class GuideWithNet(ph.HybridModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def forward(self, data: Tensor) -> Tensor:
        return pyro.sample("z", dist.Normal(self.net(torch.ones(1)).squeeze(), 0.1))


def test_a_model_and_a_guide_that_both_have_a_net_both_train() -> None:
    model, guide = WithNet(), GuideWithNet()
    before_model, before_guide = state(model), state(guide)
    svi = ph.SVI(
        model,
        guide,
        torch.optim.Adam([*model.parameters(), *guide.parameters()], 0.1),
        Trace_ELBO(),
    )
    for _ in range(3):
        svi.step(torch.full((5,), 4.0))
    for before, module in ((before_model, model), (before_guide, guide)):
        assert all(not torch.equal(a, b) for a, b in zip(before, state(module), strict=True))
    assert not torch.equal(model.net.weight, guide.net.weight)


def test_a_pyro_module_inside_belongs_to_the_instance_too() -> None:
    class Nested(WithNet):
        def __init__(self) -> None:
            super().__init__()
            self.net = PyroModule[nn.Linear](1, 1)

    (first, second), data = (Nested(), Nested()), torch.ones(5)
    ph.SVI(first, GuideWithNet(), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(data)
    before = state(second)
    second(data)
    assert same(state(second), before) and not torch.equal(first.net.weight, second.net.weight)
    assert not list(pyro.get_param_store().keys())


def test_a_stock_svi_would_not_do_it() -> None:
    """The reason why ph.SVI exists; when Pyro mends it, this test says so."""
    with pyro.settings.context(module_local_params=True):
        model, guide = WithNet(), GuideWithNet()
    with (
        pyro.settings.context(module_local_params=True),
        pytest.raises(AttributeError, match="unconstrained"),
    ):
        StockSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(torch.ones(5))


def test_a_guide_that_shares_its_parameters_by_name_is_refused_with_what_to_do() -> None:
    model, optim = WithNet(), pyro.optim.Adam({"lr": 0.1})
    with pytest.raises(
        ValueError,
        match="expected a guide whose parameters belong to it; got AutoNormal.*Derive it from ph.Hybr",
    ):
        ph.SVI(model, AutoNormal(model), optim)


def test_an_autoguide_built_with_parameters_of_its_own_trains() -> None:
    model, data = WithNet(), torch.full((5,), 4.0)
    with pyro.settings.context(module_local_params=True):
        guide = AutoNormal(model)
        guide(data)
    svi, before = (
        ph.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()),
        state(model, guide),
    )
    svi.step(data)
    assert all(not torch.equal(a, b) for a, b in zip(before, state(model, guide), strict=True))


def test_a_model_computes_the_belief_once_and_leaves_a_given_one() -> None:
    model = Line(ph.GaussNewton(1))
    data = episode()
    with torch.no_grad(), local_parameters():
        prepared = model.with_belief(data)
        assert data.belief is None and prepared.belief is not None
        assert model.with_belief(prepared) is prepared
        alone = replace(data, support=None)
        assert model.with_belief(alone) is alone


def test_a_program_says_what_it_samples_without_handlers() -> None:
    model = Line(ph.GaussNewton(1))
    assert model(episode().simulation()).shape == (3, 2, POINTS, 1)
    samples = Predictive(model, num_samples=4)(episode().simulation())
    assert samples["x"].shape == (4, 3, 2, POINTS, 1) and samples["slope"].shape == (4, 3, 1)


def test_a_model_without_a_forward_says_what_is_missing() -> None:
    class Empty(ph.HybridModel):
        pass

    with pytest.raises(
        NotImplementedError, match='Module \\[Empty\\] is missing the required "forward" function'
    ):
        Empty()(episode())


# ---- threads and modes ---------------------------------------------------------------------------


def in_another_thread(work: Callable[[], object]) -> list[BaseException]:
    """Run ``work`` in a thread and return what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="the other")
    thread.start()
    thread.join(timeout=600)  # guards against a hang alone
    assert not thread.is_alive()
    return raised


CALLS: dict[str, Callable[[Line, ph.AmortizedGuide], object]] = {
    "build": lambda model, guide: Line(),
    "run": lambda model, guide: model(episode().simulation()),
    "set": lambda model, guide: setattr(model, "noise", torch.tensor(2.0)),
    "step": lambda model, guide: train(model, guide, 1),
    "draw": lambda model, guide: ph.draws(model, guide, episode(), 3),
    "train": lambda model, guide: ph.meta_train(
        model, guide, in_float32(make_tasks(4, 4)), num_steps=1, progress=False
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_thread_is_refused_with_words_and_the_setting_is_restored(name: str) -> None:
    model = Line()
    guide = guide_of(model)
    with local_parameters():
        (error,) = in_another_thread(lambda: CALLS[name](model, guide))
    assert isinstance(error, RuntimeError)
    assert re.match(
        r"expected programs that run in one thread at a time.*; got a call from thread 'the other' "
        r"during one of another thread\. Use processes instead of threads",
        str(error),
    )
    assert pyro.settings.get("module_local_params") is False
    assert not in_another_thread(lambda: CALLS[name](model, guide))


def test_a_training_is_refused_while_another_thread_trains_and_that_one_ends_as_if_alone() -> None:
    tasks = in_float32(make_tasks(6, 4))
    torch.manual_seed(0)
    model = Line()
    guide = guide_of(model)
    alone, alone_guide = copy.deepcopy((model, guide))
    raised: list[BaseException] = []

    def meanwhile(step: int, fit: ph.Fit) -> None:
        raised.extend(in_another_thread(lambda: train(Line(), guide_of(Line()))))

    options = {"num_steps": 3, "batch_size": 2, "progress": False}
    ph.meta_train(model, guide, tasks, callback=meanwhile, **options)
    ph.meta_train(alone, alone_guide, tasks, **options)
    assert len(raised) == 3 and all("one thread at a time" in str(error) for error in raised)
    assert same(state(model, guide), state(alone, alone_guide))


def test_one_thread_may_enter_again_and_an_error_lets_the_next_one_in() -> None:
    with pytest.raises(KeyError), one_thread(), one_thread():
        raise KeyError
    assert not in_another_thread(lambda: Line()(episode()))


def test_a_model_is_not_built_inside_inference_mode() -> None:
    with (
        torch.inference_mode(),
        pytest.raises(
            RuntimeError,
            match=r"expected a Line that is built outside of torch\.inference_mode; got a call inside it",
        ),
    ):
        Line()
    model = Line()
    with torch.inference_mode():
        assert model(episode().simulation()).shape == (3, 2, POINTS, 1)
        encoder = ph.SetEncoder(1, POINTS, 8)
    with pytest.raises(
        RuntimeError, match=r"a guide whose parameters can be trained; got network\.encoder\."
    ):
        ph.SVI(model, ph.AmortizedGuide(model, encoder), pyro.optim.Adam({"lr": 0.1}))


# ---- private names of Pyro -----------------------------------------------------------------------

PRIVATE = {"_PyroModuleMeta", "_pyro_context"}  # of the latter, the attribute param_state


def private_names(path: Path) -> set[str]:
    """Names of Pyro that begin with an underscore, imported or read in a file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pyro":
            names |= {one.name for one in node.names if one.name.startswith("_")}
        if isinstance(node, ast.Attribute) and re.match(r"_[A-Za-z]", node.attr):
            owner = ast.unparse(node.value)
            if owner.split(".")[0] == "pyro" or node.attr.startswith("_pyro_"):
                names.add(node.attr)
    return names - {"_pyro_sample", "_pyro_post_sample"}  # a Messenger's methods, documented


def test_private_names_of_pyro_are_used_in_one_file_alone() -> None:
    package = Path(ph.__file__).parent
    found = {
        path.relative_to(package).as_posix(): private_names(path) for path in package.rglob("*.py")
    }
    assert {path: names for path, names in found.items() if names} == {
        "programs/module.py": PRIVATE
    }


def test_the_private_names_of_pyro_are_still_there_and_mean_what_they_did() -> None:
    plain = PyroModule[nn.Linear](1, 1)
    assert hasattr(plain, "_pyro_context") and not owns_parameters(plain)
    with pyro.settings.context(module_local_params=True):
        local = PyroModule[nn.Linear](1, 1)
    assert owns_parameters(local) and local._pyro_context.param_state.keys() == {
        "params",
        "constraints",
    }
    assert type(PyroModule) is pyro.nn.module._PyroModuleMeta
