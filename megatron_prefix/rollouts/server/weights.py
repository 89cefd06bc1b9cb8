"""Whether a server that says it has loaded weights still answers with those before."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megatron_prefix.rollouts.record_files import identity_of
from megatron_prefix.rollouts.server.answers import OtherWeights
from megatron_prefix.rollouts.server.asking import Asker

logger = logging.getLogger(__name__)

_IN_A_ROW = 3
"""Hand-overs without a difference that end the run: one step may change next to nothing."""


class KeptWeights:
    """Notices weights that were kept.

    Other weights give other log-probabilities to the same tokens. Equal ones, to the last digit and
    hand-over after hand-over, are those of weights that were kept.
    """

    def __init__(self, asker: Asker) -> None:
        """Nothing is asked yet."""
        self._asker = asker
        self._files: list[Any] | None = None
        self._last: list[float] | None = None
        self._equal = 0

    def before(self) -> list[float] | None:
        """What the server answers before it loads; None where it tells no log-probabilities."""
        if self._last is None and self._files is not None:
            self._last = self._asker.fingerprint()
        return self._last

    def check(self, folder: Path, before: list[float] | None) -> None:
        """Look at the server after it has loaded a folder.

        Raises:
            OtherWeights: it has answered the same for several hand-overs of different weights.
        """
        files = [identity_of(path) for path in sorted(folder.glob("*.safetensors"))]
        are_other = self._files is not None and files != self._files
        self._files = files
        if before is None:
            return
        self._last = self._asker.fingerprint()
        if not are_other or self._last is None:
            return
        self._equal = self._equal + 1 if self._last == before else 0
        if not self._equal:
            return
        seen = (
            f"{folder}: the server has loaded it, and gives the same log-probabilities as before, "
            f"{before[:2]} ...; it may have kept its old weights"
        )
        if self._equal >= _IN_A_ROW:
            raise OtherWeights(f"{seen} ({self._equal} hand-overs in a row)")
        logger.warning("%s", seen)
