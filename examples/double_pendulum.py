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
    choice = habits.options(__doc__, "double_pendulum", tasks=1000)

    # A thousand pendulums to learn from, three hundred to be judged on.
    system = ph.systems.DoublePendulum()
    train, held_out = habits.simulate(choice, system)

    # Known equations + a neural torque, linear in its latents, from random weights to an answer in one call. The
    # certificate comes with the report.
    model = ph.models.MetaHybridVAE(system)
    posterior = ph.identify(model, train, seed=choice.seed, stages={"certify": None})
    habits.export(choice, posterior, train, held_out, started=started)


if __name__ == "__main__":
    main()
