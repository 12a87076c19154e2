#!/usr/bin/env bash
# One run on a Slurm cluster of GPU nodes: bash launch/slurm.sh [--dry_run] NODES -- --config=FILE --workdir=DIR [--config.key=value ...]
#
# Submits a job of NODES nodes with a process for each GPU (GPUS_PER_NODE, default 8). JAX finds coordinator and rank in
# Slurm's environment. DIR must be a folder on a file system that all nodes see. A process that is lost ends the job step
# (--kill-on-bad-exit) and the job goes back into the queue (--requeue), where it goes on from its last checkpoint; five
# minutes before the time limit, and on preemption, every process gets SIGTERM, saves and ends with 75, and the job goes back
# too. What is refused (2) does not, and neither does a run that has failed at FRUITLESS restarts (default 3) without a new
# checkpoint. A relative FILE or DIR is one of the folder where this is called; FILE is then looked for in the checkout too.
# PARTITION, ACCOUNT, TIME (default 24:00:00), CPUS (a process, default 12) and SBATCH_EXTRA are read from the environment.
set -euo pipefail
# shellcheck source=launch/usage.sh
source "$(dirname "$0")/usage.sh"
root=$(cd "$(dirname "$0")/.." && pwd)

usage() { echo "refused: launch/slurm.sh [--dry_run] NODES -- --config=FILE --workdir=DIR ...: $1" >&2; exit 2; }

dry_run=""
if [ "${1:-}" = "--dry_run" ]; then dry_run=yes; shift; fi
nodes=${1:-}
[[ "$nodes" =~ ^[1-9][0-9]*$ ]] || usage "expected the number of nodes, found '${nodes}'"
shift
[ "${1:-}" = "--" ] || usage "expected -- before the arguments of launch.train"
shift
[ $# -gt 0 ] || usage "no arguments for launch.train"

gpus=${GPUS_PER_NODE:-8}
printf -v python %q "${PYTHON:-$root/.venv/bin/python}"
printf -v path %q "$root"
printf -v arguments ' %q' "$@"
job=$(cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=jaxdistill
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --cpus-per-task=${CPUS:-12}
#SBATCH --time=${TIME:-24:00:00}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=TERM@300
${PARTITION:+#SBATCH --partition=$PARTITION}
${ACCOUNT:+#SBATCH --account=$ACCOUNT}
set -euo pipefail
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
export PYTHONPATH=$path\${PYTHONPATH:+:\$PYTHONPATH}
# --kill-on-bad-exit: one lost process ends the step at once, instead of the others waiting for it
code=0
srun --kill-on-bad-exit=1 --wait=60 $python -m launch.train --distributed$arguments --restarts=${FRUITLESS:-3} || code=\$?
case \$code in
  0 | 2) exit \$code ;; # done; refused, as a rerun would be
  75) echo "stopped with work left; back into the queue" >&2 ;;
  *) echo "a process was lost (exit code \$code); back into the queue" >&2 ;;
esac
scontrol requeue "\$SLURM_JOB_ID"
END
)
if [ -n "$dry_run" ]; then
  echo "$job"
  exit 0
fi
command -v sbatch >/dev/null || { echo "refused: no sbatch here; --dry_run prints the job" >&2; exit 2; }
read -r -a extra <<<"${SBATCH_EXTRA:-}"
sbatch "${extra[@]}" <<<"$job"
