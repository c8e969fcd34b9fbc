#!/usr/bin/env bash
# Train on all hosts of a Cloud TPU: copies the repository (what git tracks, as it is now, and new .py files) to every host,
# installs it there and starts the same line on each. Run it where it can stay, such as a small VM or tmux: it watches the run.
#   launch/tpu_pod.sh [options] CONFIG [field=value ...] [--quiet]
#   launch/tpu_pod.sh --tpu my-tpu --zone us-east5-b --bucket gs://my-bucket configs/tarflow/imagenet64.py
# The run is saved in gs://BUCKET/runs/NAME. A host that fails or is repaired makes all start again, from the last checkpoint;
# SIGTERM and Ctrl-C save and end. gcloud wants its key in an agent: ssh-add ~/.ssh/google_compute_engine
#   --tpu NAME       (ZOO_TPU_NAME)
#   --zone ZONE      (ZOO_TPU_ZONE)
#   --project P      (ZOO_TPU_PROJECT, or gcloud's own)
#   --queued         NAME is a queued resource: train on all its slices
#   --internal-ip    reach the hosts by their internal addresses
#   --bucket gs://B  (ZOO_BUCKET); not needed with workdir=gs://...
#   --name NAME      of the run (by default that of the config, e.g. tarflow-imagenet64)
#   --setup COMMAND  once on every host before installing, e.g. 'sudo apt-get update && sudo apt-get install -y python3.12 python3.12-venv'
#   --retries N      at most so many times (10)
#   --dry-run        print what would run
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# --- on a host: its copy lies in ~/zoo-launch, with the process that trains in .pid
still_there() { [[ "$(ps -o args= -p "$1" 2>/dev/null)" == *zoo*train* ]]; }

# An earlier process, left over where a connection broke, holds the chips: it saves and ends first.
stop_earlier() {
  local pid seconds=0
  pid=$(cat "$root/.pid" 2>/dev/null) || return 0
  while still_there "$pid"; do
    if [ "$seconds" -eq 0 ]; then kill -TERM "$pid" || true; fi
    if [ "$seconds" -eq 300 ]; then kill -KILL "$pid" || true; fi
    seconds=$((seconds + 1))
    sleep 1
  done
}

case ${1:-} in
  --stop)
    stop_earlier
    exit
    ;;
  --inside)
    shift
    stop_earlier
    pid_file=$root/.pid
    worker "$@"
    exit "$code"
    ;;
esac

# --- here
tpu=${ZOO_TPU_NAME:-}
zone=${ZOO_TPU_ZONE:-}
project=${ZOO_TPU_PROJECT:-}
bucket=${ZOO_BUCKET:-}
name='' setup='' queued='' internal_ip=''
parse "tpu zone project bucket name setup" "queued internal-ip" "$@"
[ -n "$tpu" ] || fail "which TPU? give --tpu NAME (or ZOO_TPU_NAME)"
[ -n "$zone" ] || fail "in which zone is $tpu? give --zone ZONE (or ZOO_TPU_ZONE)"
name=${name:-$(run_name)}
in_repository
in_bucket "$bucket" "$name"

tpus=(gcloud compute tpus tpu-vm) all=(--worker=all) state='state' good=READY
if [ -n "$queued" ]; then
  tpus=(gcloud compute tpus queued-resources) all=(--node=all --worker=all --batch-size=all) state='state.state' good=ACTIVE
fi
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")
[ -z "$internal_ip" ] || all+=(--internal-ip)

archive=${TMPDIR:-/tmp}/zoo-launch-$$.tar.gz
# Through an index of its own: the user's is not touched.
# shellcheck disable=SC2016
pack=(env "GIT_INDEX_FILE=$archive.index" bash -c 'cd "$1" && git read-tree HEAD && git add --update && git add -- "*.py" && git archive --format=tar.gz --output="$2" "$(git write-tree)"' pack "$root" "$archive")
copy=("${tpus[@]}" scp "$archive" "$tpu:zoo-launch.tar.gz" "${where[@]}" "${all[@]}")
# A quiet connection is kept alive, and one that would ask something fails instead.
ssh=("${tpus[@]}" ssh "$tpu" "${where[@]}" "${all[@]}" --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oBatchMode=yes)

# What the hosts run, quoted for their shells.
ask_stop="cd zoo-launch && launch/tpu_pod.sh --stop"
prepare="mkdir -p zoo-launch && cd zoo-launch"
prepare+=" && if [ -x launch/tpu_pod.sh ]; then launch/tpu_pod.sh --stop; fi"
prepare+=" && rm -rf zoo configs launch tests && tar -xzf ../zoo-launch.tar.gz"
[ -z "$setup" ] || prepare+=" && { $setup; }"
prepare+=" && $(quote env "EXTRAS=$(with_gcs)" launch/local.sh true)"
start="cd zoo-launch && exec $(quote env "EXTRAS=$(with_gcs)" launch/tpu_pod.sh --inside "${train[@]}")"

# Waits while the TPU is being repaired. One that is gone does not come back by itself.
ready() {
  local now told=''
  while [ -z "$stopped" ]; do
    now=$("${tpus[@]}" describe "$tpu" "${where[@]}" "--format=value($state)") || return 1
    case $now in
      "$good") return 0 ;;
      CREATING | STARTING | RESTARTING | REPAIRING | REIMAGING | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES)
        [ -n "$told" ] || say "$tpu is $now; waiting"
        told=1
        run sleep "${ZOO_TPU_POLL:-30}"
        ;;
      *) fail "$tpu is ${now:-in no known state}; make it anew and start the same line again: the run goes on" ;;
    esac
  done
}

before_try() {
  code=1
  ready || return
  [ -z "$stopped" ] || return 0
  "${copy[@]}" || return
  "${ssh[@]}" "--command=$prepare" || {
    code=$?
    return "$code"
  }
}

if [ -n "$dry_run" ]; then
  step "${pack[@]}"
  step "${tpus[@]}" describe "$tpu" "${where[@]}" "--format=value($state)"
  step "${copy[@]}"
  step "${ssh[@]}" "--command=$prepare"
  step "${ssh[@]}" "--command=$start"
  exit
fi

need gcloud "install the Google Cloud CLI"
need git "it lists the files to copy"
trap 'rm -f "$archive" "$archive.index"' EXIT
"${pack[@]}" || fail "could not pack the repository; see the message above"
# shellcheck disable=SC2329 # stop calls it
hand_on() {
  say "asking every host to save and end"
  "${ssh[@]}" "--command=$ask_stop"
}
trap stop TERM INT HUP
retry "${ssh[@]}" "--command=$start"
if [ -n "$stopped" ] && [ "$code" -eq 143 ]; then code=0; fi # every host has saved
exit "$code"
