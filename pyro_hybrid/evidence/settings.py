"""Settings of evidence as data that JSON can hold."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pyro_hybrid.errors import fail
from pyro_hybrid.evidence.encoder import Encoder, Then
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.evidence.protocol import Evidence

__all__ = ["describe", "encoder_of", "restore"]


def describe(evidence: Evidence) -> list[dict[str, Any]]:
    """Describe each step of evidence by its kind and its settings."""
    if isinstance(evidence, Then):
        return [*describe(evidence.first), *describe(evidence.second)]
    if isinstance(evidence, GaussNewton):
        return [{"kind": "gauss_newton", **asdict(evidence)}]
    if isinstance(evidence, Encoder):
        return [{"kind": "encoder"}]
    fail(
        "evidence made of ph.Encoder and ph.GaussNewton, to be saved",
        type(evidence).__name__,
        "Save its settings beside the posterior, and pass them again when you load it.",
        TypeError,
    )


def restore(description: list[dict[str, Any]], own: Evidence | None) -> Evidence:
    """Build described evidence; an encoder is taken from ``own``, which has its weights.

    Arguments:
        description: what :func:`describe` returned.
        own: evidence of a model or a guide that was built as for training.
    """
    encoder = None if own is None else encoder_of(own)
    evidence: Evidence | None = None
    for settings in description:
        kind = settings.get("kind") if isinstance(settings, dict) else None
        if kind == "encoder":
            if encoder is None:
                fail(
                    "a model and a guide with the encoder that was saved",
                    "one without an encoder",
                    "Build them as they were built for training.",
                )
            step: Evidence = encoder
        elif kind == "gauss_newton":
            options = {name: value for name, value in settings.items() if name != "kind"}
            step = GaussNewton(**options | {"segments": tuple(options.get("segments", ()))})
        else:
            fail("evidence of a known kind", repr(kind), "Load it with the version that wrote it.")
        evidence = step if evidence is None else Then(evidence, step)
    if evidence is None:
        fail("a description of evidence", "an empty one", "Load what Posterior.save wrote.")
    return evidence


def encoder_of(evidence: Evidence) -> Encoder | None:
    """Return the encoder that evidence begins with, if there is one."""
    first = evidence.first if isinstance(evidence, Then) else evidence
    return first if isinstance(first, Encoder) else None
