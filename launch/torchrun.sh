#!/bin/bash
# Run a stage over two or more hosts without a scheduler. Give the same command on every host, within ten minutes:
#
#   launch/torchrun.sh FIRST_HOST HOSTS RANKS STAGE CONFIG.yaml [key=value ...]
#   launch/torchrun.sh 10.0.0.1 2 8 optimize configs/quickstart.yaml
#
# FIRST_HOST: address of one of them that all can reach. HOSTS: how many. RANKS: processes on each, one per GPU.
# The run directory must be on a file system that all see. If a host is lost, the others say so and end with exit code 4; give
# the command again, on as many hosts as are left, and the run continues.
#
# If the wrong network is chosen: export GLOO_SOCKET_IFNAME=eth1 NCCL_SOCKET_IFNAME=eth1
set -euo pipefail
[ $# -ge 5 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
first=$1 hosts=$2 ranks=$3
shift 3
exec "${PYTHON:-.venv/bin/python}" -m dist_spin.launch.torchrun --nnodes "$hosts" --nproc_per_node "$ranks" --rdzv_backend c10d \
  --rdzv_endpoint "$first:${PORT:-29400}" --rdzv_id dist-spin -m dist_spin "$@"
