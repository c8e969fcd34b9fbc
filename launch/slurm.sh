#!/usr/bin/env bash
# Train on the GPUs of one or more nodes of a Slurm cluster: submits a job with one process per node. The clone, and the
# virtual environment made in it, must lie where all nodes see them.
#   launch/slurm.sh [options] CONFIG [field=value ...] [--quiet]
#   launch/slurm.sh --nodes 2 --partition gpu configs/tarflow/imagenet64.py workdir=/shared/runs/imagenet64
# A crash is tried again within the job. Before its time is up the job saves, and queues up again; so does one whose node
# failed. `scancel --signal=TERM JOB` saves and ends it; `scancel JOB` ends it at once.
#   --nodes N        (1, or ZOO_SLURM_NODES)
#   --gpus N         per node, all of them (8, or ZOO_SLURM_GPUS)
#   --cpus N         per node; by default whole nodes are asked for
#   --time LIMIT     of one turn (24:00:00, or ZOO_SLURM_TIME)
#   --grace SECONDS  for the save before the time is up (120)
#   --partition P    (ZOO_SLURM_PARTITION, or the cluster's own)
#   --account A      (ZOO_SLURM_ACCOUNT, or the cluster's own)
#   --sbatch OPTION  anything else of sbatch, e.g. --sbatch=--constraint=h100; may be repeated
#   --retries N      at most so many times in one turn (10)
#   --dry-run        print what would run
set -euo pipefail

# task NODES CPUS: one process per node. srun takes CPUs of the job only when told how many; it has all if it binds to none.
task() {
  tasks=(srun "--ntasks=$1" --ntasks-per-node=1)
  if [ "$2" -gt 0 ]; then tasks+=("--cpus-per-task=$2"); else tasks+=(--cpu-bind=none); fi
}

# --- in the job: slurm.sh --inside ROOT EXTRAS CPUS RETRIES zoo train ... Slurm runs a copy of this file from elsewhere.
if [ "${1:-}" = --inside ]; then
  # shellcheck source=launch/lib.sh
  . "$2/launch/lib.sh"
  me=slurm.sh extras=$3 cpus=$4 retries=$5
  shift 5

  # SIGTERM to srun would kill its tasks at once, so both signals go to the tasks or nowhere. The warning is SIGUSR1 and
  # not SIGTERM, which is what a cancelled job gets: that one must not queue up again.
  time_is_up=
  # shellcheck disable=SC2329 # stop calls it
  hand_on() { [ -z "$time_is_up" ] || scancel --signal=TERM "$SLURM_JOB_ID"; }
  trap 'time_is_up=1; stop' USR1
  trap stop TERM

  env "EXTRAS=$extras" "$root/launch/local.sh" true || exit 2 # once, before all nodes want it at once
  task "$SLURM_JOB_NUM_NODES" "$cpus"
  retry "${tasks[@]}" env "EXTRAS=$extras" "$root/launch/local.sh" "$@"

  if [ -n "$time_is_up" ] && [ "$code" -ne 2 ]; then
    say "the time is up; queueing up again to go on"
    scontrol requeue "$SLURM_JOB_ID" || {
      say "could not queue up again; submit the same line to go on"
      exit 1
    }
  fi
  exit "$code"
fi

# --- on the login node
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
nodes=${ZOO_SLURM_NODES:-1}
gpus=${ZOO_SLURM_GPUS:-8}
time=${ZOO_SLURM_TIME:-24:00:00}
partition=${ZOO_SLURM_PARTITION:-}
account=${ZOO_SLURM_ACCOUNT:-}
cpus=0 grace=120
sbatch_extra=()
parse "nodes gpus cpus time grace partition account sbatch" "" "$@"
number nodes "$nodes"
[[ $gpus =~ ^([A-Za-z0-9_.-]+:)?[0-9]+$ ]] || fail "--gpus $gpus is no number of GPUs; write 8 or h100:8"
number grace "$grace"
number cpus "$cpus"

job=(sbatch "--job-name=$(run_name)" "--nodes=$nodes" --ntasks-per-node=1 "--gpus-per-node=$gpus" "--time=$time")
if [ "$cpus" -gt 0 ]; then job+=("--cpus-per-task=$cpus"); else job+=(--exclusive --mem=0); fi
[ -z "$partition" ] || job+=("--partition=$partition")
[ -z "$account" ] || job+=("--account=$account")
job+=("--signal=B:USR1@$grace" --requeue --open-mode=append)
[ ${#sbatch_extra[@]} -eq 0 ] || job+=("${sbatch_extra[@]}")
extras=$(extras_for_train)
job+=("$root/launch/slurm.sh" --inside "$root" "$extras" "$cpus" "$retries" "${train[@]}")

if [ -z "$dry_run" ]; then need sbatch "run this on a login node of the cluster"; fi
step "${job[@]}"
if [ -n "$dry_run" ]; then
  task "$nodes" "$cpus"
  echo "# in the job:"
  echo "#   $(quote env "EXTRAS=$extras" "$root/launch/local.sh" true)"
  echo "#   $(quote "${tasks[@]}" env "EXTRAS=$extras" "$root/launch/local.sh" "${train[@]}")"
fi
