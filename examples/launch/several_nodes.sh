#!/usr/bin/env bash
# Train on several machines. Run it on each of them; only NODE_RANK and NODE_ADDRESS differ.
#
#   NODES=2 NODE_RANK=0 NODE_ADDRESS=10.0.0.1 HEAD_ADDRESS=10.0.0.1 HEAD_PORT=29500 \
#   PROCESSES=8 INTERFACE=eth0 RENDEZVOUS=c10d RESTARTS=3 RUN_ID=first \
#       bash examples/launch/several_nodes.sh run.yaml [section.key=value ...]
#
#   NODES          machines
#   NODE_RANK      this machine's number, from 0; 0 is the head
#   NODE_ADDRESS   this machine's address, as the others reach it
#   HEAD_ADDRESS   the head's address, and a free port there (HEAD_PORT)
#   PROCESSES      ranks on each machine, one for each GPU
#   INTERFACE      the network interface of NODE_ADDRESS, for gloo and NCCL
#   RENDEZVOUS     c10d: machines find each other at the head, and all of them start their ranks
#                  again when one rank has died; static: they are numbered by NODE_RANK, and a dead
#                  rank ends the run on all machines
#   RESTARTS       how often ranks are started again (c10d)
#   RUN_ID         a name that tells this run from others at the same head
#
# Tensor parallelism belongs inside a machine; ranks are numbered machine by machine, so the
# tensor-parallel size has to divide PROCESSES. checkpoints/ must be on a file system that all
# machines share.
set -euo pipefail
: "${NODES:?machines}"
: "${NODE_RANK:?number of this machine, from 0}"
: "${NODE_ADDRESS:?address of this machine, as the others reach it}"
: "${HEAD_ADDRESS:?address of machine 0}"
: "${HEAD_PORT:?a free port of machine 0}"
: "${PROCESSES:?ranks on each machine, one for each GPU}"
: "${INTERFACE:?network interface of NODE_ADDRESS, such as eth0}"
: "${RENDEZVOUS:?c10d or static}"
: "${RESTARTS:?how often to start again when a rank has died; 0 for never}"
: "${RUN_ID:?a name of the run}"
: "${1:?usage: several_nodes.sh run.yaml [section.key=value ...]}"

LAUNCH_ARGS=(
    --nnodes "$NODES"
    --nproc-per-node "$PROCESSES"
)
case $RENDEZVOUS in
    c10d)
        is_head=0
        if [[ $NODE_RANK == 0 ]]; then is_head=1; fi
        LAUNCH_ARGS+=(
            --rdzv-backend c10d
            --rdzv-endpoint "$HEAD_ADDRESS:$HEAD_PORT"
            --rdzv-id "$RUN_ID"
            --rdzv-conf "is_host=$is_head" # do not guess from the machine's name
            --local-addr "$NODE_ADDRESS"
            --max-restarts "$RESTARTS"
        )
        ;;
    static)
        LAUNCH_ARGS+=(
            --node-rank "$NODE_RANK"
            --master-addr "$HEAD_ADDRESS"
            --master-port "$HEAD_PORT"
            --max-restarts 0
        )
        ;;
    *)
        echo "error: RENDEZVOUS: $RENDEZVOUS is neither c10d nor static" >&2
        exit 2
        ;;
esac
TRAIN_ARGS=(-m megatron_prefix.training "$@")

# A new store whenever ranks are started again: torchrun's own still holds what the killed ones said.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export GLOO_SOCKET_IFNAME=$INTERFACE
export NCCL_SOCKET_IFNAME=$INTERFACE
# SIGUSR1 is for the ranks, which save and end; without this it would end torchrun.
trap '' USR1
# torchrun passes SIGTERM on and kills after so many seconds: as long as saving may take.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

exec torchrun "${LAUNCH_ARGS[@]}" "${TRAIN_ARGS[@]}"
