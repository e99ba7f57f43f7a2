"""The command: runs the parts apart and prints what they found."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Before transformers is imported: nothing is fetched.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks import gpu
from benchmarks.gpu.beam_step import part_beam_step
from benchmarks.gpu.context import FULL, QUICK, Context
from benchmarks.gpu.device import REPOSITORY, gpu_machine, load_emulation, nothing_to_run_on
from benchmarks.gpu.end_to_end import part_end_to_end
from benchmarks.gpu.kernels import part_kernels, part_topk
from benchmarks.gpu.operations import part_operations
from benchmarks.gpu.others import part_others
from benchmarks.gpu.readers import part_readers
from benchmarks.gpu.report import Report, write_json

ALL_SECONDS = 470  # of eight minutes
QUICK_SECONDS = 900  # an emulation is slow
START_SECONDS = 45  # of a process, beyond the time of its part


class Part(NamedTuple):
    """A part, its time, and whether it compares with the CPU path."""

    work: Callable[[Context], None]
    seconds: float
    compares: bool = False


PARTS = {
    "operations": Part(part_operations, 25, compares=True),
    "readers": Part(part_readers, 110, compares=True),
    "kernels": Part(part_kernels, 20),
    "topk": Part(part_topk, 30),
    "beam_step": Part(part_beam_step, 25),
    "end_to_end": Part(part_end_to_end, 120),
    "others": Part(part_others, 30),
}


def main() -> int:
    arguments = _parse_arguments()
    if arguments.emulated:
        load_emulation()
    problem = nothing_to_run_on(arguments.emulated)
    if problem:
        print(f"benchmarks.gpu: {problem}", file=sys.stderr)
        return 2
    if arguments.part is not None:
        _run_part(arguments)
        return 0
    output = _output(arguments)
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "emulated": arguments.emulated,
        "quick": arguments.quick,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": gpu_machine(arguments.emulated),
        "parts": {},
    }
    begin = time.monotonic()
    for name in arguments.parts:
        limit = QUICK_SECONDS if arguments.quick else ALL_SECONDS
        left = limit - (time.monotonic() - begin)
        print(f"{name}, {left:.0f} s left", file=sys.stderr, flush=True)
        result["parts"][name] = _run_apart(name, left, arguments)
        result["seconds"] = round(time.monotonic() - begin, 1)
        write_json(output, result)
    print(_table(result))
    print(f"written: {output}")
    compared = [part for name, part in result["parts"].items() if PARTS[name].compares]
    return 0 if all(_is_equal(part) for part in compared) else 1


def _parse_arguments() -> argparse.Namespace:
    description = str(gpu.__doc__).splitlines()[0]
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=description)
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/gpu-*")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--emulated", action="store_true", help="kernels on the host; is quick")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.quick |= arguments.emulated
    return arguments


def _output(arguments: argparse.Namespace) -> Path:
    """Return where the JSON goes; nothing but results of a whole run lies in the repository."""
    results = REPOSITORY / "benchmarks" / "results"
    path: Path | None = arguments.output
    if path is None:
        if arguments.quick:
            kind = "emulated" if arguments.emulated else "quick"
            path = Path(tempfile.gettempdir()) / f"fastmrc-gpu-{kind}.json"
        else:
            name = "-".join(torch.cuda.get_device_name().lower().split())
            path = results / f"gpu-{name}.json"
    path = path.resolve()
    if arguments.emulated and results in path.parents:
        raise SystemExit(f"--output: no result of an emulation goes to {results}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _run_apart(name: str, left: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a part in a process of its own and return its report."""
    found: dict[str, Any] = {"error": None, "checks": [], "figures": [], "errors": []}
    seconds = left if arguments.quick else min(PARTS[name].seconds, left - 5)
    if seconds < 5:
        return found | {"error": "no time was left"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--seconds", str(seconds)]
    command += ["--quick"] * arguments.quick + ["--emulated"] * arguments.emulated
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "part.json"
        failure = None
        try:
            done = subprocess.run(
                [*command, "--output", str(path)],
                timeout=min(left, seconds + START_SECONDS),
                cwd=REPOSITORY,
            )
            if done.returncode != 0:
                failure = f"the process ended with code {done.returncode}"
        except subprocess.TimeoutExpired:
            failure = "stopped: it took too long"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
    if failure is not None:
        found["error"] = failure if found["error"] is None else f"{failure}; {found['error']}"
    return found


def _run_part(arguments: argparse.Namespace) -> None:
    """Run one part and keep its report in the file of ``--output``."""
    begin = time.monotonic()
    report = Report(arguments.output, judged=not arguments.quick)
    context = Context(
        device=torch.device("cpu" if arguments.emulated else "cuda:0"),
        emulated=arguments.emulated,
        quick=arguments.quick,
        sizes=QUICK if arguments.quick else FULL,
        report=report,
        end=begin + arguments.seconds,
    )
    report.save()
    with report.guard(arguments.part):
        PARTS[arguments.part].work(context)
    report.seconds = time.monotonic() - begin
    report.save()


def _is_equal(part: dict[str, Any]) -> bool:
    return part["error"] is None and all(check["passed"] for check in part["checks"])


def _table(result: dict[str, Any]) -> str:
    """Return what was found as lines of text."""
    lines = [f"{result['machine'].get('device')}, {result.get('seconds')} s"]
    if result["emulated"]:
        lines.append("emulated on the host: the times mean nothing")
    for name, part in result["parts"].items():
        lines += ["", f"{name}: {part.get('seconds', 0)} s"]
        lines += [_check_line(check) for check in part["checks"]]
        lines += [_figure_line(figure) for figure in part["figures"]]
        lines += [f"  ERROR {error['of']}: {error['error']}" for error in part["errors"]]
        if part["error"] is not None and not part["errors"]:
            lines.append(f"  ERROR {part['error']}")
        left_out = part.get("notes", {}).get("left out", [])
        if left_out:
            lines.append(f"  no time for {len(left_out)}: {', '.join(left_out[:4])[:200]}")
    return "\n".join(lines)


def _check_line(check: dict[str, Any]) -> str:
    found = "equal" if check["passed"] else f"NOT EQUAL: {check['mismatches']} mismatches"
    ties = f", {check['near_ties']} near ties" if check["near_ties"] else ""
    line = f"  {check['name']:<60} {found} of {check['compared']}{ties}"
    line += f", differences to {check['largest_difference']:.1e}"
    return "\n    ".join([line, *check["examples"]])


def _figure_line(figure: dict[str, Any]) -> str:
    line = f"  {figure['name']:<60} {figure['got']:>10.4g} {figure['unit']}"
    if "wanted" not in figure:
        return line
    met = {True: ": met", False: ": MISSED", None: ""}[figure["met"]]
    return f"{line}, wanted {figure['wanted']}{met}"


if __name__ == "__main__":
    sys.exit(main())
