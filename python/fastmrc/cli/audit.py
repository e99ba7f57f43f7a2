"""``fastmrc audit``: tokens that an output layer can never predict."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fastmrc.cli import common
from fastmrc.errors import InputError
from fastmrc.options import AuditMethod

if TYPE_CHECKING:
    from fastmrc.audit import AuditReport, OutputLayer

__all__ = ["add_parser", "run"]

_EXIT_REJECTED = 1
# Options that say nothing to `verify`.
_ONLY_AUDIT = (
    "norm",
    "tokenizer",
    "ids",
    "radius",
    "method",
    "time_limit",
    "state",
    "device",
    "certificates",
    "plot",
)
# Tokens of a status that are listed at most, without --json.
_LISTED = 20


def add_parser(subparsers: common.SubParsers) -> None:
    """Add the command to the parser of the program."""
    parser = subparsers.add_parser(
        "audit",
        help="find tokens that an output layer can never predict",
        usage="fastmrc audit [options] MODEL|FILE\n       fastmrc audit verify OUT.npz MODEL|FILE",
        description="Find tokens to which no input gives the largest logit. The second form checks "
        "the certificates of an audit.",
        epilog="Exit codes: 0 all are argmaxable (ties included), 1 some are not or only within "
        "rounding (verify: certificates were rejected), 2 an error, 3 some are undecided, 130 "
        "interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "target",
        nargs="+",
        metavar="MODEL|FILE",
        help="model directory or safetensors file, or an .npy or .npz file",
    )
    layer = parser.add_argument_group("layer")
    layer.add_argument("--weight", metavar="NAME", help="of the weights (default: a usual name)")
    layer.add_argument(
        "--bias",
        metavar="NAME",
        help="of the bias, or an .npy file; '' for none (default: a usual name, if there is one)",
    )
    layer.add_argument(
        "--norm",
        metavar="SCALE,SHIFT",
        help="names of the layer norm before the layer: only its outputs count as inputs",
    )
    layer.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json or its directory (default: that of the model)",
    )
    layer.add_argument("--ids", metavar="IDS", help="tokens to judge, such as 5,7,100-200")
    search = parser.add_argument_group("search")
    search.add_argument(
        "--radius",
        type=float,
        metavar="R",
        help="largest norm of inputs (default: any; --norm sets the square root of the width)",
    )
    search.add_argument("--method", choices=get_args(AuditMethod), help="default: auto")
    search.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="leave tokens undecided then"
    )
    search.add_argument(
        "--state", metavar="FILE", help="keeps a stopped audit, which goes on when called again"
    )
    search.add_argument("--device", help="as torch names it, such as cpu or cuda:0 (default: cpu)")
    search.add_argument("--threads", type=common.positive_int, metavar="N")
    output = parser.add_argument_group("output")
    common.add_json_option(parser)
    output.add_argument("--certificates", metavar="OUT.npz", help="write what proves the verdicts")
    output.add_argument("--plot", metavar="OUT.png", help="draw norms of rows against margins")
    output.add_argument(
        "--smallest",
        type=common.positive_int,
        default=10,
        metavar="N",
        help="list the tokens with the smallest margins (default: 10)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Audit a layer, or check certificates."""
    if args.target[0] == "verify":  # a model in a folder of that name is ./verify
        return _verify(args)
    if len(args.target) != 1:
        raise InputError(
            "expected one MODEL or FILE, or: verify OUT.npz MODEL (see `fastmrc audit --help`)"
        )
    return _audit(args)


def _audit(args: argparse.Namespace) -> int:
    for name in ("certificates", "plot", "state"):
        _check_place(name, getattr(args, name))
    norm = None if args.norm is None else args.norm.split(",")
    common.set_threads(args.threads)
    from fastmrc.audit import find_unargmaxable, load_layer, plot_margins

    path = args.target[0]
    layer = load_layer(path, weight=args.weight, bias=args.bias, norm=norm)
    ids = None if args.ids is None else _parse_ids(args.ids, len(layer.weight))
    text = _texts(args.tokenizer, path)
    report = find_unargmaxable(
        layer,
        ids=ids,
        radius=args.radius,
        device=args.device,
        method=args.method or "auto",
        time_limit=args.time_limit,
        state=args.state,
        progress=sys.stderr.isatty(),
    )
    if args.certificates is not None:
        report.save_certificates(args.certificates)
    if args.json:
        common.print_json(report.to_json(text))
    else:
        _print(report, text, args.smallest)
    if args.plot is not None:
        plot_margins(report, args.plot)
    return report.exit_code


def _check_place(name: str, path: str | None) -> None:
    """Refuse, before hours of work, a file that cannot be written."""
    if path is None:
        return
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise InputError(f"--{name}: expected a file in a directory that exists, got '{path}'")
    if name == "plot":
        import importlib.util

        if importlib.util.find_spec("matplotlib") is None:
            raise InputError("--plot: needs matplotlib: pip install 'fastmrc[audit]'")
        if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
            raise InputError(
                f"--plot: expected a name that ends in .png, .svg or .pdf, got '{path}'"
            )


def _parse_ids(text: str, size: int) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            low = int(first)
            high = int(last) if dash else low
        except ValueError:
            raise InputError(f"--ids: expected numbers such as 5,7,100-200, got {part!r}") from None
        if high < low:
            raise InputError(f"--ids: expected a rising range, got {part!r}")
        if not 0 <= low <= high < size:
            raise InputError(f"--ids: expected 0 to {size - 1}, got {part!r}")
        found += range(low, high + 1)
    return found


def _texts(tokenizer: str | None, model: str) -> Callable[[int], str] | None:
    """Return what gives the text of a token; None without a tokenizer."""
    place = Path(model if tokenizer is None else tokenizer)
    path = place / "tokenizer.json" if place.is_dir() else place
    if tokenizer is None and path.name != "tokenizer.json":
        path = place.parent / "tokenizer.json"
    if not path.is_file():
        if tokenizer is not None:
            raise InputError(
                f"--tokenizer: expected tokenizer.json or its directory, got '{place}'"
            )
        return None
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"--tokenizer: cannot read {path} ({error})") from None
    return lambda token: loaded.id_to_token(token) or ""


def _print(report: AuditReport, text: Callable[[int], str] | None, smallest: int) -> None:
    from fastmrc.audit import TokenStatus

    layer = report.layer
    rows, width = layer.weight.shape
    bias = f", bias {layer.bias_name}" if layer.bias_name else ""
    print(common.printable(f"{layer.weight_name} [{rows}, {width}]{bias}"))
    if report.radius is not None:
        print(_inputs(report.radius, layer))
    for name, count in report.counts.items():
        print(f"{count:>9,} {name}")
    print("stage          tokens  seconds")
    for stage_name, stage in report.stages().items():
        print(f"{stage_name.lower():<12} {stage['tokens']:>8,.0f} {stage['seconds']:>8.2f}")
    if not report.complete:
        print("The time ran out before all were decided.")
    print("smallest margins")
    for token, margin in report.smallest_margins(smallest):
        kind = TokenStatus(report.results.status[token]).name
        print(common.printable(f"{margin:>12.4g}  {token:>8} {_named(token, text)}  {kind}"))
    for status in TokenStatus:
        if status != TokenStatus.ARGMAXABLE:
            _print_tokens(report, status, text)


def _inputs(radius: float, layer: OutputLayer) -> str:
    return f"inputs of norm {'' if layer.sphere else 'at most '}{radius:.6g}"


def _print_tokens(report: AuditReport, status: Any, text: Callable[[int], str] | None) -> None:
    tokens = report.with_status(status)
    if not tokens:
        return
    print(status.name)
    for token in tokens[:_LISTED]:
        verdict = report.tokens[token]
        blockers = verdict.blocked_by
        named = ", ".join(f"{other} {_named(other, text)}".strip() for other in blockers)
        blocked = f"  blocked by {named}" if blockers else ""
        if verdict.twin_of is not None:
            blocked += f"  same row as {verdict.twin_of} {_named(verdict.twin_of, text)}"
        print(common.printable(f"{token:>12} {_named(token, text)}{blocked}"))
    if len(tokens) > _LISTED:
        print(f"{len(tokens) - _LISTED:>12,} more (--json lists all)")


def _named(token: int, text: Callable[[int], str] | None) -> str:
    return "" if text is None else text(token)


def _verify(args: argparse.Namespace) -> int:
    common.set_threads(args.threads)
    from tqdm import tqdm

    from fastmrc.audit import read_settings, verify_certificates
    from fastmrc.audit.report import EXIT_UNDECIDED

    if len(args.target) != 3:
        raise InputError("verify: expected OUT.npz and MODEL (see `fastmrc audit --help`)")
    for name in _ONLY_AUDIT:
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')}: no option of audit verify")
    _, certificates, path = args.target
    settings = read_settings(certificates)
    layer = _layer_of(args, path, settings)
    with tqdm(disable=not sys.stderr.isatty(), desc="verify", leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = verify_certificates(
            certificates,
            layer.weight,
            layer.bias,
            sphere=layer.sphere,
            rounding=layer.rounding,
            report=show,
        )
    if args.json:
        common.print_json(
            {
                "accepted": found.accepted,
                "undecided": found.undecided,
                "rejected": {str(token): reason for token, reason in found.rejected.items()},
            }
        )
    else:
        if settings.get("radius") is not None:
            print(_inputs(settings["radius"], layer))
        for name, count in found.accepted.items():
            print(f"{count:>9,} {name} accepted")
        print(f"{found.undecided:>9,} UNDECIDED\n{len(found.rejected):>9,} rejected")
        for token, reason in list(found.rejected.items())[:_LISTED]:
            print(f"{token:>12} {reason}")
    if found.rejected:
        return _EXIT_REJECTED
    return EXIT_UNDECIDED if found.undecided else 0


def _layer_of(args: argparse.Namespace, path: str, settings: dict[str, Any]) -> OutputLayer:
    """Load the layer that certificates are of."""
    from fastmrc.audit import load_layer

    norm: Sequence[str] | None = settings.get("norm")
    bias = args.bias if args.bias is not None else settings.get("bias") or ""
    layer = load_layer(path, weight=args.weight or settings.get("weight"), bias=bias, norm=norm)
    if layer.digest() != settings.get("sha256"):
        raise InputError(f"{path}: expected the layer of the certificates, got other weights")
    return layer
