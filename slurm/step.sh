# What both sbatch scripts do with their one step: run it, pass signals on to it, and queue the job again where that helps.
#
#   . slurm/step.sh
#   run_step srun ...

run_step() {
  local stopped="" step code
  # A signal to the script is passed on to every rank: they agree on a step, save and leave with exit code 75.
  trap 'stopped=yes; kill -USR1 "$step" 2>/dev/null' USR1 TERM
  "$@" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal interrupts `wait`
  wait "$step"
  code=$?
  $PYTHON -m dist_spin.launch.requeue "$code" "$stopped" || exit "$code"
  echo "dist-spin: job $SLURM_JOB_ID queues itself again (exit code $code)"
  scontrol requeue "$SLURM_JOB_ID"
  exit "$code"
}
