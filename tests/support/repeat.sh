#!/usr/bin/env bash
# Run the tests again and again beside a load that keeps all cores busy, and count what failed:
# tests/support/repeat.sh TIMES [argument of pytest ...]
#
# A test that fails once in a hundred runs has a cause: a race in the test or in the relay.
set -euo pipefail
cd "$(dirname "$0")/../.."

times=${1:?"how many times?"}
shift
logs=$(mktemp --directory)
burning=()
trap 'kill "${burning[@]}"' EXIT
for ((core = 0; core < $(nproc); core++)); do
  (while :; do :; done) &
  burning+=($!)
done

failed=0
for ((run = 1; run <= times; run++)); do
  SECONDS=0
  log=$logs/$run.log
  .venv/bin/python -m pytest -q -n auto --dist loadgroup "$@" >"$log" 2>&1 || failed=$((failed + 1))
  echo "run $run of $times, $SECONDS s: $(tail -n 1 "$log")"
  grep --extended-regexp '^(FAILED|ERROR) ' "$log" || true
done
echo "$failed of $times runs failed; logs: $logs"
exit $((failed > 0))
