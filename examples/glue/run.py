"""Train a converted model on tasks of GLUE and SuperGLUE, with shared prompts and without.

    python examples/glue/run.py MODEL
    python examples/glue/run.py MODEL --data my_data --tasks SuperGLUE,CoLA training.steps=200
    python examples/glue/run.py MODEL --only grouped --validate-on 500 optimizer.lr=2e-6

MODEL is a Hugging Face folder of a family that tools/convert_checkpoint.py knows; it is converted
into the output folder. `--data` holds GLUE/ and SuperGLUE/ with the benchmarks' own files, by
default the sample beside this script. The model answers every example of the dev files with the
most likely tokens, is trained by GRPO from one seed on each side (grouped: each prompt computed
once; ungrouped: training.sharing=none), and answers again. The scores are the official metrics and
averages. Everything runs in this process.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy import SIDES, largest_differences, prompts_in_order
from glue_tasks.scores import BENCHMARKS, TaskScore, average, chosen_tasks, score_tasks
from glue_tasks.task import Example, read_tasks

from megatron_prefix.config import RunConfig
from megatron_prefix.conversion import hf_to_megatron
from megatron_prefix.distributed.runtime import runtime_of_run
from megatron_prefix.rollouts.embedded.sampler import EmbeddedSampler
from megatron_prefix.rollouts.sampling.sampler import SamplingSpec, Wanted
from megatron_prefix.training.metrics import read_metrics
from megatron_prefix.training.run_config import load_run_config
from megatron_prefix.training.trainer import Trainer

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one training came to."""

    after: list[str]
    """Responses of the trained model to the dev examples."""
    rows: list[dict[str, Any]]
    """Metrics of each step."""

    @property
    def seconds(self) -> float:
        """That optimizer steps took, without sampling."""
        return sum(row["train_seconds"] for row in self.rows)

    @property
    def tokens(self) -> int:
        """That optimizer steps computed."""
        return sum(row["tokens_computed"] for row in self.rows)


def write_run(model: Path, data: Path, output: Path) -> Path:
    """Convert the model, and write the run's file with its sizes, its tokenizer and the data."""
    hf_to_megatron(model, output / "model", force=True)
    values = yaml.safe_load((HERE / "grpo.yaml").read_text(encoding="utf-8"))
    values |= yaml.safe_load((output / "model" / "model.yaml").read_text(encoding="utf-8"))
    values["rollouts"]["text"]["tokenizer"] = str(model)
    values["rollouts"]["paths"] = [str(data)]
    values["output"] |= {"load": str(output / "model"), "directory": str(output / "run")}
    path = output / "grpo.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def write_records(examples: Sequence[Example], path: Path) -> None:
    """Prompts and answers as a run's file."""
    lines = (json.dumps(example.record()) + "\n" for example in examples)
    path.write_text("".join(lines), encoding="utf-8")


def ask(config: RunConfig, dev: Path, count: int) -> list[str]:
    """Responses of the model as it was given to the dev examples."""
    with runtime_of_run(config) as place:
        return responses(Trainer(config, place), dev, count)


def train(config: RunConfig, dev: Path, count: int) -> Side:
    """Train the model, and ask it then."""
    with runtime_of_run(config) as place:
        trainer = Trainer(config, place)
        trainer.run()
        after = responses(trainer, dev, count)
    return Side(after=after, rows=read_metrics(config.output.directory / "metrics.jsonl"))


def responses(trainer: Trainer, path: Path, count: int) -> list[str]:
    """The most likely response to each of the first `count` prompts of a file."""
    config = trainer.config
    assert config.rollouts.max_response_length is not None
    prompts, tokenizer = prompts_in_order(config, path)
    asked = prompts.take(count)
    prompts.close()
    spec = SamplingSpec(
        max_response_length=config.rollouts.max_response_length,
        temperature=0.0,
        stop_tokens=config.rollouts.stop_tokens or (tokenizer.end_token,),
    )
    sampler = EmbeddedSampler(
        trainer.chunks,
        spec,
        device=trainer.runtime.device,
        kernel=config.training.kernel,
        max_cached_tokens=config.training.token_budget,
    )
    found = sampler.sample([Wanted(prompt=prompt, count=1) for prompt in asked], step=0)
    assert found is not None
    return [tokenizer.read(response.tokens.tolist()) for [response] in found.responses]


def table(scores: dict[str, list[TaskScore]]) -> str:
    """A line for each metric of each task and for each average, a column for each model."""
    lines = [("", *scores)]
    for of_task in zip(*scores.values(), strict=True):
        key = of_task[0].task.key
        for name in of_task[0].metrics:
            lines.append((f"{key} {name}", *(f"{s.metrics[name]:.1f}" for s in of_task)))
    for benchmark in BENCHMARKS:
        averages = [average(benchmark, of_model) for of_model in scores.values()]
        if averages[0] is not None:
            missing = f", without {', '.join(averages[0].missing)}" if averages[0].missing else ""
            values = (f"{a.score:.1f}" for a in averages if a is not None)
            lines.append((f"{benchmark} average{missing}", *values))
    width = max(len(line[0]) for line in lines)
    return "\n".join(
        f"{first:<{width}}" + "".join(f"{v:>11}" for v in rest) for first, *rest in lines
    )


def compared(before: Sequence[str], sides: dict[str, Side]) -> dict[str, Any]:
    """How close both sides are, and how much faster the grouped one is."""
    grouped, ungrouped = sides["grouped"], sides["ungrouped"]
    rows = {name: side.rows for name, side in sides.items()}
    same = sum(a == b for a, b in zip(grouped.after, ungrouped.after, strict=True))
    return {
        "responses": len(grouped.after),
        "same_responses": same,
        "changed_by_training": sum(a != b for a, b in zip(before, grouped.after, strict=True)),
        **largest_differences(rows, ("reward", "entropy", "grad_norm")),
        "tokens_grouped": grouped.tokens,
        "tokens_ungrouped": ungrouped.tokens,
        "seconds_grouped": grouped.seconds,
        "seconds_ungrouped": ungrouped.seconds,
        "times_faster": ungrouped.seconds / grouped.seconds,
    }


def report(
    examples: Sequence[Example], before: list[str], sides: dict[str, Side], output: Path
) -> None:
    """Print the scores and the comparison, and write them to results.json."""
    answered = {"before": before, **{name: side.after for name, side in sides.items()}}
    scores = {name: score_tasks(examples, texts) for name, texts in answered.items()}
    print(table(scores))
    result: dict[str, Any] = {
        name: {
            **{score.task.key: dict(score.metrics) for score in of_model},
            **{b: a.score for b in BENCHMARKS if (a := average(b, of_model)) is not None},
            "responses_with_an_answer": sum(score.answered for score in of_model),
        }
        for name, of_model in scores.items()
    }
    if len(sides) == len(SIDES):
        result["comparison"] = compared(before, sides)
    lines = [
        json.dumps({**example.record(), **dict(zip(answered, texts, strict=True))}) + "\n"
        for example, *texts in zip(examples, *answered.values(), strict=True)
    ]
    (output / "responses.jsonl").write_text("".join(lines), encoding="utf-8")
    (output / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result.get("comparison", {})))


def arguments() -> argparse.Namespace:
    """Those of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder with a tokenizer")
    parser.add_argument("overrides", nargs="*", help="section.key=value, of the training")
    parser.add_argument("--data", type=Path, default=HERE / "sample", help="GLUE/ and SuperGLUE/")
    parser.add_argument("--tasks", default="all", help="such as SuperGLUE,CoLA,GLUE/RTE")
    parser.add_argument("--only", choices=list(SIDES), help="train on one side alone")
    parser.add_argument("--validate-on", type=int, help="examples of each task at most")
    parser.add_argument("--output", type=Path, default=Path("outputs/glue"))
    return parser.parse_intermixed_args()


def main() -> int:
    """Command line."""
    args = arguments()
    logging.getLogger("megatron").setLevel(logging.WARNING)
    output = args.output
    output.mkdir(parents=True, exist_ok=True)
    try:
        tasks = chosen_tasks(args.tasks.split(","))
        dev = read_tasks(tasks, "dev", args.data, limit=args.validate_on)
        write_records(read_tasks(tasks, "train", args.data), output / "train.jsonl")
        write_records(dev, output / "dev.jsonl")
        run_file = write_run(args.model, output / "train.jsonl", output)
        configs = {
            side: load_run_config(
                run_file,
                (
                    "objective.report_entropy=true",
                    "output.resume=false",
                    "output.save_last=false",
                    *args.overrides,
                    f"training.sharing={SIDES[side]}",
                    f"output.directory={output / side}",
                ),
            )
            for side in ([args.only] if args.only else SIDES)
        }
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    file = output / "dev.jsonl"
    before = ask(next(iter(configs.values())), file, len(dev))
    sides = {side: train(config, file, len(dev)) for side, config in configs.items()}
    report(dev, before, sides, output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
