"""Samples by a completions server, which rank 0 asks; all ranks hand over the weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from megatron_prefix.config import RunConfig
from megatron_prefix.distributed.rank_results import on_rank_0
from megatron_prefix.rollouts.hf.folders import PolicyFolders
from megatron_prefix.rollouts.routes import route_reader
from megatron_prefix.rollouts.sampling.sampler import Answers, Sampler, SamplingSpec, Tally, Wanted
from megatron_prefix.rollouts.server.answers import OtherWeights, Reader
from megatron_prefix.rollouts.server.asking import Asker
from megatron_prefix.rollouts.server.client import ServerClient
from megatron_prefix.rollouts.server.loading import WeightLoader
from megatron_prefix.rollouts.server.weights import KeptWeights
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer, Tokens

logger = logging.getLogger(__name__)


class ServerSampler(Sampler):
    """A `Sampler` of a server. Only rank 0 ever asks; the other ranks need the same arguments."""

    is_remote = True

    def __init__(
        self, asker: Asker, folders: PolicyFolders | None, loader: WeightLoader | None
    ) -> None:
        """Nothing is written or asked yet; without a loader the server's weights are left alone."""
        self.forgets = loader is not None and not loader.names_folder
        """Whether a server that is started anew has other weights than it was told to load."""
        self._asker = asker
        self.client = asker.client
        self.folders = folders
        self._loader = loader
        self._kept = KeptWeights(asker)
        self._has_checked_model = False
        self._retries_told = 0

    def hand_over(self, step: int) -> int | None:
        """Have the server load the weights, where that is due. Collective."""
        if self._loader is None:
            on_rank_0(self._check_model)
            return None
        assert self.folders is not None
        if self.folders.refresh(step):
            on_rank_0(self.load_again)
        return self.folders.version

    def load_again(self) -> None:
        """Have the server load what was written last, and look whether it has; on rank 0."""
        assert self._loader is not None and self.folders is not None
        version = self.folders.version
        assert version is not None
        folder = self.folders.path(version)
        before = self._kept.before()
        self._loader.load(folder, version)
        self._asker.weights = str(version)
        if self._loader.names_folder:
            self._asker.requests.model = str(folder)
        else:
            self._check_model()
        self._kept.check(folder, before)

    def _check_model(self) -> None:
        if not self._has_checked_model:
            self._asker.find_model()
            self._has_checked_model = True

    def sample(self, wanted: Sequence[Wanted], *, step: int) -> Answers:
        """Responses that are all of the current weights, though the server may come back with
        others: a server that was away has been started anew, for all that is known."""
        has_differed = False
        while True:
            outages = self.client.outages
            try:
                tally = Tally()
                responses = self._asker.ask(wanted, tally)
                if not self.forgets or self.client.outages == outages:
                    # Those of the weights' hand-over count too.
                    tally.retries = self.client.retries - self._retries_told
                    self._retries_told += tally.retries
                    return Answers(responses=responses, tally=tally)
            except OtherWeights:
                # Once, where no outage explains it: a second time somebody else loads them.
                if not self.forgets or (has_differed and self.client.outages == outages):
                    raise
                has_differed |= self.client.outages == outages
            logger.warning(
                "%s: seems to have been started anew; loading the weights and asking again",
                self.client.url,
            )
            self.load_again()

    def can_be_asked(self, tokens: Tokens) -> bool:
        """Whether responses can be sampled behind these tokens, for all that is known."""
        return self._asker.can_be_asked(tokens)

    def close(self) -> None:
        """Give up what is under way."""
        self.client.close()


def server_sampler(
    config: RunConfig,
    spec: SamplingSpec,
    tokenizer: TextTokenizer | None,
    folders: PolicyFolders,
    environment: Mapping[str, str],
) -> ServerSampler:
    """The sampler of `rollouts.server`; nothing is sent yet.

    Raises:
        ValueError: the key's variable is not set, or a server that answers in text would have to
            say which of several stop tokens it ended with.
    """
    server = config.rollouts.server
    assert server is not None
    key = None
    if server.api_key_variable is not None:
        key = environment.get(server.api_key_variable)
        if not key:
            raise ValueError(
                f"rollouts.server.api_key_variable: the environment variable "
                f"{server.api_key_variable} is not set; set it to the server's key"
            )
    if server.kind == "transformers" and len(spec.stop_tokens) != 1:
        raise ValueError(
            f"rollouts.stop_tokens: {list(spec.stop_tokens)}, but server.kind: {server.kind} "
            "answers in text, which does not say which of them ended it; give one"
        )
    client = ServerClient(server, api_key=key)
    routes = route_reader(config)
    reader = Reader(
        spec=spec,
        tokenizer=tokenizer,
        has_our_tokenizer=server.kind == "transformers",
        is_corrected=config.objective.correction is not None,
        routes=None if routes is None else routes.shape,
    )
    loader = None
    if server.loads_weights:
        timeout_s = config.rollouts.weights.load_timeout_s
        loader = WeightLoader(server.kind, client, timeout_s=timeout_s)
    return ServerSampler(Asker(client, server, reader), folders, loader)
