#!/usr/bin/env bash
# Make the tests' virtual environment once and print its folder.
#
#   bash tests/environment.sh                            the newest megatron-core that Python allows
#   MEGATRON_CORE=0.15.3 bash tests/environment.sh       another release
#   TORCH=2.9.1 PYTHON=python3.12 bash tests/environment.sh
#   VERL=0.9.1 bash tests/environment.sh                 one for tests/integrations/verl alone
#
# megatron-core 0.17 and newer ask for Python 3.12. Tests of them on an older Python install the
# wheel all the same, without its dependencies, and they pass there. Users should not do this: the
# package index gives each Python the newest release that supports it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3.11}
command -v "$python" > /dev/null || python=python3
torch=${TORCH:-2.13.0}
megatron=${MEGATRON_CORE:-newest}
verl=${VERL:-}
# mbridge, the bridge of verl that works without a GPU, is for releases up to this one.
[[ -z $verl ]] || megatron=0.16.1
venv=.venv-tests/$("$python" -c 'import sys; print("py%d.%d" % sys.version_info[:2])')-torch$torch-megatron-$megatron${verl:+-verl-$verl}
# Made anew when what it holds would be another.
contents=$(cksum < setup.py)

if [[ $(cat "$venv/complete" 2> /dev/null) != "$contents" ]]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    # Modules are compiled when they are imported first, and most never are.
    pip=("$venv/bin/pip" install --quiet --no-compile)
    # torch first: what depends on it would otherwise bring in another build.
    "${pip[@]}" "torch==$torch" >&2
    if [[ -n $verl ]]; then
        # The last three: verl's trainer imports them and verl does not name them.
        "${pip[@]}" "megatron-core==$megatron" "verl==$verl" "TransferQueue>=0.1.10" \
            --editable ".[train]" pytest pytest-timeout hypothesis cachetools fastapi uvicorn >&2
        # Its own requirements would bring in another torch.
        "${pip[@]}" --no-deps mbridge==0.15.1 einops >&2
    elif [[ $megatron == newest ]]; then
        "${pip[@]}" --editable ".[dev]" >&2
    elif "$venv/bin/python" -c "
import sys
release = tuple(map(int, '$megatron'.split('.')[:2]))
sys.exit(release >= (0, 17) and sys.version_info < (3, 12))"; then
        "${pip[@]}" "megatron-core==$megatron" --editable ".[dev]" >&2
    else
        "${pip[@]}" --editable ".[dev]" >&2
        "${pip[@]}" --no-deps --ignore-requires-python "megatron-core==$megatron" >&2
    fi
    echo "$contents" > "$venv/complete"
fi
echo "$venv"
