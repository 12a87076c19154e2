# shellcheck shell=bash
# Sourced by launch/quickstart.sh and tools/test.sh: an environment with Python >= 3.11 and the package in it.

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  # shellcheck source=launch/usage.sh
  source "$(dirname "$0")/../launch/usage.sh"
  echo "refused: tools/environment.sh: no command of its own; launch/quickstart.sh and tools/test.sh source it" >&2
  exit 2
fi

if [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    for python in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
      if [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "making .venv with $("$python" --version)"
        "$python" -m venv .venv
        break
      fi
    done
  fi
  if [ ! -x .venv/bin/python ]; then
    echo "refused: Python >= 3.11 is needed; set PYTHON=/path/to/python" >&2
    exit 2
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi

# install PIP_ARGUMENTS...: once for each state of setup.py
install() {
  local stamp
  stamp="$VIRTUAL_ENV/.jaxdistill_$(cat setup.py <(echo "$@") | cksum | cut -d' ' -f1)"
  if [ ! -e "$stamp" ]; then
    echo "installing into $VIRTUAL_ENV"
    python -m pip install -qq --upgrade pip
    python -m pip install -qq --editable "$@"
    touch "$stamp"
  fi
}
