"""The trained weights as Hugging Face folders, one per version, for whoever samples from them.

    policy/
      version_000012/          config.json, safetensors, generation_config.json, tokenizer
      version_000013.partial/  being written, or cut off: never read, removed by the next one

A version is the number of rollout batches that the weights have been trained on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_prefix.config import WeightsConfig
from megatron_prefix.distributed.rank_results import on_rank_0
from megatron_prefix.rollouts.sampling.sampler import SamplingSpec
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer

_NAME = re.compile(r"version_\d{6,}(\.partial)?")


class PolicyFolders:
    """Writes versions of the policy. Methods are collective over all ranks."""

    def __init__(
        self,
        directory: Path,
        export: Callable[[Path], None],
        *,
        spec: SamplingSpec,
        tokenizer: TextTokenizer | None,
        weights: WeightsConfig,
    ) -> None:
        """Nothing is written yet.

        Args:
            directory: made when first needed; on a disk that all who read it share.
            export: writes config.json and the weights into a folder that is there; collective.
            spec: of the sampling, which generation_config.json gives servers as their defaults.
            tokenizer: written beside the weights.
            weights: when they are written, and how many newest versions stay.
        """
        # Servers run in folders of their own.
        self.directory = directory.absolute()
        self._export = export
        self._generation = _generation_settings(spec)
        self._tokenizer = tokenizer
        self._weights = weights
        self.version: int | None = None
        """Of the weights that `refresh` wrote last."""

    def path(self, version: int) -> Path:
        """The folder of a version."""
        return self.directory / f"version_{version:06d}"

    def refresh(self, step: int) -> bool:
        """Write the weights as they are at a step, if it is time; whether it is."""
        if self.version is not None and step - self.version < self._weights.every:
            return False
        self.write(step)
        self.version = step
        return True

    def write(self, version: int) -> Path:
        """Write the weights as they are now; an error of a disk is one of all ranks."""
        path = self.path(version)
        partial = path.with_name(path.name + ".partial")

        def prepare() -> None:
            for leftover in [*self.directory.glob("version_*.partial"), path]:
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)

        def finish() -> None:
            (partial / "generation_config.json").write_text(
                json.dumps(self._generation, indent=1), encoding="utf-8"
            )
            if self._tokenizer is not None:
                self._tokenizer.save(partial)
            os.replace(partial, path)
            self._prune(version)

        on_rank_0(prepare)
        self._export(partial)
        on_rank_0(finish)
        return path

    def _prune(self, newest: int) -> None:
        versions = sorted(p for p in self.directory.iterdir() if _NAME.fullmatch(p.name))
        place = versions.index(self.path(newest))
        kept = versions[max(0, place + 1 - self._weights.keep) : place + 1]
        for path in versions:  # those above the newest are an earlier, longer run's
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)


def _generation_settings(spec: SamplingSpec) -> dict[str, Any]:
    """generation_config.json of plain sampling: no top-k, no penalty, as the objective assumes.

    A server without it may decode greedily.
    """
    settings: dict[str, Any] = {
        "do_sample": True,
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "top_k": 0,
        "repetition_penalty": 1.0,
    }
    if spec.stop_tokens:
        settings["eos_token_id"] = list(spec.stop_tokens)
        settings["pad_token_id"] = spec.stop_tokens[0]
    return settings
