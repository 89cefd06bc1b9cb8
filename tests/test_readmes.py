"""Every block of every README is run here, or says what runs it or what it needs; links lead on."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_prefix.config import ParallelConfig, RunConfig, TextConfig
from megatron_prefix.config.loader import load_dataclass, read_yaml
from megatron_prefix.layout import PrefixTree
from megatron_prefix.megatron.releases import gate_has_offset
from megatron_prefix.model.transformer_config import transformer_config
from megatron_prefix.planning.shapes import read_shapes
from megatron_prefix.rollouts.file_engine import FileEngine
from megatron_prefix.rollouts.group_reader import GroupReader
from megatron_prefix.rollouts.gym.task_spec import read_task_spec
from megatron_prefix.rollouts.record_forms import RecordForms
from megatron_prefix.rollouts.rewards import exact_match
from megatron_prefix.rollouts.routes import RouteReader, RouteShape
from megatron_prefix.rollouts.text.dialogue import DialogueEncoder
from megatron_prefix.rollouts.validation import Limits
from tests import readmes
from tests.commands import run_python
from tests.megatron.models import TRAINING, model_config, single_process
from tests.readmes import ROOT, Block
from tests.rollouts.chat_templates import chat_tokenizer

FILES = readmes.markdown_files()
BLOCKS = {
    path: readmes.blocks(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    for path in FILES
}
ALL = [block for found in BLOCKS.values() for block in found]

# What is not here, and may stand in a mark.
NEEDS = {"a GPU", "8 GPUs", "several nodes", "Slurm", "hours", "another environment of several GB"}
LANGUAGES = {"bash", "yaml", "json", "python", "text"}

# What a block that is a section of a run is laid over.
SMALL_RUN = {
    "model": {
        "vocab_size": 64,
        "max_sequence_length": 4096,
        "transformer": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
    },
    "rollouts": {"paths": ["rollouts.jsonl"]},
    "training": {"steps": 2, "token_budget": 4096, "dtype": "float32", "device": "cpu"},
    "output": {"directory": "outputs/run"},
}


def _of(language: str, *, mark: str | None = None) -> Any:
    """The blocks of a language, and of a mark if it is given, as a test's parameter."""
    chosen = [b for b in ALL if b.language == language and mark in (None, b.mark)]
    assert chosen
    return pytest.mark.parametrize("block", chosen, ids=[block.source for block in chosen])


def test_the_first_page_has_at_most_1800_words() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1800


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_links_lead_to_files_and_headings(path: Path) -> None:
    assert readmes.broken_links(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_every_block_is_closed_and_names_its_language(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert 2 * len(BLOCKS[path]) == len(re.findall(r"^ *```", text, re.MULTILINE))
    assert {block.language for block in BLOCKS[path]} <= LANGUAGES


@_of("bash")
def test_every_command_is_run_or_says_what_it_needs(block: Block) -> None:
    if block.mark == "needs":
        assert block.value in NEEDS
    elif block.mark == "run by":
        text = (ROOT / block.value).read_text(encoding="utf-8")
        missing = [c for c in readmes.commands(block) if not readmes.is_mentioned(c, text)]
        assert missing == [], f"{block.value} does not run them"
    else:
        # test_commands_run
        assert block.mark == "run here"


@_of("bash", mark="run here")
def test_commands_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the files that the same README shows; what it shows as their output is their output."""
    monkeypatch.chdir(tmp_path)
    found = BLOCKS[ROOT / block.source.partition(":")[0]]
    for file in (other for other in found if other.mark == "file"):
        (tmp_path / file.value).write_text(file.text, encoding="utf-8")
    for name in ("examples", "tools"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.png")
        )
    output = ""
    for program, *arguments in readmes.commands(block):
        assert program == "python"
        done = run_python(arguments)
        assert done.returncode == 0, done.stderr
        output += done.stdout
    if block.value == "output":
        shown = found[found.index(block) + 1]
        assert shown.language == "text"
        for line in shown.text.splitlines():
            # megatron-core 0.14 keeps one tensor of a gated MLP less than newer releases.
            assert line in output or (line.startswith("GiB ") and not gate_has_offset()), line


@_of("yaml")
def test_yaml_is_what_a_run_or_a_tool_reads(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "block.yaml"
    file.write_text(block.text, encoding="utf-8")
    if isinstance(yaml.safe_load(block.text), list):
        assert read_shapes(file)
        return
    if block.mark == "tasks":
        assert read_task_spec(file).task
        return
    values = read_yaml(file)
    if not values.keys() >= SMALL_RUN.keys():
        values = _laid_over(_run_above(block), values)
    config = load_dataclass(RunConfig, values)
    transformer_config(config.model, config.parallel, config.training)


@_of("json")
def test_records_are_read(
    block: Block, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(block.text, encoding="utf-8")
    if block.mark == "prompts":
        _read_prompts(file, num_prompts=len(block.text.splitlines()))
        return
    assert block.mark in ("", "file", "messages", "named rewards", "routes", "positions")
    size, forms, routes = 64, RecordForms(), None
    if block.mark == "routes":
        shape = RouteShape(with_experts=(True,), topk=2, num_experts=4)
        routes = RouteReader(shape=shape, prompts_as_first=False)
    weights = {"correct": 1.0, "brief": 0.2} if block.mark == "named rewards" else None
    if block.mark == "messages":
        size = 400
        tokenizer = chat_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml")
        encoder = DialogueEncoder(tokenizer, stop_tokens=[tokenizer.end_token])
        forms = RecordForms(dialogues=encoder)
    reader = GroupReader(
        limits=Limits(vocab_size=size, max_positions=size),
        forms=forms,
        reward=exact_match,
        reward_weights=weights,
        routes=routes,
        has_mrope=block.mark == "positions",
    )
    engine = FileEngine([file], reader, epochs=1)
    # Records of one response make one group.
    flat = block.mark == "messages" or '"response"' in block.text
    batch = engine.next_rollouts(block.text.count('"responses"') + flat, step=0)
    assert batch is not None and np.isfinite(batch.rewards).all()


@_of("python")
def test_python_runs(block: Block) -> None:
    """In one process on the CPU, with the names that its README describes in words."""
    training = dataclasses.replace(TRAINING, dtype="float32")
    tree = PrefixTree.from_groups([([5, 17, 8], [[1, 3, 9], [4]])])
    with single_process(float64=False):
        names: dict[str, Any] = {
            "config": transformer_config(model_config(), ParallelConfig(), training),
            "tensor_parallel_size": 1,
            "device": torch.device("cpu"),
            "tree": tree,
        }
        if "model = " not in block.text:
            names["model"] = _model(names)
        exec(compile(block.text, block.source, "exec"), names)
    if "response_logprobs" in names:
        assert names["response_logprobs"].shape == (3,)
        assert (names["response_logprobs"] < 0).all()
    if "logits" in names:
        assert len(names["rows"]) == len(names["labels"]) == names["logits"].shape[1]


def _model(names: Mapping[str, Any]) -> torch.nn.Module:
    """The model that the first page builds."""
    first = next(b for b in BLOCKS[ROOT / "README.md"] if b.language == "python")
    found = dict(names)
    exec(first.text, found)
    return found["model"]


def _run_above(block: Block) -> dict[str, Any]:
    """The last whole run that stands above a block in its README, or else a small one."""
    found = BLOCKS[ROOT / block.source.partition(":")[0]]
    for other in reversed(found[: found.index(block)]):
        if other.language == "yaml":
            values = yaml.safe_load(other.text)
            if isinstance(values, dict) and values.keys() >= SMALL_RUN.keys():
                return values
    return SMALL_RUN


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        both = isinstance(under, dict) and isinstance(value, dict)
        merged[key] = _laid_over(under, value) if both else value
    return merged


def _read_prompts(file: Path, *, num_prompts: int) -> None:
    """Records of prompts, by the template of the README where they need one."""
    from transformers import AutoTokenizer

    from megatron_prefix.rollouts.text.prompts import TextPrompts
    from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
    from tests.rollouts.servers import DIGITS, save_word_tokenizer

    folder = save_word_tokenizer(file.parent / "tokenizer", DIGITS, ";")
    with_chat = AutoTokenizer.from_pretrained(folder)
    with_chat.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with_chat.save_pretrained(folder)
    tokenizer = TextTokenizer(folder, vocab_size=16)
    for line in file.read_text(encoding="utf-8").splitlines():
        one = file.with_name("one.jsonl")
        one.write_text(line + "\n", encoding="utf-8")
        template = "{question}" if "question" in line else None
        prompts = TextPrompts(
            [one],
            tokenizer,
            TextConfig(tokenizer=folder, prompt_template=template),
            vocab_size=16,
            max_prompt_length=64,
            shuffle=False,
            seed=0,
        )
        assert prompts.take(1)[0].tokens
        num_prompts -= 1
    assert num_prompts == 0


BROKEN = """# First part

[one](#second-part), [two](nowhere.md), [three](#first-part)

```bash
python tools/plan.py --json
```

<!-- run by: tests/fresh.sh -->
```bash
NAME=1 python tools/convert_checkpoint.py verify A --json  # a comment
pip install -e ".[train,hf]"
```
"""


def test_the_checks_find_what_is_wrong() -> None:
    assert readmes.broken_links(BROKEN, ROOT / "README.md") == [
        "#second-part: there is no such heading",
        "nowhere.md: there is no such file",
    ]
    unmarked, marked = readmes.blocks(BROKEN, "name.md")
    assert (unmarked.source, unmarked.mark) == ("name.md:5", "")
    assert (marked.mark, marked.value) == ("run by", "tests/fresh.sh")
    convert, install = readmes.commands(marked)
    assert readmes.is_mentioned(convert, "convert_checkpoint.py verify there")
    assert not readmes.is_mentioned(convert, "convert_checkpoint.py inspect there")
    assert not readmes.is_mentioned(convert, "plan.py verify")
    assert readmes.is_mentioned(install, "pip install --editable .[train,hf]")
    assert not readmes.is_mentioned(install, "pip install --editable .[train]")
