"""Gated delta nets over shared prefixes against every sequence alone, token after token."""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layer_spec import prefix_grouped
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import PackedLayout, PrefixTree, pack
from megatron_prefix.megatron.gated_delta_net import (
    GatedDeltaNet,
    build_without_flash_linear_attention,
)
from megatron_prefix.megatron.options import UnsupportedOptionError, refuse_unsupported
from megatron_prefix.megatron.recurrent_config import config_with_context_parallelism
from megatron_prefix.model.build import ModelChunks
from megatron_prefix.model.full_tensors import (
    full_parameters,
    load_full_parameters,
)
from tests.distributed import run_distributed
from tests.megatron.models import (
    random_groups,
    randomise,
    relative_error,
    sequence_logits,
    single_process,
    whole_gradients,
)

if GatedDeltaNet is None:
    pytest.skip("megatron-core before 0.16 has no gated delta net", allow_module_level=True)
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules

# Prompts shorter than the convolution, of one token, of several chunks; responses of one token.
SHAPES = [(70, [4, 66, 1]), (1, [5, 1]), (2, [3, 2]), (130, [1, 17, 64])]


class TokenByToken(GatedDeltaNet):
    """Megatron's layer as its equations, one token after the other."""

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        x = self.in_proj(hidden_states)[0][:, 0]
        keys, values, heads = self.qk_dim, self.v_dim, self.num_value_heads
        qkv, gate, beta, alpha = x.split([2 * keys + values, values, heads, heads], dim=-1)
        qkv = F.conv1d(
            F.pad(qkv.T[None], (self.conv_kernel_dim - 1, 0)),
            self.conv1d.weight,
            groups=qkv.shape[1],
        )[0].T
        q, k, v = self.act_fn(qkv).split([keys, keys, values], dim=-1)
        ratio = heads // self.num_key_heads
        q, k = (y.unflatten(-1, (-1, self.key_head_dim)) for y in (q, k))
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        q, k = (y.repeat_interleave(ratio, dim=1) for y in (q, k))
        v = v.unflatten(-1, (heads, -1))
        decay = (-self.A_log.exp() * F.softplus(alpha + self.dt_bias)).exp()
        state, outs = 0, []
        for t in range(len(x)):
            state = decay[t][:, None, None] * state
            known = torch.einsum("hk,hkv->hv", k[t], state) if t else torch.zeros_like(v[t])
            change = beta[t].sigmoid()[:, None] * (v[t] - known)
            state = state + k[t][:, :, None] * change[:, None]
            outs.append(torch.einsum("hk,hkv->hv", q[t], state) / self.key_head_dim**0.5)
        out = self.out_norm(torch.stack(outs)) * self.act_fn(gate.unflatten(-1, (heads, -1)))
        return self.out_proj(out.flatten(1)[:, None])


def config_of(pattern: list[int], **options: Any) -> TransformerConfig:
    defaults = {
        "num_layers": len(pattern),
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": torch.float64,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "use_cpu_initialization": True,
        "deterministic_mode": True,
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": pattern,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 6,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    return config_with_context_parallelism(TransformerConfig, **{**defaults, **options})


def block_spec(config: TransformerConfig, layer: type) -> TransformerBlockSubmodules:
    attention = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization="RMSNorm"
    )
    recurrent = copy.deepcopy(attention)
    recurrent.submodules.self_attention = ModuleSpec(
        module=layer,
        submodules=GatedDeltaNetSubmodules(
            in_proj=tensor_parallel.ColumnParallelLinear,
            out_norm=WrappedTorchNorm,
            out_proj=tensor_parallel.RowParallelLinear,
        ),
    )
    return TransformerBlockSubmodules(
        layer_specs=[
            copy.deepcopy(recurrent if kind else attention) for kind in config.linear_attention_freq
        ],
        layer_norm=WrappedTorchNorm,
    )


def build(config: TransformerConfig, *, grouped: bool) -> GPTModel:
    build_without_flash_linear_attention()
    spec = block_spec(config, GatedDeltaNet if grouped else TokenByToken)
    return GPTModel(
        config,
        prefix_grouped(spec) if grouped else spec,
        vocab_size=62,
        max_sequence_length=256,
        position_embedding_type="rope",
    )


def run(
    model: GPTModel, layout: PackedLayout, needed: np.ndarray | None = None
) -> tuple[torch.Tensor, PrefixPackedSeqParams]:
    """Logits of the output rows, and the params of the row."""
    setup = AttentionSetup.of(model.config, torch.device("cpu"))
    size = model.config.tensor_model_parallel_size
    params = PrefixPackedSeqParams.from_layout(layout, setup, needed=needed, multiple=size)
    tokens, positions = torch.from_numpy(layout.input_ids)[None], params.position_ids[None]
    return model(tokens, positions, None, packed_seq_params=params)[0], params


def assert_equal_training(
    reference: GPTModel, grouped: GPTModel, tree: PrefixTree, *, trim: bool = False
) -> None:
    layout = pack(tree, pad_to_multiple=8)
    needed = np.flatnonzero(layout.multiplicity == 1) if trim else None
    logits, params = run(grouped, layout, needed)
    place = np.full(layout.num_tokens, -1)
    place[params.output_rows] = np.arange(len(params.output_rows))
    loss = expected_loss = 0.0
    for i in range(tree.num_sequences):
        rows = place[layout.sequence_positions(i)]
        expected = sequence_logits(reference, tree.sequence_tokens(i))[torch.from_numpy(rows >= 0)]
        found = logits[rows[rows >= 0]]
        assert relative_error(found, expected) <= 1e-11
        weights = torch.randn_like(expected)
        loss = loss + (found * weights).sum()
        expected_loss = expected_loss + (expected * weights).sum()
    loss.backward()
    expected_loss.backward()
    whole = sum(float(p.grad.norm()) ** 2 for p in reference.parameters()) ** 0.5
    for (name, parameter), other in zip(
        grouped.named_parameters(), reference.parameters(), strict=True
    ):
        # Heads that forget at once have gradients near zero, which have no relative error.
        scale = max(float(other.grad.norm()), 1e-6 * whole)
        assert float((parameter.grad - other.grad).norm()) <= 1e-10 * scale, name


def pair(config: TransformerConfig, **options: Any) -> tuple[GPTModel, GPTModel]:
    reference = build(config, grouped=False)
    for name, value in options.items():
        setattr(config, name, value)
    grouped = build(config, grouped=True)
    randomise(reference)
    grouped.load_state_dict(reference.state_dict())
    return reference, grouped


PATTERNS = {"hybrid": [1, 1, 0, 1], "recurrent layers only": [1, 1], "attention last": [1, 0]}


@pytest.mark.parametrize("trim", [False, True], ids=["", "trimmed last layer"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_training_equals_every_sequence_alone(pattern: list[int], trim: bool) -> None:
    with single_process():
        reference, grouped = pair(config_of(pattern))
        tree = random_groups(np.random.default_rng(), SHAPES)
        assert_equal_training(reference, grouped, tree, trim=trim)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "full recompute"])
def test_deep_trees_with_experts(recompute: bool) -> None:
    rng = np.random.default_rng()
    stems = [rng.integers(0, 3, 90) for _ in range(3)]
    sequences = [
        np.concatenate([stems[rng.integers(3)][: rng.integers(2, 90)], rng.integers(0, 61, 5)])
        for _ in range(8)
    ]
    experts = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
    config = config_of(
        [1, 0, 1],
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        **experts,
    )
    options = {}
    if recompute:
        options = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    with single_process():
        reference, grouped = pair(config, **options)
        assert_equal_training(reference, grouped, PrefixTree.from_sequences(sequences))


def test_what_is_kept_for_backward_does_not_grow_with_the_branches() -> None:
    """Beyond the rows: equally many tokens in one response and in 30 keep as much."""
    rng = np.random.default_rng()
    kept = []
    for lengths in ([240], [8] * 30):
        layout = pack(random_groups(rng, [(128, lengths)], vocab_size=61), pad_to=400)
        sizes: dict[int, int] = {}

        def note(x: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            storage = x.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return x

        with single_process():
            grouped = build(config_of([1]), grouped=True)
            with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
                run(grouped, layout)
        kept.append(sum(sizes.values()))
    assert kept[1] <= 1.01 * kept[0]


def _l2norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def test_megatrons_own_forward_agrees_within_its_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    with single_process():
        _, grouped = pair(config_of([1]))
        layer = grouped.decoder.layers[0].self_attention
        layout = pack(random_groups(np.random.default_rng(), [(40, [30])]))
        hidden = torch.randn(layout.num_tokens, 1, 32, dtype=torch.float64)
        setup = AttentionSetup.of(grouped.config, torch.device("cpu"))
        params = PrefixPackedSeqParams.from_layout(layout, setup)
        # In place of flash-linear-attention's, which Megatron's layer calls.
        for base in GatedDeltaNet.__mro__:
            home = sys.modules[base.__module__]
            if hasattr(home, "HAVE_FLA"):
                monkeypatch.setattr(home, "l2norm", _l2norm, raising=False)
        expected, _ = layer(hidden, None)
        found, _ = layer(hidden, None, packed_seq_params=params)
        assert relative_error(found, expected) <= 1e-5


def _train(parallel: ParallelConfig, layout: PackedLayout, parameters: Any) -> tuple[Any, Any]:
    """Whole parameters, and whole gradients of a fixed loss, on rank 0."""
    with runtime(parallel, device="cpu", seed=3, timeout_minutes=2, float64=True):
        config = config_of(
            [1, 0],
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            sequence_parallel=parallel.uses_sequence_parallel,
        )
        model = build(config, grouped=True)
        chunks = ModelChunks(wrapped=[], bare=[model], config=config, head=None)
        if parameters is not None:
            load_full_parameters(chunks, parameters)
        logits, params = run(model, layout)
        return full_parameters(chunks), whole_gradients(chunks, logits, params, layout)


def _on_ranks(rank: int, world_size: int, *inputs: Any) -> Any:
    return _train(*inputs)[1]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_ranks_have_heads_of_their_own(sequence_parallel: bool) -> None:
    layout = pack(random_groups(np.random.default_rng(7), SHAPES), pad_to_multiple=4)
    parameters, expected = _train(ParallelConfig(), layout, None)
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    inputs = (parallel, layout, parameters)
    gradients = run_distributed(_on_ranks, 2, *inputs, init_process_group=False)[0]
    for name, gradient in expected.items():
        assert relative_error(gradients[name], gradient) <= 1e-10, name


def test_what_is_not_there_yet_is_refused_by_name() -> None:
    config = config_of([1, 0], context_parallel_size=4, cp_comm_type=["a2a", "p2p"])
    with pytest.raises(UnsupportedOptionError, match=r"linear_num_key_heads=2 to be a multiple"):
        refuse_unsupported(config)
    config.cp_comm_type = ["p2p", "a2a"]
    with pytest.raises(UnsupportedOptionError, match=r"num_query_groups=2 to be a multiple"):
        refuse_unsupported(config)
    config.context_parallel_size, config.experimental_attention_variant = 1, "dsa"
    with pytest.raises(UnsupportedOptionError, match=r"only softmax attention and gated delta"):
        refuse_unsupported(config)
