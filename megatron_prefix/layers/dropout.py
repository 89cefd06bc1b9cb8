"""Dropout that a user has put into a model, such as that of LoRA adapters."""

from __future__ import annotations

from torch import nn

_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


def refuse_dropout(module: nn.Module, place: str) -> None:
    """Raise for a dropout module in here, whose probability the model's config does not tell.

    Dropout that is no module of torch's is not found.

    Args:
        place: of the module in the model, for the message.

    Raises:
        ValueError: it names the dropout's place and its probability.
    """
    for name, inner in module.named_modules():
        if isinstance(inner, _DROPOUTS) and inner.p > 0:
            raise ValueError(
                f"{place}, {name}: dropout of p={inner.p} cannot be combined with shared prefixes: "
                "a shared prefix has one dropout mask where repeated prompts would have had many. "
                "Set its probability to 0; in an adapter's config (LoRA) its dropout"
            )
