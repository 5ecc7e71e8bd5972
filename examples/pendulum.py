"""A pendulum that somebody pushes and that loses energy; the model knows only its gravity.

What is unknown here is large: the push is stronger than gravity at times, and it oscillates. So training goes in two
stages. First the encoder alone learns to read trajectories, from segments of one step, where nothing can diverge. Then
the program itself is consulted, which sees what an encoder is blind to.
"""

import time

import habits

import pyro_hybrid as ph


def main() -> None:
    started = time.perf_counter()
    choice = habits.options(__doc__, "pendulum", tasks=1000, steps=1500)
    system = ph.systems.Pendulum()
    train, held_out = system.simulate(choice.tasks + choice.held_out, choice.shots, choice.seed).split(choice.held_out)

    # The encoder alone.
    model = ph.models.MetaHybridVAE(system, linear=False, noise=10.0)
    reading = ph.meta_train(model, model.guide(), train, steps=choice.steps, batch_size=64, learning_rate=4e-3,
                            seed=choice.seed, curriculum={0.0: 1}, device=choice.device,
                            callback=habits.growing_correction(model, 30.0, choice.steps))

    # The program too.
    model.prior.evidence = ph.Linearised(1, segments=(2, 2))
    guide = model.guide(ph.Linearised(1))
    steps = max(choice.steps // 4, 1)
    fit = ph.meta_train(model, guide, train, steps=steps, batch_size=16, learning_rate=2e-3, seed=choice.seed,
                        curriculum={0.0: 2, 0.5: 7}, device=choice.device)

    model.to("cpu")
    model.prior.evidence, guide.evidence = ph.Linearised(3, segments=(2, 2, 7)), ph.Linearised(2)
    habits.export(choice, model, guide, held_out, habits.judge(model, guide, train, held_out), fit, started)


if __name__ == "__main__":
    main()
