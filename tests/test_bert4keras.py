"""bert4keras' decoder: the same beams as the oracle, the right samples, readers, bad input."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import random_cases
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastmrc import InputError, Seq2SeqReader, reference
from fastmrc.integrations import bert4keras
from fastmrc.integrations.bert4keras import AutoRegressiveDecoder, ReadingComprehension
from fastmrc.pretrained import LoadedModel, load_model
from fastmrc.reference import ReencodingEncoder
from fastmrc.reference.autoregressive import best_continuations, sampling_distribution
from fastmrc.reference.sampling import uniform

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("one_thread")

# --- random models --------------------------------------------------------------------------------

INPUTS = ([7, 8], [3.5])  # two inputs of a model, without a batch axis


def random_row(rng: np.random.Generator, vocabulary: int, rtype: str, tied: bool) -> Array:
    """Draw one prediction, with forbidden tokens; tied: of few different numbers."""
    if rtype == "logits":
        row = rng.choice([-np.inf, 0, 0, 1, 2], vocabulary) if tied else rng.normal(size=vocabulary)
        row[rng.integers(vocabulary)] = 0.5
        return row
    row = rng.choice([0, 0, 0.1, 0.1, 0.4], vocabulary) if tied else rng.random(vocabulary) ** 3
    row[rng.random(vocabulary) < 0.2] = 0
    row[rng.integers(vocabulary)] += 0.2
    return row


def table_model(
    base: Any,
    seed: int = 0,
    *,
    vocabulary: int = 5,
    rtype: str = "probas",
    use_states: bool = False,
    tied: bool = False,
    dtype: str = "float32",
) -> Any:
    """Return a decoder class whose predictions are random, one row for each prefix."""

    class Table(base):  # type: ignore[misc]
        calls: list[Any]

        @base.wraps(default_rtype=rtype, use_states=use_states)
        def predict(self, inputs: Any, output_ids: Array, states: Any) -> Any:
            self.calls.append((output_ids.tolist(), [rows.tolist() for rows in inputs], states))
            assert all(len(rows) == len(output_ids) for rows in inputs)
            rows = [
                random_row(np.random.default_rng([seed, *prefix]), vocabulary, rtype, tied)
                for prefix in output_ids.tolist()
            ]
            array = np.array(rows).astype(dtype)
            return (array, states + 1) if use_states else array

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.calls = []

    return Table


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A random model, a decoder of it and a beam search."""
    vocabulary = draw(st.integers(1, 9))
    return {
        "model": {
            "seed": draw(st.integers(0, 2**32)),
            "vocabulary": vocabulary,
            "rtype": draw(st.sampled_from(["probas", "logits"])),
            "use_states": draw(st.booleans()),
            "tied": draw(st.booleans()),
            "dtype": draw(st.sampled_from(["float32", "float32", "float64", "float16"])),
        },
        "decoder": (
            draw(st.none() | st.integers(0, vocabulary - 1)),
            draw(st.integers(0, vocabulary - 1)),
            draw(st.integers(1, 6)),
            draw(st.integers(0, 5)),
        ),
        "search": {
            "topk": draw(st.integers(1, vocabulary)),
            "states": 0,
            "temperature": draw(st.sampled_from([1, 1, 0.5, 2.0])),
            "min_ends": draw(st.integers(1, 3)),
        },
    }


# --- beam search ----------------------------------------------------------------------------------


@random_cases(400)
@given(cases())
def test_beam_search_equals_the_oracle(case: dict[str, Any]) -> None:
    ours = table_model(AutoRegressiveDecoder, **case["model"])(*case["decoder"])
    theirs = table_model(reference.AutoRegressiveDecoder, **case["model"])(*case["decoder"])
    found = ours.beam_search(INPUTS, **case["search"])
    expected = theirs.beam_search(INPUTS, **case["search"])
    assert found.tolist() == expected.tolist()
    assert found.dtype == expected.dtype
    assert ours.calls == theirs.calls  # the same beams in the same order at each step


def random_scores(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> Array:
    """Draw scores with ties, forbidden entries, and differences that float64 sums lose."""
    kind = rng.integers(4)
    if kind == 0:
        scores = rng.normal(size=shape) * 10
    elif kind == 1:
        scores = rng.choice([-np.inf, np.log(1e-12), np.log(1e-12), -1.5, -0.5, 0.0], shape)
    elif kind == 2:
        scores = rng.choice([1e-30, 2e-30, 3e-30, 0.0, -0.0, -1e-30], shape)
    else:
        scores = np.log(rng.random(shape) ** 4 + 1e-12)
    return scores.astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_selection_equals_the_oracle(dtype: str) -> None:
    rng = np.random.default_rng(5)
    for _ in range(1500):
        hypotheses = int(rng.integers(1, 6))
        vocabulary = int(rng.choice([1, 2, 3, 7, 30, 200, 1000]))
        scores = random_scores(rng, (hypotheses, vocabulary), dtype)
        totals = rng.choice([0.0, -1.25, -1.25, -7.1, -300.3], hypotheses)
        count = int(rng.integers(1, min(hypotheses * vocabulary, 12) + 1))
        found = bert4keras._best_continuations(totals, scores, count)
        expected = best_continuations(totals[:, None] + scores, count)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype


def test_native_selection_is_used_unless_it_cannot_decide() -> None:
    totals = np.array([-2.0, -3.0])
    scores = np.log(np.array([[0.5, 0.5, 0, 0], [0.1, 0.2, 0.3, 0.4]], np.float32) + 1e-12)
    assert bert4keras._best_of_rows(totals, scores, 3) is not None
    assert bert4keras._best_of_rows(totals, scores.astype(np.float64), 3) is None
    # A greedy step that is certain of its token: log(1) = 0.
    certain = np.array([[0.0, -27.6], [-27.6, 0.0]], np.float32)
    assert bert4keras._best_of_rows(totals, certain, 1) is not None
    lost = np.array([[0.0, 1e-30, 2e-30, -5.0], [-9.0, -9.5, -9.7, -9.8]], np.float32)
    assert bert4keras._best_of_rows(totals, lost, 2) is None


@pytest.mark.parametrize("side", [1, -1])
def test_different_scores_of_equal_sums(side: int) -> None:
    """Scores so near each other that rounding makes their sums equal, but on one side only."""
    total, last = -300.3, np.float32(3e-7)

    def ties(x: np.float32, towards: int) -> bool:
        return total + float(np.nextafter(x, np.float32(towards))) == total + float(x)

    while not ties(last, side) or ties(last, -side):
        last = np.nextafter(last, np.float32(1))
    other = np.nextafter(last, np.float32(side))
    # The lower tokens win, not the larger scores.
    row = [last, last, other, -1.0] if side > 0 else [other, last, last, -1.0]
    scores = np.array([row], np.float32)
    _, tokens, _ = bert4keras._best_continuations(np.array([total]), scores, 2)
    assert tokens.tolist() == best_continuations(total + scores.astype(np.float64), 2)[1].tolist()
    assert tokens.tolist() == [0, 1]


def test_forbidden_tokens_fill_the_beam() -> None:
    class Chain(AutoRegressiveDecoder):
        @AutoRegressiveDecoder.wraps()
        def predict(self, inputs: Any, output_ids: Array, states: Any) -> Any:
            beams.append(output_ids.tolist())
            probas = np.zeros((len(output_ids), 4), np.float32)
            probas[:, 2] = 1  # one token is allowed
            return probas

    beams: list[Any] = []
    assert Chain(None, 3, 3).beam_search([], 3).tolist() == [2, 2, 2]
    # The fillers have equal scores: lower tokens first.
    assert beams[1] == [[2], [0], [1]]
    assert beams[2] == [[2, 2], [2, 0], [2, 1]]  # and not [0, 2], whose score is the same


def scripted(base: Any, script: dict[tuple[int, ...], list[float]]) -> Any:
    """Return a decoder class with given probabilities; a prefix without any repeats token 0."""

    class Scripted(base):  # type: ignore[misc]
        @base.wraps(default_rtype="probas")
        def predict(self, inputs: Any, output_ids: Array, states: Any) -> Any:
            return np.array([script.get(tuple(ids), [1.0, 0, 0]) for ids in output_ids.tolist()])

    return Scripted


@pytest.mark.parametrize("base", [AutoRegressiveDecoder, reference.AutoRegressiveDecoder])
def test_the_finishing_rule(base: Any) -> None:
    # Token 2 ends. It is second after the first step: that hypothesis leaves, though what follows
    # the other one is worth less.
    decoder = scripted(base, {(): [0.6, 0, 0.4], (0,): [0.1, 0.2, 0.1], (0, 1): [0, 0, 1.0]})
    assert decoder(None, 2, 5).beam_search([], 2).tolist() == [0, 1, 2]
    # With a least length of 2 nobody leaves after one token, and what goes on after an end may win.
    decoder = scripted(base, {(): [0.6, 0, 0.4], (0,): [0.1, 0, 0], (2,): [0, 0.9, 0]})
    assert decoder(None, 2, 2, 2).beam_search([], 2).tolist() == [2, 1]
    # The second end token finishes; the start token counts where it is one.
    decoder = scripted(base, {(): [0.1, 0, 0.9], (2,): [0, 0, 1.0], (1, 2): [0, 0, 1.0]})
    assert decoder(None, 2, 5).beam_search([], 1, min_ends=2).tolist() == [2, 2]
    decoder = scripted(base, {(2,): [0, 0.3, 0.7]})
    assert decoder(2, 2, 5).beam_search([], 1, min_ends=2).tolist() == [2, 2]
    assert decoder(2, 2, 2).beam_search([], 1, min_ends=3).tolist() == [2, 2, 0]


def test_inputs_are_the_models_to_change() -> None:
    class Marking(AutoRegressiveDecoder):
        @AutoRegressiveDecoder.wraps()
        def predict(self, inputs: Any, output_ids: Array, states: Any) -> Any:
            seen.append([rows[:, 0].tolist() for rows in inputs])
            inputs[0][:, 0] -= 1
            return np.full((len(output_ids), 3), 1 / 3, np.float32)

    seen: list[Any] = []
    given = [np.array([5, 6]), [9]]
    Marking(None, 9, 3).beam_search(given, 2)
    assert seen == [[[5], [9]], [[4, 4], [9, 9]], [[3, 3], [9, 9]]]
    assert given[0].tolist() == [5, 6]


def test_a_longer_prefix_may_replace_the_first_ids() -> None:
    decoder = table_model(AutoRegressiveDecoder, 3)(1, 0, 4)
    decoder.first_output_ids = np.array([[1, 2, 3]])
    assert decoder.beam_search(INPUTS, 2)[:3].tolist() == [1, 2, 3]
    assert all(ids[:3].tolist() == [1, 2, 3] for ids in decoder.random_sample(INPUTS, 4))


def test_a_method_of_five_arguments_needs_no_decorator() -> None:
    class Plain(AutoRegressiveDecoder):
        def predict(  # type: ignore[override]
            self, inputs: Any, output_ids: Array, states: Any, temperature: float, rtype: str
        ) -> Any:
            calls.append((temperature, rtype))
            return np.array([[-1.0, -0.5, -np.inf]] * len(output_ids), np.float32), states

    calls: list[Any] = []
    assert Plain(None, 0, 2).beam_search([], 2, temperature=3).tolist() == [1, 1]
    assert calls == [(3, "logits")] * 2


# --- the decorator --------------------------------------------------------------------------------


@random_cases(200)
@given(cases(), st.sampled_from(["probas", "logits"]), st.integers(1, 4))
def test_decorated_predictions_equal_the_oracles_to_the_bit(
    case: dict[str, Any], rtype: str, rows: int
) -> None:
    found, expected = (
        table_model(base, **case["model"])(None, 0, 1).predict(
            [np.zeros((rows, 1))],
            np.arange(rows)[:, None],
            0,
            case["search"]["temperature"],
            rtype,
        )
        for base in (AutoRegressiveDecoder, reference.AutoRegressiveDecoder)
    )
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[0].dtype == expected[0].dtype == case["model"]["dtype"]
    assert found[1] == expected[1] == (1 if case["model"]["use_states"] else None)


def test_a_prediction_is_not_changed() -> None:
    class Constant(AutoRegressiveDecoder):
        @AutoRegressiveDecoder.wraps()
        def predict(self, inputs: Any, output_ids: Array, states: Any) -> Any:
            """Predict."""
            return table[: len(output_ids)]

    table = np.full((8, 4), 0.5, np.float32)
    table.flags.writeable = False
    decoder = Constant(None, 0, 3)
    decoder.beam_search([], 2)
    decoder.beam_search([], 2, temperature=0.5)
    decoder.random_sample([], 3, topk=2, topp=0.9)
    assert (table == 0.5).all()
    assert Constant.predict.__doc__ == "Predict."


# --- sampling -------------------------------------------------------------------------------------


def replayed(decoder: Any, n: int, seed: int, options: dict[str, Any]) -> list[list[int]]:
    """Draw the sequences again, each on its own, from the distribution that the oracle computes."""
    temperature = options.get("temperature", 1)
    sequences = []
    for stream in range(n):
        ids, finished = decoder.first_output_ids[0].tolist(), False
        while not finished and len(ids) < decoder.first_output_ids.shape[1] + decoder.maxlen:
            probas, _ = decoder.predict(
                [np.zeros((1, 1))], np.array([ids], dtype=int), 0, temperature, "probas"
            )
            share = sampling_distribution(
                probas.astype(np.float64), options.get("topk"), options.get("topp")
            )[0]
            number = uniform(seed, stream, len(ids) - decoder.first_output_ids.shape[1])
            ids.append(int(np.flatnonzero(np.cumsum(share) > number * share.sum())[0]))
            ends = ids.count(decoder.end_id)
            finished = ids[-1] == decoder.end_id and ends >= options.get("min_ends", 1)
            finished &= len(ids) >= decoder.minlen
        sequences.append((not finished, len(ids) if finished else 0, stream, ids))
    return [ids for *_, ids in sorted(sequences)]


def test_samples_follow_the_oracles_distribution_draw_by_draw() -> None:
    rng = np.random.default_rng(11)
    lengths: Counter[int] = Counter()
    for case in range(150):
        vocabulary = int(rng.integers(2, 12))
        model = {
            "seed": case,
            "vocabulary": vocabulary,
            "rtype": str(rng.choice(["probas", "logits"])),
            "use_states": bool(rng.integers(2)),
            "dtype": str(rng.choice(["float32", "float64"])),
        }
        options: dict[str, Any] = {
            "topk": [None, int(rng.integers(1, vocabulary + 1))][rng.integers(2)],
            "topp": [None, float(rng.uniform(0.05, 0.99))][rng.integers(2)],
            "temperature": [1, 0.5, 2.0][rng.integers(3)],
            "min_ends": int(rng.integers(1, 3)),
        }
        start = [None, int(rng.integers(vocabulary))][rng.integers(2)]
        decoder = table_model(AutoRegressiveDecoder, **model)(start, 0, 5, int(rng.integers(4)))
        np.random.seed(case)
        seed = int(np.random.randint(2**63, dtype=np.uint64))
        np.random.seed(case)
        found = [ids.tolist() for ids in decoder.random_sample(INPUTS, 6, states=0, **options)]
        assert found == replayed(decoder, 6, seed, options), (case, model, options)
        lengths.update(map(len, found))
    assert len(lengths) >= 5  # early and late ends


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"topk": 3},
        {"topp": 0.7},
        {"topk": 6, "topp": 0.6, "temperature": 2.0},
    ],
    ids=str,
)
def test_shares_of_the_samples(options: dict[str, Any]) -> None:
    from scipy.stats import chisquare

    decoder = table_model(AutoRegressiveDecoder, 9, vocabulary=9)(None, 0, 1)
    np.random.seed(3)
    drawn = np.concatenate(decoder.random_sample(INPUTS, 20_000, **options))
    probas, _ = decoder.predict(
        [np.zeros((1, 1))], decoder.first_output_ids, None, options.get("temperature", 1), "probas"
    )
    share = sampling_distribution(probas, options.get("topk"), options.get("topp"))[0]
    counts = np.bincount(drawn, minlength=9)
    assert (counts[share == 0] == 0).all() and (share == 0).any()
    kept = share > 0
    expected = share[kept].astype(np.float64)
    assert chisquare(counts[kept], expected / expected.sum() * counts.sum()).pvalue > 1e-3


def test_sequences_are_as_frequent_as_those_of_the_oracle() -> None:
    from scipy.stats import chi2_contingency

    np.random.seed(8)
    counts = []
    for base in (AutoRegressiveDecoder, reference.AutoRegressiveDecoder):
        decoder = table_model(base, 21, vocabulary=3, rtype="logits")(1, 0, 3)
        drawn = decoder.random_sample(INPUTS, 3000, topp=0.95, temperature=1.5, min_ends=2)
        ends = [[ids.tolist().count(0) >= 2 and ids[-1] == 0 for ids in drawn]]
        # Finished ones in front, step by step.
        finished = sum(ends[0])
        assert ends[0] == [True] * finished + [False] * (3000 - finished)
        assert all(len(a) <= len(b) for a, b in pairwise(drawn[:finished]))
        counts.append(Counter(tuple(ids.tolist()) for ids in drawn))
    often = [key for key in counts[0] | counts[1] if counts[0][key] + counts[1][key] >= 20]
    assert len(often) > 8
    table = [[count[key] for key in often] for count in counts]
    assert chi2_contingency(table).pvalue > 1e-3


def test_seeds_of_numpy_make_samples_reproducible() -> None:
    decoder = table_model(AutoRegressiveDecoder, 5, vocabulary=9)(None, 0, 6)

    def draw() -> list[list[int]]:
        return [ids.tolist() for ids in decoder.random_sample(INPUTS, 5)]

    np.random.seed(1)
    first, second = draw(), draw()
    np.random.seed(1)
    assert draw() == first != second
    assert draw() == second


def test_a_nucleus_of_equal_shares() -> None:
    class Equal(AutoRegressiveDecoder):
        @AutoRegressiveDecoder.wraps()
        def predict(self, inputs: Any, output_ids: Array, states: Any) -> Any:
            return np.array([row] * len(output_ids), np.float32)

    def drawn(topp: float) -> set[int]:
        return set(np.concatenate(Equal(None, 9, 1).random_sample([], 200, topp=topp)).tolist())

    np.random.seed(0)
    row = [0.2, 0.2, 0.2, 0.2, 0.2]
    assert drawn(0.4) == {0, 1}
    assert drawn(0.6) == {0, 1, 2}
    assert drawn(0.600005) == {0, 1, 2, 3}
    assert drawn(1e-9) == {0}
    row = [0.45, 0.45, 0.1]
    assert drawn(0.45) == {0}
    assert drawn(0.9) == {0, 1}
    row = [0.0, 4.0, 0.0, 4.0, 8.0]  # need not add up to 1
    assert drawn(0.5) == {4}
    assert drawn(1.0) == {1, 3, 4}


# --- errors ---------------------------------------------------------------------------------------


def constant(rows: Any, rtype: str = "probas", use_states: bool = False) -> AutoRegressiveDecoder:
    """Return a decoder that predicts `rows`."""

    class Constant(AutoRegressiveDecoder):
        @AutoRegressiveDecoder.wraps(default_rtype=rtype, use_states=use_states)  # type: ignore
        def predict(self, inputs: Any, output_ids: Array, states: Any) -> Any:
            return rows

    return Constant(None, 0, 3)


GOOD = np.full((1, 3), 1 / 3, np.float32)
NAN = np.array([[0.5, np.nan, 0.5]], np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, 0, 0), InputError, "maxlen: expected at least 1, got 0"),
        ((None, 0, 2.5), TypeError, "maxlen: expected an integer, got float"),
        (("a", 0, 2), TypeError, "start_id: expected an integer, got str"),
        ((None, None, 2), TypeError, "end_id: expected an integer, got NoneType"),
        ((None, 0, 2, "1"), TypeError, "minlen: expected an integer, got str"),
    ],
)
def test_bad_decoders(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        AutoRegressiveDecoder(*arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: d.beam_search([], 0), InputError, "topk: expected at least 1, got 0"),
        (lambda d: d.beam_search([], 1.5), TypeError, "topk: expected an integer, got float"),
        (lambda d: d.beam_search([], 4), InputError, "topk: expected at most 3, .* got 4"),
        (lambda d: d.beam_search([], 1, min_ends=0), InputError, "min_ends: .* at least 1, got 0"),
        (lambda d: d.beam_search([], 1, None, 0), InputError, "temperature: .* above 0, got 0"),
        (lambda d: d.beam_search([], 1, None, "1"), TypeError, "temperature: .* number, got str"),
        (lambda d: d.beam_search(None, 1), TypeError, "inputs: .* sequence .*, got NoneType"),
        (lambda d: d.beam_search("text", 1), TypeError, "inputs: .* sequence .*, got str"),
        (lambda d: d.beam_search({"a": [1]}, 1), TypeError, "inputs: .* sequence .*, got dict"),
        (lambda d: d.beam_search(np.array(3), 1), TypeError, "inputs: .*, got ndarray"),
        (
            lambda d: d.beam_search([[1], [[1, 2], [3]]], 1),
            InputError,
            r"inputs\[1\]: expected .* equally long rows, got \[\[1, 2\], \[3\]\]",
        ),
        (lambda d: d.random_sample([], 0), InputError, "n: expected at least 1, got 0"),
        (lambda d: d.random_sample([], 1, 0), InputError, "topk: expected at least 1, got 0"),
        (lambda d: d.random_sample([], 1, 4), InputError, "topk: .* vocabulary size, 3, got 4"),
        (lambda d: d.random_sample([], 1, topp=0), InputError, "topp: .* above 0 .*, got 0"),
        (lambda d: d.random_sample([], 1, topp=1.5), InputError, "topp: .* at most 1, got 1.5"),
        (lambda d: d.random_sample([], 1, topp=np.nan), InputError, "topp: .*, got nan"),
        (lambda d: d.random_sample([], 1, min_ends=0), InputError, "min_ends: .*, got 0"),
        (lambda d: d.random_sample(3, 1), TypeError, "inputs: .*, got int"),
        (
            lambda d: d.predict([], d.first_output_ids, None, 1, "logit"),
            InputError,
            "rtype: expected one of probas, logits, got 'logit'",
        ),
        (lambda d: d.wraps("logit"), InputError, "default_rtype: .* got 'logit'"),
    ],
)
def test_bad_arguments(call: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        call(constant(GOOD))


@pytest.mark.parametrize(
    ("decoder", "error", "message"),
    [
        (constant(GOOD[0]), InputError, r"predict: expected shape \[1, V\], .* got \[3\]"),
        (constant(GOOD[:, :0]), InputError, r"predict: expected shape .*, got \[1, 0\]"),
        (constant(np.ones((2, 3))), InputError, r"predict: expected shape \[1, V\], .* \[2, 3\]"),
        (constant(np.ones((1, 3), int)), TypeError, "predict: .* floating point, got int64"),
        (constant([[0.5], [0.1, 0.2]]), TypeError, "predict: .* floating point, got list"),
        (constant(None), TypeError, "predict: .* floating point, got NoneType"),
        (constant((GOOD, 3)), TypeError, r"predict: .* got a tuple; .* wraps\(use_states=True\)"),
        (constant(GOOD, use_states=True), TypeError, "predict: expected a pair .* got ndarray"),
        (constant(NAN), InputError, "predict: expected no NaN or infinity .* got nan in row 0"),
        (constant(NAN, "logits"), InputError, "predict: expected a finite .* got nan in row 0"),
        (
            constant(np.full((1, 3), -np.inf), "logits"),
            InputError,
            "predict: expected a finite largest logit in each row, got -inf in row 0",
        ),
        (constant(-GOOD), InputError, "predict: .* no negative probability .* got -0.3.* in row 0"),
        (constant(GOOD * np.inf), InputError, "predict: expected no NaN .* got inf in row 0"),
    ],
    ids=range(13),
)
def test_bad_predictions(
    decoder: AutoRegressiveDecoder, error: type[Exception], message: str
) -> None:
    for search in (decoder.beam_search, decoder.random_sample):
        with pytest.raises(error, match=f"^{message}$"):
            search([], 1)


def test_probabilities_of_zero_only() -> None:
    zeros = constant(np.zeros((1, 3), np.float32))
    with pytest.raises(InputError, match=r"^predict: expected a probability above 0 in each row"):
        zeros.random_sample([], 1)
    with pytest.raises(InputError, match=r"^predict: expected a probability above 0 \(to the"):
        zeros.beam_search([], 1, temperature=0.5)
    # Beam search has them, as the original: votes on a filler underflow.
    zeros.first_output_ids = np.array([[2]])
    assert zeros.beam_search([], 1).tolist() == [2, 0]


def test_raw_scores_are_checked() -> None:
    class Raw(AutoRegressiveDecoder):
        def predict(self, inputs: Any, output_ids: Array, states: Any = None, *more: Any) -> Any:
            return rows, None

    rows = NAN
    with pytest.raises(InputError, match="^predict: expected no NaN"):
        Raw(None, 0, 2).beam_search([], 1)
    rows = -GOOD
    with pytest.raises(InputError, match="^predict: expected no negative"):
        Raw(None, 0, 2).random_sample([], 1)
    with pytest.raises(InputError, match="^maxlen: expected at least 1, got 0"):
        decoder = Raw(None, 0, 2)
        decoder.maxlen = 0
        decoder.beam_search([], 1)


def test_a_missing_predict_or_decorator() -> None:
    class Bare(AutoRegressiveDecoder):
        def predict(self, inputs: Any, output_ids: Array, states: Any) -> Any:  # type: ignore
            return GOOD

    with pytest.raises(TypeError, match="^predict: expected the decorator"):
        Bare(None, 0, 2).beam_search([], 1)
    with pytest.raises(NotImplementedError, match="^predict: expected a method"):
        AutoRegressiveDecoder(None, 0, 2).beam_search([], 1)
    with pytest.raises(NotImplementedError, match="^predict: expected a method"):
        reference.AutoRegressiveDecoder(None, 0, 2).random_sample([], 1)


# --- Keras ----------------------------------------------------------------------------------------


def test_last_token_without_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ImportError, match="^last_token: expected Keras to be installed"):
        AutoRegressiveDecoder(None, 0, 1).last_token(object())


def test_last_token_with_the_keras_of_bert4keras(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of Keras only what is used: a layer that is a function, a model that is a pair.
    keras = SimpleNamespace(
        layers=SimpleNamespace(Lambda=lambda function: function),
        models=SimpleNamespace(Model=lambda inputs, outputs: (inputs, outputs)),
    )
    backend = ModuleType("bert4keras.backend")
    backend.keras = keras  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bert4keras.backend", backend)
    decoder = AutoRegressiveDecoder(None, 0, 1)
    output = np.arange(12).reshape(2, 3, 2)
    model = type("Model", (), {"inputs": ["x"], "outputs": [output]})()
    inputs, outputs = decoder.last_token(model)
    assert inputs == ["x"]
    np.testing.assert_array_equal(outputs[0], output[:, -1])
    assert decoder.last_token(model)[1] is outputs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_last_token_of_a_keras_model() -> None:
    keras = pytest.importorskip("keras")
    token_ids = keras.Input((5, 2))
    model = keras.Model(token_ids, keras.layers.Dense(3)(token_ids))
    last = AutoRegressiveDecoder(None, 0, 1).last_token(model)
    x = np.random.default_rng(0).random((4, 5, 2)).astype(np.float32)
    expected = model.predict(x, verbose=0)[:, -1]
    np.testing.assert_allclose(last.predict(x, verbose=0), expected, atol=1e-6)


def test_importing_needs_no_other_library() -> None:
    code = (
        "import sys, numpy as np\n"
        "from fastmrc.integrations.bert4keras import AutoRegressiveDecoder as D\n"
        "class T(D):\n"
        "    @D.wraps()\n"
        "    def predict(self, inputs, output_ids, states):\n"
        "        return np.full((len(output_ids), 4), 0.25)\n"
        "T(None, 0, 2).beam_search([], 2), T(None, 0, 2).random_sample([], 2)\n"
        "print([m for m in ('torch', 'keras', 'bert4keras', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# --- reading comprehension ------------------------------------------------------------------------

# The example task_reading_comprehension_by_seq2seq.py of bert4keras in other words: passages vote
# on each token, every hypothesis is encoded anew.

QUESTIONS = [
    ("北京在哪里?", ["中国北京在二月天气大", "上海New York山水,火。北京", "人名"]),
    ("谁?", ["上海天气一二三", "年月日", "山水火木金土", "北京"]),
    ("何时", ["the new name", "2024年五月"]),
    ("名字", ["天气"]),
]


def voting_reader(base: Any, loaded: LoadedModel) -> Any:
    tokenizer: Any = loaded.tokenizer
    cls_id, sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    encoder = ReencodingEncoder(loaded.model, end_id=sep_id)

    class VotingReader(base):  # type: ignore[misc]
        def __init__(self, maxlen: int, mode: str = "extractive") -> None:
            super().__init__(None, sep_id, maxlen)
            self.mode = mode

        @base.wraps(default_rtype="probas", use_states=True)
        def predict(self, inputs: Any, output_ids: Array, states: Any) -> Any:
            inputs = [rows for rows in inputs if rows[0, 0] >= 0]
            probas = self.distributions(inputs, output_ids)
            if states == 0:
                stays = probas[:, 0].argmax(axis=-1) != sep_id
                if not stays.any():  # no passage holds an answer
                    return np.eye(probas.shape[-1])[[sep_id]], 1
                for rows in (rows for rows, stay in zip(inputs, stays, strict=True) if not stay):
                    rows[:, 0] = -1  # seen by the calls that follow
                inputs = [rows for rows in inputs if rows[0, 0] >= 0]
                probas = probas[stays]
            if self.mode == "extractive":
                probas = probas * self.continues(inputs, output_ids, probas.shape[-1])
            return (probas**2).sum(axis=0) / (1 + probas.sum(axis=0)), states + 1

        def distributions(self, inputs: Any, output_ids: Array) -> Array:
            """Return float64 [passages, hypotheses, V]."""
            next_log_probs = encoder.next_logits_for([rows[0].tolist() for rows in inputs])
            log_probs = next_log_probs(output_ids.tolist(), list(range(len(inputs))))
            return np.exp(log_probs.astype(np.float64))

        def continues(self, inputs: Any, output_ids: Array, vocabulary: int) -> Array:
            """Mark what stands behind the hypothesis in a passage, and the end."""
            mask = np.zeros((len(output_ids), vocabulary))
            mask[:, sep_id] = 1
            n = output_ids.shape[1]
            for k, prefix in enumerate(output_ids.tolist()):
                for passage in ([*rows[0, 1:]] for rows in inputs):
                    passage = passage[: passage.index(sep_id)]
                    for i in range(len(passage) - n):
                        if passage[i : i + n] == prefix:
                            mask[k, passage[i + n]] = 1
            return mask

        def answer_ids(self, question: str, passages: list[str], topk: int) -> list[int]:
            rows = [
                [cls_id, *tokens(passage), sep_id, *tokens(question), sep_id]
                for passage in passages
            ]
            found: list[int] = self.beam_search(rows, topk, states=0).tolist()
            return found

    def tokens(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return VotingReader


@pytest.fixture(scope="module")
def tiny(tiny_bert_dir: Path) -> LoadedModel:
    return load_model(tiny_bert_dir)


def literal_answer(
    loaded: LoadedModel, question: str, passages: list[str], literal: bool, **options: Any
) -> list[int]:
    """Return what the reference search finds, with the end token."""
    tokenizer: Any = loaded.tokenizer
    cls_id, sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id

    def tokens(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    rows = [[cls_id, *tokens(p), sep_id, *tokens(question), sep_id] for p in passages]
    best = reference.beam_search(
        ReencodingEncoder(loaded.model, end_id=sep_id).next_logits_for(rows),
        [tokens(passage) for passage in passages],
        end_id=sep_id,
        literal=literal,
        **options,
    ).best
    if best is None:
        return [sep_id]
    return [*best.token_ids, sep_id] if best.finished else best.token_ids


@pytest.mark.parametrize("mode", ["extractive", "generative"])
@pytest.mark.parametrize("topk", [1, 3])
def test_the_published_reader(tiny: LoadedModel, mode: str, topk: int) -> None:
    tokenizer: Any = tiny.tokenizer
    ours = voting_reader(AutoRegressiveDecoder, tiny)(6, mode)
    theirs = voting_reader(reference.AutoRegressiveDecoder, tiny)(6, mode)
    engine = Seq2SeqReader(tiny)
    answers = []
    for question, passages in QUESTIONS:
        found = ours.answer_ids(question, passages, topk)
        assert found == theirs.answer_ids(question, passages, topk)
        options: dict[str, Any] = {"beam_size": topk, "mode": mode, "max_tokens": 6}
        assert found == literal_answer(tiny, question, passages, True, **options)
        if found == literal_answer(tiny, question, passages, False, **options):
            answer = engine.answer(
                question, passages, beam_size=topk, mode=mode, max_answer_tokens=6
            )
            assert answer.token_ids == [token for token in found if token != tokenizer.sep_token_id]
            answers.append(tuple(answer.token_ids))
    assert len(set(answers)) >= 3


def test_the_published_reader_where_no_passage_holds_an_answer(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = voting_reader(AutoRegressiveDecoder, tiny)
    sep_id = tiny.tokenizer.sep_token_id

    def certain_of_the_end(self: Any, inputs: Any, output_ids: Array) -> Array:
        return np.tile(np.eye(9)[sep_id], (len(inputs), len(output_ids), 1))

    monkeypatch.setattr(reader, "distributions", certain_of_the_end)
    assert reader(4).answer_ids(*QUESTIONS[0], topk=2) == [sep_id]


@pytest.mark.parametrize("mode", ["extractive", "generative"])
def test_reading_comprehension_on_the_engine(
    tiny: LoadedModel, tiny_bert_dir: Path, mode: Any
) -> None:
    engine = Seq2SeqReader(tiny)
    sep_id = tiny.tokenizer.sep_token_id
    readers = [
        ReadingComprehension(None, sep_id, 5, mode, model=engine),
        ReadingComprehension(None, None, 5, mode=mode, model=str(tiny_bert_dir)),
    ]
    assert readers[0].reader is engine
    for reader in readers:
        assert (reader.end_id, reader.maxlen, reader.mode) == (sep_id, 5, mode)
        for question, passages in QUESTIONS:
            expected = engine.answer(
                question, passages, beam_size=2, mode=mode, max_answer_tokens=5
            )
            assert reader.answer(question, passages, topk=2) == expected.text
    assert readers[0].answer("谁?", []) == ""


def test_reading_comprehension_on_the_packaged_model(packaged_model: LoadedModel) -> None:
    question, passages = "中国的首都是哪里?", ["中国的首都是北京。", "北京是中华人民共和国的首都。"]
    expected = Seq2SeqReader(packaged_model).answer(question, passages, beam_size=3)
    reader = ReadingComprehension(None, None, 32)
    assert reader.answer(question, passages, 3) == expected.text != ""


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((101, None, 5), InputError, "start_id: expected None, .* got 101"),
        ((None, 0, 5), InputError, "end_id: expected 3, the .* got 0"),
        ((None, None, 0), InputError, "maxlen: expected at least 1, got 0"),
        ((None, None, 5, "both"), InputError, "mode: expected one of .* got 'both'"),
        ((None, None, 5, "extractive", 3), TypeError, "model: expected .*, got int"),
    ],
)
def test_bad_reading_comprehension(
    tiny: LoadedModel, arguments: Any, error: type[Exception], message: str
) -> None:
    model = {} if len(arguments) == 5 else {"model": Seq2SeqReader(tiny)}
    with pytest.raises(error, match=f"^{message}$"):
        ReadingComprehension(*arguments, **model)


def test_bad_calls_of_reading_comprehension(tiny: LoadedModel) -> None:
    reader = ReadingComprehension(None, None, 5, model=Seq2SeqReader(tiny))
    with pytest.raises(InputError, match="^topk: expected at least 1, got 0"):
        reader.answer("谁?", ["人"], topk=0)
    with pytest.raises(TypeError, match="expected a list of passages, got str"):
        reader.answer("谁?", "人")
    with pytest.raises(NotImplementedError, match="^predict"):
        reader.beam_search([[1]], 1)
