#!/usr/bin/env bash
# Runs the tests, on as many processes as there are cores. Arguments go to pytest:
#
#     bash launch/test.sh                         # everything
#     bash launch/test.sh -k law tests/laws       # some of it
#
# Makes the environment first where none is active (launch/environment.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
# launch/train.py and launch/recipes are tested too.
source launch/environment.sh tests,demo,recipes

# The tests start several ranks each. With more than one thread a rank, they only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A file stays in one process: its ranks are started once, and runs that its tests share are kept.
exec python -m pytest -n auto --dist loadfile "$@"
