# shellcheck shell=bash disable=SC1091
# Makes sure that distwd and what the named extras need are installed, in an environment that is active afterwards.
#
#     source launch/environment.sh tests          # or demo, docs, lint, or several: lint,docs
#
# An active virtual environment (or a conda one other than base) is used as it is, and keeps the torch it has.
# Otherwise `.venv` at the repository root is used, and made first if need be.
# This file is sourced, so it changes no shell options, returns instead of exiting, and names its functions _distwd_*.

_distwd_say() { printf 'launch/environment.sh: %s\n' "$*" >&2; }

# The first Python on the PATH that is new enough. A pyenv shim can be there and still not run, so each is tried.
_distwd_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    if command -v python3 >/dev/null 2>&1; then
        _distwd_say "distwd needs Python 3.10 or newer; python3 here is $(python3 -V 2>&1). Install a newer one and try again."
    else
        _distwd_say "python3 is not on the PATH. Install Python 3.10 or newer and try again."
    fi
    return 1
}

_distwd_make_venv() {
    local root=$1 python
    python=$(_distwd_python) || return 1
    if ! "$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then
        _distwd_say "$python cannot make virtual environments: its venv or ensurepip module is missing." \
            "On Debian and Ubuntu: apt install python3-venv. Or activate an environment of your own first."
        return 1
    fi
    _distwd_say "making $root/.venv with $("$python" -V 2>&1)"
    # --clear: what an interrupted attempt left is not to be trusted.
    "$python" -m venv --clear "$root/.venv"
}

# A .venv that came along with a copied checkout would activate, and change, the one it was copied from.
_distwd_venv_works() {
    local venv=$1/.venv
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
        [ "$(. "$venv/bin/activate" && printf '%s' "$VIRTUAL_ENV")" = "$venv" ]
}

_distwd_activate() {
    local root=$1
    if [ -n "${VIRTUAL_ENV:-}" ] || { [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; }; then
        if ! python -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            _distwd_say "the active environment has no Python 3.10 or newer; deactivate it (then .venv is made), or activate another."
            return 1
        fi
        if ! python -m pip --version >/dev/null 2>&1; then
            _distwd_say "the active environment has no pip; run 'python -m ensurepip', or deactivate it (then .venv is made)."
            return 1
        fi
        return 0
    fi
    if ! _distwd_venv_works "$root"; then
        _distwd_make_venv "$root" || return 1
    fi
    . "$root/.venv/bin/activate"
}

# The pins. In an environment that is not ours, what is there already stays as it is where pyproject.toml allows:
# its torch may be the only build that fits the machine.
_distwd_constraints() {
    local root=$1
    if [ "${VIRTUAL_ENV:-}" = "$root/.venv" ]; then
        cat "$root/launch/constraints.txt"
    else
        python - "$root/launch/constraints.txt" <<'PYTHON'
import re, sys
from importlib.metadata import distributions

installed = {re.sub("[-_.]+", "-", d.metadata["Name"]).lower(): d.version for d in distributions() if d.metadata["Name"]}
for line in open(sys.argv[1]):
    if line.split("==")[0] not in installed:
        print(line, end="")
if "torch" in installed:
    print(f"torch=={installed['torch']}")
PYTHON
    fi
}

_distwd_install() {
    local root=$1 extras=$2 scratch status
    scratch=$(mktemp -d) || return 1
    _distwd_constraints "$root" >"$scratch/constraints.txt"
    _distwd_say "installing distwd[$extras] (the first time takes minutes: torch is large)"
    python -m pip install --disable-pip-version-check --quiet -e "${root}[$extras]" -c "$scratch/constraints.txt" 2>&1 |
        tee "$scratch/log" >&2
    status=${PIPESTATUS[0]}
    # timm is tested for its optimizers alone. Its torchvision would have to fit the very build of torch.
    if [ "$status" -eq 0 ] && [[ ,$extras, == *,tests,* ]]; then
        python -m pip install --disable-pip-version-check --quiet --no-deps timm -c "$scratch/constraints.txt" 2>&1 |
            tee "$scratch/log" >&2
        status=${PIPESTATUS[0]}
    fi
    if [ "$status" -ne 0 ]; then
        if grep -qE 'NewConnectionError|Failed to establish|Name or service|name resolution|ConnectTimeout|ProxyError|No matching distribution' "$scratch/log"; then
            _distwd_say "pip could not reach a package index. Check the network or pip's settings (proxy, index) and try again;" \
                "Without a network, leave this script out: call pytest or torchrun in an environment that has the packages."
        else
            _distwd_say "pip could not install distwd[$extras]; its own lines above say why."
        fi
    fi
    rm -rf "$scratch"
    return "$status"
}

_distwd_environment() {
    local root extras stamp key extra missing=""
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P) || return 1
    extras=${1:-}
    if [[ ! $extras =~ ^[a-z]+(,[a-z]+)*$ ]]; then
        _distwd_say "say what for: source launch/environment.sh demo|recipes|tests|docs|lint (several: lint,docs)"
        return 1
    fi
    _distwd_activate "$root" || return 1

    # What is installed is written down, with a sum of the files that say what to install: a second call costs nothing.
    stamp="$(python -c 'import sys; print(sys.prefix)')/distwd-installed.txt"
    key="$root $(cat "$root/pyproject.toml" "$root/launch/constraints.txt" | cksum)"
    for extra in ${extras//,/ }; do
        grep -qxF "$key $extra" "$stamp" 2>/dev/null || missing=yes
    done
    [ -n "$missing" ] || return 0
    _distwd_install "$root" "$extras" || return 1
    # Lines of another checkout, or of older pins, hold no longer.
    {
        grep -F "$key " "$stamp" 2>/dev/null || true
        for extra in ${extras//,/ }; do printf '%s %s\n' "$key" "$extra"; done
    } >"$stamp.new" && mv "$stamp.new" "$stamp"
}

# Without an argument, `source` passes on the caller's: harmless, the pattern above refuses what is no extra.
_distwd_environment "${1:-}"
