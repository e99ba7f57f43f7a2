"""The README's Python examples run, in order, in one namespace."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fastmrc.cli import main

README = Path(__file__).resolve().parent.parent / "README.md"


def test_python_examples_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 8
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["answer"].text == "蔡伦"
    assert [span.passage for span in namespace["answer"].spans] == [0, 1]
    assert [answer.text for answer in namespace["answers"]][0] == "蔡伦"


def test_shell_block_holds_the_two_commands() -> None:
    block = re.search(r"^```sh\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    assert block is not None
    install, test = block.group(1).strip().splitlines()
    assert "fastmrc answer" in install
    assert test.endswith("pytest")


def test_the_whole_chain_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = re.findall(r"^fastmrc (answer .*--corpus.*)$", README.read_text("utf-8"), re.M)
    monkeypatch.chdir(README.parent)
    assert main([*shlex.split(line), "--no-index"]) == 0
    assert capsys.readouterr().out.startswith("Answer: 蔡伦\n")
