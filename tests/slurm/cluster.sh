#!/bin/bash
# A private Slurm on this host, for the tests: N virtual nodes, partitions `main` (preemptible) and `high` (preempts it),
# accounting in a private MariaDB. Everything lies in one directory and nothing in /etc/slurm is read or written.
#
#   cluster.sh start DIRECTORY NODES CPUS_PER_NODE FIRST_PORT     # FIRST_PORT .. FIRST_PORT + NODES + 3 must be free
#   cluster.sh node DIRECTORY NAME                                # start the slurmd of one node (again)
#   cluster.sh stop DIRECTORY
#
# Needs root and the Debian packages slurmctld slurmd slurm-client munge slurmdbd mariadb-server.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
action=$1 dir=$2
host=$(hostname -s)
export SLURM_CONF="$dir/slurm.conf" # the programs look for slurmdbd.conf and cgroup.conf beside it

start_munge() {
  mkdir -p /run/munge /var/log/munge /var/lib/munge
  chown munge:munge /run/munge /var/log/munge /var/lib/munge
  chmod 755 /run/munge
  if [ ! -s /etc/munge/munge.key ]; then
    (umask 077 && dd if=/dev/urandom of=/etc/munge/munge.key bs=128 count=1 status=none)
    chown munge:munge /etc/munge/munge.key
  fi
  munge -n </dev/null >/dev/null 2>&1 || runuser -u munge -- /usr/sbin/munged
  wait_for 'munge -n </dev/null | unmunge'
}

wait_for() { # a command that succeeds once something is up; gives it 20 seconds
  for _ in $(seq 200); do
    if eval "$1" >/dev/null 2>&1; then return; fi
    sleep 0.1
  done
  echo "cluster.sh: gave up waiting for: $1" >&2
  tail -n 5 "$dir"/log/*.log >&2 || true
  exit 1
}

start_accounting() {
  local sql="mariadb -S $dir/sock/my.sock"
  mkdir -p "$dir/mysql"
  chown mysql:mysql "$dir/mysql" "$dir/sock"
  mariadb-install-db --user=mysql --datadir="$dir/mysql" --auth-root-authentication-method=socket >"$dir/log/install-db.log" 2>&1
  setsid mariadbd --no-defaults --user=mysql --datadir="$dir/mysql" --socket="$dir/sock/my.sock" --bind-address=127.0.0.1 \
    --port="$((port + 2))" --pid-file="$dir/sock/mysql.pid" --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 \
    --innodb-use-native-aio=0 --innodb-log-file-size=64M >"$dir/log/mysql.log" 2>&1 </dev/null &
  wait_for "$sql -e 'select 1'"
  # The password guards nothing: the database is reachable from this host only, and lives as long as the tests.
  $sql -e "create database slurm_acct_db; create user slurm@'127.0.0.1' identified by 'test';
           create user slurm@localhost identified by 'test'; grant all on slurm_acct_db.* to slurm@'127.0.0.1';
           grant all on slurm_acct_db.* to slurm@localhost; flush privileges;"
  cat >"$dir/slurmdbd.conf" <<CONF
AuthType=auth/munge
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=root
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/pids/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((port + 2))
StorageUser=slurm
StoragePass=test
StorageLoc=slurm_acct_db
CONF
  chmod 600 "$dir/slurmdbd.conf"
  slurmdbd
  wait_for "sacctmgr -n list cluster"
  sacctmgr -i add cluster test >/dev/null
  sacctmgr -i add account lab >/dev/null
  sacctmgr -i add user root account=lab >/dev/null
}

write_configuration() {
  cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
SlurmctldPidFile=$dir/pids/slurmctld.pid
SlurmdPidFile=$dir/pids/slurmd.%n.pid
StateSaveLocation=$dir/state
FirstJobId=$((port % 5000 + 1))
SlurmdSpoolDir=$dir/spool/%n
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
ReturnToService=2
SlurmdParameters=config_overrides
JobRequeue=1
MinJobAge=3600
KillWait=5
InactiveLimit=0
SlurmdTimeout=15
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
AccountingStorageEnforce=associations
GresTypes=gpu
CONF
  local names="n[1-$nodes]"
  # The last node has a GPU, as Slurm sees it; there is nothing behind it.
  echo "NodeName=n$nodes Name=gpu File=/dev/null" >"$dir/gres.conf"
  for i in $(seq "$nodes"); do
    local gres=""
    if [ "$i" = "$nodes" ]; then gres="Gres=gpu:1"; fi
    echo "NodeName=n$i $gres NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 3 + i)) CPUs=$cpus Boards=1" \
      "SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN" >>"$dir/slurm.conf"
    mkdir -p "$dir/spool/n$i"
  done
  echo "PartitionName=main Nodes=$names Default=YES MaxTime=1-0 DefaultTime=10 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60" >>"$dir/slurm.conf"
  echo "PartitionName=high Nodes=$names Default=NO MaxTime=1-0 DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF" >>"$dir/slurm.conf"
  echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf" # unused with the plugins above, but slurmd insists on one it knows
}

case $action in
start)
  nodes=$3 cpus=$4 port=$5
  mkdir -p "$dir"/{state,spool,log,pids,sock}
  chmod 755 "$dir"
  getent hosts "$host" >/dev/null || echo "127.0.0.1 $host" >>/etc/hosts
  start_munge
  write_configuration
  start_accounting
  slurmctld -f "$SLURM_CONF" -c
  for i in $(seq "$nodes"); do slurmd -f "$SLURM_CONF" -N "n$i"; done
  wait_for "[ \"\$(sinfo -h -p main -t idle -o %D)\" = $nodes ]"
  ;;
node)
  slurmd -f "$SLURM_CONF" -N "$3"
  ;;
stop)
  scancel --user=root --signal=KILL >/dev/null 2>&1 || true
  scancel --user=root >/dev/null 2>&1 || true
  for file in "$dir"/pids/slurmd.*.pid "$dir"/pids/slurmctld.pid "$dir"/pids/slurmdbd.pid "$dir"/sock/mysql.pid; do
    if [ -s "$file" ]; then kill "$(cat "$file")" 2>/dev/null || true; fi
  done
  ;;
*)
  echo "cluster.sh: start, node or stop, not $action" >&2
  exit 2
  ;;
esac
