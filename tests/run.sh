#!/usr/bin/env bash
# Set up what the tests need and run all of them on the CPU.
#
#   bash tests/run.sh                          everything, on the newest megatron-core for Python
#   bash tests/run.sh tests/layout -k tree     arguments go to pytest
#   MEGATRON_CORE=0.15.3 bash tests/run.sh     another release
#   TEST_PROCESSES=0 bash tests/run.sh         in one process, for a debugger
#   SURVIVAL=long bash tests/run.sh            20 kills under a real torchrun, not 1
#   TORCH=2.9.1 PYTHON=python3.12 bash tests/run.sh
#   VERL=0.9.1 bash tests/run.sh               tests/integrations/verl, where verl is
#
# The environment is made once per combination, in .venv-tests/ (tests/environment.sh). verl asks for
# packages of its own, hence for an environment: without arguments its tests run behind all others
# on the newest megatron-core, and by themselves with VERL.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$(bash tests/environment.sh)

# Two processes of a test share the machine's cores; more threads each would only get in the way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ -n ${VERL:-} ]]; then
    exec "$venv/bin/python" -m pytest --durations=5 "${@:-tests/integrations/verl}"
fi
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
# Files run side by side: tests that start processes wait a good part of their time.
# The 15 slowest are listed: what starts processes of its own is most of the time.
"$venv/bin/python" -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile --durations=15 \
    "${@:-tests}"
if (( $# == 0 )) && [[ -z ${MEGATRON_CORE:-} ]]; then
    VERL=0.9.1 bash tests/run.sh
fi
