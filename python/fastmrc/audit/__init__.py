"""Audit of output layers: tokens that can never have the largest logit."""

from __future__ import annotations

from fastmrc.audit.layer import OutputLayer, fold_layer_norm, load_layer, norm_plane
from fastmrc.audit.plot import plot_margins
from fastmrc.audit.report import AuditReport
from fastmrc.audit.search import find_unargmaxable
from fastmrc.audit.verdicts import Stage, TokenStatus, TokenVerdict
from fastmrc.audit.verify import Verification, read_settings, verify_certificates

__all__ = [
    "AuditReport",
    "OutputLayer",
    "Stage",
    "TokenStatus",
    "TokenVerdict",
    "Verification",
    "find_unargmaxable",
    "fold_layer_norm",
    "load_layer",
    "norm_plane",
    "plot_margins",
    "read_settings",
    "verify_certificates",
]
