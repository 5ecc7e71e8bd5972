"""Your own system, from nothing: predators and prey whose encounters nobody wrote an equation for."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroParam

import pyro_hybrid as ph


class PredatorsAndPrey(ph.HybridModel):
    """prey' = growth · prey - something, predators' = something - death · predators (on a logarithmic scale)."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        encoder = ph.Encoder(ph.SetEncoder(2, steps, num_features=32))
        self.prior = ph.SupportPrior(
            encoder.then(
                ph.GaussNewton(2, segments=(5, 5))
            ),  # the program itself reads the support
            growth=ph.families.LogNormal(1),
            unknown=ph.families.Normal(1),  # one latent has a name, and one hasn't
        )
        self.residual = ph.Residual(inputs=2, latents=1, outputs=2, linear=True)
        self.noise = PyroParam(torch.tensor(0.1), dist.constraints.positive)

    def forward(self, episode: ph.Episode) -> torch.Tensor:
        p = self.prior(episode)
        with episode.plate:
            growth = pyro.sample("growth", p["growth"])[..., None, 0]
            encounters = self.residual.given(pyro.sample("unknown", p["unknown"])[..., None, :])

            def field(t, state):  # of the logarithms of both populations
                eaten, fed = encounters(*state)
                return growth - eaten, fed - 0.6

            shots = episode.query
            states = ph.solve(field, shots.initial.unbind(-1), shots.times)
            return pyro.sample(
                "x",
                dist.Normal(states, self.noise).mask(shots.scored).to_event(3),
                obs=shots.values,
            )


def measurements(
    systems: int, shots: int, steps: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Stand-in for your own data, with a truth to compare with."""
    growth, appetite = 0.5 + torch.rand(systems, 1), 0.4 + 0.6 * torch.rand(systems, 1)
    times = 0.2 * torch.arange(steps)
    start = (torch.rand(systems, shots) - 0.5, torch.rand(systems, shots) - 0.5)
    states = ph.solve(
        lambda t, s: (growth - appetite * s[1].exp(), 0.5 * appetite * s[0].exp() - 0.6),
        start,
        times,
    )
    return times, states + 0.02 * torch.randn_like(states), {"growth": growth, "appetite": appetite}


def main(steps: int = 300) -> None:
    torch.manual_seed(0)
    times, values, truth = measurements(systems=300, shots=6, steps=31)
    tasks = ph.Tasks.from_trajectories(times, values, num_support=3, true_latents=truth)
    train, held_out = tasks.split(100)
    model = PredatorsAndPrey(steps=31)
    guide = ph.AmortizedGuide(model, ph.GaussNewton(1))
    ph.meta_train(
        model,
        guide,
        train,
        num_steps=steps,
        batch_size=16,
        learning_rate=8e-3,
        curriculum={0.0: 5, 0.5: 15},
    )
    found = ph.draws(model, guide, held_out.episode(), 100)
    for name, site in {"growth": "growth", "appetite": "unknown"}.items():
        print(
            f"{name}: linear R = {ph.mcc(found[site].mean(0), held_out.true_latents[name]).linear_r[0]:.3f}"
        )


if __name__ == "__main__":
    main()
