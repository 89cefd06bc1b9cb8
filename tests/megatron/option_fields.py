"""The fields of Megatron's config against the rows of our table of options."""

from __future__ import annotations

import dataclasses

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_prefix.megatron.options import KNOWN_RELEASES, OPTIONS, Option


def config_fields() -> set[str]:
    """Of this release's configs and their parents."""
    return {
        field.name
        for config in (TransformerConfig, MLATransformerConfig)
        for field in dataclasses.fields(config)
    }


def release_of(version: str) -> str:
    """`0.19` of `0.19.2`."""
    return ".".join(version.split(".")[:2])


def what_is_wrong(
    fields: set[str], release: str, options: tuple[Option, ...] = OPTIONS
) -> list[str]:
    """A sentence for each field without a row and each row without a field, in a release."""
    wrong = []
    rows = {option.name: option for option in options}
    for name in sorted(fields - rows.keys()):
        wrong.append(
            f"{name}: megatron-core {release} has this option, and no row of "
            "megatron_prefix/megatron/options/ says whether shared prefixes use it, refuse it or "
            "are not touched by it. Read where Megatron uses it, and add one"
        )
    for option in options:
        if not {option.first, option.last or option.first} <= set(KNOWN_RELEASES):
            wrong.append(f"{option.name}: {option.first} to {option.last} are no known releases")
        expected = (
            option.declared
            and _number(option.first) <= _number(release)
            and (option.last is None or _number(option.last) >= _number(release))
        )
        if expected and option.name not in fields:
            wrong.append(
                f"{option.name}: megatron-core {release} has no such option. If it was renamed, "
                "the new name needs a row; say in the old one's row which releases had it "
                "(`first`, `last`)"
            )
        if not expected and option.name in fields:
            wrong.append(
                f"{option.name}: megatron-core {release} has this option, and its row says that "
                "it has not; correct `first`, `last` or `declared`"
            )
    return wrong


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))
