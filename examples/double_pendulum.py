"""A double pendulum whose joints have friction that nobody told the model about.

Known: two point masses, two rods, gravity. Unknown to the model: a torque in each joint. A thousand pendulums, a few
trajectories of each, and at the end the numbers g/l and m2/m1 of pendulums never seen before, the friction of both
joints, and how far to trust them.

With ``--data DIR`` the pendulum is a real one, IBM's, filmed at 400 frames a second. It is read by clocks that run s
times as fast, which makes many pendulums of it: gravity goes with s squared, friction with s, and the numbers found can
be checked.
"""

import argparse
import json
import time
from dataclasses import replace

import habits
from experiments import real_learned, real_pendulum

import pyro_hybrid as ph


def main() -> None:
    started = time.perf_counter()
    choice = habits.options(
        __doc__,
        "double_pendulum",
        tasks=1000,
        steps=900,
        data="folder of a real pendulum's recordings; then tasks and steps are the experiment's",
    )
    if choice.data:
        return real(choice)

    # A thousand pendulums to learn from, three hundred to be judged on.
    system = ph.systems.DoublePendulum()
    train, held_out = system.simulate(
        choice.tasks + choice.held_out, choice.shots, choice.seed
    ).split(choice.held_out)

    # Known equations + a neural torque, linear in its latents; support and query are read by the program itself:
    # first in short segments, from wherever the encoder points, then along the whole trajectory.
    model = ph.models.MetaHybridVAE(system, ph.Linearised(1, segments=(7, 7)))
    guide = model.guide(ph.Linearised(1))
    fit = ph.meta_train(
        model,
        guide,
        train,
        steps=choice.steps,
        batch_size=16,
        learning_rate=8e-3,
        seed=choice.seed,
        curriculum={0.0: 7, 0.4: 14},
        average=0.3,
        device=choice.device,
        callback=habits.growing_correction(model, 1000.0, choice.steps),
    )

    # For the final answer, a few more iterations than training needed, and intervals that halves of a task agree on.
    model.to("cpu")
    model.prior.evidence, guide.evidence = ph.Linearised(3, segments=(7, 7)), ph.Linearised(2)
    ph.calibrate(model, train)
    habits.export(
        choice, model, guide, held_out, habits.judge(model, guide, train, held_out), fit, started
    )


def real(choice: argparse.Namespace) -> None:
    """The same on recordings. Whole runs are held out; the rival is a classical fit of six parameters, told s."""
    learn, judge = ph.systems.ibm_double_pendulum(choice.data).split(real_pendulum.HELD_OUT)
    settings = real_learned.FAST if choice.fast else real_learned.Settings()
    rivals = real_learned.rivals(learn, settings)

    # Known: point masses. Unknown: torques, those that are the same backwards in time and those of friction.
    model, guide, fit = real_learned.trained(learn, rivals, choice.seed, settings, progress=True)

    # One table: errors of predictions on the same windows, and what was found out about s.
    found = {
        "seed": choice.seed,
        **real_pendulum.judged(model, judge, rivals, choice.seed, settings),
    }
    print(real_pendulum.table([found]))
    (choice.out / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")
    real_pendulum.figure([found]).savefig(choice.out / "recovered.png", dpi=130)

    # Gravity's truth is known up to a factor; the rival's is as good as any.
    few = real_learned.tasks(judge, 4, 8, choice.seed)
    gravity = rivals.compound[2].float() * few.true_latents["gravity"]
    few = replace(few, true_latents={"gravity": gravity})
    for name, figure in (
        ("loss", habits.loss_figure(fit)),
        ("trajectories", habits.trajectories_figure(model, guide, few)),
        ("prior_posterior", habits.prior_posterior_figure(model, guide, few)),
    ):
        figure.savefig(choice.out / f"{name}.png", dpi=130, bbox_inches="tight")
    print(f"\nfigures and metrics.json are in {choice.out}/")


if __name__ == "__main__":
    main()
