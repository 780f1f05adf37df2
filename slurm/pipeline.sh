#!/bin/bash
# The whole pipeline as Slurm jobs that wait for each other: optimize, quantize (an array), evaluate, report.
#
#   slurm/pipeline.sh CONFIG.yaml [key=value ...]
#
# Account, partition and resources are set at the top of the two sbatch files, or for all of them at once in the environment:
# SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS, SBATCH_CONSTRAINT are read by sbatch itself. Run it again when something was
# lost: finished steps and layers are not done a second time. (`dist-spin submit` does the same and also knows which jobs still
# live; this script always submits.)
set -euo pipefail

# ---- settings -----------------------------------------------------------------------------------------------------------
export ROOT=${ROOT:-$PWD}              # where slurm/ and CONFIG.yaml lie; all nodes must see it
export PYTHON=${PYTHON:-.venv/bin/python}
AT_ONCE=${AT_ONCE:-16}                 # tasks of the array that run at the same time
OPTIMIZE=(${OPTIMIZE_OPTIONS:-})       # more options of sbatch for each kind of job, such as --nodes=4 --time=120
QUANTIZE=(${QUANTIZE_OPTIONS:-})
EVALUATE=(${EVALUATE_OPTIONS:---nodes=1})
REPORT=(${REPORT_OPTIONS:---nodes=1})  # one process on one node
# -------------------------------------------------------------------------------------------------------------------------

[ $# -ge 1 ] || { echo "usage: slurm/pipeline.sh CONFIG.yaml [key=value ...]" >&2; exit 2; }
cd "$ROOT"
ranges=$($PYTHON -m dist_spin.launch.layer_ranges "$@") # such as "0:10 10:20"; empty if weights stay as they are
after=""

submit_stage() { # submit one job after the one before, say its number, and have the next wait for it
  local what=$1 id
  shift
  id=$(sbatch --parsable --kill-on-invalid-dep=yes ${after:+--dependency=afterok:$after} --job-name="dist-spin-$what" "$@")
  echo "$what: job $id${after:+, after $after}"
  after=$id
}

submit_stage optimize "${OPTIMIZE[@]}" slurm/optimize.sbatch "$@"
if [[ $ranges == *" "* ]]; then
  LAYER_RANGES=hidden-states submit_stage boundaries "${QUANTIZE[@]}" slurm/quantize_array.sbatch "$@"
fi
if [ -n "$ranges" ]; then
  count=$(wc -w <<<"$ranges")
  LAYER_RANGES=$ranges submit_stage quantize "${QUANTIZE[@]}" --array="0-$((count - 1))%$AT_ONCE" slurm/quantize_array.sbatch "$@"
fi
STAGE=evaluate submit_stage evaluate "${EVALUATE[@]}" slurm/optimize.sbatch "$@"
STAGE=report RANKS=1 submit_stage report "${REPORT[@]}" slurm/optimize.sbatch "$@"
