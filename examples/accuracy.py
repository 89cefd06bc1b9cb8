"""Train twice from the same seed, with shared prompts and without, and compare the accuracies.

    python examples/accuracy.py examples/gsm8k
    python examples/accuracy.py examples/gsm8k training.seed=7
    python examples/accuracy.py examples/gsm8k --data my_gsm8k --output outputs/mine

The folder holds grpo.yaml and sample/ (train.jsonl and test.jsonl). A tokenizer is trained on the
data, and a small model learns from nothing to write the data's own answers, for as long as it takes
to be right now and then. From there GRPO runs twice: grouped, each prompt computed once, and
ungrouped (training.sharing=none), each response with a prompt of its own.

Both do the same arithmetic in another order. So with float64 the two curves should be one, and that
is all that this shows: how good GRPO is on these data sets, or how fast, it does not say.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_prefix.config import RunConfig
from megatron_prefix.distributed.runtime import runtime_of_run
from megatron_prefix.rollouts.text.prompts import TextPrompts
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from megatron_prefix.training.metrics import read_metrics
from megatron_prefix.training.run_config import load_run_config
from megatron_prefix.training.trainer import Trainer

SIDES = {"grouped": "groups", "ungrouped": "none"}
END = "<|end|>"


def texts(path: Path) -> Iterator[str]:
    """Every text of a file's records."""
    for line in path.read_text(encoding="utf-8").splitlines():
        yield from (value for value in json.loads(line).values() if isinstance(value, str))


def train_tokenizer(data: Path, vocab_size: int, folder: Path) -> None:
    """A byte-level BPE tokenizer of the training data, as transformers loads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(data / "train.jsonl"), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)


def prompts_in_order(config: RunConfig, path: Path) -> tuple[TextPrompts, TextTokenizer]:
    """The prompts of a file as the run reads them, in the file's order, and the run's tokenizer."""
    text, length = config.rollouts.text, config.rollouts.max_response_length
    assert text is not None and length is not None
    tokenizer = TextTokenizer(text.tokenizer, vocab_size=config.model.vocab_size)
    prompts = TextPrompts(
        [path],
        tokenizer,
        text,
        vocab_size=config.model.vocab_size,
        max_prompt_length=config.model.max_sequence_length - length,
        shuffle=False,
        seed=0,
    )
    return prompts, tokenizer


def write_answers(config: RunConfig, path: Path) -> None:
    """The training data's own answers as rollouts, for the supervised warm start."""
    prompts, tokenizer = prompts_in_order(config, config.rollouts.paths[0])
    assert tokenizer.end_token is not None
    lines = []
    for _ in config.rollouts.paths[0].read_text(encoding="utf-8").splitlines():
        [prompt] = prompts.take(1)
        response = [*tokenizer.encode(prompt.answer), tokenizer.end_token]
        record = {"prompt": prompt.tokens, "responses": [response], "rewards": [0.0]}
        lines.append(json.dumps(record) + "\n")
    prompts.close()
    path.write_text("".join(lines), encoding="utf-8")


def train(config: RunConfig) -> list[dict[str, Any]]:
    """Run a training in this process; returns its metrics by step."""
    with runtime_of_run(config) as place:
        Trainer(config, place).run()
    return read_metrics(config.output.directory / "metrics.jsonl")


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The accuracies before and after, and the largest difference of any step's numbers."""
    result: dict[str, Any] = {}
    for side, rows in runs.items():
        evaluated = [row["eval"] for row in rows if "eval" in row]
        result[side] = {
            "accuracy_before": evaluated[0],
            "accuracy_after": evaluated[-1],
            "tokens_computed": sum(row.get("tokens_computed", 0) for row in rows),
        }
    return {**result, **largest_differences(runs, ("reward", "eval", "entropy", "grad_norm"))}


def largest_differences(
    runs: dict[str, list[dict[str, Any]]], names: Sequence[str]
) -> dict[str, float]:
    """Of each of these metrics the largest difference between both runs at any step."""
    pairs = list(zip(*runs.values(), strict=True))
    return {
        f"largest_difference_{name}": max(abs(a[name] - b[name]) for a, b in pairs if name in a)
        for name in names
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("example", type=Path, help="folder with grpo.yaml and sample/")
    parser.add_argument("overrides", nargs="*", help="section.key=value, of the two GRPO runs")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--output", type=Path, help="default: outputs/ and the example's name")
    parser.add_argument("--warm-start", type=int, default=60, help="supervised steps")
    args = parser.parse_intermixed_args()
    logging.getLogger("megatron").setLevel(logging.WARNING)

    data = args.data or args.example / "sample"
    output = args.output or Path("outputs") / args.example.name
    output.mkdir(parents=True, exist_ok=True)
    file = args.example / "grpo.yaml"
    common = (
        f"rollouts.paths=[{data / 'train.jsonl'}]",
        f"evaluation.paths=[{data / 'test.jsonl'}]",
        f"rollouts.text.tokenizer={output / 'tokenizer'}",
        "objective.report_entropy=true",
        "output.resume=false",
        "output.plot=false",
    )
    config = load_run_config(file, common)
    train_tokenizer(data, config.model.vocab_size, output / "tokenizer")
    write_answers(config, output / "answers.jsonl")
    warm_start = (
        "objective.name=supervised",
        "optimizer.lr=5.0e-3",
        "optimizer.lr_decay_style=cosine",
        "rollouts.engine=file",
        "rollouts.group_size=null",
        f"rollouts.paths=[{output / 'answers.jsonl'}]",
        "rollouts.groups_per_step=32",
        "evaluation=null",
        f"training.steps={args.warm_start}",
        f"output.directory={output / 'warm_start'}",
    )
    train(load_run_config(file, (*common, *warm_start)))
    runs = {}
    for side, sharing in SIDES.items():
        overrides = (
            *common,
            *args.overrides,
            f"training.sharing={sharing}",
            f"output.load={output / 'warm_start' / 'checkpoints'}",
            f"output.directory={output / side}",
            "output.save_last=false",
        )
        runs[side] = train(load_run_config(file, overrides))
    print(json.dumps({"example": args.example.name, **compare(runs)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
