"""Heat on a rod: diffusion is known, and something else is going on.

The state is a field on a grid, the neural term acts at every point, and one number says how strong it is: here, how
fast the heat is carried along.
"""

import time

import habits

import pyro_hybrid as ph


def main() -> None:
    started = time.perf_counter()
    choice = habits.options(__doc__, "advection_diffusion", tasks=300, steps=400)
    system = ph.systems.AdvectionDiffusion()
    train, held_out = system.simulate(choice.tasks + choice.held_out, choice.shots, choice.seed).split(choice.held_out)

    model = ph.models.MetaHybridVAE(system, ph.Linearised(1, segments=(7,)), noise=5.0)
    guide = model.guide(ph.Linearised(1))
    growing = habits.growing_correction(model, 1e5, choice.steps)
    fit = ph.meta_train(model, guide, train, steps=choice.steps, batch_size=4, learning_rate=5e-3, seed=choice.seed,
                        curriculum={0.0: 7}, average=0.3, device=choice.device, callback=growing)

    model.to("cpu")
    model.prior.evidence, guide.evidence = ph.Linearised(2, segments=(7,)), ph.Linearised(1)
    ph.calibrate(model, train[:100])
    habits.export(choice, model, guide, held_out, habits.judge(model, guide, train, held_out), fit, started)


if __name__ == "__main__":
    main()
