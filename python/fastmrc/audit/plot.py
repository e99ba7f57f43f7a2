"""A plot of an audit: norms of rows against margins."""

from __future__ import annotations

import math

import numpy as np

from fastmrc.audit.report import AuditReport
from fastmrc.audit.verdicts import TokenStatus
from fastmrc.data import StrPath
from fastmrc.errors import InputError

__all__ = ["plot_margins"]

_MARKS = {
    TokenStatus.UNARGMAXABLE: ("tab:red", "x"),
    TokenStatus.NEAR: ("tab:orange", "+"),
    TokenStatus.TIE: ("tab:purple", "v"),
    TokenStatus.UNDECIDED: ("tab:gray", "1"),
}


def plot_margins(report: AuditReport, path: StrPath) -> None:
    """Draw the norm of each row against its margin, logarithmically.

    Tokens without a positive margin stand on a line below all others.

    Parameters
    ----------
    report
        Of the audit.
    path
        Picture to write; the ending says the format.

    Raises
    ------
    InputError
        If matplotlib is not installed (extra ``audit``) or knows no such format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plot: needs matplotlib: pip install 'fastmrc[audit]'") from error
    norms = report.row_norms()
    margins = report.results.margin[report.ids]
    status = report.results.status[report.ids]
    sound = np.isfinite(margins) & (margins > 0)
    floor = float(margins[sound].min()) / 3 if sound.any() else 1.0
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plain = status == TokenStatus.ARGMAXABLE
    heights = np.where(sound, margins, floor)
    axes.scatter(
        norms[plain], heights[plain], s=4, color="tab:blue", label=_label(plain, "argmaxable")
    )
    for kind, (colour, mark) in _MARKS.items():
        chosen = status == kind
        if chosen.any():
            axes.scatter(
                norms[chosen],
                heights[chosen] if kind == TokenStatus.TIE else np.full(chosen.sum(), floor),
                s=36,
                color=colour,
                marker=mark,
                label=_label(chosen, kind.name.lower()),
            )
    axes.set_yscale("log")
    if math.isfinite(norms.max()) and (norms > 0).all() and norms.max() > 100 * norms.min():
        axes.set_xscale("log")
    axes.set_xlabel("norm of the row")
    axes.set_ylabel("margin: lead at the witness / its norm")
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise InputError(f"plot: {error}") from error


def _label(chosen: np.ndarray, name: str) -> str:
    return f"{name} ({int(chosen.sum()):,})"
