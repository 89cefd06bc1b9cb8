"""A converted model computes what transformers computes, and comes back bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import megatron.core
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prefix.conversion import ConversionError, hf_to_megatron, megatron_to_hf
from megatron_prefix.conversion.hf_config import read_architecture
from megatron_prefix.conversion.hf_folder import HFFolder
from megatron_prefix.conversion.inspection import inspect
from megatron_prefix.conversion.verification import report_table, verify
from tests.conversion.models import (
    CASES,
    GPT_OSS,
    HAS_SHARED_EXPERT_GATE,
    LLAMA3_ROPE,
    QWEN2_MOE,
    QWEN3_5,
    QWEN3_NEXT,
    SIZES,
    WITH_DELTA_NETS,
    add_mtp_layer,
    edit_json,
    quantize_as_mxfp4,
    write_model,
)
from tests.megatron.models import HAS_GATED_DELTA_NET

RELEASE = tuple(int(x) for x in megatron.core.__version__.split(".")[:2])
HAS_YARN = RELEASE >= (0, 15)
HAS_WINDOWS = HAS_YARN
HAS_QUERIES_WITHOUT_NORM = RELEASE < (0, 19)


@pytest.mark.parametrize("case", CASES)
def test_log_probs_equal_transformers_and_weights_come_back(tmp_path: Path, case: str) -> None:
    family, options = CASES[case]
    if (refusal := _refusal(case)) is not None:
        with pytest.raises(ValueError, match=refusal):
            verify(write_model(tmp_path / "hf", family, **options))
        return
    if "yarn" in case and not HAS_YARN:
        pytest.skip("megatron-core 0.14 has no YaRN in GPTModel")
    if "window" in case and "without" not in case and not HAS_WINDOWS:
        pytest.skip("megatron-core 0.14 has no windows in its local layers")
    checks = verify(write_model(tmp_path / "hf", family, **options))
    assert [check.name for check in checks] == ["there and back", "logits", "log-probabilities"]
    assert all(check.ok for check in checks), report_table(checks)


def _refusal(case: str) -> str | None:
    """What a release says of a model that it does not have; None where it has it."""
    if "gpt_oss" in case and not HAS_WINDOWS:
        return "softmax_type"
    if case == QWEN2_MOE and not HAS_SHARED_EXPERT_GATE:
        return "moe_shared_expert_gate"
    if case in WITH_DELTA_NETS and not HAS_GATED_DELTA_NET:
        return "experimental_attention_variant"
    if "Moonlight" in case and not HAS_QUERIES_WITHOUT_NORM:
        return r"q_lora_rank=None with qk_layernorm=True"
    return None


def test_llama_3_scaling_is_in_the_converted_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    # Only at some distance do the scaled frequencies show.
    groups = [([i % 61 for i in range(700)], [[5, 9, 60], [1]])]
    sizes = {**SIZES, "max_position_embeddings": 1024, "head_dim": 32}
    folder = write_model(tmp_path / "hf", "llama", **sizes, rope_parameters=LLAMA3_ROPE)
    checks = verify(folder, groups=groups)
    assert all(check.ok for check in checks), report_table(checks)
    tokens = torch.tensor([groups[0][0]])
    with torch.no_grad():
        scaled = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        edit_json(
            folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
        )
        plain = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    assert (scaled - plain).abs().max() > 1e-3


def test_verify_fails_where_the_checkpoint_is_of_other_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "hf", "qwen2")
    hf_to_megatron(write_model(tmp_path / "other", "qwen2", seed=1), tmp_path / "megatron")
    checks = verify(folder, checkpoint=tmp_path / "megatron")
    assert [check.ok for check in checks] == [False, False, False]


def test_sharded_bfloat16_sources_keep_their_type_and_become_as_many_shards(
    tmp_path: Path,
) -> None:
    options = CASES["qwen3_moe"][1]
    folder = write_model(
        tmp_path / "hf", "qwen3_moe", dtype=torch.bfloat16, max_shard_size=60_000, **options
    )
    (folder / "tokenizer_config.json").write_text("{}")
    assert len(list(folder.glob("*.safetensors"))) > 3
    hf_to_megatron(folder, tmp_path / "megatron", max_file_bytes=60_000)
    assert len(list((tmp_path / "megatron" / "release").glob("*.distcp"))) > 3
    megatron_to_hf(
        tmp_path / "megatron", tmp_path / "back", hf_source=folder, max_shard_bytes=60_000
    )
    source, back = HFFolder(folder), HFFolder(tmp_path / "back")
    assert len({stored.file for stored in back.tensors.values()}) > 3
    assert source.tensors.keys() == back.tensors.keys()
    for name, stored in source.tensors.items():
        assert back.tensors[name].dtype == stored.dtype == "BF16"
        assert torch.equal(back.read(name), source.read(name)), name
    assert (tmp_path / "back" / "tokenizer_config.json").exists()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_type_can_be_asked_for_both_ways(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "hf", "llama")
    hf_to_megatron(folder, tmp_path / "megatron", dtype=torch.bfloat16)
    assert {t["dtype"] for t in inspect(tmp_path / "megatron")["tensors"]} == {"bfloat16"}
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype=torch.float32)
    back = HFFolder(tmp_path / "back")
    assert {stored.dtype for stored in back.tensors.values()} == {"F32"}
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(back.read(name), HFFolder(folder).read(name).bfloat16().float())


@pytest.mark.parametrize("case", CASES)
def test_a_written_config_json_says_the_same_model(tmp_path: Path, case: str) -> None:
    family, options = CASES[case]
    folder = write_model(tmp_path / "hf", family, **options)
    architecture = hf_to_megatron(folder, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert architecture == read_architecture(folder)
    # Qwen3.5's models with experts are Qwen3-Next's, with other names of tensors.
    same = dataclasses.replace(architecture, family=architecture.canonical_family)
    assert read_architecture(tmp_path / "back") == same


@pytest.mark.parametrize("case", ["deepseek_v3, yarn", QWEN3_NEXT])
def test_layers_that_predict_further_tokens_are_kept_aside_and_put_back(
    tmp_path: Path, case: str
) -> None:
    family, options = CASES[case]
    source = write_model(tmp_path / "hf", family, dtype=torch.bfloat16, **options)
    names = add_mtp_layer(source, options["num_hidden_layers"], torch.bfloat16)
    hf_to_megatron(source, tmp_path / "megatron")
    # By what lies beside the checkpoint, and by the folder that the model came from.
    megatron_to_hf(tmp_path / "megatron", tmp_path / "beside")
    (tmp_path / "megatron" / "release").rename(tmp_path / "alone")
    megatron_to_hf(tmp_path / "alone", tmp_path / "from_source", hf_source=source)
    expected = HFFolder(source)
    for back in (HFFolder(tmp_path / "beside"), HFFolder(tmp_path / "from_source")):
        assert back.tensors.keys() == expected.tensors.keys() >= set(names)
        for name, stored in expected.tensors.items():
            assert back.tensors[name].dtype == stored.dtype
            assert torch.equal(back.read(name), expected.read(name)), name
        assert read_architecture(back.path).mtp_layers == 1
    # Without either, the written configuration asks for no such layers.
    shutil.copy(tmp_path / "megatron" / "model.yaml", tmp_path / "alone")
    megatron_to_hf(tmp_path / "alone", tmp_path / "without")
    assert read_architecture(tmp_path / "without").mtp_layers == 0
    assert not set(names) & HFFolder(tmp_path / "without").tensors.keys()


def test_the_bias_of_routers_keeps_its_type(tmp_path: Path) -> None:
    family, options = CASES["deepseek_v3, yarn"]
    source = write_model(tmp_path / "hf", family, **options)
    hf_to_megatron(source, tmp_path / "megatron", dtype=torch.bfloat16)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = HFFolder(tmp_path / "back").tensors
    kinds = {name.endswith("e_score_correction_bias"): t.dtype for name, t in back.items()}
    assert kinds == {True: "F32", False: "BF16"}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_experts_in_four_bits_are_converted_from_what_transformers_makes_of_them(
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    options = {**CASES[GPT_OSS][1], "intermediate_size": 32}
    source = write_model(tmp_path / "hf", "gpt_oss", dtype=torch.bfloat16, **options)
    quantize_as_mxfp4(source)
    with pytest.raises(ConversionError, match=r"Mxfp4Config\(dequantize=True\)"):
        hf_to_megatron(source, tmp_path / "megatron")
    # What the error says to do.
    AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    ).save_pretrained(tmp_path / "bfloat16")
    hf_to_megatron(tmp_path / "bfloat16", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    expected, found = HFFolder(tmp_path / "bfloat16"), HFFolder(tmp_path / "back")
    assert found.tensors.keys() == expected.tensors.keys()
    for name in expected.tensors:
        assert torch.equal(found.read(name), expected.read(name)), name


def test_the_norm_behind_the_delta_rule_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Less 1, as Megatron has it, small weights would not be bfloat16."""
    family, options = CASES[QWEN3_5]
    source = write_model(tmp_path / "hf", family, dtype=torch.bfloat16, **options)
    file = source / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.linear_attn.norm.weight"
    tensors[name] = torch.tensor([0.1, -0.3, 1e-4, 0.77, 1.3, 250.0], dtype=torch.bfloat16)
    assert not torch.equal((tensors[name] - 1) + 1, tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = HFFolder(tmp_path / "back")
    assert {stored.dtype for stored in back.tensors.values()} == {"BF16"}
    assert torch.equal(back.read(name), tensors[name])


def test_kimi_k2_is_read_as_deepseek_v3(tmp_path: Path) -> None:
    family, options = CASES["deepseek_v3"]
    source = write_model(tmp_path / "hf", family, **options)
    edit_json(source / "config.json", model_type="kimi_k2")
    checks = verify(source)
    assert all(check.ok for check in checks), report_table(checks)


def test_whoever_may_read_config_json_may_read_the_weights(tmp_path: Path) -> None:
    hf_to_megatron(write_model(tmp_path / "hf", "qwen2"), tmp_path / "megatron")
    before = os.umask(0o027)
    try:
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", hf_source=tmp_path / "hf")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "back").iterdir()}
    assert modes["config.json"] == modes["model.safetensors"] == 0o640


def test_inspect_says_the_same_of_either_format(tmp_path: Path) -> None:
    family, options = CASES["mixtral"]
    folder = write_model(tmp_path / "hf", family, **options)
    hf_to_megatron(folder, tmp_path / "megatron")
    hf, megatron = inspect(folder), inspect(tmp_path / "megatron")
    assert hf["model"] == megatron["model"]
    assert hf["parameters"] == megatron["parameters"]
    shapes = {tensor["name"]: tensor["shape"] for tensor in megatron["tensors"]}
    key = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert shapes[key] == [2, 4, 2 * 96, 64]


def test_the_checkpoint_runs_no_code_when_it_is_read(tmp_path: Path) -> None:
    hf_to_megatron(write_model(tmp_path / "hf", "llama"), tmp_path / "megatron")
    checkpoint = tmp_path / "megatron" / "release"
    # What Megatron-LM reads is plain values too.
    torch.load(checkpoint / "common.pt", weights_only=True)
    # A pickle that makes a file when it is loaded.
    marker = tmp_path / "ran"
    (checkpoint / ".metadata").write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    with pytest.raises(ConversionError, match=r"\.metadata: .*os\.system.*not to be trusted"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert not marker.exists()
