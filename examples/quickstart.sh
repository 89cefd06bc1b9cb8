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

python=${PYTHON:-python3.11}
command -v "$python" > /dev/null || python=python3
megatron=megatron-core${MEGATRON_CORE:+==$MEGATRON_CORE}
torch=${TORCH:-2.13.0}
venv=.venv-quickstart
installed="$("$python" --version), torch $torch, $megatron"

if [[ $(cat "$venv/complete" 2> /dev/null) != "$installed" ]]; then
    echo "Installing into $venv: $installed" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    # torch first: what depends on it would otherwise bring in another build.
    "$venv/bin/pip" install --quiet "torch==$torch"
    "$venv/bin/pip" install --quiet "$megatron" --editable ".[train]"
    echo "$installed" > "$venv/complete"
fi

PATH=$PWD/$venv/bin:$PATH exec bash examples/quickstart/stages.sh "$@"
