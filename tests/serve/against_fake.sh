#!/usr/bin/env bash
# Runs the clients of this folder against a server whose model says back what it is told. Makes the virtual environment of README.md,
# and gets Chromium where it may. Pictures of the chat page go to the folder that is given.
#
# HADAL_FAKE_SERVER names the server if it is built already, as `cargo test --workspace` does: target/debug/examples/fake_server.
set -euo pipefail
cd "$(dirname "$0")/../.."
pictures="${1:-target/pictures}"
source tests/serve/setup.sh
server="${HADAL_FAKE_SERVER:-}"
if [[ -z $server ]]; then
    # shellcheck disable=SC2086 # A list of arguments.
    cargo ${HADAL_CARGO_ARGS:-} build --locked -p systems --features remote --example fake_server
    server=target/debug/examples/fake_server
fi
logs=$(mktemp -d)
inputs=()
end() {
    # Servers end when their inputs do.
    [[ ${#inputs[@]} == 0 ]] || kill "${inputs[@]}" 2>/dev/null || true
    rm -rf "$logs"
}
trap end EXIT

# Starts a server on any free port with these arguments; its address is in $url.
start() {
    local log="$logs/$1" input="$logs/$1.input"
    shift
    mkfifo "$input"
    sleep 900 >"$input" &
    inputs+=($!)
    "$server" 127.0.0.1:0 "$@" <"$input" 2>"$log" &
    for _ in $(seq 300); do
        grep -q ready "$log" && break
        sleep 0.1
    done
    grep -q ready "$log" || { cat "$log" >&2; exit 1; }
    url=$(sed -n 's/^listening at //p' "$log")
}

start open
open=$url
start busy "" 2
busy=$url
start keyed secret
keyed=$url
"$python" tests/serve/openai_client.py "$open" --echo --busy-url "$busy"
"$python" tests/serve/openai_client.py "$keyed" --echo --key secret
chat_page "$open" --pictures "$pictures"
chat_page "$keyed" --key secret --pictures "$pictures/keyed"
"$python" tests/serve/load.py "$open" --clients 200 --secs 15
