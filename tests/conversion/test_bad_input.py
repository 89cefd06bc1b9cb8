"""What cannot be converted is refused by name, and nothing is left of the output."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prefix.conversion import ConversionError, hf_to_megatron, megatron_to_hf
from tests.conversion.models import CASES, YARN, edit_json, write_model
from tests.small_disk import SmallDisk

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in one file, the same in several, a tied one, and a checkpoint of it."""
    root = tmp_path_factory.mktemp("originals")
    write_model(root / "single", "qwen2")
    write_model(root / "sharded", "qwen2", max_shard_size=60_000)
    write_model(root / "tied", "llama", tie_word_embeddings=True)
    write_model(root / "experts", "mixtral", num_local_experts=2)
    hf_to_megatron(root / "single", root / "megatron", max_file_bytes=60_000)
    return root


def _change(**changes: torch.Tensor | None) -> Damage:
    """Set tensors of the single file; None takes one out."""

    def damage(folder: Path) -> None:
        tensors = {name: t.clone() for name, t in load_file(folder / WEIGHTS).items()}
        for name, tensor in changes.items():
            if tensor is None:
                del tensors[name]
            else:
                tensors[name] = tensor
        save_file(tensors, folder / WEIGHTS)

    return damage


def _rename(new: Callable[[str], str]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({new(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)

    return damage


def _config(**changes: Any) -> Damage:
    return lambda folder: edit_json(folder / "config.json", **changes)


def _index(edit: Callable[[dict[str, str]], None]) -> Damage:
    def damage(folder: Path) -> None:
        values = json.loads((folder / INDEX).read_text())
        edit(values["weight_map"])
        (folder / INDEX).write_text(json.dumps(values))

    return damage


def _first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def _cut_off(folder: Path) -> None:
    shard = _first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-1000])


def _only_pickles(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _twice(folder: Path) -> None:
    tensors = load_file(max(folder.glob("model-*.safetensors")))
    tensors["model.embed_tokens.weight"] = torch.zeros(61, 64)
    save_file(tensors, max(folder.glob("model-*.safetensors")))


Q = "model.layers.1.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"

BAD_SOURCES: dict[str, tuple[str, Damage, str]] = {
    "missing tensor": ("single", _change(**{Q: None}), rf"no tensor {Q}, which config\.json"),
    "extra tensor": (
        "single",
        _change(**{"model.layers.2.mlp.up_proj.weight": torch.zeros(96, 64)}),
        r"model\.layers\.2\.mlp\.up_proj\.weight would be lost",
    ),
    "wrong shape": (
        "single",
        _change(**{Q: torch.zeros(60, 64)}),
        rf"{Q} has shape \[60, 64\], but config\.json asks for \[64, 64\]",
    ),
    "wrong size in the config": (
        "single",
        _config(vocab_size=64),
        r"embed_tokens\.weight has shape \[61, 64\], .* \[64, 64\]",
    ),
    "integers": (
        "single",
        _change(**{Q: torch.zeros(64, 64, dtype=torch.int8)}),
        rf"{Q} is of type I8; only F64, F32, F16, BF16",
    ),
    "8-bit floats": (
        "single",
        _change(**{Q: torch.zeros(64, 64).to(torch.float8_e4m3fn)}),
        rf"{Q} is of type F8_E4M3",
    ),
    "mixed types in one parameter": (
        "single",
        _change(**{K: torch.zeros(32, 64).bfloat16()}),
        rf"{Q} \(F32\) and {K} \(BF16\).*add --dtype",
    ),
    "mixed types over the layers": (
        "single",
        _change(**{"model.layers.1.mlp.down_proj.weight": torch.zeros(64, 96).bfloat16()}),
        r"layers\.0\.mlp\.down_proj\.weight \(float32\).*layers\.1\.mlp\.down_proj.*--dtype",
    ),
    "cut-off file": ("sharded", _cut_off, r"model-00001-of-\d+\.safetensors: not a whole"),
    "missing file": (
        "sharded",
        lambda folder: _first_shard(folder).unlink(),
        r"model-00001-of-\d+\.safetensors: missing",
    ),
    "tensor that the index does not name": (
        "sharded",
        _index(lambda names: names.pop(Q)),
        rf"holds {Q}, but {INDEX} does not name it",
    ),
    "tensor that no file has": (
        "sharded",
        _index(lambda names: names.update({"a.b": names[Q]})),
        r"a\.b should be in model-\d+-of-\d+\.safetensors, which does not have it",
    ),
    "tensor in two files": ("sharded", _twice, r"holds model\.embed_tokens\.weight, but"),
    "index out of the folder": (
        "sharded",
        _index(lambda names: names.update({Q: "../elsewhere.safetensors"})),
        r"is no file name",
    ),
    "index to a pickle": (
        "sharded",
        _index(lambda names: names.update({Q: "pytorch_model.bin"})),
        r"no safetensors file",
    ),
    "no index": (
        "sharded",
        lambda folder: (folder / INDEX).unlink(),
        rf"but no {re.escape(INDEX)}",
    ),
    "only pickles": ("single", _only_pickles, r"pickled weights \(pytorch_model\.bin\)"),
    "no config": ("single", lambda f: (f / "config.json").unlink(), r"config\.json: missing"),
    "config that is no JSON": (
        "single",
        lambda folder: (folder / "config.json").write_text("{"),
        r"config\.json: not readable as JSON",
    ),
    "other family": ("single", _config(model_type="gpt2"), r"'gpt2' is not supported; .*qwen2"),
    "known family that cannot be converted": (
        "single",
        _config(model_type="deepseek_v2"),
        r"'deepseek_v2' is not supported: .*softmax in groups",
    ),
    "quantized": (
        "single",
        _config(quantization_config={"quant_method": "gptq"}),
        r"quantization_config",
    ),
    "other rotary scaling": (
        "single",
        _config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        r"rope_type: 'linear' is not supported",
    ),
    "other activation": ("single", _config(hidden_act="gelu"), r"hidden_act: 'gelu'"),
    "scaling of attention in YaRN": (
        "single",
        _config(rope_parameters={**YARN, "attn_factor": 1.5}),
        r"rope_scaling\.attn_factor: 1\.5 is not supported with rope_type: yarn",
    ),
    "tokens that see those after them": ("single", _config(is_causal=False), r"is_causal: False"),
    "layers of another kind": (
        "single",
        _config(layer_types=["full_attention", "chunked_attention"]),
        r"layer 1 is of chunked_attention",
    ),
    "layers with a window of no size": (
        "single",
        _config(layer_types=["full_attention", "sliding_attention"]),
        r"sliding_window: None, and layer 1 is of sliding_attention",
    ),
    "a model in one file beside an index": (
        "sharded",
        lambda folder: shutil.copy(_first_shard(folder), folder / WEIGHTS),
        rf"has {re.escape(INDEX)} and beside it {re.escape(WEIGHTS)}",
    ),
    "an adapter": (
        "single",
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        r"a PEFT adapter \(adapter_config\.json\), not a model; merge it",
    ),
    "LoRA weights": (
        "single",
        _rename(lambda name: name.replace("q_proj.weight", "q_proj.lora_A.weight")),
        r"no tensor .*q_proj\.weight.* there are LoRA weights beside",
    ),
    "a part of another model": (
        "single",
        _rename(lambda name: name.replace("model.", "model.language_model.", 1)),
        r"but there is model\.language_model\..*: the model is a part of another one",
    ),
    "a padded vocabulary": (
        "single",
        _change(**{"model.embed_tokens.weight": torch.zeros(64, 64)}),
        r"has shape \[64, 64\], .* seems to be padded; set vocab_size to 64",
    ),
    "fused experts": (
        "experts",
        _rename(lambda name: re.sub(r"experts\.0\.\w+\.weight", "experts.gate_up_proj", name)),
        r"experts\.gate_up_proj holds the experts of a layer as one tensor",
    ),
    "tied, but different": (
        "tied",
        _change(**{"lm_head.weight": torch.zeros(61, 64)}),
        r"config\.json ties lm_head\.weight .* the two differ",
    ),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_bad_source_is_named_and_leaves_no_output(
    originals: Path, tmp_path: Path, case: str
) -> None:
    original, damage, message = BAD_SOURCES[case]
    shutil.copytree(originals / original, tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(ConversionError, match=message):
        hf_to_megatron(tmp_path / "hf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tied_output_layer_that_is_stored_too_is_no_extra_tensor(
    originals: Path, tmp_path: Path
) -> None:
    shutil.copytree(originals / "tied", tmp_path / "hf")
    embedding = load_file(tmp_path / "hf" / WEIGHTS)["model.embed_tokens.weight"]
    _change(**{"lm_head.weight": embedding.clone(), "rotary_emb.inv_freq": torch.ones(8)})(
        tmp_path / "hf"
    )
    hf_to_megatron(tmp_path / "hf", tmp_path / "out")


def test_an_index_may_name_the_output_layer_of_a_tied_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "hf", "llama", tie_word_embeddings=True, max_shard_size=60_000)
    _index(lambda names: names.update({"lm_head.weight": max(names.values())}))(folder)
    hf_to_megatron(folder, tmp_path / "out")
    edit_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(ConversionError, match=r"no tensor lm_head\.weight, which config\.json"):
        hf_to_megatron(folder, tmp_path / "untied")


def test_windows_that_no_layer_has_are_none(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "hf", "qwen2")
    edit_json(
        folder / "config.json",
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=2,
        layer_types=None,
    )
    hf_to_megatron(folder, tmp_path / "out")


def _cut_off_distcp(folder: Path) -> None:
    file = folder / "release" / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:2000])


BAD_CHECKPOINTS: dict[str, tuple[Damage, str]] = {
    "cut-off file": (_cut_off_distcp, r"cannot read \S+ from __1_0\.distcp"),
    "missing file": (
        lambda folder: (folder / "release" / "__1_0.distcp").unlink(),
        r"cannot read \S+ from __1_0\.distcp",
    ),
    "no table of contents": (
        lambda folder: (folder / "release" / ".metadata").unlink(),
        r"\.metadata: missing",
    ),
    "damaged table of contents": (
        lambda folder: (folder / "release" / ".metadata").write_bytes(b"\x80\x04junk"),
        r"\.metadata: not the table of contents",
    ),
    "tracker that names nothing": (
        lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text("12"),
        r"names iter_0000012, which is no distributed checkpoint",
    ),
    "nothing says what model": (
        lambda folder: (folder / "model.yaml").unlink(),
        r"does not say what model it holds .*--hf-source.*--config",
    ),
    "other vocabulary": (
        lambda folder: _edit_text(folder / "model.yaml", "vocab_size: 61", "vocab_size: 62"),
        r"word_embeddings\.weight has shape \[61, 64\], .* configuration needs \[62, 64\]",
    ),
    "other sizes": (
        lambda folder: _edit_text(
            folder / "model.yaml", "ffn_hidden_size: 96", "ffn_hidden_size: 95"
        ),
        r"linear_fc1\.weight has shape \[2, 192, 64\], .* configuration needs \[2, 190, 64\]",
    ),
    "a bias too many": (
        lambda folder: _edit_text(
            folder / "model.yaml", "add_qkv_bias: true", "add_qkv_bias: false"
        ),
        r"linear_qkv\.bias would be lost",
    ),
    "damaged model section": (
        lambda folder: _edit_text(
            folder / "model.yaml",
            "qk_layernorm: false",
            "qk_layernorm: true\n    kv_channels: 16",
        ),
        r"kv_channels is there twice",
    ),
    "an option that Hugging Face lacks": (
        lambda folder: _edit_text(folder / "model.yaml", "activation: silu", "activation: gelu"),
        r"model\.activation: 'gelu' is nothing that a Hugging Face config\.json",
    ),
}


def _edit_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_named_and_leaves_no_output(
    originals: Path, tmp_path: Path, case: str
) -> None:
    damage, message = BAD_CHECKPOINTS[case]
    shutil.copytree(originals / "megatron", tmp_path / "megatron")
    damage(tmp_path / "megatron")
    with pytest.raises(ConversionError, match=message):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_a_source_of_another_model_is_refused(originals: Path, tmp_path: Path) -> None:
    shutil.copytree(originals / "single", tmp_path / "hf")
    _config(rms_norm_eps=1e-3)(tmp_path / "hf")
    with pytest.raises(ConversionError, match=r"different models: norm_epsilon \(1e-06 and 0.001"):
        megatron_to_hf(originals / "megatron", tmp_path / "out", hf_source=tmp_path / "hf")


@pytest.mark.parametrize("kind", ["file", "nothing"])
def test_a_path_that_is_no_folder_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "path"
    if kind == "file":
        path.write_text("")
    found = "is a file" if kind == "file" else "does not exist"
    with pytest.raises(ConversionError, match=rf"path: {found}"):
        hf_to_megatron(path, tmp_path / "out")
    with pytest.raises(ConversionError, match=rf"path: {found}"):
        megatron_to_hf(path, tmp_path / "out")


def test_an_output_that_exists_is_kept_unless_forced(originals: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    with pytest.raises(ConversionError, match=r"exists already; .*--force"):
        hf_to_megatron(originals / "single", out)
    assert (out / "precious").read_text() == "kept"
    with pytest.raises(ConversionError, match="not a whole"):
        broken = tmp_path / "broken"
        shutil.copytree(originals / "sharded", broken)
        _cut_off(broken)
        hf_to_megatron(broken, out, force=True)
    assert (out / "precious").read_text() == "kept"
    hf_to_megatron(originals / "single", out, force=True)
    assert (out / "release").is_dir() and not (out / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "out"]


def test_a_conversion_that_was_cut_off_is_not_mistaken_for_one(
    originals: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(ConversionError, match=r"out\.partial: exists already: .*--force"):
        hf_to_megatron(originals / "single", tmp_path / "out")
    hf_to_megatron(originals / "single", tmp_path / "out", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@contextlib.contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """Writes beyond `size` fail as they do on a full disk, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_is_reported_and_leaves_nothing(originals: Path, tmp_path: Path) -> None:
    for convert, source in ((hf_to_megatron, "single"), (megatron_to_hf, "megatron")):
        with (
            _largest_file(50_000),
            pytest.raises(ConversionError, match="out: file too large while writing; nothing"),
        ):
            convert(originals / source, tmp_path / "out")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("convert", "source"), [(hf_to_megatron, "single"), (megatron_to_hf, "megatron")]
)
def test_whatever_a_full_disk_cuts_off_is_reported_as_that(
    originals: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    convert: Callable[[Path, Path], object],
    source: str,
) -> None:
    monkeypatch.setattr("megatron_prefix.conversion.output_folder._SPARE_BYTES", -(2**30))
    with SmallDisk(tmp_path / "disk", 2**24) as disk:
        out = disk.path / "out"
        convert(originals / source, out)
        needed = disk.used
        shutil.rmtree(out)
        # The last files are small: the table of contents, plain values, the model section.
        for room in range(needed - 2**16, needed, 4096):
            disk.resize(room)
            with pytest.raises(ConversionError, match="out: no space left on device while writing"):
                convert(originals / source, out)
            assert not list(disk.path.iterdir())


def test_too_little_space_is_found_before_anything_is_written(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=70_000_000))
    with pytest.raises(ConversionError, match=r"0\.28 MB are needed, 0\.07 GB are free"):
        monkeypatch.setattr("megatron_prefix.conversion.output_folder._SPARE_BYTES", 69_900_000)
        hf_to_megatron(originals / "single", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_every_family_of_the_cases_is_one_that_the_readme_names() -> None:
    from megatron_prefix.conversion.architecture import FAMILIES

    assert {family for family, _ in CASES.values()} == set(FAMILIES)
