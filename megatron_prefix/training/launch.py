"""A checked configuration becomes a run on this process, and its exit status.

What ends a run on all ranks is reported once; a rank that has lost others says which, and ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from typing import NoReturn

import torch

from megatron_prefix.config import RunConfig
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.distributed.runtime import Runtime, runtime_of_run
from megatron_prefix.distributed.stop import StopRequest
from megatron_prefix.megatron.known_messages import hide_messages_about_gpus
from megatron_prefix.model.transformer_config import transformer_config
from megatron_prefix.training.checking import check_run
from megatron_prefix.training.errors import report_error
from megatron_prefix.training.trainer import Trainer

_ENDING = threading.Lock()
"""Held for ever by the thread that ends the process."""


def check(config: RunConfig) -> None:
    """What Megatron and this machine have to say about a configuration, before anything starts.

    Raises:
        ConfigError: a combination that Megatron or shared prefixes refuse, or no GPU for a process.
    """
    if config.training.device == "cpu":
        hide_messages_about_gpus()
    transformer_config(config.model, config.parallel, config.training)
    if config.training.device == "cuda":
        _check_gpu(int(os.environ.get("LOCAL_RANK", "0")))


def _check_gpu(local_rank: int) -> None:
    if not torch.cuda.is_available():
        raise ConfigError(
            f"training.device: cuda, but torch {torch.__version__} sees no GPU here; set "
            "training.device: cpu"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"training.device: cuda, but there are {count} GPUs here for process {local_rank} "
            f"(counted from 0); start with --nproc-per-node {count}"
        )


def run(config: RunConfig, rank: int, *, only_checks: bool = False) -> int:
    """Train, or only check that it can be done; the exit status of `megatron_prefix.training`."""
    with StopRequest() as stop:
        return _run(config, stop, rank, only_checks=only_checks)


def _run(config: RunConfig, stop: StopRequest, rank: int, *, only_checks: bool) -> int:
    with runtime_of_run(config) as place:
        place.liveness.end_with_others(
            lambda lost: _end(place, lost, "another rank found it; here nothing has failed yet")
        )
        # A launcher that has lost a rank asks the others to stop, and they may wait for that one.
        is_over = threading.Event()
        stop.when_made(lambda: _end_if_others_are_lost(place, stop, is_over))
        try:
            if only_checks:
                stop.release()  # there is nothing to save
                check_run(config, place)
            else:
                Trainer(config, place, stop=stop).run()
        except (ValueError, OSError) as error:
            is_over.set()
            stop.release()  # whoever waits below may be ended
            report_error([str(error)], rank)
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
