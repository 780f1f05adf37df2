"""The machine and the process group: ranks, signals, progress, memory, Slurm."""
