#!/usr/bin/env bash
# slime's own example (scripts/run-qwen3-4B.sh there) with shared prefixes: two options more.
#
#     SLIME=/root/slime MODEL=/root/Qwen3-4B DATA=/root/dapo-math-17k.jsonl bash train.sh
#
# Run it in slime's container, on a node of 8 GPUs, where Ray has been started.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
source "$SLIME/scripts/models/qwen3-4B.sh" # MODEL_ARGS

prefix_args=(
    --custom-model-provider-path slime_prefix.model_provider
    --rollout-function-path slime_prefix.generate_rollout
    # Each row ends with padding up to 128 times the tensor-parallel size otherwise.
    --data-pad-size-multiplier 1
)
rollout_args=(
    --prompt-data "$DATA" --input-key prompt --label-key label --apply-chat-template
    --rm-type deepscaler --rollout-shuffle
    --num-rollout 3000 --rollout-batch-size 32 --n-samples-per-prompt 8
    --rollout-max-response-len 8192 --rollout-temperature 1
    --global-batch-size 256
)
performance_args=(
    --tensor-model-parallel-size 2 --sequence-parallel
    --context-parallel-size 1 # others are refused
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    # Counts what runs: a prompt once, and all of its responses.
    --use-dynamic-batch-size --max-tokens-per-gpu 9216
)
training_args=(
    --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28
    --optimizer adam --lr 1e-6 --lr-decay-style constant
    --attention-dropout 0 --hidden-dropout 0 --attention-backend flash
)

ray job submit --address http://127.0.0.1:8265 \
    --runtime-env-json "{\"env_vars\": {\"PYTHONPATH\": \"/root/Megatron-LM:$here\"}}" \
    -- python3 "$SLIME/train.py" \
    --actor-num-nodes 1 --actor-num-gpus-per-node 8 --colocate \
    --hf-checkpoint "$MODEL" --ref-load "${MODEL}_torch_dist" \
    --load "${MODEL}_slime" --save "${MODEL}_slime" --save-interval 20 \
    "${MODEL_ARGS[@]}" "${prefix_args[@]}" "${rollout_args[@]}" "${performance_args[@]}" \
    "${training_args[@]}" --rollout-num-gpus-per-engine 2 --sglang-mem-fraction-static 0.7
