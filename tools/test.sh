#!/usr/bin/env bash
# Sets up what the tests need and runs them: bash tools/test.sh [pytest arguments]
# Real data is looked for in $JAXDISTILL_DATA, else in ../shared/data; tests that need it are skipped without.
set -euo pipefail
# shellcheck source=launch/usage.sh
source "$(dirname "$0")/../launch/usage.sh"
cd "$(dirname "$0")/.."

source tools/environment.sh
install ".[dev,torch,tpu]" "torch==2.13.0"

export JAX_PLATFORMS=cpu
ruff check .
ruff format --check --quiet .
exec python -m pytest -q -n "${JAXDISTILL_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
