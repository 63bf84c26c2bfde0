# shellcheck shell=bash
# Hosts in network namespaces of this machine, on a switch, each with a link of limited rate in both directions, a host name and shared
# memory of its own. Whoever sources this calls hosts_down in a trap.
#
# The limit of tbf is in bytes, for one in milliseconds drops what TCP then waits 200 ms for.

hosts_up() { # folder number of hosts rate
    local folder=$1 num_hosts=$2 rate=$3 host
    # Away from other tests on the same machine.
    prefix=hadal$$
    mkdir -p "$folder"
    echo "$prefix" >"$folder/prefix"
    { echo 127.0.0.1 localhost; for host in $(seq "$num_hosts"); do echo "10.77.0.$host h$host"; done; } >"$folder/hosts"
    ip netns add "$prefix-switch"
    ip -n "$prefix-switch" link add bridge type bridge
    ip -n "$prefix-switch" link set bridge up
    for host in $(seq "$num_hosts"); do
        ip netns add "$prefix-h$host"
        ip link add "port$host" netns "$prefix-switch" type veth peer name eth0 netns "$prefix-h$host"
        ip -n "$prefix-switch" link set "port$host" master bridge up
        ip -n "$prefix-h$host" link set lo up
        ip -n "$prefix-h$host" addr add "10.77.0.$host/24" dev eth0
        ip -n "$prefix-h$host" link set eth0 up
        ip netns exec "$prefix-h$host" tc qdisc add dev eth0 root tbf rate "$rate" burst 64kb limit 1mb
        ip netns exec "$prefix-switch" tc qdisc add dev "port$host" root tbf rate "$rate" burst 64kb limit 1mb
        # The host is what this process sees: names, shared memory, /etc/hosts.
        mkdir -p "$folder/tmp.h$host"
        nsenter --net="/run/netns/$prefix-h$host" unshare --uts --ipc --mount bash -c "hostname h$host
            mount --bind '$folder/hosts' /etc/hosts; mount -t tmpfs tmpfs /dev/shm
            echo \$\$ >'$folder/pid.h$host'; exec sleep infinity" </dev/null >/dev/null 2>&1 &
    done
    # `on HOST COMMAND`, which MPICH's launcher takes in place of ssh.
    cat >"$folder/on" <<ON
#!/bin/bash
while [[ \$1 == -* ]]; do shift; done
host=\$1
shift
exec nsenter -t "\$(cat '$folder/pid.'"\$host")" --net --uts --mount --ipc -- /bin/sh -c "cd '$PWD'; export TMPDIR='$folder/tmp.\$host'; \$*"
ON
    chmod +x "$folder/on"
    for host in $(seq "$num_hosts"); do wait_for 5 is_there "$folder/pid.h$host"; done
}
is_there() { [[ $(readlink "/proc/$(cat "$1")/exe") == "$(readlink -f "$(command -v sleep)")" ]]; }

# Bytes that a host's interface has sent and received so far.
link_bytes() { # number of the host
    ip -n "$prefix-h$1" -s -j link show eth0 |
        python3 -c 'import json, sys; s = json.load(sys.stdin)[0]["stats64"]; print(s["tx"]["bytes"], s["rx"]["bytes"])'
}

hosts_down() { # folder
    local file name
    [[ -e $1/prefix ]] || return 0
    for file in "$1"/pid.h*; do
        if [[ -s $file ]]; then kill "$(cat "$file")" 2>/dev/null || true; fi
    done
    for name in $(ip netns list | cut -d' ' -f1 | grep "^$(cat "$1/prefix")-" || true); do
        # What still runs there goes with its host.
        ip netns pids "$name" | xargs -r kill -9 2>/dev/null || true
        ip netns del "$name"
    done
}
