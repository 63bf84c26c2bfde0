#!/usr/bin/env bash
# A run on several hosts: namespaces of this machine with links of 250 Mbit each, two ranks on each of two of them, over MPI and TCP. Losses
# and weights have the bits of ranks that are threads; bytes on links, as the run counts them and as the interfaces do.
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
    for ranks in threads hosts; do
        python3 - "$name: as the run counts, $ranks" "$folder/$name/$ranks.json" <<'PYTHON'
import json, sys

def bytes_of(value, path=""):
    for key, inner in value.items() if isinstance(value, dict) else ():
        if isinstance(inner, dict):
            yield from bytes_of(inner, key)
        elif key.endswith("_node_bytes"):
            yield key, inner

found = list(bytes_of(json.load(open(sys.argv[2]))))
print(sys.argv[1] + ":", ", ".join(f"{key} {value}" for key, value in found) or "its report has no bytes on links")
PYTHON
    done
}
check 'a stage on each host'
check 'experts over both hosts' 'mesh=(pp: 1, ep: 4, dp: 1, ranks_per_node: 2)' 'pipeline=(schedule: OneFOneB)'
