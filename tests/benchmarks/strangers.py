"""Systems that no example shows, as a stranger would write them, fitted by ``ph.identify`` with defaults only.

    python tests/benchmarks/strangers.py [--only tank ...] [--seeds 0 1 2] [--table]

Every system has a program with a neural term for what its user doesn't know. ``docs/results/strangers.json`` holds, for
each latent of the truth, the correlation R of its best linear prediction from the latents that were read off the
supports of sixty systems that were held out; and beside it what the same program reaches that is *told* the true term,
the noise and the population, and reads the same supports. Runs that are in the file already are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor, nn

import pyro_hybrid as ph
from pyro_hybrid.beliefs.belief import Gaussian
from pyro_hybrid.evidence.least_squares import LeastSquares

FILE = Path(__file__).parents[2] / "docs" / "results" / "strangers.json"
HELD_OUT = 60
families = ph.families


def positive_noise() -> PyroParam:
    return PyroParam(torch.tensor(0.1), constraints.positive)


class Tank(ph.HybridModel):
    """A tank that drains through a hole, and seeps through its wall in an unknown way."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = ph.SupportPrior(
            ph.GaussNewton(), hole=families.LogNormal(1), seep=families.Normal(1)
        )
        self.term = ph.Residual(inputs=1, latents=1, outputs=1)
        self.noise = positive_noise()

    def forward(self, episode: ph.Episode) -> Tensor:
        p, shots = self.prior(episode), episode.query
        with episode.plate:
            hole = pyro.sample("hole", p["hole"])
            seepage = self.term.given(pyro.sample("seep", p["seep"])[..., None, :])
            start = pyro.sample("start", dist.Normal(shots.initial, self.noise).to_event(2))

            def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                (level,) = state
                return (-hole * level.clamp(min=1e-3).sqrt() + seepage(level),)

            states = ph.solve(field, start.unbind(-1), shots.times)
            x = dist.Normal(states, self.noise).mask(shots.scored)
            return pyro.sample("x", x.to_event(3), obs=shots.values)


class Circuit(ph.HybridModel):
    """A capacitor that is charged by a known current, in parallel with an unknown component."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = ph.SupportPrior(
            ph.GaussNewton(), rate=families.LogNormal(1), part=families.Normal(2)
        )
        self.term = ph.Residual(inputs=1, latents=2, outputs=1)
        self.noise = positive_noise()

    def forward(self, episode: ph.Episode) -> Tensor:
        p, shots = self.prior(episode), episode.query
        with episode.plate:
            rate = pyro.sample("rate", p["rate"])
            component = self.term.given(pyro.sample("part", p["part"])[..., None, :])
            start = pyro.sample("start", dist.Normal(shots.initial, self.noise).to_event(2))
            current = ph.interpolate(shots.times, shots.inputs)

            def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                (voltage,) = state
                return (rate * (current(t)[..., 0] - voltage) + component(voltage),)

            states = ph.solve(field, start.unbind(-1), shots.times)
            x = dist.Normal(states, self.noise).mask(shots.scored)
            return pyro.sample("x", x.to_event(3), obs=shots.values)


class Epidemic(ph.HybridModel):
    """Daily counts of new infections; nobody counts who is infected, and contacts change with the season."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = ph.SupportPrior(
            ph.GaussNewton(),
            contact=families.LogNormal(1, loc=math.log(0.45), scale=0.2),
            recovery=families.LogNormal(1, loc=math.log(0.2), scale=0.2),
            season=families.Normal(2),
        )
        self.term = ph.Residual(inputs=1, latents=2, outputs=1, linear=True, scale=(20.0,))

    def forward(self, episode: ph.Episode) -> Tensor:
        p, shots = self.prior(episode), episode.query
        with episode.plate:
            contact = pyro.sample("contact", p["contact"])
            recovery = pyro.sample("recovery", p["recovery"])
            season = self.term.given(pyro.sample("season", p["season"])[..., None, :])
            log_share = dist.Normal(-5.0, 1.0).expand((*shots.scored.shape[:2], 1)).to_event(2)
            infected = pyro.sample("infected", log_share)[..., 0].exp()

            def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                susceptible, ill, _ = state
                new = contact * season(t).exp() * susceptible * ill
                return -new, new - recovery * ill, new

            start = (1.0 - infected, infected, torch.zeros_like(infected))
            total = ph.solve(field, start, shots.times)[..., 2:]
            new = total.diff(dim=-2, prepend=torch.zeros_like(total[..., :1, :]))
            x = dist.Poisson(1e4 * new.clamp(min=1e-6) + 0.1).mask(shots.scored)
            return pyro.sample("x", x.to_event(3), obs=shots.values)


class Prey(ph.HybridModel):
    """Logarithms of predators and prey at irregular times, others for each trajectory; encounters are unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = ph.SupportPrior(
            ph.GaussNewton(), growth=families.LogNormal(1), hunger=families.Normal(1)
        )
        self.term = ph.Residual(inputs=2, latents=1, outputs=2)
        self.noise = positive_noise()

    def forward(self, episode: ph.Episode) -> Tensor:
        p, shots = self.prior(episode), episode.query
        with episode.plate:
            growth = pyro.sample("growth", p["growth"])
            encounters = self.term.given(pyro.sample("hunger", p["hunger"])[..., None, :])
            start = pyro.sample("start", dist.Normal(shots.initial, self.noise).to_event(2))

            def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                eaten, fed = encounters(*state)
                return growth + eaten, fed - 0.6

            states = ph.solve(field, start.unbind(-1), shots.times)
            x = dist.Normal(states, self.noise).mask(shots.scored)
            return pyro.sample("x", x.to_event(3), obs=shots.values)


class Absorption(ph.HybridModel):
    """A drug is swallowed and measured in the blood, and not in the gut; its elimination is unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = ph.SupportPrior(
            ph.GaussNewton(), absorb=families.LogNormal(1), enzyme=families.Normal(2)
        )
        self.term = ph.Residual(inputs=1, latents=2, outputs=1)
        self.noise = positive_noise()

    def forward(self, episode: ph.Episode) -> Tensor:
        p, shots = self.prior(episode), episode.query
        with episode.plate:
            absorb = pyro.sample("absorb", p["absorb"])
            elimination = self.term.given(pyro.sample("enzyme", p["enzyme"])[..., None, :])
            dose = shots.inputs[..., 0, 0]

            def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                gut, blood = state
                return -absorb * gut, absorb * gut + elimination(blood) * blood

            states = ph.solve(field, (dose, torch.zeros_like(dose)), shots.times, substeps=2)
            x = dist.Normal(states[..., 1:], self.noise).mask(shots.scored)
            return pyro.sample("x", x.to_event(3), obs=shots.values)


class Enzyme(ph.HybridModel):
    """A stiff reaction: a substance is exchanged fast, and lost slowly in an unknown way."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = ph.SupportPrior(
            ph.GaussNewton(),
            exchange=families.LogNormal(1, loc=math.log(30.0), scale=0.3),
            loss=families.Normal(1),
        )
        self.term = ph.Residual(inputs=1, latents=1, outputs=1)
        self.noise = positive_noise()

    def forward(self, episode: ph.Episode) -> Tensor:
        p, shots = self.prior(episode), episode.query
        with episode.plate:
            exchange = pyro.sample("exchange", p["exchange"])
            loss = self.term.given(pyro.sample("loss", p["loss"])[..., None, :])
            start = pyro.sample("start", dist.Normal(shots.initial, self.noise).to_event(2))

            def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                free, bound = state
                flux = exchange * (free - bound)
                return -flux, flux + loss(bound)

            states = ph.solve(field, start.unbind(-1), shots.times, substeps=6)
            x = dist.Normal(states, self.noise).mask(shots.scored)
            return pyro.sample("x", x.to_event(3), obs=shots.values)


class Spring(ph.HybridModel):
    """A mass on a spring, one long recording of each system; friction is unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = ph.SupportPrior(
            ph.GaussNewton(), stiffness=families.LogNormal(1), friction=families.Normal(2)
        )
        self.term = ph.Residual(inputs=1, latents=2, outputs=1)
        self.noise = positive_noise()

    def forward(self, episode: ph.Episode) -> Tensor:
        p, shots = self.prior(episode), episode.query
        with episode.plate:
            stiffness = pyro.sample("stiffness", p["stiffness"])
            friction = self.term.given(pyro.sample("friction", p["friction"])[..., None, :])
            start = pyro.sample("start", dist.Normal(shots.initial, self.noise).to_event(2))

            def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                place, speed = state
                return speed, -stiffness * place + friction(speed)

            states = ph.solve(field, start.unbind(-1), shots.times)
            x = dist.Normal(states, self.noise).mask(shots.scored)
            return pyro.sample("x", x.to_event(3), obs=shots.values)


# ---- the truth, which no program is told -----------------------------------------------------------


class Draw:
    """Uniform random numbers from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def noisy(self, x: Tensor, sd: float) -> Tensor:
        return x + sd * torch.randn(x.shape, generator=self.generator)


def season_of(z: Tensor, t: Tensor) -> Tensor:
    angle = t * 2.0 * math.pi / 60.0
    return z[0] * torch.cos(angle) + z[1] * torch.sin(angle)


def tanks(seed: int, n: int = 300) -> ph.Tasks:
    draw, times = Draw(seed), torch.linspace(0.0, 4.0, 41)
    hole, seep = draw(0.3, 0.8, n, 1), draw(0.05, 0.45, n, 1)
    x = ph.solve(
        lambda t, y: (-hole * y[0].clamp(min=1e-3).sqrt() - seep * y[0] ** 2,),
        (draw(1.0, 3.0, n, 6),),
        times,
    )
    truth = {"hole": hole, "seep": seep}
    return ph.Tasks.from_trajectories(times, draw.noisy(x, 0.01), num_support=3, true_latents=truth)


def circuits(seed: int, n: int = 300) -> ph.Tasks:
    draw, times = Draw(seed), torch.linspace(0.0, 6.0, 61)
    rate, cubic, steep = draw(0.6, 1.4, n, 1), draw(0.1, 0.6, n, 1), draw(0.5, 1.5, n, 1)
    current = 2.0 * torch.sin(draw(0.5, 2.0, n, 4, 1) * times + draw(0.0, 6.28, n, 4, 1))
    inputs = current.unsqueeze(-1)
    known = ph.interpolate(times, inputs)
    x = ph.solve(
        lambda t, y: (
            rate * (known(t)[..., 0] - y[0])
            - cubic * y[0] ** 3
            - 0.5 * torch.tanh(3.0 * steep * y[0]),
        ),
        (draw(-1.0, 1.0, n, 4),),
        times,
    )
    truth = {"rate": rate, "part": torch.cat([cubic, steep], -1)}
    return ph.Tasks.from_trajectories(
        times, draw.noisy(x, 0.02), num_support=2, inputs=inputs, true_latents=truth
    )


def epidemics(seed: int, n: int = 300) -> ph.Tasks:
    draw, times = Draw(seed), torch.arange(61.0)
    contact, recovery = draw(0.35, 0.55, n, 1), draw(0.15, 0.25, n, 1)
    season = draw(-0.3, 0.3, n, 2)
    infected = (-5.0 + 0.7 * torch.randn(n, 4, generator=draw.generator)).exp().clamp(max=0.2)

    def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        new = contact * season_of(season.T.unsqueeze(-1), t).exp() * state[0] * state[1]
        return -new, new - recovery * state[1], new

    start = (1.0 - infected, infected, torch.zeros_like(infected))
    total = ph.solve(field, start, times, substeps=2)[..., 2:]
    new = total.diff(dim=-2, prepend=torch.zeros_like(total[..., :1, :]))
    counts = torch.poisson(1e4 * new.clamp(min=1e-6) + 0.1, generator=draw.generator)
    truth = {"contact": contact, "recovery": recovery, "season": season}
    return ph.Tasks.from_trajectories(
        times, counts, num_support=2, initial=None, true_latents=truth
    )


def preys(seed: int, n: int = 300) -> ph.Tasks:
    draw = Draw(seed)
    growth, hunger = draw(0.5, 1.5, n, 1), draw(0.4, 1.0, n, 1)
    later = draw(0.05, 6.0, n, 4, 30).sort(-1).values
    times = torch.cat([torch.zeros(n, 4, 1), later], -1) + 0.01 * torch.arange(31.0)

    def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        prey, predators = state[0].exp(), state[1].exp()
        met = hunger / (1.0 + 0.3 * prey)
        return growth - met * predators, 0.5 * met * prey - 0.6

    start = (draw(-0.5, 0.5, n, 4), draw(-0.5, 0.5, n, 4))
    x = ph.solve(field, start, times, substeps=4)
    truth = {"growth": growth, "hunger": hunger}
    return ph.Tasks.from_trajectories(times, draw.noisy(x, 0.03), num_support=2, true_latents=truth)


def absorptions(seed: int, n: int = 300) -> ph.Tasks:
    draw, times = Draw(seed), torch.linspace(0.0, 8.0, 33)
    absorb, most, half = draw(0.8, 2.0, n, 1), draw(0.5, 1.2, n, 1), draw(0.5, 1.5, n, 1)
    dose = draw(0.5, 3.0, n, 4)
    x = ph.solve(
        lambda t, s: (-absorb * s[0], absorb * s[0] - most * s[1] / (half + s[1])),
        (dose, torch.zeros_like(dose)),
        times,
        substeps=8,
    )[..., 1:]
    truth = {"absorb": absorb, "enzyme": torch.cat([most, half], -1)}
    inputs = dose[..., None, None].expand(n, 4, 33, 1).clone()
    return ph.Tasks.from_trajectories(
        times, draw.noisy(x, 0.02), num_support=2, initial=None, inputs=inputs, true_latents=truth
    )


def enzymes(seed: int, n: int = 300) -> ph.Tasks:
    draw = Draw(seed)
    times = torch.cat([torch.linspace(0.0, 0.1, 11), torch.linspace(0.2, 3.0, 29)])
    exchange, loss = draw(20.0, 45.0, n, 1), draw(0.5, 1.5, n, 1)

    def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        flux = exchange * (state[0] - state[1])
        return -flux, flux - loss * state[1] / (0.5 + state[1])

    x = ph.solve(field, (draw(1.0, 2.0, n, 4), draw(0.0, 0.5, n, 4)), times, substeps=20)
    truth = {"exchange": exchange, "loss": loss}
    return ph.Tasks.from_trajectories(times, draw.noisy(x, 0.01), num_support=2, true_latents=truth)


def springs(seed: int, n: int = 300) -> ph.Tasks:
    draw, times = Draw(seed), 0.1 * torch.arange(200.0)
    stiffness, slow, fast = draw(2.0, 5.0, n, 1), draw(0.05, 0.2, n, 1), draw(0.0, 0.1, n, 1)
    x = ph.solve(
        lambda t, s: (s[1], -stiffness * s[0] - slow * s[1] - fast * s[1] ** 3),
        (draw(0.8, 1.5, n, 1), draw(-1.0, 1.0, n, 1)),
        times,
        substeps=2,
    )
    truth = {"stiffness": stiffness, "friction": torch.cat([slow, fast], -1)}
    return ph.Tasks.from_trajectories(
        times, draw.noisy(x, 0.02), num_support=4, pieces=8, true_latents=truth
    )


class Case(NamedTuple):
    """A stranger's system: the program, its data, the true term of the true latents, and the true noise."""

    program: Callable[[], ph.HybridModel]
    simulate: Callable[[int], ph.Tasks]
    term: Callable[..., Any]
    noise: float | None


def met(z: Tensor, prey: Tensor, predators: Tensor) -> tuple[Tensor, Tensor]:
    rate = z[0] / (1.0 + 0.3 * prey.exp())
    return -rate * predators.exp(), 0.5 * rate * prey.exp()


CASES = {
    "tank": Case(Tank, tanks, lambda z, x: -z[0] * x**2, 0.01),
    "circuit": Case(
        Circuit, circuits, lambda z, v: -z[0] * v**3 - 0.5 * torch.tanh(3.0 * z[1] * v), 0.02
    ),
    "epidemic": Case(Epidemic, epidemics, season_of, None),
    "prey": Case(Prey, preys, met, 0.03),
    "absorption": Case(Absorption, absorptions, lambda z, x: -z[0] / (z[1] + x), 0.02),
    "enzyme": Case(Enzyme, enzymes, lambda z, x: -z[0] * x / (0.5 + x), 0.01),
    "spring": Case(Spring, springs, lambda z, v: -z[0] * v - z[1] * v**3, 0.02),
}


class TrueTerm(nn.Module):
    """The true term in a network's place."""

    def __init__(self, term: Callable[..., Any]) -> None:
        super().__init__()
        self.term = term

    def given(self, latents: Tensor) -> Callable[..., Any]:
        z = latents.movedim(-1, 0)
        return lambda *inputs: self.term(z, *inputs)


def linear_r(read: Tensor, tasks: ph.Tasks) -> dict[str, list[float]]:
    """Correlation of each true latent with its best linear prediction from those that were read."""
    design = torch.cat([read.double(), torch.ones(len(read), 1).double()], 1)
    found = {}
    for name, values in (tasks.true_latents or {}).items():
        predicted = design @ torch.linalg.lstsq(design, values.double()).solution
        pairs = zip(predicted.T, values.double().T, strict=True)
        found[name] = [round(float(torch.corrcoef(torch.stack(pair))[0, 1]), 4) for pair in pairs]
    return found


@torch.no_grad()
def reachable(case: Case, tasks: ph.Tasks) -> dict[str, list[float]]:
    """Linear R of the program that is told the true term, the true noise and the population."""
    model = case.program().double()
    model.term = TrueTerm(case.term)
    if case.noise is not None:
        model.noise = torch.tensor(case.noise, dtype=torch.float64)
    sites = model.prior.families
    truth = (tasks.true_latents or {}).values()
    named = zip(sites.values(), truth, strict=True)
    u = torch.cat([family.unconstrained(value.double()) for family, value in named], -1)
    population = Gaussian.around(sites, u.mean(0), torch.linalg.inv(torch.cov(u.T)))
    support = tasks.episode().support
    problem = LeastSquares(model, support.double(), population)
    return linear_r(ph.GaussNewton(12).minimize(problem).task, tasks)


def run(name: str, seed: int) -> dict[str, Any]:
    """Fit one system with defaults only, and score what is read off the supports of systems that were held out."""
    case = CASES[name]
    train, held_out = case.simulate(seed).split(HELD_OUT)
    torch.manual_seed(seed)
    model = case.program()
    started = time.process_time()
    posterior = ph.identify(model, copy.copy(train), seed=seed)
    seconds = time.process_time() - started
    with torch.no_grad():
        belief = posterior.model.prior.belief(held_out.episode().support, posterior.model)
        read = belief.moments()[0]
    return {
        "linear_r": linear_r(read, held_out),
        "reachable": reachable(case, held_out),
        "seconds": round(seconds, 1),
        "stages": {stage.name: stage.summary for stage in posterior.stages},
        "findings": [f["name"] for s in posterior.stages for f in s.numbers.get("findings", ())],
    }


def table(results: dict[str, Any]) -> str:
    """The results as the page shows them."""
    lines = [
        "| system | latent | linear R | told the truth | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in CASES:
        runs = results.get(name, {})
        for latent in next(iter(runs.values()), {"linear_r": {}})["linear_r"]:
            reached, possible = (
                "; ".join(", ".join(f"{r:.3f}" for r in run[key][latent]) for run in runs.values())
                for key in ("linear_r", "reachable")
            )
            seconds = ", ".join(f"{run['seconds']:.0f}" for run in runs.values())
            lines.append(f"| {name} | {latent} | {reached} | {possible} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the table of the page")
    choice = parser.parse_args()
    if choice.table:
        print(table(json.loads(FILE.read_text())))
        return
    torch.set_num_threads(1)
    for seed in choice.seeds:
        for name in choice.only:
            results = json.loads(FILE.read_text()) if FILE.exists() else {}
            if str(seed) in results.get(name, {}):
                continue
            found = run(name, seed)
            results = json.loads(FILE.read_text()) if FILE.exists() else {}
            results.setdefault(name, {})[str(seed)] = found
            FILE.write_text(json.dumps(results, indent=2) + "\n")
            print(name, seed, found["linear_r"], found["seconds"], flush=True)


if __name__ == "__main__":
    main()
