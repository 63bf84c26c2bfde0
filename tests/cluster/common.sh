# shellcheck shell=bash
# What the tests on clusters share: the program, the MPI library, waiting, and comparing two runs to the bit.

hadal=$(realpath "${HADAL:-target/debug/hadal}")
mpi=${HADAL_TEST_MPI:-}
mpi=${mpi%%:*}

skip() {
    printf '\n!! SKIPPED %s: %s\n' "$(basename "$0")" "$*" >&2
    exit 0
}
# Says what is wrong, after the log of the job at hand if there is one.
fail() {
    [[ -z ${log:-} ]] || cat "$log" >&2 || true
    printf 'FAILED: %s\n' "$*" >&2
    exit 1
}
need() { # command...
    local name
    for name; do command -v "$name" >/dev/null || skip "there is no $name"; done
}
need_mpi() {
    [[ -x $mpi/bin/mpiexec ]] || skip 'HADAL_TEST_MPI names no MPI library; `pip install mpich` in a virtual environment makes one'
    HADAL_MPI=$mpi/lib/libmpi_abi.so.1
    [[ -e $HADAL_MPI ]] || skip "expected MPICH 5 in $mpi"
    export HADAL_MPI
}

now() { date +%s.%N; }
# Seconds from $1 to $2, or to now.
secs() { awk -v from="$1" -v to="${2:-$(now)}" 'BEGIN { printf "%.1f s", to - from }'; }

# Waits until a command succeeds, for as many seconds at most.
wait_for() { # seconds command...
    local tries=$(($1 * 20))
    shift
    until "$@" >/dev/null 2>&1; do
        ((tries-- > 0)) || fail "waited in vain for: $*"
        sleep 0.05
    done
}

# Steps and losses in a run's log, as they are written there.
losses() { # run folder
    python3 - "$1/log.jsonl" <<'PYTHON'
import json, sys
for line in open(sys.argv[1]):
    line = json.loads(line, parse_float=str)
    if "loss_nats_per_token" in line:
        print(line["step"], line["loss_nats_per_token"])
PYTHON
}
num_steps() { losses "$1" 2>/dev/null | wc -l; }
has_steps() { (($(num_steps "$1") >= $2)); }

# Every loss, and every byte of weights and of the optimizer's state in the last checkpoint.
same_bits() { # what, run folder that was not interrupted, run folder
    local file
    diff <(losses "$2") <(losses "$3") >&2 || fail "$1: other losses"
    [[ $(cd "$2/latest/" && find . -name '*.safetensors' | wc -l) -ge 2 ]] || fail "$1: expected weights and the optimizer's state"
    while read -r file; do
        cmp "$2/latest/$file" "$3/latest/$file" >&2 || fail "$1: other bytes in $file"
    done < <(cd "$2/latest/" && find . -name '*.safetensors')
    [[ $(readlink "$2/latest") == "$(readlink "$3/latest")" ]] || fail "$1: another last checkpoint"
    printf '%s: %s losses and the last checkpoint have the same bits\n' "$1" "$(num_steps "$3")"
}
