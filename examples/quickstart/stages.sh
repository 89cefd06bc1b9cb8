#!/usr/bin/env bash
# The stages of the quickstart, with the python and torchrun on the PATH. They write to
# outputs/quickstart/ of the current folder, which is emptied first.
#
#   bash examples/quickstart/stages.sh [section.key=value ...]    overrides of both configurations
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
output=outputs/quickstart
overrides=("$@")

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
TRAIN_ARGS=(-m megatron_prefix.training)
COMPARE_ARGS=(--batches 3 --repeats 5 --output "$output/compare.json")
REPORT_ARGS=(
    --metrics "$output/grpo/metrics.jsonl"
    --compare "$output/compare.json"
    --plot "$output/grpo/reward.png"
)

stage() { printf '\n== %s\n' "$*" >&2; }

rm -rf "$output"

stage "Data: digits to sort, after ten worked examples"
python "$here/make_data.py" "$output/data"

stage "1/4 Supervised warm start, tensor parallel (TP 2, sequence parallel)"
torchrun "${LAUNCH_ARGS[@]}" "${TRAIN_ARGS[@]}" "$here/warm_start.yaml" "${overrides[@]}"

stage "2/4 GRPO and evaluation before and after it, pipeline parallel (PP 2)"
torchrun "${LAUNCH_ARGS[@]}" "${TRAIN_ARGS[@]}" "$here/grpo.yaml" "${overrides[@]}"

stage "3/4 Grouped against ungrouped steps on the same batches (PP 2)"
torchrun "${LAUNCH_ARGS[@]}" "$here/compare.py" "${COMPARE_ARGS[@]}" "$here/grpo.yaml" \
    "${overrides[@]}"

stage "4/4 Report"
exec python "$here/report.py" "${REPORT_ARGS[@]}" "$here/grpo.yaml"
