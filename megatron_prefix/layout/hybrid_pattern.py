"""The pattern of a HybridModel's layers, as Megatron writes it: a symbol for each layer.

M   Mamba-2
G   gated delta net
*   attention
-   dense MLP
E   experts
|   the layers behind it are on the next pipeline stage

The first three kinds mix a sequence's tokens. The others go on with each token by itself, so that
behind the last layer that mixes, rows that nothing depends on are left out.
"""

from __future__ import annotations

from collections.abc import Iterator

MAMBA = "M"
GATED_DELTA_NET = "G"
ATTENTION = "*"
DENSE = "-"
EXPERTS = "E"
_STAGE = "|"
_PREDICTIONS = "/"

MIXING = (MAMBA, GATED_DELTA_NET, ATTENTION)
"""Kinds of layers that mix a sequence's tokens."""

_REFUSED = {
    "D": "DeepSeek's sparse attention, which chooses keys by position in a row; use "
    f"{ATTENTION} (attention) there, or train without shared prefixes",
    "+": "multi-latent attention, which shares prefixes in a GPTModel only "
    "(multi_latent_attention: true); use that model",
}
"""Kinds of layers that Megatron has, and what to say of them."""


def layers_of(pattern: str) -> str:
    """The symbols of all layers."""
    return pattern.replace(_STAGE, "")


def stages_of(pattern: str) -> list[str]:
    """The symbols of the layers of each pipeline stage, or of each of its chunks."""
    return pattern.split(_STAGE)


def faults_of_pattern(pattern: str) -> Iterator[str]:
    """What a pattern has that cannot share prefixes, each as the rest of a sentence about it."""
    if _PREDICTIONS in pattern:
        yield (
            f"{_PREDICTIONS} begins layers of multi-token prediction, which shares prefixes in a "
            "GPTModel only; leave it and what follows out"
        )
        pattern = pattern.partition(_PREDICTIONS)[0]
    if not all(stages_of(pattern)):
        yield f"a stage has no layer; give each one between two {_STAGE} at least one"
    for number, symbol in enumerate(layers_of(pattern), start=1):
        if symbol in _REFUSED:
            yield f"layer {number} is {symbol}: {_REFUSED[symbol]}"
        elif symbol not in (*MIXING, DENSE, EXPERTS):
            yield (
                f"layer {number} is {symbol}, which is no kind of layer that shares prefixes; use "
                f"{', '.join(MIXING)}, {DENSE} or {EXPERTS}"
            )


def first_trimmed(last_stage: str, *, experts_collect: bool) -> int:
    """The layer behind which only rows are left that the output is needed of.

    It is the last one that needs all rows: it mixes tokens, or has experts that collect statistics
    of all of them. A stage without such a layer is given fewer rows from its beginning on.

    Args:
        last_stage: symbols of the layers that share a stage with the model's output, or of all
            where there are no stages.
        experts_collect: whether routers collect statistics.

    Returns:
        Its index in the stage.
    """
    needing = {*MIXING, *(EXPERTS if experts_collect else ())}
    return max((i for i, symbol in enumerate(last_stage) if symbol in needing), default=0)


def num_trimmed(last_stage: str, *, experts_collect: bool) -> int:
    """Layers at the end of the model that compute less where they are trimmed.

    Args:
        last_stage, experts_collect: as for `first_trimmed`. Experts that collect statistics are
            given all rows.
    """
    first = first_trimmed(last_stage, experts_collect=experts_collect)
    whole = experts_collect and last_stage[first] == EXPERTS
    return len(last_stage) - first - whole
