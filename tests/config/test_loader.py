"""A YAML file becomes the dataclass that it says, or one error that names the key."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.config.loader import (
    ConfigError,
    dump_yaml,
    load_dataclass,
    load_yaml,
    read_yaml,
)

Level = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    rate: float = 0.5
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} must be in (0, 1]")
        if self.size < 0:
            raise ConfigError("a negative size makes no sense")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner
    steps: int = 1
    lr: float = 0.1
    fast: bool = False
    level: Level = "none"
    maybe_level: Level | None = None
    chunks: Literal[1, 2, True] = 1
    path: Path = Path("out")
    limit: Optional[int] = None  # noqa: UP045
    kernel: str | None = None
    other: Inner | None = None
    paths: tuple[Path, ...] = ()
    pair: tuple[int, str] = (1, "a")
    rates: list[float] = field(default_factory=list)
    inners: tuple[Inner, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    either: int | str = 0
    derived: int = field(init=False, default=7)

    def __post_init__(self):
        if self.steps == 13:
            raise ValueError("steps: 13 is unlucky; set 14")


MINIMAL = {"name": "run", "inner": {"size": 3}}


def load(**values: Any) -> Outer:
    return load_dataclass(Outer, {**MINIMAL, **values})


def failure(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(**values)
    return str(caught.value)


@pytest.fixture
def read(tmp_path):
    """Loads a YAML text as an Outer, with overrides."""

    def load_text(text: str, *overrides: str) -> Outer:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_yaml(path, Outer, overrides)

    return load_text


@pytest.mark.parametrize(
    ("key", "given_value", "expected"),
    [
        ("steps", 4, 4),
        ("lr", 2, 2.0),
        ("lr", 0.25, 0.25),
        ("lr", "1e-4", 1e-4),
        ("lr", "-2.5E+3", -2500.0),
        ("lr", ".5e1", 5.0),
        ("fast", True, True),
        ("level", "full", "full"),
        ("maybe_level", None, None),
        ("maybe_level", "full", "full"),
        ("chunks", 2, 2),
        ("chunks", True, True),
        ("path", "a/b", Path("a/b")),
        ("path", Path("a/b"), Path("a/b")),
        ("limit", None, None),
        ("limit", 3, 3),
        ("kernel", "reference", "reference"),
        ("other", None, None),
        ("other", {"size": 1, "rate": 1}, Inner(size=1, rate=1.0)),
        ("paths", ["a", "b"], (Path("a"), Path("b"))),
        ("paths", [], ()),
        ("pair", [2, "b"], (2, "b")),
        ("rates", (1, "1e-2"), [1.0, 0.01]),
        ("inners", [{"size": 1}, {"size": 2}], (Inner(size=1), Inner(size=2))),
        ("extra", {"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}),
        ("sizes", {"a": 1}, {"a": 1}),
        ("either", 1, 1),
        ("either", "x", "x"),
    ],
)
def test_a_value_becomes_its_field_type(key, given_value, expected):
    found = getattr(load(**{key: given_value}), key)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "ten"}, 'steps: expected int, got "ten"'),
        ({"steps": True}, "steps: expected int, got true"),
        ({"steps": 2.0}, "steps: expected int, got 2.0; write 2"),
        ({"steps": 2.5}, "steps: expected int, got 2.5"),
        ({"steps": None}, "steps: expected int, got null"),
        ({"lr": "fast"}, 'lr: expected float, got "fast"'),
        ({"lr": "0.5"}, 'lr: expected float, got "0.5"'),
        ({"lr": "1e-4 "}, 'lr: expected float, got "1e-4 "'),
        ({"lr": True}, "lr: expected float, got true"),
        ({"lr": math.nan}, "lr: expected float, got NaN; set a finite number"),
        ({"lr": math.inf}, "lr: expected float, got Infinity; set a finite number"),
        ({"lr": "-1e999"}, 'lr: expected float, got "-1e999"; set a finite number'),
        (
            {"rates": [1.0, -math.inf]},
            "rates[1]: expected float, got -Infinity; set a finite number",
        ),
        ({"lr": 10**400}, "lr: expected float, got 1000"),
        ({"fast": 1}, "fast: expected bool (true or false), got 1"),
        ({"fast": "true"}, 'fast: expected bool (true or false), got "true"'),
        ({"name": 3}, "name: expected str, got 3; put text in quotes"),
        (
            {"name": False},
            "name: expected str, got false; YAML reads yes, no, on, off, true and false as true or "
            "false: put text in quotes",
        ),
        ({"path": 3}, "path: expected path, got 3"),
        ({"path": ""}, 'path: expected path, got ""'),
        (
            {"level": "selectiv"},
            'level: expected one of none, selective, full, got "selectiv"; did you mean selective?',
        ),
        ({"level": "x"}, 'level: expected one of none, selective, full, got "x"'),
        ({"level": False}, "level: expected one of none, selective, full, got false; YAML reads"),
        ({"level": None}, "level: expected one of none, selective, full, got null"),
        ({"maybe_level": "ful"}, "maybe_level: expected one of none, selective, full, got"),
        ({"chunks": 3}, "chunks: expected one of 1, 2, true, got 3"),
        ({"chunks": 1.0}, "chunks: expected one of 1, 2, true, got 1.0"),
        ({"limit": "x"}, 'limit: expected int, got "x"'),
        ({"paths": "a"}, 'paths: expected list of path, got "a"; write ["a"]'),
        ({"paths": ["a", 1]}, "paths[1]: expected path, got 1"),
        ({"paths": None}, "paths: expected list of path, got null"),
        ({"pair": [1]}, "pair: expected list of 2: int, str, got [1]"),
        ({"pair": [1, 2]}, "pair[1]: expected str, got 2"),
        ({"rates": {"a": 1}}, 'rates: expected list of float, got {"a": 1}'),
        ({"inner": 3}, "inner: expected mapping of keys to values, got 3"),
        ({"inner": {"size": "x"}}, 'inner.size: expected int, got "x"'),
        ({"other": {"size": "x"}}, 'other.size: expected int, got "x"'),
        ({"inners": [{"size": 1}, {"size": "x"}]}, 'inners[1].size: expected int, got "x"'),
        ({"extra": [1]}, "extra: expected mapping of keys to values, got [1]"),
        ({"extra": {1: 2}}, "extra.1: the key is not text; put text in quotes"),
        ({"extra": {True: 2}}, "extra.true: the key is not text; YAML reads yes, no, on"),
        ({"sizes": {"a": "b"}}, 'sizes.a: expected int, got "b"'),
        ({"either": 1.5}, "either: expected int or str, got 1.5"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_would_do(values, message):
    assert failure(**values).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 1}, "stepz: unknown key; did you mean steps? Valid keys: name, inner, steps, "),
        ({"inner": {"size": 1, "rat": 1}}, "inner.rat: unknown key; did you mean rate? Valid keys"),
        ({"unrelated": 1}, "unrelated: unknown key; Valid keys: name, inner, steps, lr, fast, "),
        (
            {"top_p": 1},
            "top_p: unknown key; did you mean inner.top_p or other.top_p? Valid keys: name, ",
        ),
        ({"derived": 1}, "derived: unknown key; "),
        ({True: 1}, "true: unknown key; "),
    ],
)
def test_an_unknown_key_is_named_with_the_valid_ones(values, message):
    mapping = {**MINIMAL, **values}
    with pytest.raises(ConfigError) as caught:
        load_dataclass(Outer, mapping)
    text = str(caught.value)
    assert text.startswith(message)
    assert "derived" not in text.partition("Valid keys")[2]


def test_all_missing_keys_are_named_at_once():
    with pytest.raises(ConfigError, match=r"^name, inner: required, but not set$"):
        load_dataclass(Outer, {})
    assert failure(inner={}) == "inner.size: required, but not set"


def test_a_path_is_put_in_front_of_every_key():
    for mapping, message in [
        ({}, "model.size: required, but not set"),
        ({"size": "x"}, 'model.size: expected int, got "x"'),
        ({"size": 1, "rat": 1}, "model.rat: unknown key; did you mean rate"),
        (None, "model: expected mapping of keys to values, got null"),
        ({"size": 1, "top_p": 2}, "model.top_p: 2.0 must be in"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_dataclass(Inner, mapping, path="model")
        assert str(caught.value).startswith(message)


def test_an_error_of_the_dataclass_itself_gets_the_dotted_key_in_front():
    # A message that begins with the name of a field goes on with the key; another follows it.
    assert failure(inner={"size": 1, "top_p": 2}) == "inner.top_p: 2.0 must be in (0, 1]"
    assert failure(other={"size": -1}) == "other: a negative size makes no sense"
    assert failure(inners=[{"size": -1}]) == "inners[0]: a negative size makes no sense"
    assert failure(steps=13) == "steps: 13 is unlucky; set 14"
    with pytest.raises(ConfigError) as caught:
        load(inner={"size": 1, "top_p": 2})
    assert type(caught.value.__cause__) is ValueError


def test_a_type_that_cannot_be_converted_is_the_programmers_error():
    @dataclass(frozen=True, kw_only=True)
    class Bad:
        value: complex = 0j

    with pytest.raises(TypeError, match="value: no conversion to"):
        load_dataclass(Bad, {"value": 1})


def test_the_given_mapping_is_left_as_it_is():
    mapping = {"name": "run", "inner": {"size": 3}, "rates": [1]}
    load_dataclass(Outer, mapping)
    assert mapping == {"name": "run", "inner": {"size": 3}, "rates": [1]}
    assert load_dataclass(Outer, mapping).rates is not mapping["rates"]


TEXT = """
# A comment.
name: run
steps: 4
lr: 1e-4
paths: [a.jsonl, b.jsonl]
inner:
  size: 3
  rate: 2
extra: {std: 1e-2, layers: 2, text: "1e-2"}
"""


def test_a_file_is_read_with_numbers_that_have_no_dot(read):
    config = read(TEXT)
    assert config == load(
        steps=4,
        lr=1e-4,
        paths=["a.jsonl", "b.jsonl"],
        inner={"size": 3, "rate": 2.0},
        extra={"std": 0.01, "layers": 2, "text": "1e-2"},
    )
    assert type(config.inner.rate) is float


def test_anchors_and_merged_keys_work_and_may_be_overridden(read):
    config = read(
        "name: &n run\nextra: {x: &a {size: 1, rate: 3}, z: *n}\n"
        "inner: &b {<<: *a, rate: 4}\nother: {<<: *b}\n"
    )
    assert (config.inner, config.other) == (Inner(size=1, rate=4), Inner(size=1, rate=4))
    assert config.extra["z"] == "run"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "line 2, column 1: the key name is there twice"),
        ("name: a\ninner:\n  size: 1\n  'size': 2\n", "line 4, column 3: the key size is there"),
        ("extra: {a: {b: 1, b: 2}}", "line 1, column 19: the key b is there twice"),
        ("name: [a\n", "line 2, column 1: expected ',' or ']'"),
        ("name: *a\n", "line 1, column 7: found undefined alias"),
        ("name: !!python/object:os.system a\n", "line 1, column 7: could not determine a const"),
        ("name: a\n---\nname: b\n", "line 2, column 1: but found another document"),
        ("? [a]\n: b\n", "line 1, column 3: found unhashable key"),
        ("- a\n", 'the file is not a mapping of keys to values but ["a"]'),
        ("text\n", 'the file is not a mapping of keys to values but "text"'),
        ("name: \x00\n", "not readable as YAML: unacceptable character"),
        ("name: 2024-13-45\n", "not readable as YAML: month must be in 1..12"),
        ("[" * 100_000, "not readable as YAML: maximum recursion"),
        ("", "name, inner: required, but not set"),
        ("# nothing\n", "name, inner: required, but not set"),
        ("name: &a [*a]\ninner: {size: 1}", "name: expected str, got [[...]]"),
        ("1: 2\n", "1: unknown key; Valid keys"),
    ],
)
def test_a_file_that_is_not_the_yaml_it_should_be_is_refused_by_line(read, text, message):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert str(caught.value).startswith(message)


def test_a_file_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes("name: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="not a text file in UTF-8"):
        load_yaml(path, Outer)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "none.yaml")


def test_overrides_replace_and_add_and_the_last_one_holds(read):
    config = read(
        TEXT,
        "steps=5",
        "inner.rate=1e-3",
        "other.size=1",
        "extra.layers=8",
        "extra.deep.er={a: [1, 2]}",
        "paths=[c]",
        "name=a=b",
        "kernel=module:function",
        "fast=true",
        "limit=3",
        "limit=",
    )
    assert (config.steps, config.inner.rate, config.other) == (5, 1e-3, Inner(size=1))
    assert config.extra == {
        "std": 0.01,
        "layers": 8,
        "text": "1e-2",
        "deep": {"er": {"a": [1, 2]}},
    }
    assert (config.paths, config.name, config.fast) == ((Path("c"),), "a=b", True)
    assert (config.kernel, config.limit) == ("module:function", None)


def test_an_override_of_an_empty_file_and_of_a_null_section(read):
    assert read("", "name=a", "inner.size=1") == load_dataclass(
        Outer, {"name": "a", "inner": {"size": 1}}
    )
    assert read("name: a\ninner:\n", "inner.size=1").inner.size == 1


def test_an_override_of_a_section_leaves_its_aliases_alone(read):
    config = read("name: a\ninner: &a {size: 1}\nother: *a\n", "inner.size=2")
    assert (config.inner.size, config.other.size) == (2, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "override 'steps': write it as section.key=value"),
        ("=3", "override '=3': write it as section.key=value"),
        ("inner.=3", "override 'inner.=3': write it as section.key=value"),
        ("steps.x=3", "override 'steps.x=3': steps is 4, which has no keys of its own"),
        ("name=[a", "override 'name=[a': the value is not YAML: line 1, column 3: expected"),
        ("steps=x", 'steps: expected int, got "x"'),
        ("inner.siz=3", "inner.siz: unknown key; did you mean size?"),
        ("inner.size.x=3", "override 'inner.size.x=3': inner.size is 3, which has no keys"),
        ("--steps=3", "--steps: unknown key; did you mean steps?"),
    ],
)
def test_a_wrong_override_is_named(read, override, message):
    with pytest.raises(ConfigError) as caught:
        read(TEXT, override)
    assert str(caught.value).startswith(message)


def test_a_dump_is_one_key_per_line_in_the_order_of_the_fields(read):
    text = dump_yaml(read(TEXT))
    assert text.startswith(
        "name: run\ninner:\n  size: 3\n  rate: 2.0\n  top_p: 1.0\nsteps: 4\nlr: 0.0001\n"
        "fast: false\nlevel: none\nmaybe_level: null\n"
    )
    assert "\npaths: [a.jsonl, b.jsonl]\n" in text
    assert "\nextra:\n  std: 0.01\n  layers: 2\n  text: '1e-2'\n" in text
    assert "derived" not in text


def test_a_dump_writes_a_value_that_is_there_twice_in_full(tmp_path):
    shared = {"a": [1]}
    assert "*" not in dump_yaml(load(extra={"x": shared, "y": shared}))


def test_what_yaml_cannot_say_is_refused():
    with pytest.raises(ConfigError, match="not representable as YAML"):
        dump_yaml(load(extra={"x": object()}))


text_values = st.text(max_size=8) | st.sampled_from(
    ["no", "1e-4", "1E5", "12", "0x1", "12:30", "null", "~", "", "=", "<<", "2024-01-01", ".inf"]
)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text_values,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text_values, inner, max_size=3),
    max_leaves=6,
)
inner_configs = st.builds(
    Inner,
    size=st.integers(0, 10),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    top_p=st.floats(0, 1, exclude_min=True),
)
outer_configs = st.builds(
    Outer,
    name=text_values,
    inner=inner_configs,
    steps=st.integers().filter(lambda n: n != 13),
    lr=st.floats(allow_nan=False, allow_infinity=False),
    fast=st.booleans(),
    level=st.sampled_from(["none", "selective", "full"]),
    chunks=st.sampled_from([1, 2, True]),
    path=text_values.filter(lambda text: text and "\x00" not in text).map(Path),
    limit=st.none() | st.integers(),
    kernel=st.none() | text_values,
    other=st.none() | inner_configs,
    pair=st.tuples(st.integers(), text_values),
    rates=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    inners=st.lists(inner_configs, max_size=2).map(tuple),
    extra=st.dictionaries(text_values, plain_values, max_size=3),
    sizes=st.dictionaries(text_values, st.integers(), max_size=3),
    either=st.integers() | text_values,
)


@settings(max_examples=150, deadline=None)
@given(outer_configs)
def test_what_is_dumped_is_loaded_as_equal(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8", newline="")
    assert load_yaml(path, Outer) == config
    values = dataclasses.asdict(config)
    del values["derived"]
    assert load_dataclass(Outer, values) == config
