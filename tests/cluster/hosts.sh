#!/usr/bin/env bash
# A run on several hosts: namespaces of this machine with links of 250 Mbit each, two ranks on each of two of them, over MPI and TCP. Losses
# and weights have the bits of ranks that are threads; bytes on links are as many as with threads, and as the plan says where the routing
# leaves nothing open; the interfaces' own counts are beside them.
#
#   HADAL=target/debug/hadal HADAL_TEST_MPI=FOLDER_OF_MPICH tests/cluster/hosts.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source-path=SCRIPTDIR/../..
source tests/cluster/common.sh
source tests/cluster/hosts_up.sh
[[ $(id -u) == 0 ]] || skip 'network namespaces are for root'
need ip tc nsenter unshare python3
need_mpi
ip netns add "hadal$$-try" 2>/dev/null || skip '`ip netns add` is not possible here'
ip netns del "hadal$$-try"

folder=$(mktemp -d)
end() {
    hosts_down "$folder/hosts"
    rm -rf "$folder"
}
trap end EXIT
trap 'exit 130' INT TERM
began=$(now)
hosts_up "$folder/hosts" 4 "${RATE:-250mbit}"
echo "4 hosts: up in $(secs "$began")"

check() { # name overrides...
    local name=$1 began host before=() after=() args
    shift
    args=(run scenes/cluster.ron --set train.steps=16 --set eval=None --set sample=None --set telemetry.trace_steps=None)
    for set; do args+=(--set "$set"); done
    mkdir -p "$folder/$name"
    began=$(now)
    "$hadal" "${args[@]}" --set "telemetry.dir=\"$folder/$name/threads\"" --json "$folder/$name/threads.json" \
        >"$folder/$name/log" 2>&1 || fail "$(cat "$folder/$name/log")"
    echo "$name: as threads $(secs "$began")"
    for host in 1 2; do before[host]=$(link_bytes "$host"); done
    began=$(now)
    # As it comes out of a shell on the first host, so quoted once more.
    timeout 300 "$folder/hosts/on" h1 "$(printf '%q ' "$mpi/bin/mpiexec" -launcher ssh -launcher-exec "$folder/hosts/on" -hosts h1,h2 -iface eth0 \
        -n 4 -ppn 2 "$hadal" "${args[@]}" --set "telemetry.dir=\"$folder/$name/hosts\"" --json "$folder/$name/hosts.json")" \
        >"$folder/$name/log" 2>&1 || fail "$(cat "$folder/$name/log")"
    echo "$name: on 2 hosts x 2 ranks $(secs "$began")"
    for host in 1 2; do after[host]=$(link_bytes "$host"); done
    same_bits "$name" "$folder/$name/threads/cluster" "$folder/$name/hosts/cluster"
    for host in 1 2; do
        echo "$name: interface of h$host: $(paste -d' ' <(echo "${before[host]}") <(echo "${after[host]}") | awk '{ printf "%.2f MB sent, %.2f MB received in all", ($3 - $1) / 1e6, ($4 - $2) / 1e6 }')"
    done
    python3 - "$name" "$folder/$name/threads.json" "$folder/$name/hosts.json" <<'PYTHON' || fail "$name: other bytes on links"
import json, sys

name, threads, hosts = sys.argv[1], *(json.load(open(path))["idle"]["links"] for path in sys.argv[2:])
for link in "intra", "inter":
    predicted, measured = (hosts[f"{side}_{link}_node_bytes"] for side in ("predicted", "measured"))
    print(f"{name}: {link}-node bytes of a rank and step: {predicted} predicted, {measured} measured")
    # Where the router chooses, a plan has an expectation.
    assert predicted == measured or "router" in name, f"{name}: {hosts}"
assert hosts == threads, f"{name}: {hosts}, with threads {threads}"
PYTHON
}
ep4=('mesh=(pp: 1, ep: 4, dp: 1, ranks_per_node: 2)' 'pipeline=(schedule: OneFOneB)')
check 'a stage on each host, as the router chooses'
check 'experts over both hosts, as the router chooses' "${ep4[@]}"
check 'experts over both hosts, all for each token' "${ep4[@]}" model.num_experts_per_tok=8 model.topk_group=4
