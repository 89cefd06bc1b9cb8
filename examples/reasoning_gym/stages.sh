#!/usr/bin/env bash
# The stages of the example, with the python and torchrun on the PATH. They write to
# outputs/reasoning_gym/ of the current folder; a model that is there already is taken as it is.
#
#   bash examples/reasoning_gym/stages.sh [section.key=value ...]    overrides of grpo.yaml
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
output=outputs/reasoning_gym

# Two processes share the cores; more threads each would only get in the way.
export OMP_NUM_THREADS=1
# Megatron and torch warn about each other's deprecated calls.
export PYTHONWARNINGS=ignore
if [[ $(uname) == Linux ]]; then
    # Otherwise gloo looks up the host's name, which need not resolve.
    export GLOO_SOCKET_IFNAME=lo
fi

LAUNCH_ARGS=(
    --standalone # on this machine alone, at a free port
    --nproc-per-node 2
)

stage() { printf '\n== %s\n' "$*" >&2; }

if [[ ! -e $output/megatron/model.yaml ]]; then
    stage "1/3 The model: from GGUF to a Hugging Face folder, then to a Megatron checkpoint"
    rm -rf "$output/model" "$output/megatron"
    python "$here/get_model.py" "$output/model"
    python "$here/../../tools/convert_checkpoint.py" hf-to-megatron \
        "$output/model" "$output/megatron"
fi

stage "2/3 GRPO, and evaluation before and after it, pipeline parallel (PP 2)"
torchrun "${LAUNCH_ARGS[@]}" -m megatron_prefix.training "$here/grpo.yaml" \
    output.resume=false "$@"

stage "3/3 Report"
exec python "$here/report.py" "$output/grpo/evaluations.jsonl"
