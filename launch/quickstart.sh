#!/usr/bin/env bash
# A teacher, a one-step student, a report and an export, on embedded data: bash launch/quickstart.sh [WORKDIR]
# Makes .venv unless an environment is active. Run it again to go on where it was stopped.
set -euo pipefail
# shellcheck source=launch/usage.sh
source "$(dirname "$0")/usage.sh"
if [ $# -gt 1 ] || [[ "${1:-}" == -* ]]; then
  echo "refused: launch/quickstart.sh [WORKDIR]: found '$*'" >&2
  exit 2
fi
case ${1:-} in
  "") workdir=runs/quickstart ;; # of the checkout
  /*) workdir=$1 ;;
  *) workdir=$PWD/$1 ;;
esac
cd "$(dirname "$0")/.."

source tools/environment.sh
install .

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} # the digits take minutes on two cores
python -m launch.train --config=configs/digits/dmd2.py --workdir="$workdir"
python -m launch.export --workdir="$workdir"
cat <<END

Look at   $workdir/report.html
PyTorch   $workdir/export loads with diffusers' DiTTransformer2DModel.from_pretrained
Next      python -m launch.train --config=configs/digits/dmd2.py --workdir=runs/no_gan \\
            --config.roles.teacher.init=$workdir/teacher --config.method.gan_weight=0
END
