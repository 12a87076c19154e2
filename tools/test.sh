#!/usr/bin/env bash
# Sets up what the tests need and runs them: bash tools/test.sh [--all] [pytest arguments]
# Without --all the first tier: every module and every method at least once, identities first, at most 10 minutes on two cores.
# With it the second tier too (tests marked `full`), as continuous integration does. Tests marked `slow` run by hand: -m slow.
# Real data is looked for in $JAXDISTILL_DATA, else in ../shared/data; tests that need it are skipped without.
set -euo pipefail
# shellcheck source=launch/usage.sh
source "$(dirname "$0")/../launch/usage.sh"
cd "$(dirname "$0")/.."

tier="not slow and not full"
if [ "${1:-}" = "--all" ]; then
  tier="not slow"
  shift
fi

source tools/environment.sh
install ".[dev,torch,tpu]" "torch==2.13.0"

export JAX_PLATFORMS=cpu
ruff check .
ruff format --check --quiet .
exec python -m pytest -q -m "$tier" -n "${JAXDISTILL_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
