#!/usr/bin/env bash
# Make the tests' virtual environment once and print its folder.
#
#   bash tests/environment.sh                            the newest megatron-core that Python allows
#   MEGATRON_CORE=0.15.3 bash tests/environment.sh       another release
#   TORCH=2.9.1 PYTHON=python3.12 bash tests/environment.sh
#   VERL=0.9.1 bash tests/environment.sh                 one for tests/integrations/verl alone
#
# Environments share their files: one of another release is the newest's in hard links, with what
# differs installed over it.
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
stem=$PWD/.venv-tests/$("$python" -c 'import sys; print("py%d.%d" % sys.version_info[:2])')-torch$torch
# Made anew when what it holds would be another.
contents=$(cksum < setup.py)

is_complete() { # is_complete ENVIRONMENT
    [[ $(cat "$1/complete" 2> /dev/null) == "$contents" ]]
}

install() { # install ENVIRONMENT ARGUMENTS...: arguments go to pip
    local environment=$1
    shift
    # Modules are compiled when they are imported first, and most never are.
    "$environment/bin/pip" install --quiet --no-compile "$@" >&2
}

linked() { # linked FROM TO: a copy whose files are hard links, and whose commands run its own Python
    rm -rf "$2"
    "$python" - "$1" "$2" << 'PYTHON'
import os
import shutil
import sys
from pathlib import Path

source, copy = sys.argv[1:]
shutil.copytree(source, copy, symlinks=True, copy_function=os.link)
(Path(copy) / "complete").unlink()
for command in [*(Path(copy) / "bin").iterdir(), Path(copy) / "pyvenv.cfg"]:
    if command.is_symlink() or source.encode() not in (text := command.read_bytes()):
        continue
    mode = command.stat().st_mode
    command.unlink()  # the file of the other environment stays as it is
    command.write_bytes(text.replace(source.encode(), copy.encode()))
    command.chmod(mode)
PYTHON
}

make_torch() { # torch first: what depends on it would otherwise bring in another build
    rm -rf "$stem"
    "$python" -m venv "$stem"
    install "$stem" "torch==$torch"
}

make_newest() {
    need torch "$stem"
    linked "$stem" "$1"
    install "$1" --editable ".[dev]"
}

make_release() {
    need newest "$stem-megatron-newest"
    linked "$stem-megatron-newest" "$1"
    if "$python" -c "
import sys
release = tuple(map(int, '$megatron'.split('.')[:2]))
sys.exit(release >= (0, 17) and sys.version_info < (3, 12))"; then
        install "$1" "megatron-core==$megatron" --editable ".[dev]"
    else
        install "$1" --no-deps --ignore-requires-python "megatron-core==$megatron"
    fi
}

make_verl() {
    need torch "$stem"
    linked "$stem" "$1"
    # The last three: verl's trainer imports them and verl does not name them.
    install "$1" "megatron-core==$megatron" "verl==$verl" "TransferQueue>=0.1.10" \
        --editable ".[train]" pytest pytest-timeout hypothesis cachetools fastapi uvicorn
    # Its own requirements would bring in another torch.
    install "$1" --no-deps mbridge==0.15.1 einops
}

need() { # need KIND ENVIRONMENT: make it unless it is complete
    is_complete "$2" && return
    "make_$1" "$2"
    echo "$contents" > "$2/complete"
}

environment=$stem-megatron-$megatron${verl:+-verl-$verl}
if [[ -n $verl ]]; then
    need verl "$environment"
elif [[ $megatron == newest ]]; then
    need newest "$environment"
else
    need release "$environment"
fi
echo "$environment"
