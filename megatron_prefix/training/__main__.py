"""Run a training configuration under torchrun.

torchrun --nproc-per-node 2 -m megatron_prefix.training run.yaml [section.key=value ...]
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from megatron_prefix.training.config import load_run_config
from megatron_prefix.training.config_loader import ConfigError
from megatron_prefix.training.runtime import runtime
from megatron_prefix.training.trainer import Trainer


def main() -> int:
    """Command line; the exit status is 2 for a wrong configuration."""
    parser = argparse.ArgumentParser(
        prog="torchrun ... -m megatron_prefix.training", description=__doc__
    )
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as in the file")
    args = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"[rank {rank}] %(levelname)s %(name)s: %(message)s",
    )
    try:
        config = load_run_config(args.config, tuple(args.overrides))
        config.parallel.data_parallel_size(int(os.environ.get("WORLD_SIZE", "1")))
    except (ConfigError, OSError) as error:
        if rank == 0:
            print(f"error: {args.config}: {error}", file=sys.stderr)
        return 2
    training = config.training
    with runtime(
        config.parallel,
        device=training.device,
        seed=training.seed,
        timeout_minutes=training.timeout_minutes,
        float64=training.dtype == "float64",
    ) as place:
        try:
            Trainer(config, place).run()
        except ValueError as error:
            # Every rank sees the same rollouts and plans, so every rank gets here.
            if rank == 0:
                print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
