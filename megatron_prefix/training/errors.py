"""An error that ends a run: said once, in plain lines, and passed on to torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence

GRACE_S = 10.0
"""So long the other ranks wait for rank 0 to report what all of them met; when it ends, torchrun
ends them. One that still runs then has met it alone."""


def report_error(faults: Sequence[str], rank: int, *, source: object = None) -> None:
    """Print an error once, though every rank has met it.

    Args:
        faults: what is wrong; more than one gets a line each.
        rank: this process's.
        source: the file that they are in.
    """
    if rank != 0:
        time.sleep(GRACE_S)
    where = [f"rank {rank}"] if rank != 0 else []
    where += [] if source is None else [str(source)]
    if len(faults) == 1:
        text = ": ".join([*where, faults[0]])
    else:
        text = "\n  ".join([": ".join([*where, f"{len(faults)} faults"]), *faults])
    print(f"error: {text}", file=sys.stderr, flush=True)
    _tell_torchrun(text)


def _tell_torchrun(text: str) -> None:
    """Let torchrun's summary of the failure end with the error instead of a link."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    # The form that torch.distributed.elastic's ErrorHandler writes.
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": text, "extraInfo": extra}}, file)
