#!/usr/bin/env bash
# Runs the tests on several releases of torch, each in an environment of its own, and prints a table.
#
#     bash launch/torch_versions.sh                                   # 2.7.1, 2.9.1, 2.11.0, 2.13.0 and the newest
#     bash launch/torch_versions.sh 2.7.1@python3.10 newest@python3.13
#     bash launch/torch_versions.sh 2.7.1 newest -- -n 1 tests/test_chain.py
#
# A release is a version or "newest", and where wanted @ and the Python to make its environment with (python3 otherwise).
# What follows -- goes to pytest; without it all tests run, on as many processes as there are cores.
#
#     --index URL       take torch from there. pip's own index has CUDA builds for Linux, of several GB each; torch's
#                       page "Get started" names an index of CPU builds
#     --folder FOLDER   where the environments are made and kept, with a log beside each: FOLDER/torch-2.7.1, or
#                       FOLDER/torch-2.7.1-python3.10 for 2.7.1@python3.10 (default .venv-torch). A build of torch that
#                       is in such an environment already is kept if it is that release
#     --delete          delete each environment after its run, where disk is short
#     --offline         install nothing: each environment is there, with all that its tests need
#
# A package that cannot be installed beside a release is left out; the tests that need it are skipped, and say so.
# Exits with 1 if a test of any release failed, or a release could not be installed; the others run all the same.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'launch/torch_versions.sh: %s\n' "$*" >&2; }

folder=.venv-torch index='' delete='' offline='' releases=()
while [ $# -gt 0 ]; do
    case $1 in
        --index | --folder)
            [ $# -ge 2 ] || { say "$1 needs a value"; exit 2; }
            if [ "$1" = --index ]; then index=$2; else folder=$2; fi
            shift
            ;;
        --delete) delete=yes ;;
        --offline) offline=yes ;;
        --) shift; break ;;
        -*) say "there is no option $1; the top of this file lists them"; exit 2 ;;
        *) releases+=("$1") ;;
    esac
    shift
done
[ ${#releases[@]} -gt 0 ] || releases=(2.7.1 2.9.1 2.11.0 2.13.0 newest)
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

environment_of() { printf '%s/torch-%s' "$folder" "$(printf '%s' "$1" | tr '@/' '-_')"; } # RELEASE

# Makes the environment at VIRTUAL_ENV, which is the active one, where it is not there yet.
install() { # VERSION PYTHON
    local extras=tests,demo,recipes wanted=torch need
    [ "$1" = newest ] || wanted="torch==$1"
    "$VIRTUAL_ENV/bin/python" -m pip --version || "$2" -m venv --clear "$VIRTUAL_ENV" || return 1
    # --upgrade, since the newest release may have been an older one when the environment was made.
    python -m pip install --quiet --upgrade "$wanted" ${index:+--index-url "$index"} || return 1
    # With the pins, in one go, as launch/test.sh does it.
    # shellcheck source=launch/environment.sh
    source launch/environment.sh "$extras" && return 0

    say "torch $1 does not go with all of that; now one package at a time"
    _distwd_constraints "$PWD" >"$VIRTUAL_ENV/pins.txt"
    python -m pip install --quiet -e . -c "$VIRTUAL_ENV/pins.txt" || return 1
    python - "$extras" <<'PYTHON' >"$VIRTUAL_ENV/needs.txt"
import re, sys
from importlib.metadata import requires

extras = "|".join(sys.argv[1].split(","))
for line in requires("distwd") or []:
    if found := re.fullmatch(rf"(.+?) *; *extra *== *['\"]({extras})['\"]", line):
        print(found[1])
PYTHON
    while read -r need; do
        python -m pip install --quiet "$need" -c "$VIRTUAL_ENV/pins.txt" || say "left out: $need"
    done <"$VIRTUAL_ENV/needs.txt"
    python -m pip install --quiet --no-deps timm -c "$VIRTUAL_ENV/pins.txt" || say "left out: timm"
}

# Runs the tests on one release; prints its row of the table.
run_release() ( # RELEASE PYTEST_ARGUMENT...
    release=$1 version=${1%%@*} python=python3 status=0
    case $1 in *@*) python=${1#*@} ;; esac
    shift
    # Found before the environment's own comes first: that one may be broken.
    python=$(command -v "$python" || printf '%s' "$python")
    VIRTUAL_ENV=$(environment_of "$release")
    log=$VIRTUAL_ENV.log results=$VIRTUAL_ENV.xml
    export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    : >"$log"
    if [ -z "$offline" ] && ! install "$version" "$python" >>"$log" 2>&1; then
        printf '| %s | could not be installed, see %s | | | | | |\n' "$version" "$log"
        exit 1
    fi
    rm -f "$results"
    "$VIRTUAL_ENV/bin/python" -m pytest -n auto --dist loadfile --junitxml "$results" "$@" >>"$log" 2>&1 || status=$?
    if [ ! -f "$results" ]; then
        printf '| %s | the tests did not run, see %s | | | | | |\n' "$version" "$log"
        exit 1
    fi
    "$VIRTUAL_ENV/bin/python" - "$results" <<'PYTHON'
import datetime, platform, sys
from importlib.metadata import version
from xml.etree import ElementTree

suite = ElementTree.parse(sys.argv[1]).getroot().find("testsuite")
tests, skipped, failures, errors = (int(suite.get(key)) for key in ("tests", "skipped", "failures", "errors"))
failed, minutes = failures + errors, f"{float(suite.get('time')) / 60:.1f}"
made = [version("torch"), platform.python_version(), datetime.date.today()]
print("|", *(f"{cell} |" for cell in [*made, tests - skipped - failed, skipped, failed, minutes]))
PYTHON
    # It may be that nothing failed, but nothing ran either.
    [ "$status" = 0 ] || say "torch $version: pytest ended with exit status $status, see $log"
    exit "$status"
)

printf '| torch | Python | date | passed | skipped | failed | minutes |\n|---|---|---|---|---|---|---|\n'
failed=''
for release in "${releases[@]}"; do
    run_release "$release" "$@" || failed=yes
    if [ -n "$delete" ]; then rm -rf "$(environment_of "$release")"; fi
done
[ -z "$failed" ]
