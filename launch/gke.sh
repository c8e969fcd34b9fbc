#!/usr/bin/env bash
# Train on one or more TPU slices of a GKE cluster, by way of the JobSet in launch/gke.yaml. The cluster needs JobSet
# (jobset.sigs.k8s.io, 0.8 or later) and GKE 1.28 or later; the service account must be allowed to write to the bucket.
#   launch/gke.sh [options] CONFIG [field=value ...] [--quiet]
#   launch/gke.sh --image IMAGE --accelerator tpu-v6e-slice --topology 4x4 --bucket gs://B configs/tarflow/imagenet64.py
# The image holds the repository in /zoo. From a fresh clone:
#   printf '%s\n' 'FROM python:3.13-slim' 'COPY . /zoo' 'RUN EXTRAS=dev,gcs,tpu /zoo/launch/local.sh true' >Dockerfile
#   docker build -t IMAGE . && docker push IMAGE
# A host that fails or is taken away makes all start again, from the last checkpoint; exit code 2 (a wrong config) does not.
# The same line again continues a JobSet that has ended. `kubectl delete jobset NAME` saves and ends it.
#   --image IMAGE        (ZOO_IMAGE)
#   --accelerator A      tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, tpu7x (ZOO_TPU_ACCELERATOR)
#   --topology T         of one slice, e.g. 2x4 or 4x4x4 (ZOO_TPU_TOPOLOGY)
#   --chips N            of one host (4, or ZOO_TPU_CHIPS)
#   --slices N           (1)
#   --bucket gs://B      (ZOO_BUCKET); not needed with workdir=gs://...
#   --name NAME          of the run and the JobSet (by default that of the config, e.g. tarflow-imagenet64)
#   --service-account S  (default, or ZOO_SERVICE_ACCOUNT)
#   --grace SECONDS      for the save when a host is taken away (300)
#   --retries N          at most so many restarts (10)
#   --dry-run            print the manifest
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# --- in the container
if [ "${1:-}" = --inside ]; then
  shift
  ulimit -l unlimited 2>/dev/null || true # the chips' driver pins memory
  worker "$@"
  exit "$code"
fi

# --- here
image=${ZOO_IMAGE:-}
accelerator=${ZOO_TPU_ACCELERATOR:-}
topology=${ZOO_TPU_TOPOLOGY:-}
chips=${ZOO_TPU_CHIPS:-4}
bucket=${ZOO_BUCKET:-}
service_account=${ZOO_SERVICE_ACCOUNT:-default}
slices=1 name='' grace=300
parse "image accelerator topology chips slices bucket name service-account grace" "" "$@"
[ -n "$image" ] || fail "which image? give --image IMAGE (or ZOO_IMAGE); launch/gke.sh without arguments says how to build it"
[ -n "$accelerator" ] || fail "which TPU? give --accelerator, e.g. tpu-v6e-slice (or ZOO_TPU_ACCELERATOR)"
[[ $topology =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] || fail "--topology '$topology' is none; write one such as 4x4 or 2x2x4 (or ZOO_TPU_TOPOLOGY)"
number chips "$chips"
number slices "$slices"
number grace "$grace"
name=${name:-$(run_name | tr 'A-Z_.' 'a-z--')}
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "--name '$name' is no name for a JobSet: up to 40 small letters, digits and dashes"
in_repository
in_bucket "$bucket" "$name"

product=$((${topology//x/*}))
[ "$chips" -gt 0 ] && [ "$product" -gt 0 ] && [ $((product % chips)) -eq 0 ] ||
  fail "--topology $topology has $product chips, which --chips $chips per host do not divide"
[ "$slices" -gt 0 ] || fail "--slices 0 is no slice"

# A JSON list of the words. Kubernetes replaces $(NAME) in them, and turns $$ into $.
json() {
  local word list=''
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || fail "there is a line break or another control character in $(quote "$word")"
    word=$(printf '%s' "$word" | sed 's/[\\"]/\\&/g')
    list+="${list:+, }\"${word//\$/\$\$}\""
  done
  printf '[%s]' "$list"
}

args=$(json "${train[@]}")
manifest=$(cat "$root/launch/gke.yaml")
fill() { manifest=${manifest//"\${$1}"/"$2"}; }
for value in "$image" "$accelerator" "$service_account"; do
  [[ $value =~ ^[A-Za-z0-9./:@_-]+$ ]] || fail "'$value' holds characters that no image, accelerator or service account has"
done
fill ZOO_NAME "$name"
fill ZOO_IMAGE "$image"
fill ZOO_TPU_ACCELERATOR "$accelerator"
fill ZOO_TPU_TOPOLOGY "$topology"
fill ZOO_TPU_CHIPS "$chips"
fill ZOO_HOSTS "$((product / chips))"
fill ZOO_SLICES "$slices"
fill ZOO_RETRIES "$retries"
fill ZOO_GRACE "$grace"
fill ZOO_SERVICE_ACCOUNT "$service_account"
fill ZOO_ARGS "$args" # last: nothing in them is a value to fill in

if [ -n "$dry_run" ]; then
  echo "# kubectl apply -f -"
  printf '%s\n' "$manifest"
  exit
fi
need kubectl "install it, and point it at the cluster"
# An ended JobSet stays as it is when applied again, so it makes room; one that runs is left alone.
ended=$(kubectl get jobset "$name" --ignore-not-found -o 'jsonpath={.status.conditions[?(@.status=="True")].type}') ||
  fail "kubectl found no JobSets; see the message above, or install JobSet in the cluster"
if [[ " $ended " == *" Completed "* || " $ended " == *" Failed "* ]]; then
  say "$name has ended before; starting it again"
  kubectl delete jobset "$name"
fi
printf '%s\n' "$manifest" | kubectl apply -f -
say "to watch: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
