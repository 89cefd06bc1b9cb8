"""Run a training configuration under torchrun.

torchrun --nproc-per-node 2 -m megatron_prefix.training run.yaml [section.key=value ...]
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from megatron_prefix.config import RunConfig
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.distributed.runtime import Runtime, runtime_of_run
from megatron_prefix.distributed.stop import StopRequest
from megatron_prefix.training.run_config import load_run_config
from megatron_prefix.training.trainer import Trainer

_GRACE_S = 10.0
"""So long the other ranks wait for rank 0 to report what all of them met; when it ends, torchrun
ends them. One that still runs then has met it alone."""

_ENDING = threading.Lock()
"""Held for ever by the thread that ends the process."""


def main() -> int:
    """Command line.

    Returns:
        0: done, or stopped and saved because of SIGTERM or SIGUSR1; 1: an error, or other ranks
        were lost; 2: a wrong configuration.
    """
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
    # At INFO it lists every parameter.
    logging.getLogger("megatron").setLevel(logging.WARNING)
    try:
        config = load_run_config(args.config, tuple(args.overrides))
        config.parallel.data_parallel_size(int(os.environ.get("WORLD_SIZE", "1")))
    except (ConfigError, OSError) as error:
        _report(f"{args.config}: {error}", rank)
        return 2
    with StopRequest() as stop:
        return _run(config, stop, rank)


def _run(config: RunConfig, stop: StopRequest, rank: int) -> int:
    with runtime_of_run(config) as place:
        place.liveness.end_with_others(
            lambda lost: _end(place, lost, "another rank found it; here nothing has failed yet")
        )
        # A launcher that has lost a rank asks the others to stop, and they may wait for that one.
        is_over = threading.Event()
        stop.when_made(lambda: _end_if_others_are_lost(place, stop, is_over))
        try:
            Trainer(config, place, stop=stop).run()
        except (ValueError, OSError) as error:
            is_over.set()
            stop.release()  # whoever waits below may be ended
            _report(str(error), rank)
            return 1
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            how = f"here it shows as {type(error).__name__}: {first_line}"
            lost = place.liveness.lost_ranks()
            if not lost:
                raise
            _end(place, lost, how)
        finally:
            is_over.set()
    return 0


def _end_if_others_are_lost(place: Runtime, stop: StopRequest, is_over: threading.Event) -> None:
    lost = place.liveness.lost_ranks()
    if lost and not is_over.is_set():
        assert stop.signal is not None
        name = signal.Signals(stop.signal).name
        _end(place, lost, f"this one was asked to stop ({name})")


def _end(place: Runtime, lost: list[int], how: str) -> NoReturn:
    """End this rank because others are gone, without waiting for anything of theirs."""
    with _ENDING:
        names = ", ".join(map(str, lost))
        print(
            f"error: rank {place.rank}: lost rank {names} (ended or stopped) in the middle of the "
            f"run; {how}. Find out why it ended and start the run again; it continues from its "
            "last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        place.liveness.leave(lost)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)


def _report(message: str, rank: int) -> None:
    """Print an error once, though every rank has met it."""
    if rank != 0:
        time.sleep(_GRACE_S)
        message = f"rank {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
