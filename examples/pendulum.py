"""A pendulum that somebody pushes and that loses energy; the model knows only its gravity.

What is unknown here is large: the push is stronger than gravity at times, and it oscillates. So the encoder learns
to read trajectories first, alone, from a few segments of one step at a time, where nothing can diverge. What it is
blind to, the program itself finds in the support once it is trained.
"""

import time

import habits

import pyro_hybrid as ph


def main() -> None:
    started = time.perf_counter()
    choice = habits.options(
        __doc__,
        "pendulum",
        tasks=1000,
        steps=3000,
        unconditional="compare: the encoder alone, with a prior that doesn't look at the support",
    )
    system = ph.systems.Pendulum()
    train, held_out = habits.simulate(choice, system)

    model = ph.models.MetaHybridVAE(
        system, linear=False, straightness=0.3, noise=10.0, conditional=not choice.unconditional
    )
    guide = model.guide()
    fit = ph.meta_train(
        model,
        guide,
        train,
        num_steps=choice.steps,
        batch_size=48,
        learning_rate=3e-3,
        seed=choice.seed,
        curriculum={0.0: 1},
        segments_per_shot=8,
        average_last=0.2,
        device=choice.device,
        penalty_weights={"projection": ph.Ramp(30.0, power=2)},
    )

    # The last digits come from whole trajectories, by second order. For the final answer, credit gravity with all that
    # it explains, consult the program, from several starts, and calibrate the intervals.
    posterior = ph.Posterior(model.to("cpu"), guide.to("cpu"))
    if not choice.unconditional:
        posterior = ph.refine_weights(
            posterior,
            train,
            num_steps=1 if choice.fast else 24,
            batch_size=32,
            forgetting=0.05,
            prior_sd=0.02,
            evidence=ph.GaussNewton(2, segments=(2, 2, 7)),
            seed=choice.seed,
        )
        posterior = ph.fix_gauge(posterior, train[:200])
        restarts = 0 if choice.fast else 4
        support = ph.GaussNewton(3, segments=(2, 2, 2, 7), num_restarts=restarts)
        posterior = ph.compute_evidence(posterior, support, ph.GaussNewton(2))
        posterior = ph.rescale_intervals(posterior, train[:300])
    habits.export(choice, posterior, train, held_out, fit, started=started)


if __name__ == "__main__":
    main()
