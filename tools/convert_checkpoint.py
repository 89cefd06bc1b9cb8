"""Bring a Hugging Face model into Megatron, and take it out again.

    python tools/convert_checkpoint.py hf-to-megatron HF_FOLDER OUTPUT
    python tools/convert_checkpoint.py megatron-to-hf CHECKPOINT OUTPUT --hf-source HF_FOLDER
    python tools/convert_checkpoint.py inspect FOLDER
    python tools/convert_checkpoint.py verify HF_FOLDER

Families: llama (Llama 3), qwen2 (Qwen2, Qwen2.5), qwen3, qwen3_moe, mistral, mixtral, deepseek_v3
(also Moonlight), kimi_k2, glm4_moe (GLM-4.5 to 4.7). Hugging Face folders hold config.json and
safetensors; Megatron checkpoints are distributed ones (torch_dist), which load at any tensor-,
pipeline- and expert-parallel size. Runs on the CPU, holds one layer and one shard of the output in
memory, and leaves a whole output or none. The exit status is 0 if all is well, 1 if a verification
fails, 2 for anything that cannot be converted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from tool_help import HelpFormatter

DTYPES = ("bfloat16", "float16", "float32")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, details: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.\n\n{details}",
            formatter_class=HelpFormatter,
        )

    bring = command(
        "hf-to-megatron",
        "write a Megatron checkpoint of a Hugging Face model",
        "OUTPUT gets release/ (the checkpoint), latest_checkpointed_iteration.txt (by which\n"
        "Megatron-LM's --load OUTPUT --finetune finds it) and model.yaml: the `model` section\n"
        "of a run's config. Put that into run.yaml, add `output: {load: OUTPUT, ...}`, and train.",
    )
    bring.add_argument("source", type=Path, metavar="HF_FOLDER", help="config.json, *.safetensors")
    _add_mtp(bring)
    _add_output(bring, "largest file of the checkpoint in GB")

    take = command(
        "megatron-to-hf",
        "write a Hugging Face folder from a Megatron checkpoint",
        "CHECKPOINT is a checkpoint of any layout, or a folder whose newest is taken: a run's\n"
        "output directory, an OUTPUT of hf-to-megatron, or Megatron-LM's. What model it is comes\n"
        "from model.yaml or trainer.json beside it, from --hf-source or from --config.",
    )
    take.add_argument("source", type=Path, metavar="CHECKPOINT")
    take.add_argument(
        "--hf-source",
        type=Path,
        metavar="HF_FOLDER",
        help="folder that the model came from: its config.json is kept, its tokenizer copied",
    )
    take.add_argument(
        "--config",
        type=Path,
        metavar="RUN_YAML",
        help="a run's config whose `model` section describes the checkpoint",
    )
    _add_output(take, "largest safetensors file in GB")

    look = command(
        "inspect",
        "show what a Hugging Face folder or a Megatron checkpoint holds",
        "Family, sizes, number of parameters, and every tensor with its shape and type; from\n"
        "headers alone, nothing is loaded.",
    )
    look.add_argument("source", type=Path, metavar="FOLDER")
    look.add_argument("--json", action="store_true", help="everything as one JSON object")

    verify = command(
        "verify",
        "prove a conversion: there and back bit for bit, and logits equal to transformers'",
        "Converts HF_FOLDER into temporary folders (twice its size) unless --megatron names a\n"
        "checkpoint of it, takes that back, and compares every tensor. Then transformers runs\n"
        "each sequence whole, Megatron runs each prompt once with all of its responses, packed,\n"
        "both in float32 on the CPU (4 bytes per parameter of memory), and the logits and\n"
        "log-probabilities of every response's tokens are compared.",
    )
    verify.add_argument("source", type=Path, metavar="HF_FOLDER")
    verify.add_argument("--megatron", type=Path, metavar="CHECKPOINT", help="verify this one")
    _add_mtp(verify)
    verify.add_argument(
        "--groups",
        type=Path,
        metavar="FILE",
        help='JSONL or Parquet of {"prompt": [ids], "responses": [[ids], ...]}; else random tokens',
    )
    verify.add_argument("--num-groups", type=int, default=4, help="read at most so many")
    verify.add_argument("--work-folder", type=Path, help="where the temporary folders are made")
    verify.add_argument(
        "--tolerance", type=float, default=5e-5, help="of logits, divided by the largest of them"
    )
    verify.add_argument("--seed", type=int, default=0, help="of the random tokens")
    verify.add_argument("--json", action="store_true", help="the checks as one JSON object")
    return parser


def _add_mtp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mtp",
        action="store_true",
        help="convert layers that predict further tokens; else they are kept aside",
    )


def _add_output(parser: argparse.ArgumentParser, size_help: str) -> None:
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="type of all weights; else kept as it is")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, metavar="GB", help=size_help)
    parser.add_argument("--force", action="store_true", help="replace OUTPUT where it exists")


@contextlib.contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=what, dynamic_ncols=True) as bar:
        yield lambda size: bar.update(size) and None


def _hf_to_megatron(args: argparse.Namespace) -> int:
    from megatron_prefix.conversion import hf_to_megatron
    from megatron_prefix.conversion.hf_folder import HFFolder

    dtype = _dtype(args.dtype)
    stored = HFFolder(args.source).tensors.values()
    total = sum(
        t.num_bytes if dtype is None else math.prod(t.shape) * dtype.itemsize for t in stored
    )
    reports: list[str] = []
    with _progress(total, "hf-to-megatron") as progress:
        hf_to_megatron(
            args.source,
            args.output,
            dtype=dtype,
            mtp=args.mtp,
            max_file_bytes=_bytes(args.max_shard_gb),
            force=args.force,
            progress=progress,
            report=reports.append,
        )
    for line in reports:
        print(line)
    print(f"{args.output}: checkpoint in release/, a run's model section in model.yaml")
    return 0


def _megatron_to_hf(args: argparse.Namespace) -> int:
    from megatron_prefix.config import ModelConfig
    from megatron_prefix.config.loader import ConfigError, load_dataclass, read_yaml
    from megatron_prefix.conversion import megatron_to_hf
    from megatron_prefix.conversion.inspection import inspect
    from megatron_prefix.conversion.model_section import from_model_config

    architecture = None
    if args.config is not None:
        try:
            values = read_yaml(args.config)
            section = load_dataclass(ModelConfig, values.get("model", {}), path="model")
        except ConfigError as error:
            raise ConfigError(f"{args.config}: {error}") from error
        architecture = from_model_config(section)
    dtype = _dtype(args.dtype)
    found = inspect(args.source)
    total = found["bytes"] if dtype is None else found["parameters"] * dtype.itemsize
    with _progress(total, "megatron-to-hf") as progress:
        megatron_to_hf(
            args.source,
            args.output,
            hf_source=args.hf_source,
            architecture=architecture,
            dtype=dtype,
            max_shard_bytes=_bytes(args.max_shard_gb),
            force=args.force,
            progress=progress,
        )
    print(f"{args.output}: config.json and safetensors, for transformers, vLLM or SGLang")
    if args.hf_source is None:
        print("no tokenizer: name the folder that the model came from with --hf-source")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from megatron_prefix.conversion.inspection import inspect

    found = inspect(args.source)
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"{found['path']}: {found['format']}")
    for name, value in found["model"].items():
        if value not in (None, [], ()):
            print(f"  {name}: {value}")
    size = found["bytes"] / 1e9
    print(
        f"  parameters: {found['parameters']:,} ({size:.3g} GB in {len(found['tensors'])} tensors)"
    )
    width = max((len(tensor["name"]) for tensor in found["tensors"]), default=0)
    for tensor in found["tensors"]:
        print(f"{tensor['name']:<{width}}  {tensor['dtype']:<8}  {tensor['shape']}")
    if found["others"]:
        kinds = Counter(_kind(name) for name in found["others"])
        counted = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
        print(f"and entries that are no weights: {counted}")
    return 0


def _kind(entry: str) -> str:
    """What an entry of a checkpoint that is no weight belongs to."""
    if "_extra_state" in entry:
        return "Transformer Engine's extra states (empty without it)"
    if entry.startswith(("optimizer", "chained_")):
        return "the optimizer"
    return "the run (random states, schedule)"


def _verify(args: argparse.Namespace) -> int:
    from megatron_prefix.conversion.hf_folder import HFFolder
    from megatron_prefix.conversion.verification import report_table, verify

    rounds = 1 if args.megatron is not None else 2
    with _progress(rounds * HFFolder(args.source).num_bytes, "convert") as progress:
        checks = verify(
            args.source,
            checkpoint=args.megatron,
            groups=None if args.groups is None else _read_groups(args.groups, args.num_groups),
            mtp=args.mtp,
            work_folder=args.work_folder,
            tolerance=args.tolerance,
            seed=args.seed,
            progress=progress,
        )
    ok = all(check.ok for check in checks)
    if args.json:
        print(json.dumps({"ok": ok, "checks": [vars(check) for check in checks]}))
    else:
        print(report_table(checks))
    return 0 if ok else 1


def _read_groups(path: Path, count: int) -> list[tuple[Any, Any]]:
    from megatron_prefix.rollouts.parsing import group_id, read_group
    from megatron_prefix.rollouts.record import START, GroupRecords
    from megatron_prefix.rollouts.record_files import open_record_file

    groups = []
    for record in open_record_file(path).records(START):
        if len(groups) == count:
            break
        group_id(record)  # which refuses a record without responses
        group = read_group(GroupRecords(records=(record,))).group(0)
        groups.append((group.prompt, group.responses))
    return groups


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


def _bytes(gigabytes: float) -> int:
    if not gigabytes > 0:
        raise ValueError(f"--max-shard-gb: {gigabytes} must be above 0")
    return max(1, int(gigabytes * 1e9))


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C, so that a half-written output is removed."""

    def interrupt(signum: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> int:
    """Command line."""
    args = _parser().parse_args()
    from megatron_prefix.packages import needed_by

    # What Megatron and transformers say at import is not about the model.
    warnings.simplefilter("ignore")
    commands = {
        "hf-to-megatron": _hf_to_megatron,
        "megatron-to-hf": _megatron_to_hf,
        "inspect": _inspect,
        "verify": _verify,
    }
    try:
        with _sigterm_as_interrupt(), needed_by(args.command, extra="hf"):
            return commands[args.command](args)
    except BrokenPipeError:
        # Whoever read the output has seen enough.
        sys.stdout = None
        return 0
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("convert_checkpoint: interrupted; no output is left", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
