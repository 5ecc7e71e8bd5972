"""A pendulum that somebody pushes and that loses energy; the model knows only its gravity.

What is unknown here is large: the push is stronger than gravity at times, and it oscillates. So training goes in two
stages. First the encoder alone learns to read trajectories, from segments of one step, where nothing can diverge. Then
the program itself is consulted, which sees what an encoder is blind to.
"""

import argparse
import time

import habits

import pyro_hybrid as ph


def main() -> None:
    started = time.perf_counter()
    choice = habits.options(__doc__, "pendulum", tasks=1000, steps=2000,
                            unconditional="compare: the encoder alone, with a prior that doesn't look at the support")
    system = ph.systems.Pendulum()
    train, held_out = system.simulate(choice.tasks + choice.held_out, choice.shots, choice.seed).split(choice.held_out)

    # The encoder alone. One neural latent more than one thinks are needed leaves it room to untangle them.
    model = ph.models.MetaHybridVAE(system, latents=4, linear=False, straightness=3.0, noise=10.0,
                                    conditional=not choice.unconditional)
    guide = model.guide()
    fit = ph.meta_train(model, guide, train, steps=choice.steps, batch_size=48, learning_rate=3e-3, seed=choice.seed,
                        curriculum={0.0: 1}, device=choice.device,
                        callback=habits.growing_correction(model, 30.0, choice.steps))
    if not choice.unconditional:
        guide, fit = consult_the_program(model, train, choice)
    model.to("cpu")
    habits.export(choice, model, guide, held_out, habits.judge(model, guide, train, held_out), fit, started)


def consult_the_program(model: ph.models.MetaHybridVAE, train: ph.Tasks,
                        choice: argparse.Namespace) -> tuple[ph.AmortizedGuide, ph.Fit]:
    """Go on training with computed evidence. What the encoder says is a good start by now: leave it as it is."""
    model.prior.evidence, guide = ph.Linearised(1, segments=(2, 2)), model.guide(ph.Linearised(1))
    model.prior.encoder.requires_grad_(False), model.prior.head.requires_grad_(False)
    model.correction = 100.0
    fit = ph.meta_train(model, guide, train, steps=max(choice.steps // 10, 1), batch_size=16, learning_rate=5e-4,
                        seed=choice.seed, curriculum={0.0: 2}, average=0.5, device=choice.device)

    # For the final answer, more iterations than training needed, from several starts, and calibrated intervals.
    model.prior.evidence, guide.evidence = ph.Linearised(3, segments=(2, 2, 2, 7), restarts=4), ph.Linearised(2)
    ph.calibrate(model.to("cpu"), train[:300])
    return guide, fit


if __name__ == "__main__":
    main()
