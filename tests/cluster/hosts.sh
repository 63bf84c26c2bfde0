#!/usr/bin/env bash
# A run on several hosts: namespaces of this machine with links of 250 Mbit each, two ranks on each of two of them, over MPI and TCP. Losses
# and weights have the bits of ranks that are threads; bytes on links are as many as with threads, and as the plan says where the routing
# leaves nothing open; the interfaces' own counts are beside them. Then the second host's cable is pulled while a run is under way: every
# rank ends with 5 and names one that it does not hear, and the run, resumed, ends with the bits of one that kept its cable.
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

settings=(run scenes/cluster.ron --set train.steps=16 --set eval=None --set sample=None --set telemetry.trace_steps=None)
on_threads() { # name arguments...
    "$hadal" "${settings[@]}" "${@:2}" >"$folder/$1/log" 2>&1 || fail "$(cat "$folder/$1/log")"
}
launcher_flags=()
# Two ranks on each of two hosts, as it comes out of a shell on the first host, so quoted once more.
on_hosts() { # program arguments...
    timeout 300 "$folder/hosts/on" h1 "$(printf '%q ' "$mpi/bin/mpiexec" -launcher ssh -launcher-exec "$folder/hosts/on" -hosts h1,h2 -iface eth0 \
        "${launcher_flags[@]}" -n 4 -ppn 2 "$1" "${settings[@]}" "${@:2}")"
}

check() { # name overrides...
    local name=$1 began host before=() after=() args=()
    shift
    for set; do args+=(--set "$set"); done
    mkdir -p "$folder/$name"
    began=$(now)
    on_threads "$name" "${args[@]}" --set "telemetry.dir=\"$folder/$name/threads\"" --json "$folder/$name/threads.json"
    echo "$name: as threads $(secs "$began")"
    for host in 1 2; do before[host]=$(link_bytes "$host"); done
    began=$(now)
    on_hosts "$hadal" "${args[@]}" --set "telemetry.dir=\"$folder/$name/hosts\"" --json "$folder/$name/hosts.json" \
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

# A rank that leaves its exit code and its words, since nobody on the other side can be told. MPICH sends SIGUSR1 to those of a rank that
# is gone.
cat >"$folder/rank" <<RANK
#!/bin/bash
trap : USR1
"$hadal" "\$@" 2>"$folder/cut/said.\$PMI_RANK"
code=\$?
echo \$code >"$folder/cut/code.\$PMI_RANK"
exit \$code
RANK
chmod +x "$folder/rank"
all_ended() { [[ $(cat "$folder"/cut/code.* 2>/dev/null | wc -l) == 4 ]]; }
none_left() { ! pgrep -f "^$hadal run .*$folder/cut/hosts" >/dev/null; }
cut_off() {
    local rank other launcher began args=(--set 'checkpoint=(every_steps: 2)' --set 'watchdog=(min_secs: 4)')
    mkdir -p "$folder/cut"
    on_threads cut "${args[@]}" --set "telemetry.dir=\"$folder/cut/threads\""
    args+=(--set "telemetry.dir=\"$folder/cut/hosts\"")
    # So that all ranks speak; otherwise not, for with it mpiexec may end a run that went well with 141.
    launcher_flags=(-disable-auto-cleanup)
    on_hosts "$folder/rank" "${args[@]}" >"$folder/cut/first.log" 2>&1 &
    launcher=$!
    log=$folder/cut/first.log
    wait_for 120 has_steps "$folder/cut/hosts/cluster" 5
    began=$(now)
    ip -n "$prefix-switch" link set port2 down
    wait_for 60 all_ended
    echo "a cable is pulled: all ranks ended after $(secs "$began"), watchdog.min_secs is 4"
    for rank in 0 1 2 3; do
        other=$((rank < 2 ? 2 : 0))
        [[ $(cat "$folder/cut/code.$rank") == 5 ]] || fail "rank $rank ended with $(cat "$folder/cut/code.$rank"): $(cat "$folder/cut/said.$rank")"
        grep "peer lost: rank [$other$((other + 1))]: " "$folder/cut/said.$rank" | tail -n 1 || fail "rank $rank names no rank of the other host: $(cat "$folder/cut/said.$rank")"
    done
    wait_for 10 none_left
    kill "$launcher" 2>/dev/null || true
    wait "$launcher" 2>/dev/null || true
    ip -n "$prefix-switch" link set port2 up
    launcher_flags=()
    began=$(now)
    on_hosts "$hadal" "${args[@]}" --resume >"$folder/cut/log" 2>&1 || fail "it does not go on"
    grep '^resumed from' "$folder/cut/log" || fail "it begins from nothing"
    echo "a cable is pulled: the rest took $(secs "$began")"
    same_bits 'a cable is pulled' "$folder/cut/threads/cluster" "$folder/cut/hosts/cluster"
}
cut_off
