"""Layers that predict further tokens: converted, they predict what the folder's tensors do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import ParallelConfig
from megatron_prefix.conversion import ConversionError, hf_to_megatron, megatron_to_hf
from megatron_prefix.conversion.hf_folder import HFFolder
from megatron_prefix.conversion.verification import report_table, verify
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layers.predictions import add_predictions
from megatron_prefix.layout import PrefixTree, pack
from megatron_prefix.layout.predictions import shifted_layouts
from megatron_prefix.rollouts.hf.export import weights_exporter
from tests.conversion.loading import load_converted, model_section
from tests.conversion.models import CASES, QWEN3_5, QWEN3_NEXT, write_model
from tests.conversion.mtp import WEIGHTS, add_mtp_layers, fuse_experts, predicted_logits
from tests.megatron.models import HAS_PREDICTIONS
from tests.training.runs import good_records, read_rows, run_values, trainer, write_records

if not HAS_PREDICTIONS:
    pytest.skip("megatron-core before 0.16 has another model", allow_module_level=True)

# The last layer has softmax attention, as in published models.
ATTENDS_LAST = {"num_hidden_layers": 2, "full_attention_interval": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": CASES["deepseek_v3"],
    "glm4_moe": CASES["glm4_moe"],
    "qwen3_next": ("qwen3_next", {**CASES[QWEN3_NEXT][1], **ATTENDS_LAST}),
    "qwen3_5_text": ("qwen3_5_text", {**CASES[QWEN3_5][1], **ATTENDS_LAST}),
    "qwen3_5_moe_text": CASES["qwen3_5, experts"],
}
DEPTHS = {"glm4_moe": 2}
"""Names of GLM-4.5 allow for several layers, though published models have one."""
FUSED = ("qwen3_next",)
"""Models that are given the experts of the MTP layer in one tensor, as Qwen3.6 is published."""


def write(folder: Path, name: str, **how: Any) -> Path:
    """A model with MTP layers; its folder."""
    family, options = MODELS[name]
    write_model(folder, family, **{**options, **how})
    add_mtp_layers(folder, DEPTHS.get(name, 1))
    if name in FUSED:
        fuse_experts(folder)
    return folder


def assert_same(source: Path, back: Path) -> None:
    expected, found = HFFolder(source), HFFolder(back)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, stored in expected.tensors.items():
        assert found.tensors[name].dtype == stored.dtype, name
        assert torch.equal(found.read(name), expected.read(name)), name


def _found(megatron: Path, tree: PrefixTree) -> list[list[Tensor]]:
    """For each depth and sequence: logits of the converted model, prompts shared."""
    layout = pack(tree)
    with runtime(ParallelConfig(), device="cpu", seed=9, timeout_minutes=1):
        _, chunks, _ = load_converted(megatron, ParallelConfig())
        (model,), depths = chunks.bare, chunks.config.mtp_num_layers
        setup = AttentionSetup.of(chunks.config, torch.device("cpu"))
        params = PrefixPackedSeqParams.from_layout(layout, setup)
        add_predictions(params, layout, setup, depths)
        weight = None
        if model.share_embeddings_and_output_weights:
            weight = model.shared_embedding_or_output_weight()
        row = params.own(layout.input_ids)[None], params.position_ids[None], None
        with torch.no_grad():
            model.eval()(*row, packed_seq_params=params)
            logits = [
                model.output_layer(depth.taken(), weight=weight)[0][:, 0]
                for depth in params.predictions
            ]
    return [
        [of_depth[shifted.sequence_positions(i)] for i in range(tree.num_sequences)]
        for of_depth, shifted in zip(logits, shifted_layouts(layout, depths)[1:], strict=True)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_layer_predicts_what_its_tensors_do_and_comes_back(
    name: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "hf", name)
    hf_to_megatron(source, tmp_path / "megatron", mtp=True)
    assert model_section(tmp_path / "megatron").transformer["mtp_num_layers"] == DEPTHS.get(name, 1)
    # Nothing else says that tensors are named as Qwen3.5's.
    hf_source = source if name == "qwen3_5_moe_text" else None
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", hf_source=hf_source)
    assert_same(source, tmp_path / "back")
    rng = np.random.default_rng(3)
    prompts = [(7, (4, 1, 9)), (1, (5, 6))]
    groups = [
        (rng.integers(0, 61, length), [rng.integers(0, 61, n) for n in lengths])
        for length, lengths in prompts
    ]
    tree = PrefixTree.from_groups(groups)
    sequences = [tree.sequence_tokens(i).tolist() for i in range(tree.num_sequences)]
    expected = predicted_logits(source, tmp_path, sequences)
    for depth, (of_depth, wanted) in enumerate(
        zip(_found(tmp_path / "megatron", tree), expected, strict=True)
    ):
        for sequence, (logits, theirs) in enumerate(zip(of_depth, wanted, strict=True)):
            assert logits.shape == theirs.shape
            if theirs.numel():
                error = (logits.double() - theirs).abs().max() / theirs.abs().max()
                assert error < 1e-4, (depth, sequence, float(error))


def test_a_run_trains_a_converted_layer_and_copies_follow_the_model(tmp_path: Path) -> None:
    source = write(tmp_path / "hf", "deepseek_v3", vocab_size=64)
    hf_to_megatron(source, tmp_path / "megatron", mtp=True)
    values = run_values(
        tmp_path / "run",
        records=write_records(tmp_path / "records.jsonl", good_records(2)),
        training={"steps": 1},
        output={"load": str(tmp_path / "megatron")},
    )
    values["model"] = yaml.safe_load((tmp_path / "megatron" / "model.yaml").read_text())["model"]
    served = tmp_path / "served"
    served.mkdir()
    with trainer(values) as run:
        run.run()
        weights_exporter(run.chunks, run.config.model, timeout_minutes=1)(served)
    (row,) = read_rows(tmp_path / "run")
    assert np.isfinite(row["mtp_loss"])
    megatron_to_hf(tmp_path / "run", tmp_path / "back")
    # What servers get, too.
    assert_same(served, tmp_path / "back")
    before, after = HFFolder(source), HFFolder(tmp_path / "back")
    assert before.tensors.keys() == after.tensors.keys()
    for name in ("eh_proj", "hnorm", "shared_head.norm", "self_attn.o_proj", "embed_tokens"):
        name = f"model.layers.3.{name}.weight"
        assert not torch.equal(before.read(name), after.read(name)), name
    for name, of in (
        ("embed_tokens", "model.embed_tokens"),
        ("shared_head.head", "lm_head"),
    ):
        copy = after.read(f"model.layers.3.{name}.weight")
        assert torch.equal(copy, after.read(f"{of}.weight")), name


def test_an_embedding_that_is_no_copy_is_named_and_kept_aside(tmp_path: Path) -> None:
    source = write(tmp_path / "hf", "deepseek_v3", dtype=torch.bfloat16)
    tensors = load_file(source / WEIGHTS)
    name = "model.layers.3.embed_tokens.weight"
    tensors[name] = tensors[name] + 1
    # No copy of the output layer, and so none in what comes back.
    del tensors["model.layers.3.shared_head.head.weight"]
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    reports: list[str] = []
    hf_to_megatron(source, tmp_path / "megatron", mtp=True, report=reports.append)
    assert len(reports) == 1
    assert reports[0].startswith(f"{name} differs from model.embed_tokens.weight")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "beside")
    assert_same(source, tmp_path / "beside")
    (tmp_path / "megatron" / "release").rename(tmp_path / "alone")
    megatron_to_hf(tmp_path / "alone", tmp_path / "from_source", hf_source=source)
    assert_same(source, tmp_path / "from_source")


def test_a_run_is_told_how_weights_get_such_layers(tmp_path: Path) -> None:
    source = write(tmp_path / "hf", "glm4_moe")
    hf_to_megatron(source, tmp_path / "megatron")
    section = tmp_path / "megatron" / "model.yaml"
    values = yaml.safe_load(section.read_text())
    assert "mtp_num_layers" not in values["model"]["transformer"]
    values["model"]["transformer"]["mtp_num_layers"] = 2
    section.write_text(yaml.safe_dump(values))
    with (
        runtime(ParallelConfig(), device="cpu", seed=9, timeout_minutes=1),
        pytest.raises(ValueError, match=r"no tensor mtp\.layers\.0\..* convert them with --mtp"),
    ):
        load_converted(tmp_path / "megatron", ParallelConfig())


def test_verify_converts_such_layers_where_it_is_asked_to(tmp_path: Path) -> None:
    checks = verify(write(tmp_path / "hf", "deepseek_v3"), mtp=True)
    assert all(check.ok for check in checks), report_table(checks)


@pytest.mark.parametrize(
    ("case", "count", "changes", "message"),
    [
        (CASES["qwen3"], 0, {}, r"hf: has no layers that predict .*model.layers.2; .* without"),
        (CASES[QWEN3_NEXT], 1, {}, r"gated delta net as the last layer.* is kept aside"),
        (MODELS["qwen3_next"], 2, {}, r"mtp_num_layers: 2 .* share one projection \(mtp.fc\)"),
        (MODELS["qwen3_next"], 1, {"mtp.fc.weight": None}, "no tensor mtp.fc.weight"),
        (MODELS["qwen3_next"], 1, {"mtp.layers.0.mlp.gate.weight": None}, "the last .* has none"),
        (
            MODELS["deepseek_v3"],
            1,
            {"model.layers.3.further.weight": torch.ones(1)},
            "model.layers.3.further.weight would be lost",
        ),
    ],
    ids=["none", "like the last", "several", "missing", "experts", "unknown"],
)
def test_layers_that_megatron_does_not_have_are_refused(
    case: tuple[str, dict[str, Any]],
    count: int,
    changes: dict[str, Tensor | None],
    message: str,
    tmp_path: Path,
) -> None:
    family, options = case
    source = write_model(tmp_path / "hf", family, **options)
    if count:
        add_mtp_layers(source, count)
    tensors = {**load_file(source / WEIGHTS), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=message):
        hf_to_megatron(source, tmp_path / "megatron", mtp=True)
    assert not (tmp_path / "megatron").exists()
