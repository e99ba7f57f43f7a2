"""What the installed package promises: light import, version, type information."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import fastmrc
from fastmrc import _C

PACKAGE = Path(fastmrc.__file__).parent
PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
HEAVY = ("torch", "transformers", "tokenizers", "safetensors", "tqdm", "huggingface_hub")


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import fastmrc; fastmrc.build_info(); dir(fastmrc)",
        "import fastmrc; import numpy as np; fastmrc.ops.topk(np.zeros(5, np.float32), 2)",
        "import fastmrc; fastmrc.SpanIndex([[1]]); fastmrc.Trie([[1]]); fastmrc.reference.topk",
        "import fastmrc.decoding, fastmrc.options, fastmrc.cli",
    ],
)
def test_import_is_light(code: str) -> None:
    out = _python(f"{code}\nimport sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert out.strip() == "[]"


def test_public_names_exist() -> None:
    for name in fastmrc.__all__:
        assert getattr(fastmrc, name) is not None
        assert name in dir(fastmrc)
    with pytest.raises(AttributeError, match="module 'fastmrc' has no attribute 'nothing'"):
        fastmrc.nothing  # noqa: B018


def test_public_names_have_docstrings() -> None:
    for name in fastmrc.__all__:
        value = getattr(fastmrc, name)
        assert isinstance(value, str) or (value.__doc__ or "").strip(), name


def test_build_info() -> None:
    info = fastmrc.build_info()
    assert set(info) == {"version", "compiler", "isa", "threads", "cuda"}
    assert info["isa"] in ("generic", "avx2", "avx512")
    assert info["threads"] >= 1
    assert isinstance(info["cuda"], bool)
    assert re.search(r"\d", info["compiler"])
    assert info["version"] == fastmrc.__version__


def test_version_has_one_source() -> None:
    if PYPROJECT.is_file():
        version = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["version"]
        assert fastmrc.__version__ == version
    try:
        installed = importlib.metadata.version("fastmrc")
    except importlib.metadata.PackageNotFoundError:
        return  # imported from the source tree
    assert fastmrc.__version__ == installed


def test_type_information_is_installed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_C.pyi").is_file()


def _stub_names(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    return {node.name: node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def _public(value: Any) -> set[str]:
    own = vars(value) if inspect.isclass(value) else dir(value)
    return {name for name in own if not name.startswith("_")}


def _arguments(node: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in node.args.args]


def _native_arguments(function: Any) -> list[str]:
    """Argument names of the signature that pybind11 writes into the docstring."""
    text = function.__doc__.split("(", 1)[1].rsplit(") ->", 1)[0]
    return re.findall(r"(?:^|, )(\w+):", text)


def test_stub_agrees_with_the_extension() -> None:
    stub = _stub_names(ast.parse((PACKAGE / "_C.pyi").read_text(encoding="utf-8")).body)
    assert set(stub) == _public(_C)
    for name, node in stub.items():
        native = getattr(_C, name)
        if isinstance(node, ast.FunctionDef):
            assert _arguments(node) == _native_arguments(native), name
            continue
        assert isinstance(node, ast.ClassDef)
        members = _stub_names(node.body)
        assert set(members) - {"__init__"} == _public(native), name
        assert [base.id for base in node.bases if isinstance(base, ast.Name)] in (
            [],
            [native.__bases__[0].__name__],
        )
        for member, definition in members.items():
            value = inspect.getattr_static(native, member)
            assert isinstance(definition, ast.FunctionDef)
            if isinstance(value, property):
                assert [d.id for d in definition.decorator_list if isinstance(d, ast.Name)] == [
                    "property"
                ]
                continue
            assert _arguments(definition) == _native_arguments(getattr(native, member)), member
