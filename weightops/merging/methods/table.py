"""The merge methods that can be named. To add one, write its function and name it here."""

from __future__ import annotations

from weightops.merging.methods import averaging, sparse, spectral, spherical
from weightops.merging.methods.method import Method
from weightops.support.registry import Registry

_FUNCTIONS = (
    averaging.linear,
    averaging.task_arithmetic,
    averaging.model_stock,
    averaging.ema,
    averaging.passthrough,
    sparse.magnitude,
    sparse.ties,
    sparse.dare_linear,
    sparse.dare_ties,
    sparse.breadcrumbs,
    sparse.breadcrumbs_ties,
    sparse.della_linear,
    sparse.della,
    sparse.sce,
    sparse.tall_consensus,
    spherical.slerp,
    spherical.nuslerp,
    spherical.karcher,
    spectral.tsv_m,
    spectral.iso_c,
    spectral.iso_cts,
)

METHODS: Registry[Method] = Registry(
    "merge method", "methods", {f.__name__: Method(f.__name__, f) for f in _FUNCTIONS}
)
