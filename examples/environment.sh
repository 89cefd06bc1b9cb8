#!/usr/bin/env bash
# Make an example's virtual environment once and print the folder of its commands.
#
#   bash examples/environment.sh quickstart train
#   bash examples/environment.sh NAME EXTRAS [PACKAGE ...]     .venv-NAME; extras of megatron-prefix
#
# Needs Python 3.10 or newer and a package index, which gives the newest megatron-core for the
# Python unless MEGATRON_CORE names a release. TORCH and PYTHON name others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=$1 extras=$2
shift 2
python=${PYTHON:-python3.11}
command -v "$python" > /dev/null || python=python3
megatron=megatron-core${MEGATRON_CORE:+==$MEGATRON_CORE}
torch=${TORCH:-2.13.0}
venv=.venv-$name
installed="$("$python" --version), torch $torch, $megatron"

if [[ $(cat "$venv/complete" 2> /dev/null) != "$installed" ]]; then
    echo "Installing into $venv: $installed" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    # torch first: what depends on it would otherwise bring in another build.
    "$venv/bin/pip" install --quiet "torch==$torch" >&2
    "$venv/bin/pip" install --quiet "$megatron" --editable ".[$extras]" "$@" >&2
    echo "$installed" > "$venv/complete"
fi
echo "$PWD/$venv/bin"
