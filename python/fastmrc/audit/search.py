"""The audit: stage after stage for the tokens that are left."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fastmrc.audit.cutting_planes import has_highs, lp_search
from fastmrc.audit.frank_wolfe import HullPoints, frank_wolfe
from fastmrc.audit.layer import OutputLayer, make_layer
from fastmrc.audit.newton import Found, Lifted, equal_in_effect, newton_search
from fastmrc.audit.report import AuditReport
from fastmrc.audit.results import AuditState, Results
from fastmrc.audit.rows import UNIT64, Rows, group_tokens
from fastmrc.audit.verdicts import Stage, TokenStatus
from fastmrc.audit.weights import Weights, best_proof, bounded_proof
from fastmrc.audit.witnesses import BestOthers, lead_errors, reflect
from fastmrc.data import StrPath
from fastmrc.errors import InputError
from fastmrc.options import AuditMethod
from fastmrc.pretrained import resolve_device

__all__ = ["find_unargmaxable"]

# Reflections before what is left is solved one by one, and those of the published search.
_REFLECTIONS, _PATIENCE = 20, 2500
_FRANK_WOLFE_STEPS = 500
# Numbers held at once by a stage that works on many tokens.
_HELD = 1 << 24
_ROWS = 1024
# A mean row so near to a token's, by the largest norm of a row, makes it NEAR.
_NEAR = 1e-6
_SAVE_SECONDS = 30.0


def find_unargmaxable(
    weight: Any,
    bias: Any = None,
    ids: Sequence[int] | NDArray[np.integer[Any]] | None = None,
    radius: float | None = None,
    device: str | None = None,
    *,
    method: AuditMethod = "auto",
    time_limit: float | None = None,
    state: StrPath | None = None,
    progress: bool = False,
) -> AuditReport:
    """Find tokens to which an output layer can never give the largest logit.

    Token k is argmaxable iff some input z gives ``(w_k - w_i) z + b_k - b_i > 0`` for all other
    tokens i. Demeter, Kimmel and Downey, "Stolen Probability", 2020; Grivas, Bogoychev and Lopez,
    "Low-Rank Softmax Can Have Unargmaxable Classes in Theory but Rarely in Practice", 2022.

    Every verdict but UNDECIDED comes with what proves it, beyond bounds of all rounding. Stages:
    equal rows; the product of all whitened rows; reflections; Newton steps on a working set; linear
    programmes, if highspy is installed (extra ``audit``).

    Parameters
    ----------
    weight
        [V, d], float16, bfloat16, float32 or float64, NumPy or torch; or an `OutputLayer`.
    bias
        [V], likewise, or None.
    ids
        Tokens to judge, against all others; None for all.
    radius
        Only inputs of at most this norm count; None for any. Without a bias it makes no difference.
    device
        As torch names it, of the products of the first stages; the CPU by default.
    method
        ``auto``, or one way for all tokens, to compare: ``frank-wolfe`` (the point of least norm in
        the hull of the differences), ``reflection`` (the published search, which finds witnesses
        only) or ``lp``.
    time_limit
        Seconds after which what is left stays UNDECIDED.
    state
        File in which a stopped audit is kept; named again, it goes on there.
    progress
        Whether to show progress bars on stderr.

    Returns
    -------
    AuditReport

    Raises
    ------
    InputError
        For shapes or numbers that do not fit, NaN or infinity, ids out of range, a method that
        cannot be used, or a state of another audit.
    TypeError
        For another dtype.
    """
    layer = weight if isinstance(weight, OutputLayer) else make_layer(weight, bias)
    if layer is weight and bias is not None:
        raise InputError("bias: expected None beside an OutputLayer, which has its own")
    asked = _checked_ids(ids, len(layer.weight))
    if radius is not None and not 1e-30 <= radius <= 1e30:
        raise InputError(f"radius: expected a number from 1e-30 to 1e30, got {radius}")
    if layer.sphere is not None and radius not in (None, layer.sphere):
        raise InputError(
            f"radius: expected none, or {layer.sphere} of the layer norm, got {radius}"
        )
    radius = layer.sphere if radius is None else radius
    if time_limit is not None and not time_limit > 0:
        raise InputError(f"time_limit: expected seconds above 0, got {time_limit}")
    methods = get_args(AuditMethod)
    if method not in methods:
        raise InputError(f"method: expected {', '.join(methods)}, got {method!r}")
    if method == "lp" and not has_highs():
        raise InputError("method: 'lp' needs highspy: pip install 'fastmrc[audit]'")
    if method in ("lp", "reflection") and radius is not None:
        raise InputError(f"method: {method!r} knows no radius (nor a layer norm, which sets one)")
    deadline = math.inf if time_limit is None else time.monotonic() + time_limit
    with _exact_products():
        audit = _Audit(layer, asked, radius, method, resolve_device(device), progress)
        audit.deadline = deadline
        return audit.run(state)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Have float32 multiplied as such, whatever the caller lets torch do; bounds rest on it."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _checked_ids(ids: Any, size: int) -> NDArray[np.int64]:
    if ids is None:
        return np.arange(size)
    given = np.asarray(ids)
    if given.size == 0:
        raise InputError("ids: expected at least one token, got none")
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise InputError(f"ids: expected integers, got {given.dtype} of shape {given.shape}")
    wrong = given[(given < 0) | (given >= size)]
    if len(wrong):
        raise InputError(f"ids: expected 0 to {size - 1}, got {wrong[0]}")
    return np.unique(given.astype(np.int64))


class _Audit:
    """One audit. Points and radius in here are those of `Rows`, the inputs divided by its unit."""

    def __init__(
        self,
        layer: OutputLayer,
        asked: NDArray[np.int64],
        radius: float | None,
        method: AuditMethod,
        device: torch.device,
        progress: bool,
    ) -> None:
        self.layer = layer
        self.asked = asked
        self.asked_radius = radius
        self.method = method
        self.progress = progress
        self.deadline = math.inf
        self.results = Results(len(layer.weight))
        distinct, self.judge = group_tokens(layer)
        self.rows = Rows(layer, distinct, device)
        self.lifted = Lifted(self.rows)
        # Without a bias any length will do, and the radius says nothing.
        self.bounded = radius is not None and self.rows.bias is not None
        self.radius = math.inf if radius is None else radius / self.rows.unit
        # Norm of witnesses whose norm is free; rounding must not take it above the radius.
        self.length = 1.0 if radius is None else self.radius * (1 - 2.0**-21)
        # In float64 where it is far from 1.
        self.narrow = 1e-30 < self.length < 1e30
        # Numbers, among the distinct rows, of those that are asked for.
        self.numbers = torch.from_numpy(np.searchsorted(distinct, np.unique(self.judge[asked])))
        self.all = len(self.numbers) == len(distinct)
        self.kept: dict[str, NDArray[Any]] = {}
        self.saved = time.monotonic()

    def go_on(self) -> bool:
        return time.monotonic() < self.deadline

    def run(self, path: StrPath | None) -> AuditReport:
        self.state = AuditState(path, "" if path is None else self._key())
        loaded = self.state.load(self.results)
        self.kept = {name: loaded[name] for name in ("best", "done") if name in loaded}
        try:
            self._stages()
        finally:
            self.state.save(self.results, **self.kept)
        self._near()
        self._twins()
        undecided = self.results.status[self.asked] == TokenStatus.UNDECIDED
        return AuditReport(
            self.layer,
            self.asked,
            self.asked_radius,
            self.method,
            self.results,
            self.judge,
            self.rows.weight_scale,
            self.rows.centre.numpy(),
            self.rows.basis.numpy(),
            self.go_on() or not undecided.any(),
        )

    def _key(self) -> str:
        asked = self.asked.tolist()
        return json.dumps([self.layer.digest(), asked, self.asked_radius, self.method])

    def _stages(self) -> None:
        if len(self.rows) == 1:
            token = int(self.rows.distinct[0])
            self.results.decide(token, TokenStatus.ARGMAXABLE, Stage.DUPLICATES, math.inf)
            self.results.witnesses[token] = np.zeros(self.rows.width)
            if self.layer.sphere is not None:
                self.results.witnesses[token][0] = self.length * self.rows.unit
            return
        if self.lifted.width == 0:  # all are equal but for rounding
            for number in self.numbers.tolist():
                twin = torch.tensor([int(number == 0)])
                found = equal_in_effect(self.rows, number, twin)
                self._take_weights(number, found.weights, Stage.DUPLICATES)
            return
        if self.method == "auto":
            self._whitened()
            if self.bounded:
                self._at_radius()
                self._frank_wolfe()
            else:
                self._reflections(_REFLECTIONS, white=True)
            self._one_by_one(Stage.NEWTON)
            if has_highs():
                self._one_by_one(Stage.LP)
        elif self.method == "reflection":
            self._reflections(_PATIENCE, white=False)
        elif self.method == "frank-wolfe":
            self._frank_wolfe()
        else:
            self._one_by_one(Stage.LP)

    def _left(self, stage: Stage) -> torch.Tensor:
        """Return the numbers of the rows that are not decided and that a stage has not tried."""
        tokens = self.rows.distinct[self.numbers.numpy()]
        left = self.results.status[tokens] == TokenStatus.UNDECIDED
        left &= self.results.tried[tokens] & (1 << stage) == 0
        return self.numbers[torch.from_numpy(left)]

    def _give_up(self, numbers: torch.Tensor, stage: Stage) -> None:
        """Note that a stage has tried rows, unless the time ran out on it."""
        if self.go_on():
            self.results.tried[self.rows.distinct[numbers.numpy()]] |= 1 << stage

    @contextmanager
    def _timed(self, stage: Stage) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.results.seconds[stage] += time.perf_counter() - begin

    def _save_now_and_then(self) -> None:
        if time.monotonic() - self.saved > _SAVE_SECONDS:
            self.state.save(self.results, **self.kept)
            self.saved = time.monotonic()

    # --- stages --------------------------------------------------------------------------------

    def _whitened(self) -> None:
        if "best" in self.kept and int(self.kept["done"]) < 0:
            return
        with self._timed(Stage.WHITENED):
            others = BestOthers(self.rows, None if self.all else self.numbers)
            if "best" in self.kept:
                others.best = torch.from_numpy(self.kept["best"].copy())
                others.done = int(self.kept["done"])
            with self._bar(others.total, others.done, "whitened rows") as bar:
                while others.done < others.total and self.go_on():
                    others.step()
                    bar.update()
                    self.kept = {"best": others.best.numpy(), "done": np.array(others.done)}
                    self._save_now_and_then()
            if others.done == others.total:
                self._judge_leads(others.best)
                self.kept = {"best": np.empty(0, np.float32), "done": np.array(-1)}

    def _judge_leads(self, best: torch.Tensor) -> None:
        rows, size = self.rows, max(1, _HELD // max(1, self.rows.width))
        for start in range(0, len(self.numbers), size):
            numbers = self.numbers[start : start + size]
            white = rows.white[numbers.to(rows.device)].cpu()
            points = white.double() @ rows.basis.T
            norms = torch.linalg.vector_norm(points, dim=1)
            lead = (white.double() ** 2).sum(dim=1) - best[start : start + size]
            safe = lead - lead_errors(rows, white, norms)
            scale, gap = self._scales(numbers, safe, norms)
            lengths = scale * norms
            sound = (safe > 0) & (scale * safe + gap > self._off_sphere(lengths))
            for inputs in (lengths, lengths * rows.unit):
                sound &= (inputs > 1e-30) & (inputs < 1e30)
            margin = (scale * safe + gap) / lengths
            tokens = rows.distinct[numbers.numpy()]
            for i in sound.nonzero()[:, 0].tolist():
                token = int(tokens[i])
                norm = float(lengths[i]) * rows.unit
                self._decide(token, Stage.WHITENED, float(margin[i]), norm)

    def _off_sphere(self, norms: torch.Tensor) -> torch.Tensor:
        """Bound what leads lose when points of some norms are moved onto the layer's sphere."""
        if self.layer.sphere is None:
            return torch.zeros_like(norms)
        return 2 * self.rows.largest_norm * (norms - self.radius).abs()

    def _decide(self, token: int, stage: Stage, margin: float, norm: float) -> None:
        """Note a token with a witness; the margin is that of scaled rows, the norm that of the
        input."""
        margin /= self.rows.weight_scale
        self.results.weights.pop(token, None)
        self.results.decide(token, TokenStatus.ARGMAXABLE, stage, margin, norm)

    def _scales(
        self, numbers: torch.Tensor, safe: torch.Tensor, norms: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how long the witnesses are made, by the factor, and what the bias may cost."""
        unit = self.length / norms
        bias = self.rows.bias
        if bias is None:
            return unit, torch.zeros_like(norms)
        gap = (bias[numbers] - bias.max()) * (1 + 16 * UNIT64) - 8 * self.rows.bias_rounding
        if self.bounded:
            return unit, gap
        return torch.maximum(unit, -2 * gap / safe), gap

    def _at_radius(self) -> None:
        """Try the whitened witnesses at the radius with each token's bias, not the largest one."""
        left = self._left(Stage.WHITENED)
        with self._timed(Stage.WHITENED), self._bar(len(left), 0, "at the radius") as bar:
            for numbers in torch.split(left, _ROWS):
                if not self.go_on():
                    return
                white = self.rows.white[numbers.to(self.rows.device)].cpu().double()
                self._take_witnesses(numbers, white @ self.rows.basis.T, Stage.WHITENED)
                self._advance(bar, numbers, Stage.WHITENED)

    def _reflections(self, steps: int, *, white: bool) -> None:
        rows = self.rows
        vectors = rows.white if white else rows.rows(slice(0, len(rows))).to(rows.device)
        size = max(1, min(_ROWS, _HELD // len(rows)))
        left = self._left(Stage.REFLECTION)
        with self._timed(Stage.REFLECTION), self._bar(len(left), 0, "reflections") as bar:
            for numbers in torch.split(left, size):
                if not self.go_on():
                    return
                starts = vectors[numbers.to(rows.device)]
                points = reflect(rows, numbers, starts, steps, vectors, self.go_on).cpu().double()
                points = points @ rows.basis.T if white else points
                self._take_witnesses(numbers, points, Stage.REFLECTION)
                self._advance(bar, numbers, Stage.REFLECTION)

    def _take_witnesses(self, numbers: torch.Tensor, points: torch.Tensor, stage: Stage) -> None:
        """Decide the rows that lead at their points [n, d]."""
        if self.rows.bias is None or self.bounded:
            norms = torch.linalg.vector_norm(points, dim=1, keepdim=True).clamp(min=1e-300)
            points = points * (self.length / norms)
        rounded = points.float() if self.narrow else points
        lead, error = self.rows.leads(rounded, numbers)
        lengths = torch.linalg.vector_norm(rounded.double(), dim=1)
        error += self._off_sphere(lengths)
        for i in ((lead > error) & (lengths <= self.radius)).nonzero()[:, 0].tolist():
            self._keep_witness(int(numbers[i]), rounded[i], float(lead[i]), stage)

    def _keep_witness(self, number: int, point: torch.Tensor, lead: float, stage: Stage) -> None:
        token = int(self.rows.distinct[number])
        wide = point.double().numpy()
        length = float(np.linalg.norm(wide))
        witness = wide * self.rows.unit
        with np.errstate(over="ignore"):
            narrow = witness.astype(np.float32)
        self.results.witnesses[token] = narrow if (narrow == witness).all() else witness
        margin = lead / length if length else math.inf
        self._decide(token, stage, margin, length * self.rows.unit)

    def _frank_wolfe(self) -> None:
        rows = self.rows
        # A radius bounds inputs in their own coordinates; without one the bias is a coordinate.
        vectors = self._hull_vectors()
        upwards = self.lifted.upwards()
        extra = upwards[0].to(vectors.dtype) if len(upwards) and not self.bounded else None
        bias = rows.bias.to(vectors.dtype) if rows.bias is not None and self.bounded else None
        radius = min(self.radius, 1e100) if self.bounded else 1.0
        size = max(1, min(256, _HELD // 4 // len(rows)))
        left = self._left(Stage.FRANK_WOLFE)
        with self._timed(Stage.FRANK_WOLFE), self._bar(len(left), 0, "Frank-Wolfe") as bar:
            for numbers in torch.split(left, size):
                if not self.go_on():
                    return
                found = frank_wolfe(
                    numbers, vectors, bias, extra, radius, _FRANK_WOLFE_STEPS, self.go_on
                )
                self._take_hull(numbers, found)
                self._advance(bar, numbers, Stage.FRANK_WOLFE)

    def _hull_vectors(self) -> torch.Tensor:
        """Return the rows [U, c] for Frank-Wolfe steps; of many, in float32."""
        rows = self.rows
        many = len(rows) * rows.width > _HELD
        width = rows.width if self.bounded else self.lifted.width
        dtype = torch.float32 if many else torch.float64
        vectors = torch.empty(len(rows), width, dtype=dtype)
        for numbers in torch.split(torch.arange(len(rows)), _ROWS):
            vectors[numbers] = (
                rows.rows(numbers) if self.bounded else self.lifted.vectors(numbers)
            ).to(dtype)
        return vectors

    def _take_hull(self, numbers: torch.Tensor, found: HullPoints) -> None:
        for i in (found.lower > 0).nonzero()[:, 0].tolist():
            point = found.best[i].double()
            witness = point if self.bounded else self.lifted.witness(point)
            if witness is not None:
                self._take_witnesses(numbers[i : i + 1], witness[None], Stage.FRANK_WOLFE)
        status = self.results.status[self.rows.distinct[numbers.numpy()]]
        for i in np.flatnonzero(status == TokenStatus.UNDECIDED).tolist():
            weights = found.weights[i, : len(self.rows)].double()
            others = weights.nonzero()[:, 0]
            number = int(numbers[i])
            proof = None
            if self.bounded:
                proof = bounded_proof(self.rows, number, others, weights[others], self.radius)
            if proof is None and len(others):
                proof = best_proof(self.rows, number, others, weights[others])
            self._take_weights(number, proof, Stage.FRANK_WOLFE)

    def _one_by_one(self, stage: Stage) -> None:
        solve = newton_search if stage == Stage.NEWTON else lp_search
        left = self._left(stage)
        with self._timed(stage), self._bar(len(left), 0, stage.name) as bar:
            for number in left.tolist():
                if not self.go_on():
                    return
                start = self.rows.white[number]
                self._take(number, solve(self.lifted, number, start, self.go_on), stage)
                self._advance(bar, torch.tensor([number]), stage)

    def _take(self, number: int, found: Found, stage: Stage) -> None:
        if found.witness is None:
            self._take_weights(number, found.weights, stage)
            return
        point, lead = found.witness, found.lead
        length = float(torch.linalg.vector_norm(point.double()))
        if math.isfinite(self.radius):
            if length:
                before = len(self.results.witnesses)
                resized = point.double()[None] * (self.length / length)
                self._take_witnesses(torch.tensor([number]), resized, stage)
                if len(self.results.witnesses) > before:
                    return
            if length > self.radius or self.layer.sphere is not None:
                return
        self._keep_witness(number, point, lead, stage)

    def _take_weights(self, number: int, weights: Weights | None, stage: Stage) -> None:
        """Keep weights that prove that a row has no witness; others if they are the best yet."""
        if weights is None:
            return
        results, token = self.results, int(self.rows.distinct[number])
        kept = (self.rows.distinct[weights.numbers], weights.values)
        if weights.proven:
            results.weights[token] = kept
            results.decide(token, TokenStatus.UNARGMAXABLE, stage, 0.0)
            return
        margin = weights.residual / self.rows.weight_scale
        margin += weights.bias_gap / self.rows.bias_scale
        if results.margin[token] <= margin:
            return
        near = weights.residual <= _NEAR * self.rows.largest_norm
        results.near[token] = near and weights.bias_gap <= _NEAR * weights.bias_size
        results.weights[token] = kept
        results.decide(token, TokenStatus.UNDECIDED, stage, margin)

    def _near(self) -> None:
        """Say of what is left which rows are within rounding of a proof."""
        results = self.results
        for number in self._left(Stage.NONE).tolist():
            token = int(self.rows.distinct[number])
            if results.near[token]:
                results.status[token] = TokenStatus.NEAR
            else:
                results.weights.pop(token, None)
                results.decide(token, TokenStatus.UNDECIDED, Stage.NONE, math.nan)

    # --- equal rows ----------------------------------------------------------------------------

    def _twins(self) -> None:
        """Judge tokens with equal rows by the one that stands for them."""
        judge, results, bias = self.judge, self.results, self.layer.bias
        twins = np.flatnonzero(judge != np.arange(len(judge)))
        tied = []
        for token in twins.tolist():
            other = int(judge[token])
            if bias is not None and bias[token] < bias[other]:
                results.weights[token] = (np.array([other]), np.ones(1))
                results.decide(token, TokenStatus.UNARGMAXABLE, Stage.DUPLICATES, 0.0)
            else:
                tied.append((token, other))
        for token, other in tied:
            if results.status[other] == TokenStatus.ARGMAXABLE:
                results.status[other] = TokenStatus.TIE
            for values in (results.status, results.stage, results.margin, results.norm):
                values[token] = values[other]

    # --- progress ------------------------------------------------------------------------------

    @contextmanager
    def _bar(self, total: int, done: int, name: str) -> Iterator[Any]:
        with tqdm(
            total=total,
            initial=done,
            desc=name,
            disable=not self.progress or not total,
            leave=False,
        ) as bar:
            yield bar

    def _advance(self, bar: Any, numbers: torch.Tensor, stage: Stage) -> None:
        """Note that a stage is through with rows."""
        self._give_up(numbers, stage)
        bar.update(len(numbers))
        if self.progress:
            counts = self.results.counts(self.rows.distinct[self.numbers.numpy()])
            bar.set_postfix_str(", ".join(f"{n} {name}" for name, n in counts.items()))
        self._save_now_and_then()
