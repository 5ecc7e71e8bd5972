"""A double pendulum whose joints have friction that nobody told the model about.

Known: two point masses, two rods, gravity. Unknown to the model: a torque in each joint. A thousand pendulums, a few
trajectories of each, and at the end the numbers g/l and m2/m1 of pendulums never seen before, the friction of both
joints, and how far to trust them.

``python examples/experiments real_pendulum`` does the same for a real one, filmed at 400 frames a second.
"""

import time

import habits

import pyro_hybrid as ph


def main() -> None:
    started = time.perf_counter()
    choice = habits.options(__doc__, "double_pendulum", tasks=1000, steps=900)

    # A thousand pendulums to learn from, three hundred to be judged on.
    system = ph.systems.DoublePendulum()
    train, held_out = habits.simulate(choice, system)

    # Known equations + a neural torque, linear in its latents; support and query are read by the program itself:
    # first in short segments, from wherever the encoder points, then along the whole trajectory.
    model = ph.models.MetaHybridVAE(system, ph.GaussNewton(1, segments=(7, 7)))
    guide = model.guide(ph.GaussNewton(1))
    fit = ph.meta_train(
        model,
        guide,
        train,
        num_steps=choice.steps,
        batch_size=16,
        learning_rate=8e-3,
        seed=choice.seed,
        curriculum={0.0: 7, 0.4: 14},
        average_last=0.3,
        device=choice.device,
        penalty_weights={"projection": ph.Ramp(1000.0, power=2)},
    )

    # The last digits come from whole trajectories, by second order; gravity is credited with all that it explains. For
    # the final answer, a few more iterations than training needed, and intervals that halves of a task agree on.
    posterior = ph.Posterior(model.to("cpu"), guide.to("cpu"))
    posterior = ph.refine_weights(
        posterior, train, num_steps=1 if choice.fast else 8, seed=choice.seed
    )
    posterior = ph.fix_gauge(posterior, train[:200])
    support = ph.GaussNewton(8, segments=(7, 7))
    posterior = ph.compute_evidence(posterior, support, ph.GaussNewton(2))
    posterior = ph.rescale_intervals(posterior, train)
    habits.export(choice, posterior, train, held_out, fit, started)


if __name__ == "__main__":
    main()
