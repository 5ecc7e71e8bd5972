"""Models and data of which it is known whether they are identifiable, drawn at random over structure and sizes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_hybrid as ph
from pyro_hybrid.beliefs.families import Beta, Family, Gamma, LogNormal, Normal
from pyro_hybrid.inference.prior import Prior
from pyro_hybrid.programs.run import Program

EVIDENCE = ph.GaussNewton(6, num_restarts=2)
Values = Mapping[str, Tensor]
Rule = Callable[[Values], Tensor]
Kind = Literal["real", "positive", "fraction"]
FITTING: dict[Kind, list[type[Family]]] = {
    "real": [Normal],
    "positive": [LogNormal, Gamma],
    "fraction": [Beta],
}


# ---- what systems do -----------------------------------------------------------------------------


class Slot(NamedTuple):
    """A number that an equation needs: what it may be, and its population in unconstrained coordinates."""

    kind: Kind
    loc: float
    scale: float

    def value(self, u: Tensor | float) -> Any:
        """The number at u."""
        u = torch.as_tensor(u)
        return {"real": u, "positive": u.exp(), "fraction": u.sigmoid()}[self.kind]


class Equation(NamedTuple):
    """A kind of system: its slots, where its states start, which of them can be observed, and how they move."""

    slots: dict[str, Slot]
    start: tuple[tuple[float, float], ...]
    horizon: float
    sensors: tuple[tuple[int, ...], ...]
    run: Callable[[SimpleNamespace, tuple[Tensor, ...], Tensor], Tensor]


def ode(slopes: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """States of ``slopes(slots, t, *state)``, (..., task, shot, time, component)."""

    def run(p: SimpleNamespace, start: tuple[Tensor, ...], times: Tensor) -> Tensor:
        return ph.solve(lambda t, state: slopes(p, t, *state), start, times)

    return run


def formula(states: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One state in closed form, ``states(slots, times, *start)``."""

    def run(p: SimpleNamespace, start: tuple[Tensor, ...], times: Tensor) -> Tensor:
        p = SimpleNamespace(**{name: value.unsqueeze(-1) for name, value in vars(p).items()})
        return states(p, times, *(part.unsqueeze(-1) for part in start)).unsqueeze(-1)

    return run


def pos(centre: float, scale: float = 0.35) -> Slot:
    return Slot("positive", math.log(centre), scale)


def real(centre: float, scale: float) -> Slot:
    return Slot("real", centre, scale)


EQUATIONS = {
    "decay": Equation(
        {"k": pos(0.8), "source": real(0.5, 0.3)},
        ((0.5, 3.0),),
        3.0,
        ((0,),),
        ode(lambda p, t, x: (p.source - p.k * x,)),
    ),
    "decay chain": Equation(
        {"k1": pos(1.2), "k2": pos(0.7), "branch": Slot("fraction", 0.5, 0.7)},
        ((1.0, 3.0), (0.0, 1.5)),
        3.0,
        ((0, 1),),
        ode(lambda p, t, x, y: (-p.k1 * x, p.branch * p.k1 * x - p.k2 * y)),
    ),
    "oscillator": Equation(
        {"omega": pos(1.8, 0.25), "damping": pos(0.3), "push": real(0.3, 0.5)},
        ((0.8, 2.0), (-1.0, 1.0)),
        3.0,
        ((0,), (0, 1)),
        ode(lambda p, t, x, v: (v, p.push - p.omega**2 * x - p.damping * v)),
    ),
    "duffing": Equation(
        {
            "linear": pos(1.0),
            "cubic": pos(0.6),
            "damping": pos(0.3),
            "drive": real(0.8, 0.4),
            "push": real(0.0, 0.4),
        },
        ((1.0, 2.2), (-1.0, 1.0)),
        3.0,
        ((0, 1),),
        ode(
            lambda p, t, x, v: (
                v,
                p.push
                + p.drive * torch.cos(2.0 * t)
                - p.damping * v
                - p.linear * x
                - p.cubic * x**3,
            )
        ),
    ),
    "predator and prey": Equation(
        {
            "birth": pos(1.0, 0.25),
            "eaten": pos(0.8, 0.25),
            "death": pos(0.9, 0.25),
            "gain": pos(0.6, 0.25),
        },
        ((0.6, 2.0), (0.6, 2.0)),
        4.0,
        ((0, 1),),
        ode(lambda p, t, x, y: (x * (p.birth - p.eaten * y), y * (p.gain * x - p.death))),
    ),
    "logistic": Equation(
        {"rate": pos(1.5, 0.3), "capacity": pos(4.0, 0.3), "season": Slot("fraction", -0.5, 0.7)},
        ((0.3, 1.5),),
        4.0,
        ((0,),),
        ode(
            lambda p, t, x: (
                p.rate * (1.0 + p.season * torch.cos(3.0 * t)) * x * (1.0 - x / p.capacity),
            )
        ),
    ),
    "van der pol": Equation(
        {"mu": pos(0.6, 0.3), "omega": pos(1.3, 0.25)},
        ((0.5, 2.0), (-1.5, 1.5)),
        3.0,
        ((0,), (0, 1)),
        ode(lambda p, t, x, v: (v, p.mu * (1.0 - x**2) * v - p.omega**2 * x)),
    ),
    "epidemic": Equation(
        {"contact": pos(2.5, 0.25), "recovery": pos(0.7, 0.3), "waning": pos(0.4)},
        ((0.6, 0.9), (0.05, 0.3)),
        4.0,
        ((0, 1),),
        ode(
            lambda p, t, s, i: (
                p.waning * (1.0 - s - i) - p.contact * s * i,
                p.contact * s * i - p.recovery * i,
            )
        ),
    ),
    "enzyme": Equation(
        {"speed": pos(1.5, 0.3), "half": pos(0.8, 0.5), "supply": real(0.3, 0.15)},
        ((0.3, 4.0),),
        4.0,
        ((0,),),
        ode(lambda p, t, x: (p.supply - p.speed * x / (p.half + x.clamp(min=0.0)),)),
    ),
    "polynomial": Equation(
        {"c0": real(0.4, 0.5), "c2": real(0.3, 0.4), "c3": pos(0.5)},
        ((-2.0, 2.0),),
        2.5,
        ((0,),),
        ode(lambda p, t, x: (p.c0 - 0.3 * x + p.c2 * x**2 - p.c3 * x**3,)),
    ),
    "bump": Equation(
        {"height": real(2.0, 0.4), "centre": real(1.2, 0.2), "width": pos(0.5, 0.3)},
        ((0.5, 2.0),),
        2.2,
        ((0,),),
        formula(
            lambda p, t, dose: dose * p.height * torch.exp(-0.5 * ((t - p.centre) / p.width) ** 2)
        ),
    ),
    "response": Equation(
        {"top": real(2.0, 0.4), "half": pos(1.0, 0.3), "slope": pos(2.5, 0.25)},
        ((0.5, 2.0),),
        4.0,
        ((0,),),
        formula(
            lambda p, t, dose: (
                dose * p.top * torch.sigmoid(p.slope * ((t + 0.05).log() - p.half.log()))
            )
        ),
    ),
    "ringing": Equation(
        {
            "cosine": real(1.5, 0.4),
            "sine": real(0.0, 1.0),
            "omega": pos(2.0, 0.25),
            "damping": pos(0.4),
        },
        ((0.5, 2.0),),
        3.0,
        ((0,),),
        formula(
            lambda p, t, dose: (
                dose
                * (p.cosine * torch.cos(p.omega * t) + p.sine * torch.sin(p.omega * t))
                * torch.exp(-p.damping * t)
            )
        ),
    ),
}
FLAT = {  # linear, and the same for every shot: what a support says of its mean never varies
    "slope": lambda t: t / 2.0,
    "wave": lambda t: torch.sin(2.5 * t),
    "curve": lambda t: (t / 2.0) ** 2 - t / 2.0,
    "ring": lambda t: torch.cos(4.0 * t),
}


# ---- a system as a program, with its data --------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A program, the sizes of its data, and what a certificate should say of them.

    ``slots`` are functions of latents by label (``omega``, ``unknown[1]``), each (..., task, 1).
    """

    equation: Equation
    sites: dict[str, Family]
    slots: dict[str, Rule]
    name: str = ""
    sensors: tuple[int, ...] = (0,)
    noise: float = 0.03
    start_noise: float = 0.0
    points: int = 14
    tasks: int = 300
    support: int = 2
    shots: int = 4
    uneven: Literal["", "lengths", "gaps"] = (
        ""  # recorded for half to all of the time; with up to 70% missing
    )
    plain: bool = False
    conditional: bool = True
    gain: str | None = (
        None  # a latent that only a further sensor sees, and that one is never observed
    )
    repeated: Literal["", "shots", "trajectories"] = (
        ""  # one system: with fresh shots for every task, or the very same
    )
    expected: str = "holds"
    flaw: str = ""
    condition: str = ""
    culprits: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """A plain function follows the precision of its data, so that its prior must be in float64."""
        return torch.float64 if self.plain else torch.float32

    def states(self, latents: Values, start: Tensor, times: Tensor) -> Tensor:
        """Noise-free sensors (..., task, shot, time, sensor) of latents by site and initial states by component."""
        single = {
            label: value[..., i, None]
            for site, value in latents.items()
            for i, label in enumerate(labels(site, self.sites[site].n))
        }
        p = SimpleNamespace(**{name: slot(single) for name, slot in self.slots.items()})
        states = self.equation.run(p, start.unbind(-1), times)
        seen = states[..., list(self.sensors)]
        if self.gain is None:
            return seen
        further = single[self.gain][..., None, None] * states[..., :1]
        shape = torch.broadcast_shapes(seen.shape[:-1], further.shape[:-1])
        return torch.cat([seen.expand(*shape, -1), further.expand(*shape, -1)], -1)

    def program(self, prior: Prior, episode: ph.Episode) -> Tensor:
        """The true system as a Pyro program."""
        p = prior(episode)
        with episode.plate:
            latents = {name: pyro.sample(name, p[name]) for name in self.sites}
            start = episode.query.initial
            if self.start_noise:
                start = pyro.sample("initial", dist.Normal(start, self.start_noise).to_event(2))
            x = dist.Normal(self.states(latents, start, episode.query.times), self.noise).mask(
                episode.query.scored
            )
            return pyro.sample("x", x.to_event(3), obs=episode.query.values)

    def build(self, seed: int = 0) -> tuple[Program, ph.AmortizedGuide]:
        """The program and its guide, both by computed evidence, so that nothing needs training."""
        torch.manual_seed(seed)
        sensors = len(self.sensors) + (self.gain is not None)
        encoder = ph.SetEncoder(sensors, self.points, 8, width=16)
        prior: Prior = ph.UnconditionalPrior(**self.sites)
        if self.conditional:
            prior = ph.SupportPrior(ph.Encoder(encoder).then(EVIDENCE), **self.sites)
        query = ph.GaussNewton(2) if self.conditional else EVIDENCE
        if self.plain:
            program = self.function(prior.double())
            return program, ph.AmortizedGuide(program, query)
        model = Model(self, prior)
        return model, ph.AmortizedGuide(model, query)

    def function(self, prior: Prior) -> Any:
        """The program as a plain function, which computes the belief given the support itself."""

        def program(episode: ph.Episode) -> Tensor:
            if episode.belief is None:
                episode = replace(episode, belief=prior.belief(episode.support, program))
            return self.program(prior, episode)

        program.prior = prior
        return program

    def data(self, seed: int = 0) -> ph.Tasks:
        """Tasks from the population that the prior starts from."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        systems = 1 if self.repeated else self.tasks
        recorded = 1 if self.repeated == "trajectories" else self.tasks
        truth = {
            name: family.constrained(
                family.loc
                + family.scale * torch.special.ndtri(0.02 + 0.96 * uniform(systems, family.n))
            )
            .expand(self.tasks, -1)
            .clone()
            for name, family in self.sites.items()
        }
        low, high = torch.tensor(self.equation.start, dtype=torch.float64).T
        start = low + (high - low) * uniform(recorded, self.shots, len(low))
        times = torch.linspace(0.0, self.equation.horizon, self.points, dtype=torch.float64)
        clean = self.states({name: value[:recorded] for name, value in truth.items()}, start, times)
        values = (clean + self.noise * normal(*clean.shape)).expand(self.tasks, -1, -1, -1)
        start = (start + self.start_noise * normal(*start.shape)).expand(self.tasks, -1, -1)
        if self.repeated == "trajectories":
            values = values + 1e-4 * normal(*values.shape)
        mask = self._seen(uniform).expand_as(values).clone()
        if self.gain is not None:
            mask[..., -1] = False
        return ph.Tasks.from_trajectories(
            times.to(self.dtype),
            values.to(self.dtype),
            num_support=self.support,
            initial=start.to(self.dtype),
            observed=None if mask.all() else mask,
            true_latents={name: value.to(self.dtype) for name, value in truth.items()},
        )

    def _seen(self, uniform: Callable[..., Tensor]) -> Tensor:
        """What was recorded, (task, shot, time, 1)."""
        if self.uneven == "lengths":
            return torch.linspace(0.0, 1.0, self.points)[:, None] <= 0.5 + 0.5 * uniform(
                self.tasks, 1, 1, 1
            )
        rates = 0.7 * uniform(self.tasks, 1, 1, 1) if self.uneven else 0.0
        return uniform(self.tasks, self.shots, self.points, 1) >= rates

    def certify(self, **how: Any) -> ph.Certificate:
        """Its certificate."""
        return ph.certify(*self.build(), self.data(), progress=False, **how)


class Model(ph.HybridModel):
    """A case as a module."""

    def __init__(self, case: Case, prior: Prior) -> None:
        super().__init__()
        self.case, self.prior = case, prior

    def forward(self, episode: ph.Episode) -> Tensor:
        return self.case.program(self.prior, episode)


def labels(site: str, n: int) -> list[str]:
    """Latents' names as the certificate has them."""
    return [site] if n == 1 else [f"{site}[{i}]" for i in range(n)]


def known(equation: str, *latents: str, **sizes: Any) -> Case:
    """A case in which these slots are latents, each with a site of its own, the other slots being known."""
    system = EQUATIONS[equation]
    sites = {name: _site(system.slots[name]) for name in latents}
    slots = {
        name: _own(name) if name in latents else _constant(slot)
        for name, slot in system.slots.items()
    }
    return Case(
        system,
        sites,
        slots,
        equation,
        **({"sensors": system.sensors[-1], "uneven": "lengths"} | sizes),
    )


def _site(slot: Slot) -> Family:
    return FITTING[slot.kind][0](1, loc=slot.loc, scale=slot.scale)


def _own(name: str) -> Rule:
    return lambda z: z[name]


def _constant(slot: Slot) -> Rule:
    return lambda z: slot.value(slot.loc)


# ---- random structure ----------------------------------------------------------------------------


class Plan(NamedTuple):
    """Latents by name, and the slots as functions of them."""

    latents: dict[str, Slot]
    slots: dict[str, Rule]

    def positive(self) -> list[str]:
        """Slots that are a positive latent."""
        return [name for name, slot in self.latents.items() if slot.kind == "positive"]

    def scalable(self) -> list[str]:
        """Slots that are a positive or a real latent."""
        return [name for name, slot in self.latents.items() if slot.kind != "fraction"]


def planned(rng: random.Random, equation: Equation, needed: int) -> Plan:
    """Some of an equation's slots are latents, so many positive ones among them; the others are known."""
    positive = sorted(name for name, slot in equation.slots.items() if slot.kind == "positive")
    chosen = rng.sample(positive, needed)
    rest = sorted(set(equation.slots) - set(chosen))
    chosen += rng.sample(
        rest, rng.randint(0 if chosen else 1, min(len(rest), 4 - needed if needed else 5))
    )
    latents = {name: slot for name, slot in equation.slots.items() if name in chosen}
    slots = {
        name: _own(name) if name in chosen else _constant(slot)
        for name, slot in equation.slots.items()
    }
    return Plan(latents, slots)


def product(rng: random.Random, plan: Plan) -> tuple[str, ...]:
    """A positive slot becomes the product of two latents."""
    name = rng.choice(plan.positive())
    slot, pair = plan.latents.pop(name), (f"{name}_a", f"{name}_b")
    plan.latents.update(
        {one: Slot("positive", slot.loc / 2, slot.scale / math.sqrt(2)) for one in pair}
    )
    plan.slots[name] = lambda z: z[pair[0]] * z[pair[1]]
    return pair


def total(rng: random.Random, plan: Plan) -> tuple[str, ...]:
    """A slot becomes the sum of two latents."""
    name = rng.choice(plan.scalable())
    slot, pair = plan.latents.pop(name), (f"{name}_a", f"{name}_b")
    half = (
        Slot("real", slot.loc / 2, slot.scale / math.sqrt(2))
        if slot.kind == "real"
        else Slot("positive", slot.loc - math.log(2), slot.scale * math.sqrt(2))
    )
    plan.latents.update(dict.fromkeys(pair, half))
    plan.slots[name] = lambda z: z[pair[0]] + z[pair[1]]
    return pair


def ignored(rng: random.Random, plan: Plan) -> tuple[str, ...]:
    """A latent more, which nothing uses."""
    plan.latents["idle"] = Slot(rng.choice(["real", "positive", "fraction"]), 0.0, 0.5)
    return ("idle",)


def mirrored(rng: random.Random, plan: Plan) -> tuple[str, ...]:
    """A latent of either sign enters as its square or its size."""
    name = rng.choice(plan.scalable())
    slot, size = plan.latents[name], rng.choice([torch.abs, torch.square])
    plan.latents[name] = Slot("real", 0.0, 1.0)
    if slot.kind == "real":
        plan.slots[name] = lambda z: slot.loc + slot.scale * (size(z[name]) - 1.0)
    else:
        plan.slots[name] = lambda z: math.exp(slot.loc) * (0.4 + 0.5 * size(z[name]))
    return (name,)


def exchangeable(rng: random.Random, plan: Plan) -> tuple[str, ...]:
    """Two latents enter through their sum and their product alone."""
    first, second = rng.sample(plan.positive(), 2)
    sizes = [math.exp(plan.latents.pop(name).loc) for name in (first, second)]
    plan.latents.update({name: Slot("positive", 0.0, 0.35) for name in ("one", "other")})
    plan.slots[first] = lambda z: sizes[0] * 0.5 * (z["one"] + z["other"])
    plan.slots[second] = lambda z: sizes[1] * z["one"] * z["other"]
    return "one", "other"


def unseen(rng: random.Random, plan: Plan) -> tuple[str, ...]:
    """A latent more, which only a sensor that is always masked sees."""
    plan.latents["brightness"] = Slot("positive", 0.0, 0.4)
    return ("brightness",)


LOCAL, GLOBAL = "injectivity, local", "injectivity, global"
MEANS, ALL = "variability of means", "variability (iv)"


class Flaw(NamedTuple):
    """Why a program isn't identifiable: what is done to it, the condition that says so, and what it needs."""

    condition: str
    spoil: Callable[[random.Random, Plan], tuple[str, ...]] = lambda rng, plan: ()
    needed: int = 1
    sizes: dict[str, Any] = {}


FLAWS = {
    "product": Flaw(LOCAL, product),
    "sum": Flaw(LOCAL, total),
    "ignored latent": Flaw(LOCAL, ignored),
    "sign symmetry": Flaw(GLOBAL, mirrored),
    "exchangeable latents": Flaw(GLOBAL, exchangeable, needed=2),
    "masked sensor": Flaw(LOCAL, unseen),
    "unconditional prior": Flaw(MEANS, sizes={"conditional": False}),
    "one system repeated": Flaw(MEANS, sizes={"repeated": "shots"}),
    "only means vary": Flaw(ALL, needed=0, sizes={"uneven": ""}),
    "two tasks": Flaw(MEANS, sizes={"tasks": 2}),
}


def housed(
    rng: random.Random, latents: Mapping[str, Slot]
) -> tuple[dict[str, Family], dict[str, Rule], dict[str, str]]:
    """Families by site; how each latent is read from what the sites say; and its label there.

    A latent has a site of its own, in a family that fits it, or is a component of ``unknown``, standard Normal.
    """
    together = [name for name in latents if rng.random() < 0.25]
    label = {name: name for name in latents} | dict(
        zip(together, labels("unknown", len(together)), strict=True)
    )
    sites: dict[str, Family] = {}
    for name, slot in latents.items():
        if name not in together:
            sites[name] = rng.choice(FITTING[slot.kind])(1, loc=slot.loc, scale=slot.scale)
    if together:
        sites["unknown"] = Normal(len(together))
    read = {
        name: _scaled(slot, label[name]) if name in together else _own(name)
        for name, slot in latents.items()
    }
    return sites, read, label


def _scaled(slot: Slot, label: str) -> Rule:
    return lambda z: slot.value(slot.loc + slot.scale * z[label])


def _through(rule: Rule, read: Mapping[str, Rule]) -> Rule:
    return lambda z: rule({name: get(z) for name, get in read.items()})


def flat(rng: random.Random) -> Equation:
    """Two to four unknown weights of fixed functions of time."""
    chosen = rng.sample(sorted(FLAT), rng.randint(2, 4))

    def states(p: SimpleNamespace, t: Tensor, start: Tensor) -> Tensor:
        return start + sum(getattr(p, name) * FLAT[name](t) for name in chosen)

    return Equation(
        {name: real(0.0, 1.0) for name in chosen}, ((-1.0, 1.0),), 3.0, ((0,),), formula(states)
    )


def drawn(seed: int, equation: str | None = None, flaw: str | None = None) -> Case:
    """A random program and random sizes; with a flaw, not identifiable because of that."""
    rng = random.Random(seed)
    wrong = FLAWS[flaw] if flaw else Flaw("", needed=0)
    names = [
        name
        for name, system in EQUATIONS.items()
        if sum(slot.kind == "positive" for slot in system.slots.values()) >= wrong.needed
    ]
    name = "weights" if flaw == "only means vary" else equation or rng.choice(names)
    system = flat(rng) if name == "weights" else EQUATIONS[name]
    plan = planned(rng, system, wrong.needed)
    culprits = wrong.spoil(rng, plan)
    sites, read, label = housed(rng, plan.latents)
    support, count = rng.randint(1, 2), len(plan.latents)
    sizes = {
        "noise": 10 ** rng.uniform(-2.4, -1.8),
        "start_noise": 0.02 if rng.random() < 0.3 else 0.0,
        "points": rng.randint(12, 16),
        "tasks": rng.randint(50 + 150 * count, 1000),
        "support": support,
        "shots": 2 * support + rng.randint(1, 2),
        "uneven": rng.choice(
            ["lengths", "gaps"]
        ),  # or precisions hardly vary, and 1000 systems may be too few
        "plain": rng.random() < 0.25,
        "gain": label.get("brightness"),
    }
    return Case(
        system,
        sites,
        {one: _through(rule, read) for one, rule in plan.slots.items()},
        name=name,
        sensors=rng.choice(system.sensors),
        **(sizes | wrong.sizes),
        expected="fails" if flaw else "holds",
        flaw=flaw or "",
        condition=wrong.condition,
        culprits=tuple(label[one] for one in culprits),
    )


def forty(seed: int = 0) -> list[Case]:
    """Twenty programs that are identifiable, and two of each flaw."""
    rng = random.Random(seed)
    names = rng.sample(sorted(EQUATIONS), len(EQUATIONS)) + rng.sample(
        sorted(EQUATIONS), len(EQUATIONS)
    )
    good = [drawn(rng.getrandbits(32), name) for name in names[:20]]
    return good + [drawn(rng.getrandbits(32), flaw=flaw) for flaw in FLAWS for _ in range(2)]


# ---- what only a hand-written program has --------------------------------------------------------


class Repeated(Normal):
    """Normal of variance 1 in an exponential form that says everything twice: T = (z, 2 z + 1)."""

    _terms = ("z", "2 z + 1")

    def statistics(self, z: Tensor) -> Tensor:
        return torch.stack([z, 2.0 * z + 1.0], -1)

    def log_partition(self, natural: Tensor) -> Tensor:
        return 0.5 * self.gaussian(natural)[0] ** 2 + natural[..., 1]

    def log_base(self, z: Tensor) -> Tensor:
        return self._log_base - 0.5 * z**2

    def mean_statistics(self, natural: Tensor) -> Tensor:
        return self.statistics(self.gaussian(natural)[0])

    def from_gaussian(self, mean: Tensor, scale: Tensor) -> Tensor:
        return torch.stack([mean, torch.zeros_like(mean)], -1)

    def gaussian(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        mean = natural @ natural.new_tensor([1.0, 2.0])
        return mean, torch.ones_like(mean)

    _parameters, _from_parameters = gaussian, from_gaussian


class Folded(Repeated):
    """The same with T = (z, |z|), which says everything twice where z is positive."""

    _terms = ("z", "|z|")

    def statistics(self, z: Tensor) -> Tensor:
        return torch.stack([z, z.abs()], -1)


def functions(varies: Literal["both", "means", "variances"] = "both") -> tuple[Program, Program]:
    """Two weights of straight lines, by hand: nothing of ours in the program, its prior or its guide.

    A record that ends early says little of one weight; with ``means`` the prior has the population's variances instead
    of its own, with ``variances`` the population's means.
    """

    def posterior(*sets: ph.Shots | None) -> tuple[Tensor, Tensor]:
        precision = torch.eye(2, dtype=torch.float64)
        right = torch.zeros(2, dtype=torch.float64)
        for shots in sets:
            if shots is None or shots.values is None:
                continue
            lines = torch.stack([1.0 - shots.times, shots.times], -1)
            weight = shots.scored[..., 0].double() / 0.1**2
            precision = precision + torch.einsum("tsn,ni,nj->tij", weight, lines, lines)
            right = right + torch.einsum("tsn,tsn,ni->ti", weight, shots.values[..., 0], lines)
        covariance = torch.linalg.inv(precision)
        mean = (covariance @ right.unsqueeze(-1)).squeeze(-1)
        return mean, covariance.diagonal(dim1=-2, dim2=-1).sqrt()

    def prior(support: ph.Shots | None) -> tuple[Tensor, Tensor]:
        mean, scale = posterior(support)
        return mean * (varies != "variances"), scale if varies != "means" else torch.full_like(
            scale, 0.1
        )

    def program(episode: ph.Episode) -> Tensor:
        with episode.plate:
            weights = pyro.sample("weights", dist.Normal(*prior(episode.support)).to_event(1))
            lines = torch.stack([1.0 - episode.query.times, episode.query.times], -1)
            states = (lines * weights[..., None, None, :]).sum(
                -1, keepdim=True
            ) + 0.0 * episode.query.initial.unsqueeze(-2)
            x = dist.Normal(states, 0.1).mask(episode.query.scored)
            return pyro.sample("x", x.to_event(3), obs=episode.query.values)

    def guide(episode: ph.Episode) -> Tensor:
        with episode.plate:
            return pyro.sample(
                "weights", dist.Normal(*posterior(episode.support, episode.query)).to_event(1)
            )

    return program, guide


def lines(tasks: int, seed: int = 0) -> ph.Tasks:
    """Records of two added lines, of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.linspace(0.0, 1.0, 10, dtype=torch.float64)
    weights = torch.randn(tasks, 2, generator=generator, dtype=torch.float64)
    clean = weights[:, :1] * (1.0 - times) + weights[:, 1:] * times
    values = clean[:, None, :, None] + 0.1 * torch.randn(
        tasks, 4, 10, 1, generator=generator, dtype=torch.float64
    )
    mask = times[:, None] <= 0.3 + torch.rand(tasks, 1, 1, 1, generator=generator)
    return ph.Tasks.from_trajectories(
        times,
        values,
        num_support=2,
        initial=values[:, :, 0],
        observed=mask.expand_as(values),
        true_latents={"weights": weights},
    )
