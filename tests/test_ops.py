"""The native kernels against the oracle, and what they refuse."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    COUNTS,
    DTYPES,
    Generator,
    Tally,
    cast,
    compare_step,
    count_cases,
    host,
    random_rows,
    random_step,
    rounded,
    same_scores,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import fastmrc
from fastmrc import ops, reference

# --- random cases against the oracle -------------------------------------------------------------


def _kernel_rows(rng: Generator) -> tuple[NDArray[np.float32], str, Any]:
    """Draw rows of any width, as values and as the array the kernels get."""
    width = int(rng.choice([1, 2, 7, 63, 64, 65, 129, 300]))
    if rng.random() < 0.02:
        width = int(rng.choice([4095, 4097, 9000]))
    rows = random_rows(rng, int(rng.integers(1, 5)), width)
    rows[rng.random(len(rows)) < 0.1] = -np.inf
    dtype = str(rng.choice(DTYPES))
    return rounded(rows, dtype), dtype, cast(rows, dtype)


def _compare_kernels(rng: Generator, tally: Tally) -> None:
    """Top-k is exact, ties included; the log-sum-exp is right to float32."""
    rows, _, given_rows = _kernel_rows(rng)
    k = int(rng.choice([1, 2, 3, 8, 40, rows.shape[1], rows.shape[1] + 2]))
    tally.cases += 1
    values, ids = (host(a) for a in ops.topk(given_rows, k))
    want_values, want_ids = reference.topk(rows, k)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_array_equal(values, want_values)

    log_probs, ids = (host(a) for a in ops.log_softmax_topk(given_rows, k))
    want_log_probs, want_ids = reference.log_softmax_topk(rows, k)
    np.testing.assert_array_equal(ids, want_ids)
    assert same_scores(log_probs, want_log_probs)

    largest, argmax, logsumexp = (host(a) for a in ops.row_stats(given_rows))
    want_largest, want_argmax, want_logsumexp = reference.row_stats(rows)
    np.testing.assert_array_equal(argmax, want_argmax)
    np.testing.assert_array_equal(largest, want_largest)
    assert same_scores(logsumexp, want_logsumexp)


@pytest.mark.parametrize("cases", COUNTS)
def test_row_kernels(cases: int) -> None:
    tally, line = count_cases(20, cases, _compare_kernels)
    print(f"row kernels: {line}")
    assert tally.cases >= cases


@pytest.mark.parametrize("cases", COUNTS)
def test_beam_step(cases: int) -> None:
    tally, line = count_cases(21, cases, lambda rng, t: compare_step(random_step(rng), t))
    print(f"beam step: {line}")
    tally.check()


@pytest.mark.parametrize("vocabulary", [8191, 8192, 8193, 21128])
def test_beam_step_of_a_large_vocabulary(vocabulary: int) -> None:
    """Several parts of the vocabulary and several threads."""
    tally = Tally()
    for seed in range(10):
        compare_step(random_step(np.random.default_rng([vocabulary, seed]), vocabulary), tally)
    tally.check()


def test_beam_step_of_saturated_rows() -> None:
    """One token takes all: scores are so near to 0 that only the margin can be asked for."""
    tally = Tally()
    rng = np.random.default_rng(22)
    while tally.cases < 300:
        case = random_step(rng)
        case.logits = rounded(case.logits * np.float32(30), case.dtype)
        compare_step(case, tally)


def test_weights_of_any_size() -> None:
    """The float32 filter of the unconstrained step must not overflow."""
    rng = np.random.default_rng(23)
    logits = np.repeat(rng.normal(size=(1, 50)).astype(np.float32) * 5, 4, axis=0)
    for size in (3e38, 1e30, 1e-30, 1e-44):
        arguments: dict[str, Any] = {
            "passages": 4,
            "hypotheses": 1,
            "beam_size": 5,
            "end_id": 0,
            "vote": "weighted",
            "weights": np.full(4, size, dtype=np.float32),
        }
        ours = ops.beam_step(logits, [0.0], **arguments)
        theirs = reference.beam_step(logits, [0.0], **arguments)
        np.testing.assert_array_equal(ours[1], theirs[1])
        assert same_scores(ours[0], theirs[0])


FINITE = st.floats(-100, 100, width=32)


@settings(deadline=None, max_examples=100)
@given(
    x=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=2, min_side=1, max_side=70),
        elements=st.one_of(FINITE, st.just(-np.inf), st.integers(-1, 1).map(float)),
    ),
    k=st.integers(1, 80),
)
def test_topk_property(x: NDArray[np.float32], k: int) -> None:
    values, ids = ops.topk(x, k)
    want_values, want_ids = reference.topk(x, k)
    np.testing.assert_array_equal(values, want_values)
    np.testing.assert_array_equal(ids, want_ids)


# --- forms of arrays -----------------------------------------------------------------------------


def _step_arguments() -> dict[str, Any]:
    return {"passages": 2, "hypotheses": 1, "beam_size": 3, "end_id": 0}


KERNELS: dict[str, Callable[[Any], Any]] = {
    "topk": lambda x: ops.topk(x, 3),
    "log_softmax_topk": lambda x: ops.log_softmax_topk(x, 3),
    "row_stats": ops.row_stats,
    "beam_step": lambda x: ops.beam_step(x, [0.0], **_step_arguments()),
}
ROWS = np.random.default_rng(0).normal(size=(2, 40)).astype(np.float32)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return KERNELS[request.param]


def _equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


def _wide(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    wide = np.full((2, 64), 99.0, dtype=np.float32)
    wide[:, 5:45] = rows
    return wide[:, 5:45]


def _read_only(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    copy = rows.copy()
    copy.flags.writeable = False
    return copy


@pytest.mark.parametrize(
    "form",
    [
        _read_only,
        _wide,
        lambda rows: rows[::-1].copy()[::-1],
        torch.from_numpy,
        lambda rows: torch.from_numpy(rows).clone().requires_grad_(),
        lambda rows: torch.from_numpy(rows).clone().requires_grad_() * 1.0,
        lambda rows: torch.nn.Parameter(torch.from_numpy(rows).clone()),
        lambda rows: torch.from_numpy(_wide(rows)),
    ],
    ids=["read-only", "apart", "reversed", "torch", "grad", "non-leaf", "parameter", "view"],
)
def test_accepted_forms(kernel: Callable[[Any], Any], form: Callable[[Any], Any]) -> None:
    assert _equal(kernel(form(ROWS)), kernel(ROWS))


def test_rows_may_be_the_same_memory() -> None:
    row = ROWS[0]
    ours = ops.topk(np.broadcast_to(row, (3, 40)), 4)
    assert _equal(ours, ops.topk(np.stack([row] * 3), 4))


def test_output_follows_the_input(kernel: Callable[[Any], Any]) -> None:
    assert all(isinstance(a, np.ndarray) for a in kernel(ROWS))
    assert all(isinstance(a, torch.Tensor) for a in kernel(torch.from_numpy(ROWS)))


@pytest.mark.parametrize("to", [np.asarray, torch.from_numpy])
def test_inputs_are_not_modified(kernel: Callable[[Any], Any], to: Callable[[Any], Any]) -> None:
    x = ROWS.copy()
    kernel(to(x))
    np.testing.assert_array_equal(x, ROWS)


def test_beam_step_leaves_its_vectors_alone() -> None:
    arguments = {
        "scores": np.zeros(2, np.float32),
        "passages": np.array([1], np.int32),
        "hypotheses": np.array([2], np.int32),
        "weights": np.ones(1, np.float32),
        "states": np.zeros(2, np.int32),
    }
    before = {name: array.copy() for name, array in arguments.items()}
    trie = fastmrc.Trie([[1, 2], [3]])
    ops.beam_step(ROWS, beam_size=2, end_id=0, vote="weighted", constraint=trie, **arguments)  # type: ignore[arg-type]
    for name, array in arguments.items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_no_rows() -> None:
    values, ids = ops.topk(np.zeros((0, 5), np.float32), 2)
    assert values.shape == ids.shape == (0, 2)
    assert [a.shape for a in ops.row_stats(np.zeros((0, 5), np.float32))] == [(0,)] * 3
    arguments = _step_arguments() | {"passages": [0], "hypotheses": [0]}
    scores, tokens, parents = ops.beam_step(np.zeros((0, 5), np.float32), [], **arguments)
    assert tokens.tolist() == parents.tolist() == [[-1, -1, -1]]
    assert np.isneginf(scores).all()


@pytest.mark.parametrize("function", ["topk", "log_softmax_topk", "row_stats"])
def test_a_vector_is_one_row(function: str) -> None:
    arguments = () if function == "row_stats" else (3,)
    one = getattr(ops, function)(ROWS[0], *arguments)
    two = getattr(ops, function)(ROWS[:1], *arguments)
    assert all(np.array_equal(a, b[0]) for a, b in zip(one, two, strict=True))


# --- what is refused -----------------------------------------------------------------------------


class OnCuda:
    """A tensor that says it is on a GPU and cannot be exported from there."""

    ndim = 2

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("exported")


class BadProtocol:
    """Answers the protocol with something else."""

    ndim = 2

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **_: Any) -> Any:
        return 3


class ExportsFromCuda:
    """Hands out a DLPack tensor that says it is on a GPU, as a CUDA tensor would."""

    ndim = 2

    def __dlpack__(self, **_: Any) -> Any:
        class Tensor(ctypes.Structure):
            _fields_ = (
                ("data", ctypes.c_void_p),
                ("device_type", ctypes.c_int32),
                ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32),
                ("dtype", ctypes.c_uint8 * 4),
                ("shape", ctypes.POINTER(ctypes.c_int64)),
                ("strides", ctypes.POINTER(ctypes.c_int64)),
                ("byte_offset", ctypes.c_uint64),
                ("manager_ctx", ctypes.c_void_p),
                ("deleter", ctypes.c_void_p),
            )

        self.shape = (ctypes.c_int64 * 2)(2, 3)
        dtype = (ctypes.c_uint8 * 4)(2, 32, 1, 0)  # float32, one lane
        self.tensor = Tensor(None, 2, 1, 2, dtype, self.shape, None, 0, None, None)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


BAD_ARRAYS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("list", lambda: ROWS.tolist(), TypeError, "expected a NumPy array.*got list"),
    ("none", lambda: None, TypeError, "expected a NumPy array.*got NoneType"),
    ("float64", lambda: ROWS.astype(np.float64), TypeError, "expected float32.*got float64"),
    ("int32", lambda: ROWS.astype(np.int32), TypeError, "expected float32.*got int32"),
    ("bool", lambda: ROWS > 0, TypeError, "expected float32.*got bool"),
    ("complex", lambda: ROWS.astype(np.complex64), TypeError, "expected float32"),
    ("object", lambda: ROWS.astype(object), TypeError, "DLPack"),
    ("big-endian", lambda: ROWS.astype(">f4"), TypeError, "DLPack.*byte"),
    ("scalar", lambda: np.array(1.0, np.float32), ValueError, "expected 1 or 2 dimensions, got 0"),
    ("3-d", lambda: ROWS[None], ValueError, "expected 1 or 2 dimensions, got 3"),
    ("no columns", lambda: ROWS[:, :0], ValueError, "at least one .*columns"),
    ("transposed", lambda: ROWS.T, ValueError, "contiguous"),
    ("every second", lambda: ROWS[:, ::2], ValueError, "contiguous in memory, got stride 2"),
    ("backwards", lambda: ROWS[:, ::-1], ValueError, "contiguous in memory, got stride -1"),
    ("torch float64", lambda: torch.zeros(2, 3).double(), TypeError, "expected float32"),
    ("torch transposed", lambda: torch.zeros(3, 2).T, ValueError, "contiguous"),
    ("torch meta", lambda: torch.empty(2, 3, device="meta"), ValueError, "CPU"),
    ("torch sparse", lambda: torch.eye(2).to_sparse(), TypeError, "DLPack"),
    ("cuda", OnCuda, ValueError, "on the CPU, got device cuda:0"),
    ("exported from cuda", ExportsFromCuda, ValueError, "on the CPU, got device cuda:1"),
    ("bad protocol", BadProtocol, TypeError, "capsule"),
    ("NaN", lambda: np.where(ROWS[1, 7] == ROWS, np.nan, ROWS), ValueError, "NaN.*row 1"),
]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [entry[1:] for entry in BAD_ARRAYS],
    ids=[entry[0] for entry in BAD_ARRAYS],
)
def test_bad_arrays(
    kernel: Callable[[Any], Any],
    make: Callable[[], Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as caught:
        kernel(make())
    assert str(caught.value).startswith(("x: ", "logits: "))


@pytest.mark.parametrize("width", [1, 3, 64, 100, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [0.0, -np.inf, 3.0])
def test_nan_is_found_anywhere(width: int, dtype: str, fill: float) -> None:
    for column in {0, 1, width // 2, width - 2, width - 1} & set(range(width)):
        rows = np.full((3, width), fill, dtype=np.float32)
        rows[2, column] = np.nan
        for function in (lambda x: ops.topk(x, 2), ops.row_stats):
            with pytest.raises(ValueError, match="NaN.*row 2"):
                function(cast(rows, dtype))


@pytest.mark.parametrize(
    ("name", "argument"), [("log_softmax_topk", "x"), ("row_stats", "x"), ("beam_step", "logits")]
)
def test_plus_infinity_is_refused(name: str, argument: str) -> None:
    rows = ROWS.copy()
    rows[1, 4] = np.inf
    with pytest.raises(ValueError, match=f"^{argument}: .*infinity, got inf in row 1"):
        KERNELS[name](rows)


def test_topk_takes_plus_infinity() -> None:
    assert ops.topk(np.array([0, np.inf, 1], np.float32), 2)[1].tolist() == [1, 2]


def test_a_row_of_minus_infinity() -> None:
    rows = ROWS.copy()
    rows[1] = -np.inf
    assert ops.topk(rows, 2)[1][1].tolist() == [-1, -1]
    largest, argmax, logsumexp = ops.row_stats(rows)
    assert (largest[1], argmax[1], logsumexp[1]) == (-np.inf, -1, -np.inf)
    with pytest.raises(ValueError, match="only -inf in row 1"):
        KERNELS["beam_step"](rows)


@pytest.mark.parametrize("k", [0, -1])
def test_topk_refuses_k(k: int) -> None:
    for function in (ops.topk, ops.log_softmax_topk):
        with pytest.raises(ValueError, match=f"k: expected at least 1, got {k}"):
            function(ROWS, k)


@pytest.mark.parametrize("k", [1.5, None, "3", 2**70])
def test_topk_refuses_other_types_of_k(k: Any) -> None:
    with pytest.raises(TypeError):
        ops.topk(ROWS, k)


@pytest.mark.parametrize("k", [2**61, 2**62])
def test_topk_of_more_than_memory(k: int) -> None:
    with pytest.raises((MemoryError, ValueError)):
        ops.topk(ROWS, k)


TRIE = fastmrc.Trie([[1, 2]])
BAD_STEPS: list[tuple[dict[str, Any], str]] = [
    ({"beam_size": 0}, "beam_size: expected 1 to .*got 0"),
    ({"beam_size": 41}, "beam_size: expected 1 to the vocabulary size 40, got 41"),
    ({"end_id": -1}, "end_id: expected .*got -1"),
    ({"end_id": 40}, "end_id: expected .*got 40"),
    ({"passages": 1}, "logits: expected 1 rows"),
    ({"passages": [1, 1]}, "hypotheses|scores"),
    ({"passages": -1}, "passages"),
    ({"passages": [[1]]}, "passages: expected 1 dimension, got 2"),
    ({"hypotheses": 0}, "hypotheses|scores"),
    ({"vote": "median"}, "vote: expected original.*got median"),
    ({"vote": "weighted"}, "weights: expected one per passage"),
    ({"weights": [1.0, 1.0]}, "weights: expected .*None otherwise"),
    ({"vote": "weighted", "weights": [1.0]}, "weights: expected 2"),
    ({"vote": "weighted", "weights": [1.0, -1.0]}, "weights: expected finite"),
    ({"vote": "weighted", "weights": [1.0, np.nan]}, "weights: expected finite"),
    ({"vote": "weighted", "weights": [1.0, np.inf]}, "weights: expected finite"),
    ({"scores": [np.nan]}, "scores: expected"),
    ({"scores": [np.inf]}, "scores: expected"),
    ({"scores": [[0.0]]}, "scores"),
    ({"constraint": [TRIE, None]}, "constraint: expected 1"),
    ({"constraint": TRIE, "states": [0, 0]}, "states: expected 1"),
    ({"constraint": TRIE, "states": [3]}, "state.*3"),
    ({"constraint": TRIE, "states": [-2]}, "state.*-2"),
    ({"constraint": TRIE, "states": [2**31]}, "states: expected values that fit 32 bits"),
    ({"constraint": fastmrc.Trie([[40]])}, "constraint: expected tokens below .*40, got 40"),
    ({"constraint": fastmrc.Trie([[0]])}, "constraint: expected no end token 0"),
    ({"allow_end": [True, True]}, "allow_end: expected 1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_STEPS)
def test_beam_step_refuses(changes: dict[str, Any], message: str) -> None:
    arguments = _step_arguments() | {"scores": [0.0]} | changes
    with pytest.raises(ValueError, match=message):
        ops.beam_step(ROWS, **arguments)


@pytest.mark.parametrize("name", ["passages", "hypotheses"])
@pytest.mark.parametrize("value", [True, 1.5, "1", np.float32(1)])
def test_counts_are_integers(name: str, value: Any) -> None:
    arguments = _step_arguments() | {"scores": [0.0]} | {name: value}
    with pytest.raises(TypeError, match=f"{name}: expected an integer"):
        ops.beam_step(ROWS, **arguments)


@pytest.mark.parametrize("integer", [int, np.uint8, np.int64, np.array, torch.tensor])
def test_counts_of_any_integer_type(integer: Callable[[int], Any]) -> None:
    hypotheses = 100
    rows = np.repeat(ROWS[:1], 3 * hypotheses, axis=0)
    counts = {"passages": integer(1), "hypotheses": integer(hypotheses)}
    _, tokens, _ = ops.beam_step(rows, np.zeros(300, np.float32), beam_size=2, end_id=0, **counts)
    assert tokens.shape == (3, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": ["a"]}, "scores: expected numbers"),
        ({"passages": 1.5}, "passages: expected an integer"),
        ({"hypotheses": [True]}, "hypotheses: expected integers"),
        ({"states": [0.0]}, "states: expected integers"),
        ({"constraint": reference.Trie([[1]])}, "constraint: expected a fastmrc.SpanIndex or Trie"),
        ({"constraint": "trie"}, "constraint: expected a fastmrc.SpanIndex or Trie"),
        ({"constraint": [3]}, "constraint: expected a fastmrc.SpanIndex or Trie"),
        ({"beam_size": 1.5}, "incompatible"),
        ({"end_id": None}, "incompatible"),
    ],
)
def test_beam_step_refuses_types(changes: dict[str, Any], message: str) -> None:
    arguments = _step_arguments() | {"scores": [0.0]} | changes
    with pytest.raises(TypeError, match=message):
        ops.beam_step(ROWS, **arguments)


def test_a_dead_state_has_no_continuation() -> None:
    scores, tokens, _ = ops.beam_step(
        ROWS, [0.0], constraint=TRIE, states=[-1], **_step_arguments()
    )
    assert tokens.tolist() == [[-1, -1, -1]]
    assert np.isneginf(scores).all()
