"""Exact search: the ids and scores of brute force in float64, in any block and on any threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_cases
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import fastmrc
from fastmrc import reference, retrieval
from fastmrc.errors import InputError
from fastmrc.integrations.faiss import faiss_index
from fastmrc.retrieval import search_vectors

Vectors = NDArray[Any]


def check(queries: Vectors, corpus: Vectors, k: int) -> None:
    hits = search_vectors(queries, corpus, k)
    ids, scores = reference.search_vectors(queries, corpus, k)
    assert (hits.ids.dtype, hits.scores.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(hits.ids, ids)
    np.testing.assert_allclose(hits.scores, scores, rtol=1e-6, atol=1e-12)


@given(st.data())
@random_cases(300)
def test_as_brute_force(monkeypatch: pytest.MonkeyPatch, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    monkeypatch.setattr(retrieval, "_CORPUS_ROWS", data.draw(st.sampled_from([1, 7, 64, 4096])))
    monkeypatch.setattr(retrieval, "_QUERY_ROWS", data.draw(st.sampled_from([1, 3, 512])))
    n, m = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 200))
    d, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    queries, corpus = rng.normal(size=(n, d)), rng.normal(size=(m, d))
    kind = data.draw(
        st.sampled_from(["random", "whole numbers", "few different", "zeros", "large"])
    )
    if kind == "whole numbers":  # many ties
        queries, corpus = np.round(queries), np.round(corpus)
    elif kind == "few different":  # more equal ones than there are candidates
        corpus = corpus[rng.integers(min(m, 3), size=m)]
    elif kind == "zeros":
        corpus[rng.random(m) < 0.5] = 0
    elif kind == "large":
        corpus *= 100.0 ** rng.integers(-2, 2, (m, 1))
    dtypes = [np.float32, np.float16]
    check(
        queries.astype(data.draw(st.sampled_from(dtypes))),
        corpus.astype(data.draw(st.sampled_from(dtypes))),
        k,
    )


def test_nearly_equal_scores_are_told_apart() -> None:
    # In float32 the products round to the same number, or to the wrong order.
    rng = np.random.default_rng(0)
    query = rng.normal(size=(1, 384)).astype(np.float32)
    corpus = np.repeat(query, 500, axis=0)
    rows, columns = np.arange(500), rng.integers(384, size=500)
    corpus[rows, columns] = np.nextafter(corpus[rows, columns], np.float32(9))
    check(query, corpus, 5)


def test_products_that_torch_may_round(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    query = rng.normal(size=(4, 256)).astype(np.float32)
    corpus = query[0] + (1e-4 * rng.normal(size=(400, 256))).astype(np.float32)
    torch.set_float32_matmul_precision("medium")  # bfloat16 where the processor has it
    try:
        check(query, corpus, 3)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_very_small_numbers() -> None:
    rng = np.random.default_rng(5)
    check(*(1e-25 * rng.normal(size=(2, 40, 8))).astype(np.float32), 5)


def test_many_equal_rows_in_any_place() -> None:
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(3, 50)).astype(np.float32)
    corpus = rng.normal(size=(9000, 50)).astype(np.float32)
    best = queries[0] / np.linalg.norm(queries[0]) * 9
    corpus[rng.permutation(9000)[:100]] = best
    check(queries, corpus, 10)


def test_memory_mapped(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for dtype in (np.float32, np.float16):
        corpus = rng.normal(size=(5000, 24)).astype(dtype)
        np.save(tmp_path / "corpus.npy", corpus)
        mapped = np.load(tmp_path / "corpus.npy", mmap_mode="r")
        check(corpus[:4].astype(np.float32), mapped, 7)
        check(corpus[::2][:4], mapped[::2], 7)  # rows apart


def test_torch_and_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(40, 64, generator=generator)
    corpus = torch.randn(9000, 64, generator=generator).requires_grad_()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(search_vectors(queries, corpus, 12))
    finally:
        torch.set_num_threads(before)
    for hits in found[1:]:
        np.testing.assert_array_equal(hits.ids, found[0].ids)
        np.testing.assert_array_equal(hits.scores, found[0].scores)
    narrow = search_vectors(queries.bfloat16(), corpus.detach().half(), 3)
    expected = search_vectors(queries.bfloat16().float(), corpus.detach().half().float(), 3)
    np.testing.assert_array_equal(narrow.ids, expected.ids)


def test_nothing_to_find() -> None:
    hits = search_vectors(np.zeros((2, 3), np.float32), np.zeros((0, 3), np.float32), 2)
    assert hits.ids.tolist() == [[-1, -1]] * 2 and np.isneginf(hits.scores).all()
    assert search_vectors(
        np.zeros((0, 3), np.float32), np.ones((4, 3), np.float32), 2
    ).ids.shape == (
        0,
        2,
    )


ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("queries", "corpus", "k", "error", "message"),
    [
        (ONES, ONES, 0, InputError, "k: expected at least 1, got 0"),
        (ONES, ONES, 1.0, TypeError, "k: expected an integer, got float"),
        (ONES, ONES, True, TypeError, "k: expected an integer, got bool"),
        (ONES, np.ones((2, 4), np.float32), 1, InputError, "corpus: expected vectors of 3 numbers"),
        (ONES[0], ONES, 1, InputError, r"queries: expected shape \[n, d\], got \[3\]"),
        (ONES, ONES.astype(np.float64), 1, TypeError, "corpus: expected float32 or float16"),
        (ONES.astype(int), ONES, 1, TypeError, "queries: expected float32 or float16, got int64"),
        (ONES.tolist(), ONES, 1, TypeError, "queries: expected an array of vectors, got list"),
        (ONES * np.nan, ONES, 1, InputError, "queries: expected finite numbers"),
        (ONES, ONES * np.inf, 1, InputError, "corpus: expected finite numbers.*rows 0 to 1"),
        (ONES, ONES * 1e20, 1, InputError, "corpus: expected finite numbers whose squares"),
        (ONES * 1e25, ONES * 1e15, 1, InputError, "inner products within the range of float32"),
        (ONES, np.asfortranarray(ONES), 1, InputError, "corpus: expected vectors that are contig"),
        (torch.ones(3, 2).T, ONES, 1, InputError, "queries: expected vectors that are contig"),
        (ONES, ONES * np.nan, 1, InputError, "corpus: expected finite numbers"),
        (np.ones((2, 0), np.float32), ONES, 1, InputError, "queries: expected shape"),
    ],
)
def test_what_is_wrong_is_said(
    queries: Any, corpus: Any, k: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        search_vectors(queries, corpus, k)


def test_progress_shows(capsys: pytest.CaptureFixture[str]) -> None:
    search_vectors(ONES, ONES, 1, progress=True)
    assert "2.00/2.00" in capsys.readouterr().err
    search_vectors(ONES, ONES, 1)
    assert capsys.readouterr().err == ""


def test_the_lists_of_topk_merge_are_checked() -> None:
    scores = np.ones((2, 3), np.float32)
    values, ids = np.full((2, 2), -np.inf, np.float32), np.full((2, 2), -1, np.int64)
    fastmrc._C.topk_merge(scores, 5, values, ids)
    assert ids.tolist() == [[5, 6]] * 2
    with pytest.raises(ValueError, match="with 2 rows"):
        fastmrc._C.topk_merge(scores, 0, values[:1], ids[:1])
    with pytest.raises(ValueError, match="contiguous"):
        fastmrc._C.topk_merge(scores, 0, np.asfortranarray(values), ids)
    with pytest.raises(TypeError):  # a converted copy would be written in vain
        fastmrc._C.topk_merge(scores, 0, values.astype(np.float64), ids)
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match=f"ids: expected rows below 2, got {wrong}"):
            fastmrc._C.inner_products(ONES, ONES, np.array([[wrong], [0]]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the import of faiss
def test_faiss() -> None:
    pytest.importorskip("faiss", reason="faiss is not installed")
    rng = np.random.default_rng(3)
    corpus = rng.normal(size=(400, 16)).astype(np.float16)
    hits = search_vectors(corpus[:5], corpus, 3)
    scores, ids = faiss_index(corpus, "Flat").search(corpus[:5].astype(np.float32), 3)
    np.testing.assert_array_equal(ids, hits.ids)
    np.testing.assert_allclose(scores, hits.scores, rtol=1e-5)
    assert faiss_index(corpus, "IVF4,Flat").ntotal == faiss_index(corpus).ntotal == 400
    with pytest.raises(InputError, match="enough vectors to train 'IVF1024,Flat', got 400"):
        faiss_index(corpus, "IVF1024,Flat")
    with pytest.raises(InputError, match="factory: expected an index that FAISS can make.*'Oops'"):
        faiss_index(corpus, "Oops")
    with pytest.raises(TypeError, match="corpus: expected float32 or float16"):
        faiss_index(corpus.astype(np.float64))


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(InputError, match=r"pip install 'fastmrc\[faiss\]'"):
        faiss_index(ONES)
