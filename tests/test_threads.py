"""Results do not depend on threads, instruction set or who calls at the same time."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import random_search, random_step

import fastmrc
from fastmrc import ops

ISAS = ("generic", "avx2", "avx512")

# Prints a digest of the results of many kernels and searches, small and large.
DIGEST = """
import hashlib, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from cases import cast, random_rows, random_search, random_step
import fastmrc
from fastmrc import ops

def put(*arrays):
    for array in arrays:
        array = np.asarray(array)
        digest.update(str((array.shape, array.dtype)).encode() + array.tobytes())

for threads in map(int, sys.argv[2].split(",")):
    fastmrc.set_num_threads(threads)
    digest = hashlib.sha256()
    rng = np.random.default_rng(50)
    for i in range(30):
        rows = random_rows(rng, 5, int(rng.choice([1, 17, 64, 100, 4097, 21128])))
        for dtype in ("float32", "float16", "bfloat16"):
            x = cast(rows, dtype)
            put(*ops.topk(x, 5), *ops.log_softmax_topk(x, 5), *ops.row_stats(x))
    for i in range(80):
        put(*random_step(rng).native())
    for i in range(4):
        put(*random_step(rng, 21128).native())
    for i in range(60):
        digest.update(repr(random_search(rng).native()).encode())
    digest.update(repr(random_search(rng, 9000).native()).encode())
    print(fastmrc.build_info()["isa"], threads, digest.hexdigest())
"""


@pytest.fixture
def keep_threads() -> Iterator[None]:
    from fastmrc import _build

    before = fastmrc.get_num_threads(), _build._threads_were_set
    yield
    fastmrc.set_num_threads(before[0])
    _build._threads_were_set = before[1]


def _run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_equal_bits_on_every_instruction_set_and_thread_count() -> None:
    digests = {}
    for isa in ISAS:
        done = _run(DIGEST, str(Path(__file__).parent), "1,2,3", FASTMRC_FORCE_ISA=isa)
        if done.returncode and f"has no {isa}" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        for line in done.stdout.splitlines():
            used, threads, digest = line.split()
            assert used == isa
            digests[isa, threads] = digest
    assert {("generic", "1"), ("generic", "2"), ("generic", "3")} <= set(digests)
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "generic "])
def test_a_wrong_instruction_set_fails_the_import(isa: str) -> None:
    done = _run("import fastmrc", FASTMRC_FORCE_ISA=isa)
    assert done.returncode != 0
    message = f"FASTMRC_FORCE_ISA: expected generic, avx2 or avx512, got {isa}"
    assert message in done.stderr


def test_an_empty_variable_is_none() -> None:
    code = "import fastmrc; print(fastmrc.build_info()['isa'])"
    assert _run(code, FASTMRC_FORCE_ISA="").stdout == _run(code).stdout != ""


def _in_threads(count: int, task: Callable[[int], Any]) -> list[Any]:
    barrier = threading.Barrier(count)

    def run(i: int) -> Any:
        barrier.wait()
        return task(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_kernels_in_several_python_threads(keep_threads: None, threads: int) -> None:
    fastmrc.set_num_threads(threads)
    rows = np.random.default_rng(51).normal(size=(20, 21128)).astype(np.float32)
    steps = [random_step(np.random.default_rng([52, i]), 9000) for i in range(3)]
    want_topk = ops.topk(rows, 4)
    want_steps = [step.native() for step in steps]

    def task(i: int) -> bool:
        good = True
        for _ in range(10):
            good &= all(map(np.array_equal, ops.topk(rows, 4), want_topk))
            for step, want in zip(steps, want_steps, strict=True):
                good &= all(map(np.array_equal, step.native(), want))
        return good

    assert all(_in_threads(4, task))


def test_searches_in_several_python_threads(keep_threads: None) -> None:
    fastmrc.set_num_threads(2)

    def task(i: int) -> list[Any]:
        rng = np.random.default_rng(53)
        return [random_search(rng).native() for _ in range(40)]

    results = _in_threads(4, task)
    assert all(result == results[0] for result in results)


def test_an_error_in_a_worker_comes_back(keep_threads: None) -> None:
    fastmrc.set_num_threads(2)
    rows = np.zeros((40, 21128), dtype=np.float32)
    rows[39, 5] = rows[17, 21127] = np.nan
    for _ in range(5):
        with pytest.raises(ValueError, match="NaN in row 17"):
            ops.topk(rows, 2)
        with pytest.raises(ValueError, match="NaN in row 17"):
            ops.row_stats(rows)
    assert ops.topk(rows[:17], 1)[1].tolist() == [[0]] * 17


def _topk_of_child(results: Any) -> None:
    rows = np.random.default_rng(54).normal(size=(30, 21128)).astype(np.float32)
    results.put(ops.topk(rows, 2)[1].tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_threads_survive_fork(keep_threads: None) -> None:
    fastmrc.set_num_threads(2)
    rows = np.random.default_rng(54).normal(size=(30, 21128)).astype(np.float32)
    want = ops.topk(rows, 2)[1].tolist()  # the pool exists before the fork
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_topk_of_child, args=(results,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert results.get() == want
    assert ops.topk(rows, 2)[1].tolist() == want


@pytest.mark.parametrize("n", [0, -1])
def test_number_of_threads_is_checked(n: int) -> None:
    with pytest.raises(ValueError, match=f"num_threads: expected at least 1, got {n}"):
        fastmrc.set_num_threads(n)


def test_number_of_threads_follows_torch_until_set() -> None:
    code = (
        "import fastmrc, torch\n"
        "torch.set_num_threads(3)\n"
        "print(fastmrc.get_num_threads(), fastmrc.build_info()['threads'])\n"
        "fastmrc.set_num_threads(1)\n"
        "torch.set_num_threads(2)\n"
        "print(fastmrc.get_num_threads())\n"
    )
    assert _run(code).stdout.split() == ["3", "3", "1"]


def test_the_interpreter_runs_while_the_kernels_do(keep_threads: None) -> None:
    """The lock of the interpreter is released: another thread runs during a call."""
    fastmrc.set_num_threads(1)
    rows = np.zeros((100, 50_000), dtype=np.float32)
    ready, go, ran = threading.Event(), threading.Event(), threading.Event()

    def other() -> None:
        ready.set()
        go.wait()
        ran.set()

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # now only who gives the lock away lets others run
    try:
        go.set()
        before = ran.is_set()
        for _ in range(1000):
            ops.topk(rows, 3)
            if ran.is_set():
                break
        during = ran.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert (before, during) == (False, True)
