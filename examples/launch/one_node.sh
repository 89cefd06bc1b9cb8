#!/usr/bin/env bash
# Train on the accelerators of one machine.
#
#   PROCESSES=8 RESTARTS=3 bash examples/launch/one_node.sh run.yaml [section.key=value ...]
#
#   PROCESSES   ranks, one for each GPU
#   RESTARTS    how often all ranks are started again, from the last checkpoint, when one has died
set -euo pipefail
: "${PROCESSES:?ranks on this machine, one for each GPU}"
: "${RESTARTS:?how often to start again when a rank has died; 0 for never}"
: "${1:?usage: one_node.sh run.yaml [section.key=value ...]}"

LAUNCH_ARGS=(
    --standalone # on this machine alone, at a free port
    --nproc-per-node "$PROCESSES"
    --max-restarts "$RESTARTS"
)
TRAIN_ARGS=(-m megatron_prefix.training "$@")

# SIGUSR1 is for the ranks, which save and end; without this it would end torchrun.
trap '' USR1
# torchrun passes SIGTERM on and kills after so many seconds: as long as saving may take.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

exec torchrun "${LAUNCH_ARGS[@]}" "${TRAIN_ARGS[@]}"
