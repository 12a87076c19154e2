#!/usr/bin/env bash
# One run on a TPU slice of GKE, as a JobSet: bash launch/gke/jobset.sh [--dry_run] NAME IMAGE ACCELERATOR TOPOLOGY -- --config=FILE --workdir=DIR [...]
#
# ACCELERATOR is GKE's name of the TPU (tpu-v5p-slice, tpu-v5-lite-podslice, tpu-v6e-slice), TOPOLOGY that of the slice
# (4x4x4). IMAGE holds this folder as its working directory, with the package and jax[tpu] installed. DIR must be a folder that
# every pod sees (Filestore, or a bucket mounted by gcsfuse; gs:// is refused). The JobSet starts a pod for each host, restarts
# all of them where one is lost or stopped with work left (exit code 75), and every restart goes on from the last checkpoint;
# what is refused (exit code 2), a run that has failed at FRUITLESS restarts (default 3) without a new checkpoint among it, fails
# the JobSet for good. Needs the JobSet controller (0.6 or newer) in the cluster. CHIPS_PER_HOST (default 4) and RESTARTS (of all
# kinds together, default 100) come from the environment.
set -euo pipefail
# shellcheck source=launch/usage.sh
source "$(dirname "$0")/../usage.sh"

usage() { echo "refused: launch/gke/jobset.sh [--dry_run] NAME IMAGE ACCELERATOR TOPOLOGY -- --config=FILE --workdir=DIR ...: $1" >&2; exit 2; }

dry_run=""
if [ "${1:-}" = "--dry_run" ]; then dry_run=yes; shift; fi
[ $# -ge 4 ] || usage "expected name, image, accelerator and topology"
name=$1 image=$2 accelerator=$3 topology=$4
shift 4
[[ "$topology" =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || usage "topology '$topology', expected one such as 4x4 or 4x4x4"
[ "${1:-}" = "--" ] || usage "expected -- before the arguments of launch.train"
shift
[ $# -gt 0 ] || usage "no arguments for launch.train"

chips=$((${topology//x/*}))
per_host=${CHIPS_PER_HOST:-4}
hosts=$(((chips + per_host - 1) / per_host))
command=""
for word in "$@"; do command+=", \"${word//\"/\\\"}\""; done
manifest=$(cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-100}
    rules:
      - name: refused # a restart would be refused again
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: workers
      replicas: 1
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob # refused; every other code restarts the JobSet
                onExitCodes: {containerName: train, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300 # SIGTERM saves a checkpoint
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology
              containers:
                - name: train
                  image: $image
                  command: ["python", "-m", "launch.train", "--restarts=${FRUITLESS:-3}", "--distributed"$command]
                  resources:
                    requests: {google.com/tpu: $per_host}
                    limits: {google.com/tpu: $per_host}
END
)
if [ -n "$dry_run" ]; then
  echo "$manifest"
  exit 0
fi
command -v kubectl >/dev/null || { echo "refused: no kubectl here; --dry_run prints the manifest" >&2; exit 2; }
kubectl apply -f - <<<"$manifest"
