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
        "evidence made of ph.Encoder and ph.GaussNewton, which alone can be saved",
        type(evidence).__name__,
        "Save the weights alone with ph.Fit().save(folder, model, guide), and ph.load them into a model and a guide "
        "that you built with this evidence.",
        TypeError,
    )


def restore(description: list[dict[str, Any]], own: Evidence | None) -> Evidence:
    """Build described evidence; an encoder is taken from ``own``, which has its weights.

    Arguments:
        description: what :func:`describe` returned.
        own: evidence of a model or a guide that was built as for training.
    """
    encoder = None if own is None else encoder_of(own)
    steps = [_restore_step(settings, encoder) for settings in description]
    match steps:
        case [evidence]:
            return evidence
        case [Encoder() as first, second]:
            return first.then(second)
    fail(
        "a description of an encoder, of computed evidence, or of both in this order",
        [type(step).__name__ for step in steps],
        "Load what Posterior.save wrote.",
    )


def _restore_step(settings: dict[str, Any], encoder: Encoder | None) -> Evidence:
    match settings:
        case {"kind": "gauss_newton", **options}:
            return GaussNewton(**options | {"segments": tuple(options.get("segments", ()))})
        case {"kind": "encoder"} if encoder is not None:
            return encoder
        case {"kind": "encoder"}:
            fail(
                "a model and a guide with the encoder that was saved",
                "one without an encoder",
                "Build them as they were built for training.",
            )
    fail("evidence of a known kind", settings, "Load it with the version that wrote it.")


def encoder_of(evidence: Evidence) -> Encoder | None:
    """Return the encoder that evidence begins with, if there is one."""
    first = evidence.first if isinstance(evidence, Then) else evidence
    return first if isinstance(first, Encoder) else None
