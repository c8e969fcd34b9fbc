# shellcheck shell=bash
# What the launchers share: their arguments, one process watched, retries. Sourced, never run.
#
# Exit codes of `zoo train`: 0 done, or stopped by SIGTERM and saved; 2 a mistake to mend, never tried again; all else is a
# fault of the machine or the network, and the same line goes on from the last checkpoint.

me=${0##*/}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pause=${ZOO_RETRY_PAUSE:-10} # seconds before a retry

say() { echo "launch/$me: $*" >&2; }

fail() {
  say "$*"
  exit 2
}

# The header of the script is its usage.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# The words as one line that a shell reads as the same words. Quoted once more, it passes two shells.
quote() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=$(printf %q "$word")
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command; with --dry-run prints it.
step() {
  if [ -n "$dry_run" ]; then
    quote "$@"
  else
    "$@"
  fi
}

# The flags of `zoo train`, which pass through; a test compares them with the command line of zoo.
train_flags="--quiet"
train_valued="--profile --wandb --allow" # and a value behind

# parse "VALUED OPTIONS" "BARE OPTIONS" ARGUMENT...: `--some-option VALUE` or `--some-option=VALUE` becomes $some_option, a
# bare one becomes 1, in any order with the rest, which becomes ($train) = zoo train CONFIG ... and $config.
dry_run='' retries=10 config=''
parse() {
  local valued="${1:+$1 }retries" bare="${2:+$2 }dry-run" word option value
  shift 2
  if [ $# -eq 0 ]; then
    usage
    exit 2
  fi
  train=(zoo train)
  while [ $# -gt 0 ]; do
    word=$1
    shift
    case $word in
      -h | --help)
        usage
        exit 0
        ;;
      -*)
        option=${word%%=*}
        if [[ " $train_flags " == *" $word "* ]]; then
          train+=("$word")
        elif [[ " $train_valued " == *" $option "* ]]; then
          train+=("$word")
          if [ "$option" = "$word" ]; then
            [ $# -gt 0 ] || fail "$option needs a value behind it"
            train+=("$1")
            shift
          fi
        elif [[ " $valued " == *" ${option#--} "* ]]; then
          if [ "$option" != "$word" ]; then
            value=${word#*=}
          else
            [ $# -gt 0 ] || fail "$option needs a value behind it"
            value=$1
            shift
          fi
          if [ "$option" = --sbatch ]; then # the one that may come more than once
            sbatch_extra+=("$value")
          else
            option=${option#--}
            printf -v "${option//-/_}" %s "$value"
          fi
        elif [[ " $bare " == *" ${word#--} "* ]]; then
          option=${word#--}
          printf -v "${option//-/_}" 1
        else
          fail "no option ${option}; launch/$me without arguments lists them all"
        fi
        ;;
      *)
        if [ -z "$config" ]; then
          [[ $word != *=* ]] || fail "CONFIG must come before $word"
          config=$word
        elif [[ $word != *=* ]]; then
          fail "$word is neither field=value nor --flag; there is one CONFIG, $config"
        fi
        train+=("$word")
        ;;
    esac
  done
  [ -n "$config" ] || fail "which CONFIG? give a file such as configs/tarflow/digits.py or a name such as tarflow/digits"
  number retries "$retries"
}

number() { [[ $2 =~ ^[0-9]+$ ]] || fail "--$1 $2 is no number"; }

# A program that the launcher cannot do without.
need() { command -v "$1" >/dev/null 2>&1 || fail "$1 is not here; $2"; }

# The folder of the run as `zoo train` names it: tarflow-digits for configs/tarflow/digits.py, tarflow-digits-smoke for :smoke.
run_name() {
  local file=${config%%:*} part='' folder
  [[ $config != *:* ]] || part=-${config#*:}
  [ "$part" != -config ] || part=
  folder=$(cd "$(dirname "$file")" 2>/dev/null && pwd) || folder=$(dirname "$file")
  printf '%s-%s%s' "$(basename "$folder")" "$(basename "$file" .py)" "$part"
}

# Other machines get the repository alone: $config becomes a path in it.
in_repository() {
  local file=${config%%:*} base folder inside i
  if [ -f "$file" ]; then
    base=$(cd "$root" && pwd -P)
    folder=$(cd "$(dirname "$file")" && pwd -P)
    [[ $folder/ == "$base"/* ]] || fail "$file lies outside the repository, which is all that the other machines get"
    inside=${folder#"$base"}/$(basename "$file")${config#"$file"}
    for i in "${!train[@]}"; do
      if [ "${train[i]}" = "$config" ]; then train[i]=${inside#/}; fi
    done
  elif [[ $file == *.py && ! -f $root/$file ]]; then
    fail "there is no config file $file"
  fi
}

# in_bucket BUCKET NAME: where machines share no disk, the run goes to a bucket, unless the user has said where.
in_bucket() {
  local bucket=$1 word
  for word in "${train[@]}"; do
    [[ $word != workdir=* ]] || return 0
  done
  [ -n "$bucket" ] || fail "where shall the run be saved? give --bucket gs://BUCKET (or ZOO_BUCKET), or workdir=gs://BUCKET/FOLDER"
  [[ $bucket == gs://?* ]] || fail "--bucket $bucket is no bucket; write gs://BUCKET"
  train+=("workdir=${bucket%/}/runs/$2")
}

# The extras to install: those of the user, and what buckets need.
with_gcs() {
  local extras=${EXTRAS:-dev}
  [[ ,$extras, == *,gcs,* ]] || extras+=,gcs
  echo "$extras"
}
extras_for_train() { if [[ " ${train[*]}" == *[\ =]gs://* ]]; then with_gcs; else echo "${EXTRAS:-dev}"; fi; }

# --- one process, watched ---------------------------------------------------------------------------

stopped='' child='' code=0 interrupted='' pid_file=''

# How a stop reaches the training; launchers of other machines say it their way.
hand_on() { kill -TERM "$child" 2>/dev/null; }

# For traps: the training saves and ends, and nothing starts after it.
stop() {
  stopped=1 interrupted=1
  [ -z "$child" ] || hand_on || true
}

# Runs a command to its end and leaves its exit code in $code. It is in a process group of its own, so that Ctrl-C in a terminal
# comes as one SIGTERM, by way of stop.
run() {
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  [ -z "$pid_file" ] || echo "$child" >"$pid_file"
  while :; do # a signal ends `wait` early
    interrupted=
    if wait "$child"; then code=0; else code=$?; fi
    [ -n "$interrupted" ] || break
  done
  child=
}

# What has to be done before every try; where it fails, its code counts as that of the try.
before_try() { :; }

# Runs a command until it exits with 0 or 2, or is stopped, or $retries are used up. Leaves the exit code in $code.
retry() {
  local tries=0 failed
  while [ -z "$stopped" ]; do
    if before_try; then
      [ -z "$stopped" ] || break
      run "$@"
    fi
    if [ -n "$stopped" ] || [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then break; fi
    if [ "$tries" -ge "$retries" ]; then
      say "exit code $code, and no retry is left; the same line goes on from the last checkpoint"
      break
    fi
    tries=$((tries + 1))
    say "exit code $code; retry $tries of $retries in $pause seconds"
    failed=$code
    run sleep "$pause"
    code=$failed
  done
}

# One process of a pod, on its machine. Whoever sent it SIGTERM wanted the machine, not the run's end, so a save is no success
# (143 as for a process that SIGTERM killed): the pod starts again.
worker() {
  trap stop TERM INT HUP
  run "$root/launch/local.sh" "$@"
  if [ -n "$stopped" ] && [ "$code" -eq 0 ]; then code=143; fi
}
