#!/usr/bin/env bash
# One run on all hosts of a Cloud TPU slice: bash launch/tpu_pod.sh [--dry_run] NAME ZONE -- --config=FILE --workdir=DIR [...]
#
# Copies this folder to every worker of the TPU VM called NAME, installs it there with jax[tpu], and starts launch.train on
# all of them; JAX finds coordinator and rank in the slice's metadata. DIR must be one file system for all workers (Filestore, or
# a bucket mounted by gcsfuse). While a run is going on, the same command is refused; after a preemption, when the VM has been
# created again under its name, it goes on from the last checkpoint.
# PROJECT is read from the environment. SIGTERM at a maintenance event reaches every process, which save and end.
set -euo pipefail
# shellcheck source=launch/usage.sh
source "$(dirname "$0")/usage.sh"
cd "$(dirname "$0")/.."

usage() { echo "refused: launch/tpu_pod.sh [--dry_run] NAME ZONE -- --config=FILE --workdir=DIR ...: $1" >&2; exit 2; }

run() { if [ -n "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }

dry_run=""
if [ "${1:-}" = "--dry_run" ]; then dry_run=yes; shift; fi
[ $# -ge 2 ] || usage "expected the name of a TPU VM and its zone"
name=$1 zone=$2
shift 2
[ "${1:-}" = "--" ] || usage "expected -- before the arguments of launch.train"
shift
[ $# -gt 0 ] || usage "no arguments for launch.train"
if [ -z "$dry_run" ] && ! command -v gcloud >/dev/null; then
  echo "refused: no gcloud here; --dry_run prints what it would execute" >&2
  exit 2
fi

where=(--zone="$zone" ${PROJECT:+--project="$PROJECT"})
printf -v arguments ' %q' "$@"
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
run tar --exclude=.venv --exclude=.git --exclude=runs -czf "$archive" .
run gcloud compute tpus tpu-vm scp "$archive" "$name:jaxdistill.tar.gz" --worker=all "${where[@]}"
# one shell line on every worker: unpack, install once, train unless a run holds the lock
line="set -e; mkdir -p jaxdistill; tar -xzf jaxdistill.tar.gz -C jaxdistill; cd jaxdistill;"
line+=" [ -x .venv/bin/python ] || python3 -m venv .venv; .venv/bin/pip install -qq -e '.[tpu]';"
line+=" exec flock -n -E 2 /tmp/jaxdistill.lock .venv/bin/python -m launch.train --distributed$arguments"
run gcloud compute tpus tpu-vm ssh "$name" --worker=all "${where[@]}" --command="$line"
