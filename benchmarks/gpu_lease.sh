#!/bin/sh
# Runs every unfinished step of gpu_lease.py, each for at most ten minutes: gpu_lease.sh [FOLDER] [EPOCHS]
# Run the script again to continue. EPOCHS above 0 adds the long trainings, which resume from their checkpoints.
set -u
cd "$(dirname "$0")/.."
out=${1:-results/gpu}
epochs=${2:-0}
failed=0
for step in $(python benchmarks/gpu_lease.py --out "$out" --epochs "$epochs" --list); do
    timeout --signal=INT 590 python benchmarks/gpu_lease.py --out "$out" --epochs "$epochs" --only "$step" --json \
        > /dev/null || { echo "$step is not done; run this again" >&2; failed=1; }
done
exit "$failed"
