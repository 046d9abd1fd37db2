#!/usr/bin/env bash
# Runs what only a GPU can show, on one card, in some eight minutes. Needs torch, pytest, hypothesis and numpy; no network.
#
#     bash launch/gpu.sh                      # everything
#     bash launch/gpu.sh tests steps          # these parts
#     bash launch/gpu.sh --dry-run            # on the CPU, with small tensors, to see that it works
#
# Results go to $OUT, or to runs/gpu: PART.txt for what a part has printed, PART.json for its numbers. Each part has its own time
# limit, and one that fails does not stop the others.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

out="${OUT:-runs/gpu}"
dry=()
parts=()
for word in "$@"; do
    if [[ "$word" == --dry-run ]]; then dry=(--dry-run); else parts+=("$word"); fi
done
[[ ${#parts[@]} -gt 0 ]] || parts=(env tests fused ceilings numerics steps launches blocks)

mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# A machine without a network has no other interface.
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}"

failed=()
for part in "${parts[@]}"; do
    case "$part" in
    env)
        limit=30
        command=(python -m torch.utils.collect_env)
        ;;
    tests)
        limit=150
        command=(python -m pytest -q -p no:cacheprovider "--junitxml=$out/tests.xml" tests/test_gpu.py)
        ;;
    fused)
        # Triton compiles some two hundred kernels first. Where it is not installed there is no test (5), which is no fault.
        limit=240
        # shellcheck disable=SC2016 # expanded by the shell that runs it
        tests='python -m pytest -q -p no:cacheprovider "--junitxml=$0/fused.xml" tests/test_triton.py; code=$?; exit $((code == 5 ? 0 : code))'
        command=(bash -c "$tests" "$out")
        ;;
    ceilings | numerics | launches | blocks)
        limit=60
        command=(python launch/gpu.py "$part" --out "$out" "${dry[@]}")
        ;;
    steps)
        limit=200
        command=(python launch/gpu.py "$part" --out "$out" "${dry[@]}")
        ;;
    *)
        echo "gpu.sh: there is no part $part; parts are env tests fused ceilings numerics steps launches blocks" >&2
        exit 2
        ;;
    esac
    begin=$SECONDS
    if timeout -k 5 "$limit" "${command[@]}" >"$out/$part.txt" 2>&1; then
        echo "$part: done in $((SECONDS - begin)) s"
    else
        echo "$part: failed after $((SECONDS - begin)) s (limit $limit); see $out/$part.txt"
        failed+=("$part")
    fi
done
[[ ${#failed[@]} -eq 0 ]]
