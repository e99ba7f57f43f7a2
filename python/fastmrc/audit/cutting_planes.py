"""One token at a time: the linear programme, solved by HiGHS on rows that are added as needed.

Maximise r so that ``D_i z >= r`` for all differences D_i and ``|z_j| <= 1``. A row has a witness
iff the largest r is above 0; else the duals of the programme are weights that prove it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastmrc.audit.newton import Found, Lifted, equal_in_effect, tested_witness
from fastmrc.audit.weights import best_proof

__all__ = ["has_highs", "lp_search"]

_ROUNDS = 200
# For all programmes of a token: HiGHS is not interrupted by anything else.
_SECONDS = 120.0
_TOLERANCE = 1e-9


def has_highs() -> bool:
    """Return whether the package highspy is installed."""
    return importlib.util.find_spec("highspy") is not None


def lp_search(lifted: Lifted, number: int, start: torch.Tensor, go_on: Callable[[], bool]) -> Found:
    """Search as `newton_search` does, by linear programmes."""
    import highspy

    rows = lifted.rows
    solver = _solver(highspy, lifted.width)
    _add(highspy, solver, lifted.upwards())
    working = added = lifted.first_rows(number, start)
    for _ in range(_ROUNDS):
        differences = lifted.differences(number, added)
        twins = added[(differences == 0).all(dim=1)]
        if len(twins):
            return equal_in_effect(rows, number, twins)
        _add(highspy, solver, differences)
        solver.run()
        if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            break
        solution = solver.getSolution()
        values = torch.tensor(solution.col_value, dtype=torch.float64)
        point, lead = values[:-1], float(values[-1])
        if lead <= _TOLERANCE:
            duals = torch.tensor(solution.row_dual, dtype=torch.float64).abs()
            duals = duals[len(duals) - len(working) :]
            return Found(weights=best_proof(rows, number, working, duals))
        found = tested_witness(rows, number, lifted.witness(point))
        if found is not None:
            return Found(*found)
        added = lifted.more_rows(number, working, point)
        if not len(added) or not go_on():
            break
        working = torch.cat([working, added])
    return Found()


def _solver(highspy: Any, width: int) -> Any:
    class Silent(highspy.Highs):  # type: ignore[misc]
        """Says nothing; its constructor would print the version, before an option can be set."""

        def enableCallbacks(self) -> None:
            self.silent()
            super().enableCallbacks()

    solver = Silent()
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("time_limit", _SECONDS)
    for name in ("primal_feasibility_tolerance", "dual_feasibility_tolerance"):
        solver.setOptionValue(name, _TOLERANCE)
    infinite = highspy.kHighsInf
    for _ in range(width):
        solver.addVar(-1.0, 1.0)
    solver.addVar(0.0, infinite)
    solver.changeColCost(width, 1.0)
    solver.changeObjectiveSense(highspy.ObjSense.kMaximize)
    return solver


def _add(highspy: Any, solver: Any, differences: torch.Tensor) -> None:
    """Add ``D z - r >= 0`` for differences D [n, width]."""
    count, width = differences.shape
    scaled = differences / torch.linalg.vector_norm(differences, dim=1, keepdim=True)
    entries = torch.cat([scaled, -torch.ones(count, 1).double()], dim=1).numpy()
    starts = np.arange(count, dtype=np.int32) * (width + 1)
    columns = np.tile(np.arange(width + 1, dtype=np.int32), count)
    solver.addRows(
        count,
        np.zeros(count),
        np.full(count, highspy.kHighsInf),
        entries.size,
        starts,
        columns,
        entries.ravel(),
    )
