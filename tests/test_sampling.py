"""Random draws: the same tokens as the oracle, the right shares, the same on any thread count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    COUNTS,
    DTYPES,
    MARGIN,
    Generator,
    Tally,
    cast,
    count_cases,
    host,
    random_alphabet,
    random_automata,
    random_rows,
    random_sequences,
    rounded,
)
from numpy.typing import NDArray

import fastmrc
from fastmrc import decoding, ops, reference
from fastmrc.options import NUCLEUS_SLACK, SamplingOptions
from fastmrc.reference.ops import allowed_mask
from fastmrc.reference.sampling import _weights, philox, uniform
from fastmrc.types import SampledSequence

DRAWS = 200_000


# --- random numbers ------------------------------------------------------------------------------


def test_philox_gives_the_published_numbers() -> None:
    # The known answers of Random123 for philox4x32 with 10 rounds.
    ones = 2**32 - 1
    assert philox(0, (0, 0, 0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox(2**64 - 1, (ones,) * 4) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    found = philox(0x299F31D0A4093822, pi)
    assert found == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_both_sides_draw_the_same_numbers() -> None:
    # Of 2**20 equal weights the token is the first 20 bits of the number.
    logits = np.zeros((3, 1 << 20), np.float32)
    streams, positions, seed = [0, 2**63 + 5, 2**64 - 1], [0, 7, 2**32 - 1], 2**64 - 3
    tokens, _ = ops.sample(logits, end_id=0, seed=seed, streams=streams, positions=positions)
    numbers = [uniform(seed, s, p) for s, p in zip(streams, positions, strict=True)]
    assert tokens.tolist() == [int(u * (1 << 20)) for u in numbers]


# --- one draw ------------------------------------------------------------------------------------


def random_options(rng: Generator) -> dict[str, Any]:
    return {
        "top_k": [None, None, 1, 2, 5, 50][rng.integers(6)],
        "top_p": float(rng.choice([1.0, 1.0, 0.95, 0.5, 0.01])),
        "temperature": float(rng.choice([1.0, 0.5, 0.05, 2.5, 100.0])),
    }


def compare_draws(rng: Generator, tally: Tally) -> None:
    """Compare a batch of draws; a number near the border of two tokens may fall on either side."""
    vocabulary = int(rng.choice([1, 2, 3, 17, 65, 200, 1100, 3000], p=[0.05] + [0.15] * 6 + [0.05]))
    rows = int(rng.integers(1, 5))
    dtype = str(rng.choice(DTYPES, p=[0.6, 0.2, 0.2]))
    logits = rounded(random_rows(rng, rows, vocabulary), dtype)
    end_id = int(rng.integers(vocabulary))
    drawn = [random_automata(rng, vocabulary, end_id, 1) for _ in range(rows)]
    options = random_options(rng)
    keywords = options | {
        "end_id": end_id,
        "seed": int(rng.integers(2**64, dtype=np.uint64)),
        "streams": rng.integers(0, 2**40, rows).tolist(),
        "positions": rng.integers(0, 100, rows).tolist(),
        "allow_end": rng.integers(0, 2, rows).astype(bool).tolist(),
    }
    tokens, log_probs = ops.sample(
        cast(logits, dtype),
        constraint=[d[0] for d in drawn],
        states=np.array([d[2][0] for d in drawn], np.int32),
        **keywords,
    )
    tokens, log_probs = host(tokens), host(log_probs)
    expected, expected_log_probs = reference.sample(
        logits, constraint=[d[1] for d in drawn], states=[d[3][0] for d in drawn], **keywords
    )
    for i in range(rows):
        tally.cases += 1
        if tokens[i] == expected[i]:
            both = log_probs[i], expected_log_probs[i]
            assert both[0] == both[1] or abs(both[0] - both[1]) <= 1e-5, keywords
            continue
        allowed = allowed_mask(
            drawn[i][1],
            np.array([drawn[i][3][0]]),
            vocabulary,
            end_id,
            bool(keywords["allow_end"][i]),
        )
        margin = draw_margin(logits[i], allowed[0], keywords, i)
        assert margin <= MARGIN, (margin, tokens[i], expected[i], keywords)
        tally.near_tie(margin)


def draw_margin(
    row: NDArray[np.float32], allowed: NDArray[np.bool_], keywords: dict[str, Any], i: int
) -> float:
    """Return how far the number is from a border of two tokens, or top_p from one of the nucleus,
    whichever is nearer; as a share of all weights."""
    options = {name: keywords[name] for name in ("top_k", "top_p", "temperature")}
    weights = _weights(row, allowed, SamplingOptions(**options))
    if not weights.any():
        return np.inf
    u = uniform(keywords["seed"], keywords["streams"][i], keywords["positions"][i])
    margins = [np.abs(np.cumsum(weights) / weights.sum() - u).min()]
    if keywords["top_p"] < 1:
        whole = _weights(row, allowed, SamplingOptions(**options | {"top_p": 1.0}))
        falling = np.sort(whole[whole > 0])[::-1]
        least = keywords["top_p"] - NUCLEUS_SLACK
        margins.append(np.abs(np.cumsum(falling) / falling.sum() - least).min())
    return float(min(margins))


@pytest.mark.parametrize("cases", COUNTS)
def test_draws_as_the_oracle(cases: int) -> None:
    tally, line = count_cases(11, cases, compare_draws)
    print(line)
    tally.check()


@pytest.mark.parametrize("gap", [5.0, 80.0, 500.0, 1e30])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_an_end_that_is_not_allowed_hides_nothing(gap: float, top_p: float) -> None:
    # However much likelier it is: weights are relative to the likeliest token that may be drawn.
    logits = np.zeros((400, 3000), np.float32)
    logits[:, 1] = gap
    logits[:, 2] = 1.0
    keywords: dict[str, Any] = {"end_id": 1, "seed": 3, "allow_end": False, "top_p": top_p}
    tokens, _ = ops.sample(logits, temperature=0.1, **keywords)
    expected, _ = reference.sample(logits[:40], temperature=0.1, **keywords)
    assert tokens[:40].tolist() == expected.tolist()
    assert set(tokens.tolist()) > {2} and 1 not in tokens


def test_extreme_temperatures() -> None:
    logits = np.array([[1.0, 1.0 + 1e-6, -np.inf, 0.5]] * 200, np.float32)
    cold, _ = ops.sample(logits, end_id=0, seed=1, temperature=1e-300)
    hot, _ = ops.sample(logits, end_id=0, seed=1, temperature=1e300)
    assert set(cold.tolist()) == {1} and set(hot.tolist()) == {0, 1, 3}


def test_log_probs_are_of_the_whole_row() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)) * 4
    tokens, log_probs = ops.sample(logits, end_id=7, seed=5, top_k=3, top_p=0.8, temperature=0.3)
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(6), tokens.long()]
    assert isinstance(log_probs, torch.Tensor) and log_probs.dtype == torch.float64
    assert tokens.dtype == torch.int32 and torch.allclose(log_probs, expected, atol=1e-6)


def test_nothing_to_draw() -> None:
    logits = np.zeros((3, 4), np.float32)
    trie = fastmrc.Trie([[2]])
    leaf = int(trie.advance([0], [2])[0])
    given: dict[str, Any] = {"end_id": 1, "seed": 0, "constraint": trie}
    tokens, log_probs = ops.sample(
        logits, states=[0, leaf, -1], allow_end=[True, False, True], **given
    )
    assert tokens.tolist() == [2, -1, -1]
    assert log_probs[0] == pytest.approx(-np.log(4)) and np.isneginf(log_probs[1:]).all()
    tokens, _ = ops.sample(logits, states=[leaf] * 3, **given)
    assert tokens.tolist() == [1, 1, 1]
    only_end = np.full((1, 4), -np.inf, np.float32)
    only_end[0, 1] = 0
    for options in ({}, {"top_k": 2}, {"top_p": 0.5}):
        assert ops.sample(only_end, end_id=1, seed=0, allow_end=False, **options)[0].tolist() == [
            -1
        ]
    assert ops.sample(np.zeros((0, 4), np.float32), end_id=0, seed=0)[0].shape == (0,)


GOOD = np.zeros((2, 5), np.float32)


@pytest.mark.parametrize(
    ("logits", "changes", "message"),
    [
        (np.array([[0, np.nan]], np.float32), {}, "logits: expected numbers.*NaN in row 0"),
        (np.array([[0, np.inf]], np.float32), {"top_k": 1}, "logits: .*inf in row 0"),
        (np.full((1, 2), -np.inf, np.float32), {}, "only -inf"),
        (np.zeros(5, np.float32), {}, "logits: expected 2 dimensions, got 1"),
        (GOOD, {"top_k": 0}, "top_k: expected at least 1, got 0"),
        (GOOD, {"top_p": 0.0}, "top_p: expected a share above 0 and at most 1, got 0.0"),
        (GOOD, {"top_p": 1.5}, "top_p: .*got 1.5"),
        (GOOD, {"top_p": float("nan")}, "top_p: expected a number, got NaN"),
        (GOOD, {"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
        (GOOD, {"temperature": float("inf")}, "temperature: .*got inf"),
        (GOOD, {"end_id": 5}, "end_id: expected a token below 5, got 5"),
        (GOOD, {"end_id": -1}, "end_id: expected 0 or a positive 32-bit integer, got -1"),
        (GOOD, {"seed": -1}, r"seed: expected 0 to 2\*\*64 - 1, got -1"),
        (GOOD, {"seed": 2**64}, "seed: "),
        (GOOD, {"streams": [1]}, "streams: expected one per row, 2, got 1"),
        (GOOD, {"streams": [-1, 0]}, "streams: expected 0 to"),
        (GOOD, {"positions": [0, 2**32]}, "positions: expected 0 to"),
        (GOOD, {"positions": [[0, 1]]}, "positions: expected one per row or one for all"),
        (GOOD, {"allow_end": [True]}, "allow_end: expected one per row, 2, got 1"),
        (GOOD, {"states": [0]}, "states: expected one per row, 2, got 1"),
        (GOOD, {"constraint": fastmrc.Trie([[9]])}, "constraint: expected tokens below"),
        (GOOD, {"constraint": fastmrc.Trie([[0]])}, "constraint: expected no end token 0"),
    ],
)
def test_what_is_wrong_is_said(logits: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.sample(logits, **({"end_id": 0, "seed": 0} | changes))


@pytest.mark.parametrize(
    ("logits", "changes", "message"),
    [
        (np.zeros((2, 5)), {}, "logits: expected float32"),
        (GOOD, {"seed": 1.0}, "seed: expected an integer, got float"),
        (GOOD, {"end_id": 1.0}, "end_id: expected an integer, got 1.0"),
        (GOOD, {"positions": 0.5}, "positions: expected integers"),
        (GOOD, {"seed": True}, "seed: expected an integer, got bool"),
        (GOOD, {"streams": np.array([0.5, 1])}, "streams: expected integers"),
        (GOOD, {"streams": [0.5, 1]}, "streams: expected integers"),
        (GOOD, {"positions": "a"}, "positions: expected integers"),
        (GOOD, {"allow_end": [1, 0]}, "allow_end: expected True or False, got int64"),
    ],
)
def test_wrong_types_are_refused(logits: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ops.sample(logits, **({"end_id": 0, "seed": 0} | changes))


# --- shares --------------------------------------------------------------------------------------


class OneRow:
    """The same logits after every prefix, for any number of prompts."""

    def __init__(self, row: NDArray[np.float32], prompts: int = 1) -> None:
        self._row, self._prompts = row, prompts

    def prefill(self) -> Any:
        return np.tile(self._row, (self._prompts, 1))

    def step(self, request: Any) -> Any:
        return np.tile(self._row, (len(request.row_passage), 1))


def draw_many(row: NDArray[np.float32], count: int, **options: Any) -> list[SampledSequence]:
    return decoding.sample_sequences(
        OneRow(row),
        [count],
        end_id=0,
        vocabulary_size=len(row),
        options=SamplingOptions(**options),
        seed=20_240_612,
    )[0]


def chi_square_z(observed: NDArray[Any], expected: NDArray[np.float64]) -> float:
    """Return how many standard deviations the statistic is off (Wilson and Hilferty 1931); cells
    of fewer than 10 expected draws are counted together."""
    small = expected < 10
    cells = [(observed[~small], expected[~small])]
    if small.any():
        cells.append((observed[small].sum(keepdims=True), expected[small].sum(keepdims=True)))
    seen, wanted = (np.concatenate(part) for part in zip(*cells, strict=True))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    freedom = len(seen) - 1
    if freedom == 0:
        return 0.0
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    scale = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - scale)) / np.sqrt(scale))


@pytest.mark.parametrize("vocabulary", [50, 3000])
@pytest.mark.parametrize("top_k", [None, 1, 5, 40])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_shares_of_draws(
    vocabulary: int, top_k: int | None, top_p: float, temperature: float
) -> None:
    rng = np.random.default_rng(7)
    row = (rng.normal(size=vocabulary) * 2).astype(np.float32)
    options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    drawn = draw_many(row, DRAWS, max_tokens=1, **options)
    tokens = [0 if one.finished else one.token_ids[0] for one in drawn]
    observed = np.bincount(tokens, minlength=vocabulary)
    weights = _weights(row, np.ones(vocabulary, bool), SamplingOptions(**options))
    expected = weights / weights.sum() * DRAWS
    assert not observed[weights == 0].any()
    assert abs(chi_square_z(observed, expected)) < 4, options


def test_shares_would_show_a_wrong_sampler() -> None:
    # The test of the test: one part in twenty too many of one token of ten.
    expected = np.full(10, DRAWS / 10)
    observed = expected.copy()
    observed[3] *= 1.05
    observed[4] -= expected[3] * 0.05
    assert chi_square_z(observed, expected) > 4


def test_draws_of_neighbouring_positions_and_streams_are_independent() -> None:
    row = np.zeros(17, np.float32)
    row[0] = -np.inf  # no end
    drawn = np.array([one.token_ids for one in draw_many(row, DRAWS, max_tokens=2)]) - 1
    along = np.bincount(drawn[:, 0] * 16 + drawn[:, 1], minlength=256)
    across = np.bincount(drawn[:-1, 0] * 16 + drawn[1:, 0], minlength=256)
    for pairs in (along, across):
        assert abs(chi_square_z(pairs, np.full(256, pairs.sum() / 256))) < 4


# --- sequences -----------------------------------------------------------------------------------


class Table:
    """Logits that depend on the whole prefix, for both sides; reads prefixes off the requests."""

    def __init__(self, rng: Generator, prompts: int, vocabulary: int, end_id: int) -> None:
        self._rows = random_rows(rng, 23, vocabulary)
        self._rows[:, end_id] += np.float32(rng.choice([0.0, -3.0, 2.0]))
        self._prompts = prompts
        self._paths: dict[tuple[int, int], list[int]] = {}
        self.encoded = 0  # tokens asked for

    def row(self, prompt: int, prefix: list[int]) -> NDArray[np.float32]:
        return self._rows[hash((prompt, *prefix)) % len(self._rows)]

    def next_rows(self, prompt: int) -> Any:
        return lambda prefixes: np.stack([self.row(prompt, prefix) for prefix in prefixes])

    def prefill(self) -> Any:
        return np.stack([self.row(prompt, []) for prompt in range(self._prompts)])

    def step(self, request: Any) -> Any:
        first = request.columns - request.width
        for a, prompt in enumerate(request.questions.tolist()):
            for i in range(int(request.hypotheses[a])):
                columns = np.flatnonzero(request.ancestors[a, i]).tolist()
                assert columns[-1] == first + i and len(columns) == request.depths[a, i] + 1
                before = [self._paths[prompt, c][-1] for c in columns[:-1]]
                self._paths[prompt, first + i] = [*before, int(request.tokens[a, i])]
                self.encoded += 1
        keys = zip(request.row_passage.tolist(), request.row_column.tolist(), strict=True)
        return np.stack([self.row(prompt, self._paths[prompt, c]) for prompt, c in keys])


def compare_sequences(rng: Generator, tally: Tally) -> None:
    vocabulary = int(rng.choice([2, 3, 5, 17, 65]))
    end_id = int(rng.integers(vocabulary))
    prompts = int(rng.integers(1, 4))
    counts = rng.integers(0, 9, prompts).tolist()
    least = int(rng.choice([0, 0, 1, 3]))
    options = SamplingOptions(
        **random_options(rng),
        min_tokens=least,
        max_tokens=max(1, least) + int(rng.integers(0, 6)),
        min_ends=int(rng.choice([1, 1, 2, 3])),
    )
    alphabet = random_alphabet(rng, vocabulary, end_id)
    automata: list[tuple[Any, Any]] = []
    for _ in range(prompts):
        kind = rng.integers(3)
        sequences = random_sequences(rng, int(rng.integers(0, 5)), 6, alphabet)
        name = "SpanIndex" if kind == 1 else "Trie"
        both = getattr(fastmrc, name)(sequences), getattr(reference, name)(sequences)
        automata.append(both if kind else (None, None))
    table = Table(rng, prompts, vocabulary, end_id)
    seed = int(rng.integers(2**63))
    ours = decoding.sample_sequences(
        table,
        counts,
        end_id=end_id,
        vocabulary_size=vocabulary,
        options=options,
        seed=seed,
        constraints=[native for native, _ in automata],
    )
    for prompt, count in enumerate(counts):
        theirs = reference.sample_sequences(
            table.next_rows(prompt),
            count,
            end_id=end_id,
            options=options,
            seed=seed,
            constraint=automata[prompt][1],
        )
        tally.cases += max(1, count)
        for a, b in zip(ours[prompt], theirs, strict=True):
            assert (a.token_ids, a.finished) == (b.token_ids, b.finished), (seed, options)
            assert a.log_prob == pytest.approx(b.log_prob, abs=1e-4)


@pytest.mark.parametrize("cases", COUNTS)
def test_sequences_as_the_oracle(cases: int) -> None:
    # A near-tie, one in 10,000, would show as a failure: none has been met with this seed.
    tally, line = count_cases(5, cases, compare_sequences)
    print(line)


def test_lengths_and_ends() -> None:
    row = np.zeros(4, np.float32)
    row[0] = 3.0  # the end is likely
    for least, most, ends in ((0, 5, 1), (3, 3, 1), (2, 8, 1), (0, 9, 3), (4, 9, 2)):
        options: dict[str, Any] = {"min_tokens": least, "max_tokens": most, "min_ends": ends}
        drawn = draw_many(row, 300, **options)
        assert len({tuple(one.token_ids) for one in drawn}) > 8
        for one in drawn:
            assert one.token_ids.count(0) == ends - 1 if one.finished else True
            assert one.token_ids.count(0) < ends
            # The end that finishes is one of the steps.
            assert least <= len(one.token_ids) <= most - one.finished
            assert one.finished or len(one.token_ids) == most
            assert 0 not in one.token_ids[:least]


def test_a_text_depends_on_seed_and_stream_alone() -> None:
    rng = np.random.default_rng(0)
    row = rng.normal(size=600).astype(np.float32)
    options = SamplingOptions(top_k=50, max_tokens=6)

    def draw(counts: list[int], seed: int = 4) -> list[list[SampledSequence]]:
        return decoding.sample_sequences(
            OneRow(row, len(counts)),
            counts,
            end_id=0,
            vocabulary_size=len(row),
            options=options,
            seed=seed,
        )

    whole = draw([200])[0]
    assert draw([30])[0] == whole[:30]
    assert draw([7, 0, 200, 30]) == [whole[:7], [], whole, whole[:30]]
    assert draw([30], seed=5)[0] != whole[:30]


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.9}, {"temperature": 1.7}, {}])
def test_any_number_of_threads(options: dict[str, Any]) -> None:
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(1)) * 3
    before = fastmrc.get_num_threads()
    try:
        drawn = []
        for threads in (1, 2, 4):
            fastmrc.set_num_threads(threads)
            drawn.append(ops.sample(logits, end_id=3, seed=8, **options))
    finally:
        fastmrc.set_num_threads(before)
    for tokens, log_probs in drawn[1:]:
        assert torch.equal(tokens, drawn[0][0]) and torch.equal(log_probs, drawn[0][1])


def test_any_batch() -> None:
    logits = torch.randn(9, 500, generator=torch.Generator().manual_seed(2)) * 3
    streams = [5, 1, 7, 7, 2, 0, 9, 3, 3]
    given: dict[str, Any] = {"end_id": 3, "seed": 8, "positions": 4, "top_p": 0.9}
    whole = ops.sample(logits, streams=streams, **given)[0].tolist()
    alone = [
        int(ops.sample(logits[i : i + 1], streams=[s], **given)[0]) for i, s in enumerate(streams)
    ]
    assert whole == alone


def test_shared_beginnings_are_encoded_once() -> None:
    rng = np.random.default_rng(3)
    table = Table(rng, 1, 40, 0)
    options = SamplingOptions(top_k=2, max_tokens=4, min_tokens=4)
    drawn = decoding.sample_sequences(
        table, [500], end_id=0, vocabulary_size=40, options=options, seed=1
    )[0]
    distinct = {tuple(one.token_ids[:n]) for one in drawn for n in (1, 2, 3)}
    assert table.encoded == len(distinct) <= 2 + 4 + 8


def test_the_sampler_refuses_wrong_input() -> None:
    row = np.zeros(4, np.float32)

    def draw(source: Any = None, **changes: Any) -> Any:
        given = {"end_id": 0, "vocabulary_size": 4, "seed": 0} | changes
        counts = given.pop("counts", [1])
        options = SamplingOptions(max_tokens=2)
        source = source or OneRow(row, len(counts))
        return decoding.sample_sequences(source, counts, options=options, **given)

    with pytest.raises(ValueError, match="end_id: expected a token below 4, got 4"):
        draw(end_id=4)
    with pytest.raises(ValueError, match="sequences: expected at least 0, got -1"):
        draw(counts=[-1])
    with pytest.raises(ValueError, match=r"logits: expected shape \[1, 5\], got \[1, 4\]"):
        draw(vocabulary_size=5)
    with pytest.raises(ValueError, match="NaN in row 0"):
        draw(OneRow(np.full(4, np.nan, np.float32)))
    with pytest.raises(ValueError, match="constraints: expected one per prompt, 1, got 2"):
        fastmrc._C.SequenceSampler([1], 4, 0, 0, 1.0, 1.0, 0, 0, 0, 2, 1, [None, None])
    with pytest.raises(ValueError, match="max_tokens: expected at least 3, got 2"):
        fastmrc._C.SequenceSampler([1], 4, 0, 0, 1.0, 1.0, 0, 0, 3, 2, 1, [])
    sampler = fastmrc._C.SequenceSampler([1], 4, 0, 0, 1.0, 1.0, 0, 0, 0, 1, 1, [])
    sampler.step(row[None])
    assert sampler.done
    with pytest.raises(ValueError, match="the sampling is done"):
        sampler.step(row[None])
    with pytest.raises(IndexError, match="prompt: expected below 1, got 1"):
        sampler.sequences(1)


@pytest.mark.parametrize("name", ["top_k", "min_tokens", "max_tokens", "min_ends"])
def test_options_are_whole_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected an integer, got float"):
        SamplingOptions(**{name: 1.5})
