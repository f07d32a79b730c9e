#!/usr/bin/env bash
# Run `make run` and `make test` on a Debian with only Python and make, as a user without
# privileges, and print how long each takes: tests/support/bare_machine.sh [target of make ...]
#
# Needs root, mmdebstrap and, like make itself, a package index: the settings and certificates of
# pip are those of this machine. Nothing remains: all processes and mounts end with their
# namespaces, and the directory is removed. The variable SUITE names another release of Debian.
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly LIMIT_S=1800
readonly USER_ID=1000
targets=("${@:-test}")

root=$(mktemp --directory)
trap 'rm --recursive --force --one-file-system "$root"' EXIT

mmdebstrap --quiet --variant=minbase --include=ca-certificates,make,python3,python3-venv \
  "${SUITE:-bookworm}" "$root"
cp /etc/hosts /etc/resolv.conf "$root/etc"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs"

home=$root/home/tester
mkdir --parents "$home/relay"
git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from=- |
  tar --extract --directory="$home/relay"
chown --recursive "$USER_ID:$USER_ID" "$home"

# The settings of pip on this machine, variables first, and the files and directories they name.
{
  echo "[global]"
  python3 -m pip config list | sed "s/^.*\.\([a-z-]*\)='\(.*\)'$/\1 = \2/; s/\\\\n/ /g" |
    awk -F ' = ' '!seen[$1]++'
} >"$root/etc/pip.conf"
mapfile -t named < <(grep --only-matching --extended-regexp '(= | |file://)/[^ ]+' \
  "$root/etc/pip.conf" | sed 's#^[^/]*##; s#^//##; s#^file://##; s#/simple$##' | sort --unique)

cat >"$home/run" <<'EOF'
set -u -m
cd ~/relay
touch ~/run.log
export RELAY__SERVER__PORT=0 RELAY__METRICS__PORT=0  # another relay may run on this machine
make run &>~/run.log &
until grep --quiet --word-regexp ready ~/run.log; do
  kill -0 $! || { cat ~/run.log; exit 1; }
  sleep 0.1
done
ready_s=$SECONDS
kill -INT -- -$!
wait
cat ~/run.log
unset RELAY__SERVER__PORT RELAY__METRICS__PORT
SECONDS=0
make "$@"
status=$?
echo "ready after $ready_s s; make $* ended after $SECONDS s with status $status"
exit $status
EOF

# shellcheck disable=SC2016 # the inner shell expands these
timeout --kill-after=10 "$LIMIT_S" unshare --mount --pid --fork --kill-child bash -euc '
  root=$1 user=$2
  shift 2
  mount --rbind /dev "$root/dev"
  mount --types proc proc "$root/proc"
  while [[ $1 != -- ]]; do
    if [[ -d $1 ]]; then mkdir --parents "$root$1"; mount --bind "$1" "$root$1"
    elif [[ -f $1 ]]; then mkdir --parents "$root${1%/*}"; cp "$1" "$root$1"; fi
    shift
  done
  exec chroot --userspec="$user:$user" "$root" env --ignore-environment HOME=/home/tester \
    PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 bash /home/tester/run "${@:2}"
' bash "$root" "$USER_ID" "${named[@]}" -- "${targets[@]}"
