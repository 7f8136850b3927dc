#!/usr/bin/env bash
# Run a command on two machines that are network namespaces of this one (as root):
#   tests/cluster/two_nodes.sh COMMAND [arguments]
# Each has an address of its own, 10.231.N.1 and .2, and NNODES, NODE_RANK and
# MASTER_ADDR for tools/dist_run.sh. Ends with the larger of the two exit codes, or with
# 77 if this machine does not permit network namespaces.
set -euo pipefail
if [ $# -lt 1 ]; then
    echo 'usage: two_nodes.sh COMMAND [arguments]' >&2
    exit 2
fi
# So that several can run at the same time.
id=$$
net=10.231.$((id % 250))
names=("convmlp${id}a" "convmlp${id}b")
links=("cv${id}a" "cv${id}b")

if ! ip netns add "${names[0]}"; then
    echo 'two_nodes.sh: error: this machine does not permit "ip netns add"' >&2
    exit 77
fi
trap 'for name in "${names[@]}"; do ip netns del "$name" 2> /dev/null || true; done' EXIT
ip netns add "${names[1]}"
ip link add "${links[0]}" netns "${names[0]}" type veth \
    peer name "${links[1]}" netns "${names[1]}"
for i in 0 1; do
    ip -n "${names[i]}" link set lo up
    ip -n "${names[i]}" addr add "$net.$((i + 1))/24" dev "${links[i]}"
    ip -n "${names[i]}" link set "${links[i]}" up
done

jobs=()
for i in 0 1; do
    # gloo looks for the name of the machine, which is not an address of the namespace.
    NNODES=2 NODE_RANK=$i MASTER_ADDR=$net.1 \
        GLOO_SOCKET_IFNAME=${links[i]} TP_SOCKET_IFNAME=${links[i]} \
        ip netns exec "${names[i]}" "$@" &
    jobs+=($!)
done
code=0
for job in "${jobs[@]}"; do
    wait "$job" && ended=0 || ended=$?
    code=$((ended > code ? ended : code))
done
exit "$code"
