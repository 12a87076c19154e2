#!/usr/bin/env bash
# One run on all hosts of a Cloud TPU slice: bash launch/tpu_pod.sh [--dry_run] NAME ZONE -- --config=FILE --workdir=DIR [...]
#
# Copies this folder to every worker of the TPU VM called NAME, installs it there with jax[tpu], and starts launch.train on
# all of them; JAX finds coordinator and rank in the slice's metadata. Where a VM has no Python >= 3.11, uv brings one. FILE must
# lie in this folder: relative to where this is called, or to the checkout. DIR must be a folder on one file system for all
# workers (Filestore, or a bucket mounted by gcsfuse; gs:// is refused). While a run is going on, the same command is refused;
# after a preemption, when the VM has been created again under its name, it goes on from the last checkpoint.
# PROJECT is read from the environment. SIGTERM at a maintenance event reaches every process, which save and end with 75.
set -euo pipefail
# shellcheck source=launch/usage.sh
source "$(dirname "$0")/usage.sh"
here=$PWD
cd "$(dirname "$0")/.."

usage() { echo "refused: launch/tpu_pod.sh [--dry_run] NAME ZONE -- --config=FILE --workdir=DIR ...: $1" >&2; exit 2; }

# config FILE[:VARIANT]: the same from the checkout's root, which is where the workers start
config() {
  local file=${1%%:*} found
  found=$(realpath -m --relative-to=. "$here/$file")
  [[ "$file" = /* ]] && found=$(realpath -m --relative-to=. "$file")
  if [ -f "$found" ] && [[ "$found" = ../* ]]; then usage "--config=$file is outside of $PWD, which is what is copied"; fi
  if [ -f "$found" ]; then echo "$found${1#"$file"}"; else echo "$1"; fi
}

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
words=() before=""
for word in "$@"; do
  if [[ "$word" = --config=* ]]; then word=$(config "${word#--config=}"); word=--config=$word
  elif [ "$before" = --config ]; then word=$(config "$word"); fi
  words+=("$word") before=$word
done
printf -v arguments ' %q' "${words[@]}"
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
run tar --exclude=.venv --exclude=.git --exclude=runs -czf "$archive" .
run gcloud compute tpus tpu-vm scp "$archive" "$name:jaxdistill.tar.gz" --worker=all "${where[@]}"
# one shell line on every worker: unpack, a Python that is new enough, install, train unless a run holds the lock
new="import sys; sys.exit(sys.version_info < (3, 11))"
line="set -e; mkdir -p jaxdistill; tar -xzf jaxdistill.tar.gz -C jaxdistill; cd jaxdistill;"
line+=" if ! [ -x .venv/bin/pip ]; then for python in python3 python3.13 python3.12 python3.11; do"
line+=" if \$python -c '$new' 2>/dev/null && \$python -m venv --clear .venv; then break; fi; done; fi;"
line+=" if ! [ -x .venv/bin/pip ]; then rm -rf .venv; python3 -m pip install -qq --user uv;"
line+=" python3 -m uv venv -q --seed --python 3.12 .venv; fi; .venv/bin/pip install -qq -e '.[tpu]';"
line+=" exec flock -n -E 2 /tmp/jaxdistill.lock .venv/bin/python -m launch.train --distributed$arguments"
run gcloud compute tpus tpu-vm ssh "$name" --worker=all "${where[@]}" --command="$line"
