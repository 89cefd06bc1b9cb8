"""Add shared prefixes to a GPTModel that you build yourself, and see that only the time changes.

    python examples/add_to_a_model.py
    torchrun --nproc-per-node 2 examples/add_to_a_model.py       tensor parallel over 2 processes

It runs on the CPU in a few seconds. Two models of the same weights see the same two groups: the one
with shared prefixes as a single packed row, Megatron-Core's own one sequence at a time, with the
prompt in each. The largest differences of their log-probabilities and gradients are printed; the
exit status is 1 if one is above rounding. The lines marked CPU are the ones to leave out on a GPU.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.megatron.known_messages import hide_known_messages

hide_known_messages()  # what Megatron says of itself at import; leave it out to see it

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from megatron_prefix import (  # noqa: E402
    AttentionSetup,
    PrefixPackedSeqParams,
    PrefixTree,
    enable_cpu_device,
    pack,
    prefix_grouped,
)

DTYPE = torch.float64  # so that equal means equal: train in bfloat16
DEVICE = torch.device("cpu")  # CPU; torch.device("cuda", local_rank) on a GPU
VOCAB_SIZE, MAX_SEQUENCE_LENGTH = 64, 32
ROUNDING = 1e-10

# Two groups: a prompt and its responses (token ids), with the advantage of each response.
GROUPS = [
    ([5, 17, 8, 1], [[3, 9, 2], [4, 4], [3, 9, 7, 6]]),
    ([30, 31, 32, 33, 34, 35], [[40, 41], [42, 43, 44]]),
]
ADVANTAGES = [1.0, -0.5, -0.5, 0.7, -0.7]


def main() -> int:
    """Compare the two models; the exit status."""
    start()
    tensor_parallel_size = parallel_state.get_tensor_model_parallel_world_size()
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        # Shared prefixes refuse dropout: a prompt has one mask where copies of it would have many.
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=tensor_parallel_size,
        params_dtype=DTYPE,
        use_cpu_initialization=True,  # CPU
    )
    shared, plain = build(config, shared_prefixes=True), build(config, shared_prefixes=False)
    shared.load_state_dict(plain.state_dict())  # names and shapes are the same

    found, packed_tokens = log_probs_of_packed_row(shared)
    expected = log_probs_of_sequences(plain)
    loss(found).backward()
    loss(expected).backward()

    worst_log_prob = max(
        float((a - b).detach().abs().max()) for a, b in zip(found, expected, strict=True)
    )
    worst_gradient = max(
        float((a.grad - b.grad).abs().max())
        for a, b in zip(shared.parameters(), plain.parameters(), strict=True)
    )
    worst = torch.tensor([worst_log_prob, worst_gradient])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        repeated = sum(len(prompt) + len(r) - 1 for prompt, rs in GROUPS for r in rs)
        print(f"processes (tensor parallel): {tensor_parallel_size}")
        print(f"tokens computed: {packed_tokens} packed, {repeated} with the prompts repeated")
        print(f"largest difference of log-probabilities: {worst[0]:.1e}")
        print(f"largest difference of gradients:         {worst[1]:.1e}")
    dist.destroy_process_group()
    return int(bool((worst > ROUNDING).any()))


def start() -> None:
    """Process groups and seeds, as in any program around Megatron-Core."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)  # torchrun has set them
    os.environ.setdefault("MASTER_PORT", "0")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's advice for its overlap
    enable_cpu_device(float64=True)  # CPU
    torch.set_default_dtype(DTYPE)
    dist.init_process_group("gloo")  # CPU; "nccl" on a GPU
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)


def build(config: TransformerConfig, *, shared_prefixes: bool) -> GPTModel:
    """The model. The spec is the only thing that differs."""
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)  # CPU: True on a GPU
    if shared_prefixes:
        spec = prefix_grouped(spec)
    return GPTModel(
        config,
        spec,
        vocab_size=VOCAB_SIZE,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        position_embedding_type="rope",
    )


def log_probs_of_packed_row(model: GPTModel) -> tuple[list[Tensor], int]:
    """Log-probabilities of every response, from one forward of one packed row, and its length.

    The row holds the prompts first, then all responses. A row predicts `layout.labels` of itself.
    A prompt's last token predicts the first token of each of its responses; it is an input of every
    response, and not of the prompt. For the first group of GROUPS, alone, the row would be

        inputs     5  17   8 |  1   3   9 |  1   4 |  1   3   9   7
        labels    17   8   1 |  3   9   2 |  4   4 |  3   9   7   6
        positions  0   1   2 |  3   4   5 |  3   4 |  3   4   5   6

    `layout.sequence_positions(i)` are the rows that predict tokens 1, 2, ... of sequence i, where
    sequences are counted over all groups in order.
    """
    # With sequence parallelism the row's length must be a multiple of the tensor-parallel size.
    multiple = 1
    if model.config.sequence_parallel:
        multiple = model.config.tensor_model_parallel_size
    layout = pack(PrefixTree.from_groups(GROUPS), pad_to_multiple=multiple)

    def row(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values)[None].to(DEVICE)  # [1, T]

    log_probs = model_log_probs(
        model,
        row(layout.input_ids),
        row(layout.position_ids),
        row(layout.labels),
        PrefixPackedSeqParams.from_layout(layout, AttentionSetup.of(model.config, DEVICE)),
    )
    responses = [response for _, responses in GROUPS for response in responses]
    of_responses = [
        log_probs[layout.sequence_positions(i)[-len(response) :]]
        for i, response in enumerate(responses)
    ]
    return of_responses, layout.num_tokens


def log_probs_of_sequences(model: GPTModel) -> list[Tensor]:
    """The same from an unmodified model: each response with its prompt, one after the other."""
    found = []
    for prompt, responses in GROUPS:
        for response in responses:
            tokens = torch.tensor([[*prompt, *response]], device=DEVICE)
            inputs, labels = tokens[:, :-1], tokens[:, 1:]
            positions = torch.arange(inputs.shape[1], device=DEVICE)[None]
            found.append(model_log_probs(model, inputs, positions, labels)[-len(response) :])
    return found


def model_log_probs(
    model: GPTModel,
    input_ids: Tensor,
    position_ids: Tensor,
    labels: Tensor,
    packed_seq_params: PrefixPackedSeqParams | None = None,
) -> Tensor:
    """[T] log-probability of each row's label, whole on every tensor-parallel rank.

    Given labels, GPTModel returns cross entropies. They come from logits that are split over the
    vocabulary between tensor-parallel ranks, and from which Megatron needs two small all-reduces.
    For a large vocabulary `megatron_prefix.vocab_parallel_log_probs` takes hidden states and the
    output layer's weight instead, and never holds all logits at once.
    """
    cross_entropies = model(
        input_ids,
        position_ids,
        attention_mask=None,
        labels=labels,
        packed_seq_params=packed_seq_params,
    )
    return -cross_entropies[0]


def loss(log_probs: list[Tensor]) -> Tensor:
    """GRPO's policy gradient on samples of the current policy: the mean over responses of the mean
    over tokens. A response's weight does not depend on how the batch was packed or split."""
    terms = [-a * of_response.mean() for a, of_response in zip(ADVANTAGES, log_probs, strict=True)]
    return torch.stack(terms).mean()


if __name__ == "__main__":
    sys.exit(main())
