#!/usr/bin/env bash
# Trains a tiny model for a few steps, serves it, and runs the clients of this folder against it: with a key and without, with a short queue,
# and 200 at a time; then sees that SIGTERM lets a running answer end. Pictures of the chat page go to the folder that is given.
#
# HADAL names the program if it is built already; LOAD_SECS is how long the many clients stay.
set -euo pipefail
cd "$(dirname "$0")/../.."
pictures="${1:-target/pictures}"
source tests/serve/setup.sh
hadal="${HADAL:-}"
if [[ -z $hadal ]]; then
    # shellcheck disable=SC2086 # A list of arguments.
    cargo ${HADAL_CARGO_ARGS:-} build --locked -p hadal
    hadal=target/debug/hadal
fi
folder=$(mktemp -d)
servers=()
end() {
    [[ ${#servers[@]} == 0 ]] || kill "${servers[@]}" 2>/dev/null || true
    wait
    rm -rf "$folder"
}
trap end EXIT
"$hadal" run scenes/tiny.ron --set train.steps=20 --set model.max_position_embeddings=8192 --set "telemetry.dir=\"$folder/runs\"" --set 'name="tiny"' 2>"$folder/run.log" >&2 ||
    { cat "$folder/run.log" >&2; exit 1; }

# Starts a server on any free port with these arguments; its address is in $url, its number in $server.
start() {
    local log="$folder/$1"
    shift
    "$hadal" serve "$folder/runs/tiny/latest" --port 0 "$@" 2>"$log" &
    server=$!
    servers+=("$server")
    for _ in $(seq 300); do
        grep -q '^serving' "$log" && break
        sleep 0.1
    done
    grep -q '^serving' "$log" || { cat "$log" >&2; exit 1; }
    url=$(sed -n 's/^listening on \(.*\); loading.*/\1/p' "$log")
}

start open
open=$url
start busy --max-queued 2 --max-running 2 --step-tokens 8
busy=$url
HADAL_API_KEY=secret start keyed --speculate
keyed=$url
"$python" tests/serve/openai_client.py "$open" --busy-url "$busy"
"$python" tests/serve/openai_client.py "$keyed" --key secret
chat_page "$open" --max-tokens 3000 --pictures "$pictures"
chat_page "$keyed" --key secret --max-tokens 3000 --pictures "$pictures/keyed"
"$python" tests/serve/load.py "$open" --clients 200 --secs "${LOAD_SECS:-15}"

# An answer that runs when the signal comes is whole, and the server ends by the signal's number.
start ending
answer="$folder/answer"
curl -sN "$url/v1/completions" -H 'Content-Type: application/json' \
    -d '{"prompt": "Call me", "max_tokens": 100, "ignore_eos": true, "stream": true}' >"$answer" &
client=$!
for _ in $(seq 100); do
    [[ -s $answer ]] && break
    sleep 0.02
done
kill -TERM "$server"
wait "$client"
status=0
wait "$server" || status=$?
[[ $status == 143 ]] || { echo "expected 143 after SIGTERM, found $status" >&2; exit 1; }
tail -n 2 "$answer" | grep -q '\[DONE\]' || { echo 'the answer that ran was cut' >&2; exit 1; }
echo 'SIGTERM: the running answer ended whole'
