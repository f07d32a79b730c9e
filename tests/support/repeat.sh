#!/usr/bin/env bash
# Run the tests again and again, as many runs at a time as there are cores, so that each run is a load
# for the others, and list what failed: tests/support/repeat.sh TIMES [argument of pytest ...]
#
# A test that fails once in a hundred runs has a cause: a race in the test or in the relay.
set -euo pipefail
cd "$(dirname "$0")/../.."

times=${1:?"how many times?"}
shift
logs=$(mktemp --directory)
export logs

# shellcheck disable=SC2329  # xargs invokes it
run() {
  local number=$1 log=$logs/$1.log
  shift
  SECONDS=0
  .venv/bin/python -m pytest -q -n auto --dist loadgroup "$@" >"$log" 2>&1 || touch "$logs/$number.failed"
  echo "run $number, $SECONDS s: $(tail -n 1 "$log")"
  grep --extended-regexp '^(FAILED|ERROR) ' "$log" || true
}
export -f run

# shellcheck disable=SC2016  # expanded by the shell that xargs starts
seq "$times" | xargs --max-procs="$(nproc)" -I{} bash -c 'run "$@"' run {} "$@"
failed=$(find "$logs" -name '*.failed' | wc -l)
echo "$failed of $times runs failed; logs: $logs"
exit $((failed > 0))
