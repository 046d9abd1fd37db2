#!/usr/bin/env bash
# Trains a small language model on 2 ranks with FSDP2 and relative weight decay, beside a whole-model replica in one
# process that must end with the same bits; then once more without decay. A table and a picture show both.
#
#     bash launch/demo.sh
#
# Needs Python 3.10 or newer, and a network the first time; makes .venv where no environment is active. No GPU, no
# download of weights or text. It writes to runs/demo only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh demo

# Each rank wants a GPU of its own; where there is only one, the CPU serves both.
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" = 1 ]; then
    echo "launch/demo.sh: one GPU is too few for two ranks; training on the CPU instead"
    export CUDA_VISIBLE_DEVICES=""
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # torchrun would set it, with a warning of six lines

train() {
    local name=$1
    shift
    python -m torch.distributed.run --standalone --nproc-per-node 2 launch/train.py \
        --mesh fsdp=2 --steps 150 --context 96 --log-every 3 --val-every 30 --out "runs/demo/$name" "$@"
}

echo "1/2 with relative weight decay, checked against one process"
train relative --check --decay relative --weight-decay 4 --metric mad --norm-input update
echo "2/2 without weight decay"
train none --decay none
python launch/report.py runs/demo/relative runs/demo/none --picture runs/demo/picture.png
