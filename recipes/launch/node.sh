#!/usr/bin/env bash
# Runs a launcher on one node of a cluster, so that it can be asked to stop and started again:
#     node.sh torchrun --nproc_per_node 8 recipes/bert.py --output /shared/runs/lamb --resume auto
# Launchers do not hand SIGUSR1 on: they die of it. Here SIGUSR1, SIGTERM and SIGINT reach the ranks as SIGUSR1, which
# write a checkpoint. torchrun and accelerate make 1 of every status; here it is that of the ranks: 138 if they were
# stopped (the same line goes on), 2 for bad input, 3 for a run that could not go on, 0 at its end.
set -u

# Ranks append their status; those that were stopped end with 0, which no launcher takes for a failure.
TRUSTRATIO_STATUS_FILE=$(mktemp) || exit 1
export TRUSTRATIO_STATUS_FILE
trap 'rm -f "$TRUSTRATIO_STATUS_FILE"' EXIT

descendants() {
    local file child
    grep -ls "^PPid:[[:space:]]*$1\$" /proc/[0-9]*/status | while IFS= read -r file; do
        child=${file#/proc/}
        echo "${child%/status}"
        descendants "${child%/status}"
    done
}

trap '' USR1 # What is ignored here, the launcher ignores, too. Ranks listen all the same.
"$@" &
launcher=$!
asked=
trap 'asked=yes' USR1 TERM INT

while kill -0 "$launcher" 2>/dev/null; do
    if [ -n "$asked" ]; then # every second: a rank that only starts does not listen yet
        for process in $(descendants "$launcher"); do kill -USR1 "$process" 2>/dev/null; done
    fi
    sleep 1 &
    wait $! # unlike sleep, this ends at once when a signal comes
done
wait "$launcher"
status=$?

# Of several, 2 and 3 say more than 138. What a launcher started anew and brought to its end has not failed.
own=$(sort -n "$TRUSTRATIO_STATUS_FILE" | head -n 1)
if [ -n "$own" ] && { [ "$status" != 0 ] || [ "$own" = 138 ]; }; then status=$own; fi
exit "$status"
