"""Kinds of sites in a program's trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
from pyro import poutine
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Independent

__all__ = ["Site", "is_random", "latent_values", "random_sites", "unwrap"]

Site = Mapping[str, Any]


def is_random(site: Any) -> bool:
    """Tell latents and observations from parameters, plates, factors and deterministic sites."""
    if site["type"] != "sample" or site_is_subsample(site) or site_is_factor(site):
        return False
    return not site["infer"].get("_deterministic")


def random_sites(trace: poutine.Trace) -> dict[str, Site]:
    """Select a trace's latents and observations, by name."""
    return {name: site for name, site in trace.nodes.items() if is_random(site)}


def latent_values(sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """Select the values of the sites that are not observed."""
    return {name: site["value"] for name, site in sites.items() if not site["is_observed"]}


def unwrap(fn: Distribution, mask: Tensor | bool | None) -> tuple[Distribution, Tensor | bool]:
    """Remove Independent, Expanded and Masked wrappers; return the distribution and the product of the masks."""
    mask = True if mask is None else mask
    while isinstance(fn, Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask & mask
        fn = fn.base_dist
    return fn, mask
