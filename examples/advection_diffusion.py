"""Heat on a rod: diffusion is known, and something else is going on.

The state is a field on a grid, the neural term acts at every point, and one number says how strong it is: here, how
fast the heat is carried along.
"""

import time

import habits

import pyro_hybrid as ph


def main() -> None:
    started = time.perf_counter()
    choice = habits.options(__doc__, "advection_diffusion", tasks=300, steps=1500)
    system = ph.systems.AdvectionDiffusion()
    train, held_out = habits.simulate(choice, system)

    # The encoder learns to read whole fields from a few segments of each, where the physics gets all the credit it can.
    model = ph.models.MetaHybridVAE(system, noise=10.0)
    guide = model.guide()
    fit = ph.meta_train(
        model,
        guide,
        train,
        num_steps=choice.steps,
        batch_size=16,
        learning_rate=3e-3,
        seed=choice.seed,
        curriculum={0.0: 7},
        segments_per_shot=8,
        average_last=0.2,
        device=choice.device,
        penalty_weights={"projection": ph.Ramp(1e5, power=2)},
    )

    # The last digits come from whole trajectories, by second order; diffusion is credited with all that it explains.
    posterior = ph.Posterior(model.to("cpu"), guide.to("cpu"))
    posterior = ph.refine_weights(
        posterior,
        train,
        num_steps=1 if choice.fast else 6,
        batch_size=16,
        evidence=ph.GaussNewton(2, segments=(7,)),
        seed=choice.seed,
    )
    posterior = ph.fix_gauge(posterior, train[:200])

    # What the encoder is blind to, the program itself finds.
    support = ph.GaussNewton(2, segments=(7,))
    posterior = ph.compute_evidence(posterior, support, ph.GaussNewton(1))
    posterior = ph.rescale_intervals(posterior, train[:100])
    habits.export(choice, posterior, train, held_out, fit, started=started)


if __name__ == "__main__":
    main()
