"""Steps after training: each takes a posterior and returns a new one."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import nn

from pyro_hybrid.data.tasks import Tasks, require_tasks
from pyro_hybrid.errors import require
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.evidence.protocol import Evidence
from pyro_hybrid.evidence.settings import describe, encoder_of
from pyro_hybrid.fitting.posterior import Posterior
from pyro_hybrid.inference.intervals import measure_interval_scale
from pyro_hybrid.inference.prior import SupportPrior
from pyro_hybrid.programs.fix_gauge import fix_gauge as place_gauge
from pyro_hybrid.training.refinement import Refinement
from pyro_hybrid.training.second_order import BatchRecord, refine_in_place

__all__ = ["compute_evidence", "fix_gauge", "refine_weights", "rescale_intervals"]


def compute_evidence(
    posterior: Posterior,
    support: GaussNewton = GaussNewton(3),
    query: GaussNewton = GaussNewton(2),
) -> Posterior:
    """Compute the evidence of support and query with the program itself, starting where their encoders point, if any.

    For the final answer, more iterations and restarts help than training needs. Intervals are those of the evidence
    as it is: rescale them afterwards.

    Arguments:
        posterior: the posterior so far.
        support: how the prior reads the support.
        query: how the guide reads the query.
    """
    changed = posterior.copy()
    prior = changed.model.prior
    if isinstance(prior, SupportPrior):
        prior.evidence = _goes_on(prior.evidence, support)
    changed.guide.evidence = _goes_on(changed.guide.evidence, query)
    prior.interval_scale.fill_(1.0)
    settings = {"support": describe(support), "query": describe(query)}
    return changed.after("compute evidence", settings, {})


def refine_weights(
    posterior: Posterior,
    tasks: Tasks,
    *,
    num_steps: int = 8,
    batch_size: int = 8,
    evidence: GaussNewton = GaussNewton(2),
    forgetting: float = 0.1,
    prior_sd: float = 0.1,
    outlier_factor: float = 10.0,
    noise: str | None = "noise",
    network: str = "residual",
    seed: int = 0,
    progress: bool = True,
) -> Posterior:
    """Bring the weights of a network to the optimum by Gauss-Newton over many systems.

    Call it once :func:`~pyro_hybrid.meta_train` has come near. Encoders still point to the latents of the former
    weights: call :func:`compute_evidence` afterwards, with more iterations. Intervals become those of the evidence as
    it is: rescale them afterwards. :func:`~pyro_hybrid.training.second_order.refine_in_place` says how it works.

    Arguments:
        posterior: the posterior so far.
        tasks: the training data.
        num_steps: number of batches.
        batch_size: number of systems in a batch.
        evidence: how a batch is read, from where the guide points.
        forgetting: share of the weights' precision that each batch forgets.
        prior_sd: how far off the weights may be.
        outlier_factor: exclude tasks whose cost exceeds this multiple of the batch median.
        noise: name of the model's attribute that holds the observations' standard deviation, to be set to what is left
            unexplained; None to leave it.
        network: name of the model's attribute that holds the network.
        seed: seed of the batches.
        progress: show a progress bar.
    """
    settings = Refinement(
        num_steps=num_steps,
        batch_size=batch_size,
        evidence=evidence,
        forgetting=forgetting,
        prior_sd=prior_sd,
        outlier_factor=outlier_factor,
        noise=noise,
        seed=seed,
    )
    require_tasks(tasks)
    changed = posterior.copy()
    part = getattr(changed.model, network, None)
    require(
        isinstance(part, nn.Module),
        f"a model with a network in its attribute {network!r}",
        type(posterior.model).__name__,
        "Pass network= with the name of the attribute, such as network='force'.",
    )
    records = refine_in_place(
        changed.model, changed.guide, tasks, settings, network=part, progress=progress
    )
    changed.model.prior.interval_scale.fill_(1.0)
    noted = settings._asdict() | {"evidence": asdict(evidence), "network": network}
    return changed.after("refine weights", noted, _numbers(records))


def _numbers(records: list[BatchRecord]) -> dict[str, list[float]]:
    """By batch, in the form of JSON."""
    return {name: [float(getattr(r, name)) for r in records] for name in BatchRecord._fields}


def fix_gauge(posterior: Posterior, tasks: Tasks) -> Posterior:
    """Credit the physics with all that it can explain: physics latents change, and trajectories hardly do.

    Intervals become those of the evidence as it is: rescale them afterwards.

    Arguments:
        posterior: the posterior so far; its model owns a :class:`~pyro_hybrid.Gauge`.
        tasks: training tasks; the force is evaluated at points spread over what the program visits from their starts.
    """
    changed = posterior.copy()
    place_gauge(changed.model, tasks)
    changed.model.prior.interval_scale.fill_(1.0)
    return changed.after("fix gauge", {}, {})


def rescale_intervals(posterior: Posterior, tasks: Tasks, prob: float = 0.9) -> Posterior:
    """Scale intervals so that estimates from two halves of a task's shots agree at the nominal rate.

    Arguments:
        posterior: the posterior so far; its prior has computed evidence.
        tasks: training tasks; no truth is needed.
        prob: the share of tasks whose estimates should differ by no more than the interval of this probability.
    """
    changed = posterior.copy()
    scale = measure_interval_scale(changed.model, tasks, prob)
    with torch.no_grad():
        changed.model.prior.interval_scale.copy_(scale)
    return changed.after("rescale intervals", {"prob": prob}, {"scale": scale.tolist()})


def _goes_on(evidence: Evidence, computed: GaussNewton) -> Evidence:
    encoder = encoder_of(evidence)
    return computed if encoder is None else encoder.then(computed)
