"""A conversion is right if it comes back bit for bit, and computes what transformers computes.

The converted model runs through the path that training takes: each prompt once, with all of its
responses, packed. transformers runs every sequence whole.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.checkpoints.initial_weights import check_initial_weights
from megatron_prefix.checkpoints.weights import load_weights
from megatron_prefix.config import ParallelConfig, TrainingConfig
from megatron_prefix.conversion.architecture import Architecture
from megatron_prefix.conversion.convert import Progress, hf_to_megatron, megatron_to_hf
from megatron_prefix.conversion.errors import ConversionError
from megatron_prefix.conversion.hf_config import read_architecture, read_config
from megatron_prefix.conversion.hf_folder import HFFolder
from megatron_prefix.conversion.mapping import is_no_weight
from megatron_prefix.conversion.model_section import to_model_config
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import PrefixTree, pack
from megatron_prefix.model.build import ModelChunks, build_gpt_model
from megatron_prefix.model.transformer_config import transformer_config
from megatron_prefix.packages import needed_by

TOLERANCE = 5e-5
"""Of logits and log-probabilities in float32, as a part of the largest logit: rounding errors grow
with the logits, and some models have logits of 1, others of 40."""

Group = tuple[Sequence[int], Sequence[Sequence[int]]]
"""A prompt and its responses, as token ids."""

_SHAPES = ((17, (5, 1, 9, 12)), (1, (3, 2)), (8, (20,)))


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str
    result: str
    limit: str
    ok: bool


def random_groups(architecture: Architecture, seed: int) -> list[Group]:
    """Groups of random tokens: several responses, a one-token prompt, a single response."""
    rng = np.random.default_rng(seed)

    def draw(length: int) -> list[int]:
        return rng.integers(0, architecture.vocab_size, length).tolist()

    return [(draw(prompt), [draw(length) for length in lengths]) for prompt, lengths in _SHAPES]


def verify(
    source: Path,
    *,
    checkpoint: Path | None = None,
    groups: Sequence[Group] | None = None,
    mtp: bool = False,
    work_folder: Path | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> list[Check]:
    """Convert a Hugging Face model there and back, and compare what both sides compute.

    Args:
        source: folder of the model; not changed.
        checkpoint: compare this checkpoint of it instead of converting the model anew.
        groups: what to run; None draws random tokens.
        mtp: convert layers that predict further tokens, too. What they predict is not compared,
            since transformers does not run them.
        work_folder: where copies are made (once the model's size each way) and removed again;
            None takes the system's temporary folder.
        tolerance: largest difference of logits and log-probabilities in float32, divided by the
            largest logit (its distance from the mean of its row).

    Returns:
        The checks; each says whether it holds.

    Raises:
        ConversionError: source or checkpoint cannot be used, naming what is wrong.
    """
    architecture = read_architecture(source)
    groups = random_groups(architecture, seed) if groups is None else groups
    _check_groups(groups, architecture)
    checks = []
    with tempfile.TemporaryDirectory(prefix="verify_", dir=work_folder) as name:
        work = Path(name)
        if checkpoint is None:
            checkpoint = work / "megatron"
            hf_to_megatron(source, checkpoint, mtp=mtp, progress=progress)
        back = megatron_to_hf(checkpoint, work / "back", hf_source=source, progress=progress)
        checks.append(_same_tensors(HFFolder(source), HFFolder(work / "back")))
        expected = _transformers_logits(source, groups, work)
        found = _megatron_logits(checkpoint, back, groups, expected)
    checks += found.checks(tolerance)
    return checks


def _check_groups(groups: Sequence[Group], a: Architecture) -> None:
    if not groups:
        raise ConversionError("no groups to run; give at least one prompt with a response")
    for number, (prompt, responses) in enumerate(groups):
        for part in (prompt, *responses):
            outside = [token for token in part if not 0 <= token < a.vocab_size]
            if outside:
                raise ConversionError(
                    f"group {number}: token {outside[0]} is outside the vocabulary of "
                    f"{a.vocab_size}"
                )
        length = len(prompt) + max(map(len, responses), default=0)
        if length > a.max_length:
            raise ConversionError(
                f"group {number}: {length} tokens exceed the model's {a.max_length} positions"
            )


def _same_tensors(source: HFFolder, back: HFFolder) -> Check:
    wanted = {name for name in source.tensors if not is_no_weight(name)}
    # A tied output layer that is stored all the same is the embedding once more.
    wanted -= {"lm_head.weight"} - back.tensors.keys()
    different = [
        name
        for name in sorted(wanted | back.tensors.keys())
        if name not in wanted or not torch.equal(source.read(name), back.read(name))
    ]
    same = len(wanted) - len(different)
    result = f"{same} of {len(wanted)} tensors bit for bit"
    if different:
        result += f"; not {different[0]}"
    return Check(name="there and back", result=result, limit="all", ok=not different)


def _transformers_logits(source: Path, groups: Sequence[Group], work: Path) -> list[Path]:
    """Logits of every response's tokens by transformers, a file per group; float32."""
    with needed_by("comparing with transformers", extra="hf"):
        from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=read_config(source),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        ).eval()
    except Exception as error:
        raise ConversionError(f"{source}: transformers cannot load it: {error}") from error
    files = []
    with torch.no_grad():
        for number, (prompt, responses) in enumerate(groups):
            logits = [
                model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].clone()
                for response in responses
            ]
            files.append(work / f"logits_{number}.pt")
            with files[-1].open("wb") as file:
                torch.save(logits, file)
    # A large model must be gone before the other one comes.
    del model
    gc.collect()
    return files


@dataclass(kw_only=True)
class _Differences:
    """The largest there are."""

    tokens: int = 0
    logits: float = 0.0
    log_probs: float = 0.0
    size: float = 0.0
    """Largest distance of an expected logit from the mean of its row."""
    same_choice: int = 0

    def add(self, found: Tensor, expected: Tensor, labels: Tensor) -> None:
        self.tokens += len(labels)
        self.size = max(self.size, _largest(expected - expected.mean(-1, keepdim=True)))
        self.logits = max(self.logits, _largest(found - expected))
        picked = [torch.log_softmax(x, -1).gather(1, labels[:, None]) for x in (found, expected)]
        self.log_probs = max(self.log_probs, _largest(picked[0] - picked[1]))
        self.same_choice += int((found.argmax(-1) == expected.argmax(-1)).sum())

    def checks(self, tolerance: float) -> list[Check]:
        return [
            Check(
                name=name,
                result=f"{value:.1e} at most, of {self.tokens} tokens",
                limit=f"{tolerance * self.size:.1e}",
                ok=value <= tolerance * self.size,
            )
            for name, value in (("logits", self.logits), ("log-probabilities", self.log_probs))
        ]


def _largest(difference: Tensor) -> float:
    # NaN would pass through max().
    value = float(difference.abs().max())
    return value if value == value else float("inf")


def _megatron_logits(
    checkpoint: Path, architecture: Architecture, groups: Sequence[Group], expected: list[Path]
) -> _Differences:
    """Run the groups with shared prefixes, and compare with the files."""
    differences = _Differences()
    parallel = ParallelConfig()
    training = TrainingConfig(steps=1, token_budget=1, dtype="float32", device="cpu")
    config = to_model_config(architecture)
    with runtime(parallel, device="cpu", seed=0, timeout_minutes=10), torch.no_grad():
        megatron_config = transformer_config(config, parallel, training)
        model = build_gpt_model(config, megatron_config)
        setup = AttentionSetup.of(megatron_config, torch.device("cpu"))
        chunks = ModelChunks(wrapped=[], bare=[model], config=megatron_config, head=None)
        try:
            check_initial_weights(checkpoint, config, chunks)
            load_weights(checkpoint, chunks)
        except ValueError as error:
            raise ConversionError(str(error)) from error
        for (prompt, responses), file in zip(groups, expected, strict=True):
            tree = PrefixTree.from_groups([(np.array(prompt), [np.array(r) for r in responses])])
            layout = pack(tree)
            logits = model(
                torch.from_numpy(layout.input_ids)[None],
                torch.from_numpy(layout.position_ids)[None],
                None,
                packed_seq_params=PrefixPackedSeqParams.from_layout(layout, setup),
            )[0].float()
            # Written above, by this process.
            for i, theirs in enumerate(torch.load(file, weights_only=True)):
                rows = torch.from_numpy(layout.sequence_positions(i))[len(prompt) - 1 :]
                differences.add(logits[rows], theirs, torch.tensor(responses[i]))
    return differences


def report_table(checks: Sequence[Check]) -> str:
    """The checks as lines of text."""
    rows: list[tuple[Any, ...]] = [("check", "result", "limit", "")]
    rows += [(c.name, c.result, c.limit, "ok" if c.ok else "FAILED") for c in checks]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
