"""tools/convert_checkpoint.py: from a model to a model, with messages that stand on their own."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conversion.models import CASES, write_model

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            status = tool.main()
        except SystemExit as exit:
            status = exit.code
        assert signal.getsignal(signal.SIGTERM) is handler
        found = capsys.readouterr()
        return status, found.out, found.err

    return call


def test_a_model_goes_in_comes_out_and_is_verified(run, tmp_path: Path) -> None:
    hf, megatron, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    write_model(hf, "qwen3", **CASES["qwen3"][1])
    (hf / "tokenizer.json").write_text("{}")
    status, out, err = run("hf-to-megatron", hf, megatron)
    assert (status, "model.yaml" in out) == (0, True), err
    assert "100%" in err
    status, out, _ = run("inspect", megatron)
    assert status == 0 and "family: qwen3" in out
    assert "decoder.layers.mlp.linear_fc1.weight" in out and "[2, 192, 64]" in out
    last = out.splitlines()[-1]
    assert re.fullmatch(
        r"and entries that are no weights: \d+ of Transformer Engine's extra states \(empty .*\)",
        last,
    ), last
    status, out, _ = run("inspect", hf, "--json")
    assert json.loads(out)["model"]["head_dim"] == 32
    status, out, err = run("megatron-to-hf", megatron, back, "--hf-source", hf)
    assert status == 0, err
    assert (back / "tokenizer.json").exists()
    groups = tmp_path / "groups.jsonl"
    groups.write_text('{"prompt": [5, 6], "responses": [[7], [8, 9]]}\n')
    status, out, err = run("verify", hf, "--megatron", megatron, "--groups", groups)
    assert status == 0, out + err
    assert "of 3 tokens" in out and out.count(" ok") == 3


def test_a_failed_verification_exits_with_1(run, tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "llama")
    status, out, _ = run("verify", tmp_path / "hf", "--tolerance", "1e-12", "--json")
    report = json.loads(out)
    assert status == 1 and not report["ok"]
    assert [check["ok"] for check in report["checks"]] == [True, False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hf-to-megatron", "nowhere", "out"), "nowhere: does not exist; name the folder of a"),
        (("megatron-to-hf", "nowhere", "out"), "nowhere: does not exist; name the folder of a"),
        (("inspect", "empty"), "empty: not a Megatron distributed checkpoint"),
        (("verify", "empty"), "no *.safetensors file"),
        (("hf-to-megatron", "hf", "hf"), "hf: exists already; choose another folder, or add"),
        (("hf-to-megatron", "hf", "out", "--max-shard-gb", "0"), "--max-shard-gb: 0.0 must be"),
        (("verify", "hf", "--groups", "bad.jsonl"), "group 0: token 61 is outside the vocabulary"),
        (("verify", "hf", "--groups", "nothing.jsonl"), "nothing.jsonl"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("hf"), "llama")
    Path("empty").mkdir()
    Path("bad.jsonl").write_text('{"prompt": [61], "responses": [[1]]}\n')
    status, out, err = run(*arguments)
    assert status == 2 and not out
    lines = [line for line in err.splitlines() if line.startswith("convert_checkpoint: ")]
    assert len(lines) == 1 and message in lines[0], err
    assert "Traceback" not in err and not Path("out").exists()


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf", "inspect", "verify"])
def test_help_says_what_goes_in_and_comes_out(run, command: str) -> None:
    status, out, _ = run("--help")
    assert status == 0 and command in out and "safetensors" in out
    status, out, _ = run(command, "--help")
    assert status == 0 and len(out.splitlines()) > 8
