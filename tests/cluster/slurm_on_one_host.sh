#!/usr/bin/env bash
# A SLURM of two nodes on this machine, for trying tools/slurm_*.sh (as root, on Debian
# with slurm-wlm, munge and nothing of SLURM running):
#   tests/cluster/slurm_on_one_host.sh FOLDER COMMAND [arguments]
# starts it with its files in FOLDER, runs the command with SLURM_CONF set, and stops it.
# Partitions: "low", whose jobs are preempted and queued again, and "high", for which
# they are. Ports 17000 to 17002 of the loopback.
set -euo pipefail
unset CDPATH
if [ $# -lt 2 ]; then
    echo 'usage: slurm_on_one_host.sh FOLDER COMMAND [arguments]' >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
host=$(hostname -s)
export SLURM_CONF=$folder/slurm.conf
cat > "$SLURM_CONF" << CONF
ClusterName=one_host
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=30
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=1 RealMemory=1000
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
CONF
mkdir -p "$folder/state" "$folder/spool-n1" "$folder/spool-n2"

munge=
stop() {
    for name in slurmd-n1 slurmd-n2 slurmctld; do
        [ ! -f "$folder/$name.pid" ] || kill "$(cat "$folder/$name.pid")" || true
    done
    [ -z "$munge" ] || kill "$munge" || true
}
trap stop EXIT
if ! munge --no-input > /dev/null 2>&1; then
    mkdir -p /run/munge && chown munge /run/munge
    [ -f /etc/munge/munge.key ] || mungekey --create
    chown munge /etc/munge/munge.key
    runuser -u munge -- munged --foreground 2> "$folder/munged.log" &
    munge=$!
    sleep 1
fi
slurmctld
slurmd -N n1
slurmd -N n2
for _ in $(seq 60); do
    [ "$(sinfo --noheader --states=idle --partition=low --format %D)" = 2 ] && break
    sleep 1
done
sinfo
# The nodes of mmengine's master address are names of SLURM, which only SLURM knows here.
MASTER_ADDR=127.0.0.1 "$@"
