"""The packages beyond the bare install that a run's configuration asks for.

They are looked for before anything starts: a run must not end at its last step because the picture
of its rewards cannot be drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_prefix.config import RunConfig
from megatron_prefix.packages import is_installed, missing_line
from megatron_prefix.rollouts.gym.checks import task_files
from megatron_prefix.rollouts.gym.task_spec import EXTRA
from megatron_prefix.rollouts.names import LIBRARY_REWARDS

_HUGGING_FACE = ("transformers", "safetensors", "mbridge", "einops")


@dataclass(frozen=True, kw_only=True)
class _Need:
    what: str
    """The option that asks for them."""
    extra: str
    packages: tuple[str, ...]
    """Named as on the package index."""


def missing_packages(config: RunConfig) -> list[str]:
    """A line for each option that needs packages which are not installed, with what to do."""
    lines = []
    for need in _needs(config):
        missing = [p for p in need.packages if not is_installed(p.replace("-", "_"))]
        if missing:
            lines.append(missing_line(need.what, " and ".join(missing), need.extra))
    return lines


def _needs(config: RunConfig) -> Iterator[_Need]:
    rollouts, output = config.rollouts, config.output
    if output.tensorboard:
        yield _Need(what="output.tensorboard: true", extra="train", packages=("tensorboard",))
    if output.plot:
        yield _Need(what="output.plot: true", extra="train", packages=("matplotlib",))
    for name in ("wandb", "mlflow"):
        if getattr(output, name) is not None:
            yield _Need(what=f"output.{name}", extra=name, packages=(name,))
    saves = output.save_every or output.save_last or output.keep_best
    if saves or config.objective.kl_coefficient > 0:
        yield _Need(what="writing a checkpoint", extra="train", packages=("psutil",))
    paths = list(rollouts.files)
    if config.evaluation is not None:
        paths += [path for found in config.evaluation.data_sets.values() for path in found]
    if any(path.suffix == ".parquet" for path in paths):
        yield _Need(what="reading Parquet", extra="train", packages=("pyarrow",))
    engine = f"rollouts.engine: {rollouts.engine}"
    if rollouts.engine == "openai":
        yield _Need(what=engine, extra="rollouts", packages=("httpx", *_HUGGING_FACE))
    elif rollouts.engine == "hf":
        yield _Need(what=engine, extra="rollouts", packages=_HUGGING_FACE)
    if rollouts.text is not None:
        packages = ("transformers", *(("jinja2",) if rollouts.text.chat else ()))
        if rollouts.engine != "file" or config.evaluation is not None:
            packages += ("datasets",)
        yield _Need(what="rollouts.text", extra="rollouts", packages=packages)
    for key, spec in rollouts.reward_specs.items():
        library = LIBRARY_REWARDS.get(spec)
        if library is not None and library.package is not None:
            what = f"rollouts.{key}: {spec}"
            yield _Need(what=what, extra=library.extra, packages=(library.project,))
    for key, paths in task_files(config).items():
        for path in paths:
            yield _Need(what=f"{key}: {path}", extra=EXTRA, packages=("reasoning-gym",))
