"""Every option of Megatron's model config: used, refused or harmless with shared prefixes.

`OPTIONS` has a row for each field of `TransformerConfig`, `MLATransformerConfig` and their parents
in every known release; a test fails on a field that has none. `refuse_unsupported` asks the rows.
"""

from __future__ import annotations

from typing import Any

from megatron_prefix.megatron.options import (
    attention,
    experts,
    latent,
    layers,
    parallel,
    precision,
    running,
)
from megatron_prefix.megatron.options.record import (
    KNOWN_RELEASES,
    Option,
    Refusal,
    UnsupportedOptionError,
)

OPTIONS: tuple[Option, ...] = (
    *attention.OPTIONS,
    *experts.OPTIONS,
    *latent.OPTIONS,
    *layers.OPTIONS,
    *parallel.OPTIONS,
    *precision.OPTIONS,
    *running.OPTIONS,
)

__all__ = [
    "KNOWN_RELEASES",
    "OPTIONS",
    "Option",
    "Refusal",
    "UnsupportedOptionError",
    "refuse_unsupported",
]


def refuse_unsupported(config: Any) -> None:
    """Raise one `UnsupportedOptionError` for all options that cannot work with shared prefixes.

    Args:
        config: Megatron's `TransformerConfig`, or anything with its attributes.
    """
    found = (option.refusal(config) for option in OPTIONS)
    refusals = tuple(refusal for refusal in found if refusal is not None)
    if not refusals:
        return
    if len(refusals) == 1:
        (refusal,) = refusals
        message = (
            f"{refusal.setting} cannot be combined with shared prefixes: "
            f"{refusal.why}. {refusal.instead}"
        )
    else:
        lines = [f"\n  {r.setting}: {r.why}. {r.instead}" for r in refusals]
        message = f"{len(refusals)} options cannot be combined with shared prefixes:" + "".join(
            lines
        )
    raise UnsupportedOptionError(message, refusals)
