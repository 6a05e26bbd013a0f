#!/bin/sh
# Runs every unfinished step of gpu_lease.py, each process for at most ten minutes: gpu_lease.sh [FOLDER] [EPOCHS]
# Run the script again to continue. EPOCHS above 0 adds the long trainings, which resume from their checkpoints.
# $PYTHON names the interpreter; the default is python3.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:-results/gpu}
epochs=${2:-0}
set -- "${PYTHON:-python3}" benchmarks/gpu_lease.py --out "$out" --epochs "$epochs"
processes=$("$@" --list) || { echo "the steps cannot be listed" >&2; exit 1; }
failed=0
while read -r steps; do
    [ -n "$steps" ] || continue
    # shellcheck disable=SC2086  # the names of several steps
    timeout --signal=INT --kill-after=20 570 "$@" --only $steps --json > /dev/null < /dev/null \
        || { echo "not done: some of $steps; run this again" >&2; failed=1; }
done <<END
$processes
END
exit "$failed"
