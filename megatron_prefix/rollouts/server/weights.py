"""The weights that a server samples from: handed over, and looked at whether it has taken them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megatron_prefix.distributed.rank_results import on_rank_0
from megatron_prefix.rollouts.hf.folders import PolicyFolders
from megatron_prefix.rollouts.record_files import identity_of
from megatron_prefix.rollouts.server.answers import OtherWeights
from megatron_prefix.rollouts.server.asking import Asker
from megatron_prefix.rollouts.server.loading import WeightLoader

logger = logging.getLogger(__name__)

_IN_A_ROW = 3
"""Hand-overs without a difference that end the run: one step may change next to nothing."""


class ServerWeights:
    """Has a server load the policy's weights."""

    def __init__(
        self, asker: Asker, folders: PolicyFolders | None, loader: WeightLoader | None
    ) -> None:
        """Nothing is written or asked yet.

        Args:
            asker: of the server.
            folders: where the weights are written.
            loader: has the server load them; None leaves the server's weights alone.
        """
        self.folders = folders
        self.forgets = loader is not None and not loader.names_folder
        """Whether a server that is started anew has other weights than it was told to load."""
        self._asker = asker
        self._loader = loader
        self._kept = KeptWeights(asker)
        self._has_checked_model = False

    def hand_over(self, step: int) -> int | None:
        """Write the weights and have the server load them, where that is due. Collective.

        Returns:
            Their version; None where the server's weights are its own affair.

        Raises:
            ServerError: the server does not load them, or serves another model.
        """
        if self._loader is None:
            if not self._has_checked_model:
                on_rank_0(self._asker.find_model)
                self._has_checked_model = True
            return None
        assert self.folders is not None
        if self.folders.refresh(step):
            on_rank_0(self.load_again)
        return self.folders.version

    def load_again(self) -> None:
        """Have the server load what was written last, and look whether it has; on rank 0.

        Raises:
            ServerError: it has not.
        """
        assert self._loader is not None and self.folders is not None
        version = self.folders.version
        assert version is not None
        folder = self.folders.path(version)
        before = self._kept.before()
        self._loader.load(folder, version)
        self._asker.weights = str(version)
        if self._loader.names_folder:
            self._asker.requests.model = str(folder)
        elif not self._has_checked_model:
            self._asker.find_model()
            self._has_checked_model = True
        self._kept.check(folder, before)


class KeptWeights:
    """Whether a server that says it has loaded weights still answers with those before.

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
