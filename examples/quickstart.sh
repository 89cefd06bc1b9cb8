#!/usr/bin/env bash
# A small model learns by GRPO from nothing, on the CPU, with each group's prompt computed once.
#
#   bash examples/quickstart.sh
#   bash examples/quickstart.sh training.seed=7        overrides of both training configurations
#   TORCH=2.9.1 MEGATRON_CORE=0.15.3 PYTHON=python3.12 bash examples/quickstart.sh
#
# Needs Python 3.10 or newer and a package index, which gives the newest megatron-core for the
# Python unless MEGATRON_CORE names a release. Makes .venv-quickstart/ once, then runs
# examples/quickstart/stages.sh, which writes to outputs/quickstart/ and begins anew every time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

commands=$(bash examples/environment.sh quickstart train)
PATH=$commands:$PATH exec bash examples/quickstart/stages.sh "$@"
