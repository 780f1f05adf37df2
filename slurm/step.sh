# What both sbatch scripts do with their one step: run it, pass signals on to it, and queue the job again where that helps.
#
#   . slurm/step.sh
#   run_step srun ...

run_step() {
  local stopped="" step code again=""
  # A signal to the script is passed on to every rank: they agree on a step, save and leave with exit code 75.
  trap 'stopped=yes; kill -USR1 "$step" 2>/dev/null' USR1 TERM
  "$@" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal interrupts `wait`
  wait "$step"
  code=$?
  # 75: saved and left. 4: a rank did not answer the others. Above 128: a rank was killed. All continue where they were.
  if [ "$code" = 75 ] || { [ "$code" != 0 ] && [ -n "$stopped" ]; }; then again=yes; fi
  if [ "$code" = 4 ] || [ "$code" -gt 128 ]; then [ "${SLURM_RESTART_COUNT:-0}" -ge "$LOSSES" ] || again=yes; fi
  [ -n "$again" ] || exit "$code"
  # Not if somebody cancelled it: then it is on its way out already.
  [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null | sort -u | grep -v PENDING)" = RUNNING ] || exit "$code"
  echo "dist-spin: job $SLURM_JOB_ID queues itself again (exit code $code)"
  scontrol requeue "$SLURM_JOB_ID"
  exit "$code"
}
