"""What the command line answers before torch and Megatron are imported, and what it then hides."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import re
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.config import RunConfig
from megatron_prefix.config.loader import load_dataclass
from megatron_prefix.config.output import OutputConfig
from megatron_prefix.megatron.known_messages import hide_known_messages
from megatron_prefix.training.requirements import missing_packages
from megatron_prefix.training.surroundings import faults_of_surroundings
from tests.training.runs import good_records, run_values, torchrun, write_config, write_records

ROOT = Path(__file__).resolve().parents[2]

# Ends by saying which of the two it has imported.
_COMMAND = """
import sys, time
from megatron_prefix.training.__main__ import main
status = main()
print("imported:", [name for name in ("torch", "megatron", "numpy") if name in sys.modules])
sys.exit(status)
"""


def _command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    records = write_records(tmp_path / "rollouts.jsonl", good_records(1))
    values = run_values(tmp_path / "out", records=records)
    return write_config(tmp_path / "run.yaml", values)


def test_help_names_every_section_on_a_screen_and_imports_neither_torch_nor_megatron() -> None:
    done = _command("--help")
    assert done.returncode == 0 and done.stderr == ""
    *lines, imported = done.stdout.splitlines()
    assert imported == "imported: []"
    assert len(lines) < 30 and max(map(len, lines)) <= 100 and "section.key=value" in done.stdout
    text = done.stdout
    for field in dataclasses.fields(RunConfig):
        assert re.search(rf"^  [* ] {field.name} +[A-Z].*\.$", text, re.MULTILINE), field.name
    required = re.findall(r"^  \* (\w+)", text, re.MULTILINE)
    assert required == ["model", "training", "rollouts", "output"]
    assert "--check" in text and "Ctrl-C" in text


def test_help_of_a_section_and_of_a_key_says_type_default_and_meaning() -> None:
    section, key, nested = (
        _command("--help", name).stdout for name in ("output", "optimizer.lr", "rollouts.server")
    )
    for field in dataclasses.fields(OutputConfig):
        assert f"\noutput.{field.name}: " in section
    assert "\noutput.directory: path, must be set\n    Folder of the run" in section
    assert "\noutput.keep: int, default 2\n    Checkpoints that are kept" in section
    assert key.startswith("optimizer.lr: float, default ") and key.count("\n    ") == 1
    assert nested.startswith("rollouts.server: ") and "\nrollouts.server.url: " in nested
    for text in (section, key, nested):
        assert text.endswith("imported: []\n")


def test_help_of_what_is_no_key_names_the_sections() -> None:
    done = _command("--help", "optimiser.lr")
    assert done.returncode == 2 and done.stdout == "imported: []\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: --help optimiser.lr: there is no such section or key; sections: "
    )
    assert "optimizer" in line


def test_a_misspelt_key_is_answered_within_a_second(config: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = _command(config, "training.stepz=3")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and done.stdout == "imported: []\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {config}: training.stepz: unknown key; did you mean steps?")
    # Of the processor, which other processes on the machine do not lengthen; it waits for nothing.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1


def test_all_faults_of_all_sections_are_said_at_once(config: Path) -> None:
    done = _command(
        config,
        *(
            "training.stepz=3",
            "training.token_budget=many",
            "optimizer.lr=-1",
            "optimizer.min_lr=-2",
            "model.transformer.hiden_size=8",
            "model.transformer.num_layers=two",
            "model.transformer.bf16=true",
        ),
        *("model.vocab_size=", "rollouts.engine=openai", "optimiser={lr: 1}", "output.keep=0"),
    )
    assert done.returncode == 2 and done.stdout == "imported: []\n"
    first, *faults = done.stderr.splitlines()
    assert first == f"error: {config}: {len(faults)} faults"
    for fault in (
        "training.stepz: unknown key; did you mean steps?",
        'training.token_budget: expected int, got "many"',
        "optimizer.lr: -1.0 must be at least 0",
        "optimizer.min_lr: -2.0 must be at least 0",
        "model.vocab_size: expected int, got null",
        "rollouts.group_size: required by engine: openai",
        "rollouts.max_response_length: required by engine: openai",
        "rollouts.reward: required by engine: openai",
        "rollouts.server: missing, with engine: openai",
        "optimiser: unknown key; did you mean optimizer?",
        "output.keep: 0 must be at least 1",
        "model.transformer.hiden_size: Megatron-Core's TransformerConfig has no such field; did "
        "you mean hidden_size?",
        "model.transformer.num_layers: 'two' is not of type int",
        "model.transformer.bf16: True is decided by training.dtype; remove it here",
    ):
        assert sum(line.startswith(f"  {fault}") for line in faults) == 1, fault
    assert len(faults) == 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: run.yaml; usage: torchrun "),
        (
            ["run.yaml", "--optimizer.lr", "1e-5"],
            "--optimizer.lr: options are keys of the configuration, without dashes: "
            "optimizer.lr=1e-5",
        ),
        (["run.yaml", "--chek"], "--chek: there is no such option; options are --check, --help"),
        (["run.yaml", "--optimizer.lr=1e-5"], "without dashes: optimizer.lr=1e-5"),
        (["nope.yaml"], "nope.yaml: cannot be read: No such file or directory"),
    ],
)
def test_wrong_arguments_are_one_line_that_says_what_to_write(
    arguments: list[str], message: str
) -> None:
    done = _command(*arguments)
    assert done.returncode == 2 and done.stdout == "imported: []\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "rollouts.text={tokenizer: t, prompt_template: {question}}",
            'rollouts.text.prompt_template: expected str, got {"question": null}; YAML reads {...} '
            "as a mapping: put text that begins with { in quotes",
        ),
        (
            "rollouts.server={url:x}",
            "rollouts.server.url:x: unknown key; YAML wants a space after a colon: url: x",
        ),
        (
            "parallel.tensor_model_parallel_size=2",
            "parallel: 1 process does not divide by tensor_model_parallel_size x "
            "pipeline_model_parallel_size = 2; start a multiple of it: torchrun --nproc-per-node "
            "2 -m megatron_prefix.training",
        ),
    ],
)
def test_usual_mistakes_are_answered_with_what_to_write(
    config: Path, override: str, message: str
) -> None:
    done = _command(config, override)
    assert done.returncode == 2 and done.stdout == "imported: []\n"
    assert message in done.stderr


def test_under_torchrun_only_rank_0_reports_and_torchruns_summary_ends_with_it(
    config: Path,
) -> None:
    values = config.read_text().replace("token_budget", "token_bugdet")
    config.write_text(values)
    failed = torchrun(config)
    assert failed.returncode != 0
    (error,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert "2 faults" in error
    assert failed.stderr.count("  training.token_bugdet: unknown key") == 2
    # Once by rank 0, once in the summary.
    assert "training.token_bugdet: unknown key" in failed.stderr.split("Root Cause")[1]


def test_without_a_gpu_the_default_device_is_one_line_that_says_cpu(tmp_path: Path) -> None:
    records = write_records(tmp_path / "rollouts.jsonl", good_records(1))
    values = run_values(tmp_path / "out", records=records)
    del values["training"]["device"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "megatron_prefix.training"),
            str(write_config(tmp_path / "run.yaml", values)),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "training.device: cuda, but torch" in line
    assert line.endswith("sees no GPU here; set training.device: cpu")


def test_what_is_missing_around_a_run_is_said_at_once_before_torch_is_imported(
    config: Path,
) -> None:
    folder = config.parent
    missing, there = folder / "missing.jsonl", folder / "rollouts.jsonl"
    (folder / "a.txt").touch()
    done = _command(
        config,
        f"rollouts.paths=[{missing}, {there}, {folder}, {folder / 'a.txt'}, nowhere.jsonl]",
        f"evaluation={{paths: [{missing}], num_prompts: 1}}",
        "rollouts.max_response_length=4",
        "rollouts.reward=exact_mach",
        f"output.load={folder / 'no_weights'}",
        f"output.directory={config}",
        "output.checkpoint_writer=nvrx",
        "parallel.tensor_model_parallel_size=2",
    )
    assert done.returncode == 2 and done.stdout == "imported: []\n"
    first, *faults = done.stderr.splitlines()
    assert first == f"error: {config}: {len(faults)} faults"
    expected = [
        "parallel: 1 process does not divide by",
        f"rollouts.paths: {missing}: there is no such file",
        f"rollouts.paths: {folder}: is a directory; name the files in it",
        f"rollouts.paths: {folder / 'a.txt'}: unknown format; its name must end in .jsonl,",
        f"rollouts.paths: nowhere.jsonl: there is no such file in {ROOT}",
        f"evaluation.paths: {missing}: there is no such file",
        "rollouts.reward: exact_mach: name one of exact_match, token_match_fraction,",
        "output.checkpoint_writer: nvrx needs nvidia-resiliency-ext 0.6 or newer",
        f"output.load: {folder / 'no_weights'}: does not exist; name the folder of a distributed",
        f"output.directory: {config} cannot be written: Not a directory: {config}; name another",
    ]
    if importlib.util.find_spec("nvidia_resiliency_ext"):
        expected = [fault for fault in expected if "nvrx" not in fault]
    assert len(faults) == len(expected), faults
    for fault, start in zip(faults, expected, strict=True):
        assert fault.startswith(f"  {start}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.timeout_minutes=.inf", "expected float, got Infinity; set a finite number"),
        ("training.timeout_minutes=1e300", "1e+300 must be at most 14400 (10 days): a run whose"),
        ("optimizer.lr=.inf", "expected float, got Infinity; set a finite number"),
        ("optimizer.weight_decay=.inf", "expected float, got Infinity; set a finite number"),
        ("objective.clip_high=.inf", "expected float, got Infinity; set a finite number"),
        ("training.kernel=flash_attn_4", "flash_attn_4 cannot compute on device: cpu; choose one"),
        ("rollouts.reward=numeric", "numeric: it reads text; set rollouts.text.tokenizer"),
    ],
)
def test_a_value_that_no_run_could_use_is_named_by_its_key(
    config: Path, override: str, message: str
) -> None:
    done = _command(config, override)
    assert done.returncode == 2 and done.stdout == "imported: []\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {config}: {override.partition('=')[0]}: {message}")


def _around(config: Path, rank: int = 0, **output: Any) -> list[str]:
    values = run_values(config.parent / "out", records=config.parent / "rollouts.jsonl")
    values["output"].update(output)
    return faults_of_surroundings(load_dataclass(RunConfig, values), rank)


def test_each_reward_of_several_is_looked_at(config: Path) -> None:
    values = run_values(
        config.parent / "out",
        records=config.parent / "rollouts.jsonl",
        rollouts={"reward": {"right": "exact_match", "close": "exact_mach"}},
        objective={"reward_weights": {"right": 1.0, "close": 0.5}},
    )
    (fault,) = faults_of_surroundings(load_dataclass(RunConfig, values), 0)
    assert fault.startswith("rollouts.reward.close: exact_mach: name one of exact_match, ")


@pytest.mark.parametrize("name", ["{}/nowhere", "outputs/my/tokenizer", "../tokenizer"])
def test_a_tokenizer_that_can_only_be_a_folder_is_looked_for(config: Path, name: str) -> None:
    values = run_values(
        config.parent / "out",
        records=config.parent / "rollouts.jsonl",
        rollouts={"text": {"tokenizer": name.format(config.parent)}},
    )
    (fault,) = faults_of_surroundings(load_dataclass(RunConfig, values), 0)
    assert fault == (
        f"rollouts.text.tokenizer: {name.format(config.parent)}: there is no such folder"
    )
    values["rollouts"]["text"]["tokenizer"] = "owner/name"
    assert faults_of_surroundings(load_dataclass(RunConfig, values), 0) == []


def test_weights_to_start_from_are_looked_for_where_no_checkpoint_takes_their_place(
    config: Path,
) -> None:
    missing = str(config.parent / "no_weights")
    assert _around(config) == []
    (fault,) = _around(config, load=missing)
    assert fault.startswith(f"output.load: {missing}: does not exist")
    assert _around(config, rank=1, load=missing) == []
    (config.parent / "out/checkpoints/step_000001").mkdir(parents=True)
    assert _around(config, load=missing) == []
    (fault,) = _around(config, load=missing, resume=False)
    assert fault.startswith("output.load: ")


def test_an_output_folder_without_the_right_to_write_is_named(config: Path) -> None:
    closed = config.parent / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("this user may write anywhere")
    (fault,) = _around(config, directory=str(closed / "run" / "1"))
    assert fault == (
        f"output.directory: {closed}/run/1 cannot be written: Permission denied: {closed}; name "
        "another folder, or make it writable"
    )


def _needs(monkeypatch: pytest.MonkeyPatch, missing: set[str], **sections: Any) -> list[str]:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    values = run_values(Path("out"), records=Path("r.jsonl"), **sections)
    return missing_packages(load_dataclass(RunConfig, values))


def test_missing_packages_are_named_by_the_options_that_need_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = {"tensorboard", "matplotlib", "psutil", "httpx", "jinja2", "datasets", "pyarrow"}
    train = "which is not installed; pip install 'megatron-prefix[train]'"
    rollouts = "which is not installed; pip install 'megatron-prefix[rollouts]'"
    quiet = {"save_last": False}
    assert _needs(monkeypatch, missing, output=quiet) == []
    assert _needs(monkeypatch, missing) == [f"writing a checkpoint needs psutil, {train}"]
    assert _needs(monkeypatch, missing, output={**quiet, "tensorboard": True, "plot": True}) == [
        f"output.tensorboard: true needs tensorboard, {train}",
        f"output.plot: true needs matplotlib, {train}",
    ]
    assert _needs(monkeypatch, missing, output=quiet, rollouts={"paths": ["a.parquet"]}) == [
        f"reading Parquet needs pyarrow, {train}"
    ]
    asked = {"group_size": 2, "max_response_length": 4, "reward": "r"}
    text = {"tokenizer": "t", "chat": True}
    server = {"url": "http://localhost:1", "kind": "vllm"}
    openai = {**asked, "engine": "openai", "server": server, "text": text}
    assert _needs(monkeypatch, missing, output=quiet, rollouts=openai) == [
        f"rollouts.engine: openai needs httpx, {rollouts}",
        f"rollouts.text needs jinja2 and datasets, {rollouts}",
    ]
    hf = {**asked, "engine": "hf"}
    assert _needs(monkeypatch, {*missing, "mbridge"}, output=quiet, rollouts=hf) == [
        f"rollouts.engine: hf needs mbridge, {rollouts}"
    ]


def test_only_what_is_known_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    name = "megatron.core.models.gpt.gpt_model"
    before = logging.getLogger(name).filters[:]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hide_known_messages()
            for text, category, module in [
                ("Apex is not installed. Falling back", UserWarning, "megatron.core.optimizer"),
                ("Apex is not installed. Falling back", UserWarning, "my_module"),
                ("Apex is not installed. Falling back", FutureWarning, "megatron.core.optimizer"),
                ("Your batch is empty", UserWarning, "megatron.core.optimizer"),
            ]:
                warnings.warn_explicit(text, category, "file.py", 1, module=module)
        assert [(str(w.message)[:4], w.category) for w in caught] == [
            ("Apex", UserWarning),
            ("Apex", FutureWarning),
            ("Your", UserWarning),
        ]
        logging.getLogger(name).warning("GPTModel IS DEPRECATED. GPTModel is only accepting")
        logging.getLogger(name).warning("the vocabulary is odd")
        assert [record.getMessage() for record in caplog.records] == ["the vocabulary is odd"]
    finally:
        logging.getLogger(name).filters[:] = before
