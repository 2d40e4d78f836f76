#!/usr/bin/env bash
# Runs a game on a Cloud TPU slice of any size, from your own machine; see
# launch/README.md.
#
#   launch/tpu.sh COMMAND [FLAG...] [-- ARGUMENT...]
#
#   create    requests the slice (a queued resource) and waits until it is active
#   setup     copies the last commit to every VM and installs Python and JAX there
#   run       runs the game on all VMs; ARGUMENTs are those of adadfq_jax.main
#   stop      makes the game save and stop: run and resume end with exit code 130
#   resume    creates and sets up the slice where needed; runs until the game is done
#   fetch     copies the workdir to this machine, into the folder --to
#   delete    gives the slice back
#
#   --name=NAME        name of the slice                $TPU_NAME
#   --zone=ZONE        zone, as us-west4-a              $ZONE
#   --project=ID       gcloud's project by default      $PROJECT_ID
#   --type=TYPE        type and size, as v5litepod-8    $ACCELERATOR_TYPE
#   --runtime=VERSION  the type's image by default      $RUNTIME_VERSION
#   --spot             cheaper; may be preempted        $SPOT=1 (true, yes)
#   --workdir=DIR      gs://BUCKET/RUN, or a folder     $WORKDIR
#   --to=DIR           for fetch; runs/NAME by default
#   --file=FILE        for setup: a file, such as P's, for the clone on every VM;
#                      repeatable
#   --poll=SECONDS     seconds between two requests for the slice's state; 30
#   --dry-run          prints the commands, executes none
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
# shellcheck source=launch/cli.sh
source "$here/cli.sh"

name=${TPU_NAME:-} zone=${ZONE:-} project=${PROJECT_ID:-} type=${ACCELERATOR_TYPE:-}
runtime=${RUNTIME_VERSION:-} spot=${SPOT:-} workdir=${WORKDIR:-} to="" poll=30
files=()
now=        # state of the slice, see look
created=    # set where this process requested the slice, which is then not set up yet
lasting=600 # a run that lasted this many seconds did start
case "${spot,,}" in
  1 | true | yes) spot=1 ;;
  "" | 0 | false | no) spot= ;;
  *) fail "SPOT=$spot: 1 or 0 is needed" ;;
esac
command=${1:-}
shift || true
case "$command" in
  create | setup | run | stop | resume | fetch | delete) ;;
  -h | --help) usage && exit ;;
  *) fail "'$command': one of create, setup, run, stop, resume, fetch, delete is needed" ;;
esac
while (($#)); do
  case "$1" in
    --) shift && break ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --spot) spot=1 ;;
    --workdir=*) workdir=${1#*=} ;;
    --to=*) to=${1#*=} ;;
    --file=*) files+=("${1#*=}") ;;
    --poll=*) poll=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage && exit ;;
    *) fail "$1: no such flag; arguments of adadfq_jax.main come after --" ;;
  esac
  shift
done
arguments=("$@")

need() { # need VARIABLE FLAG WHAT
  [[ -n "${!1}" ]] || fail "$2 is needed: $3"
}

runtime_of() { # runtime_of TYPE: prints the image that Google names for the type
  case "$1" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "--runtime is needed: the image of $1 is not known" ;;
  esac
}

check() {
  need name --name "the slice, as you call it (or \$TPU_NAME)"
  [[ "$name" =~ ^[a-z][a-z0-9-]*$ ]] ||
    fail "--name=$name: only small letters, digits and - are allowed"
  need zone --zone "as in us-west4-a (or \$ZONE)"
  [[ -z "$type" || "$type" =~ -[0-9]+$ ]] ||
    fail "--type=$type: a type and its size are needed, as in v5litepod-8"
  case "$command" in
    create | resume)
      need type --type "as in v5litepod-8 (or \$ACCELERATOR_TYPE)"
      runtime=${runtime:-$(runtime_of "$type")}
      ;;
  esac
  case "$command" in
    run | resume | fetch)
      need workdir --workdir "as in gs://BUCKET/RUN (or \$WORKDIR)"
      ;;
  esac
  case "$command" in
    run | resume) ;;
    *) ((${#arguments[@]} == 0)) || fail "$command takes no arguments after --" ;;
  esac
  local argument file
  for argument in "${arguments[@]}"; do
    case "$argument" in
      -workdir* | --workdir*) fail "--workdir comes before --" ;;
    esac
  done
  case "$command:$workdir" in
    *:gs://*) ;;
    resume:*)
      fail "--workdir=$workdir: resume needs gs://BUCKET/RUN; a lost VM loses its disk"
      ;;
    run:*)
      [[ -z "$type" ]] || ((${type##*-} <= 8)) ||
        fail "--workdir=$workdir: the VMs of a $type share it: use gs://BUCKET/RUN"
      ;;
  esac
  [[ "$poll" =~ ^[0-9]+$ ]] || fail "--poll=$poll: a number of seconds is needed"
  for file in "${files[@]}"; do
    [[ -f "$file" ]] || fail "--file=$file: no such file"
  done
  command -v gcloud > /dev/null || [[ -n "$dry_run" ]] ||
    fail "gcloud is missing: https://cloud.google.com/sdk/docs/install"
}

on_all() { # on_all COMMAND-LINE: runs it on every VM; returns the first failure's code
  call gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all \
    --ssh-flag=-oServerAliveInterval=30 --command="$1"
}

look() { # look ASSUMED: sets $now to the slice's state; with --dry-run to ASSUMED
  # With list, unlike describe, a missing slice differs from a failure of gcloud.
  local list=(gcloud compute tpus queued-resources list "${place[@]}")
  list+=("--filter=name~/$name\$" "--format=value(state.state)")
  if [[ -n "$dry_run" ]]; then
    call "${list[@]}"
    now=$1
    return
  fi
  local attempt
  for attempt in 1 2 3 4 5; do
    ((attempt == 1)) || sleep "$poll"
    if now=$(call "${list[@]}"); then
      now=${now:-ABSENT}
      return
    fi
  done
  return 1
}

request() {
  local flags=("--node-id=$name" "--accelerator-type=$type")
  flags+=("--runtime-version=$runtime")
  [[ -z "$spot" ]] || flags+=(--spot)
  call gcloud compute tpus queued-resources create "$name" "${place[@]}" \
    "${flags[@]}" || return
  created=1
}

await() { # waits until the slice is active
  look ACTIVE || return
  while [[ "$now" != ACTIVE ]]; do
    case "$now" in
      ABSENT | FAILED | SUSPENDING | SUSPENDED | DELETING)
        echo "error: the request for $name is $now" >&2
        return 1
        ;;
    esac
    echo "$name: $now" >&2
    sleep "$poll"
    look ACTIVE || return
  done
}

create() {
  request && await
}

setup() {
  local archive="${TMPDIR:-/tmp}/adadfq_jax-$name.tar.gz"
  if [[ -n "$(git -C "$root" status --porcelain)" ]]; then
    echo "warning: changes that are not committed are not copied" >&2
  fi
  call git -C "$root" archive --format=tar.gz --output="$archive" HEAD || return
  call gcloud compute tpus tpu-vm scp "$archive" "$name:adadfq_jax.tar.gz" \
    "${place[@]}" --worker=all || return
  on_all "mkdir -p adadfq_jax && tar -xzf adadfq_jax.tar.gz -C adadfq_jax &&\
 ./adadfq_jax/launch/tpu_vm.sh setup" || return
  ((${#files[@]} == 0)) || call gcloud compute tpus tpu-vm scp "${files[@]}" \
    "$name:adadfq_jax/" "${place[@]}" --worker=all || return
  created=
}

run() {
  on_all "$(quoted ./adadfq_jax/launch/tpu_vm.sh run --distributed \
    "--workdir=$workdir" "${arguments[@]}")"
}

stop() {
  on_all "./adadfq_jax/launch/tpu_vm.sh stop"
}

ready() { # waits for an active slice; requests a new one where it was preempted
  look SUSPENDED || return
  while [[ "$now" != ACTIVE ]]; do
    case "$now" in
      ABSENT) request || return ;;
      SUSPENDED) delete && request || return ;;
      FAILED)
        echo "error: the request for $name FAILED; gcloud ... describe says why" >&2
        return 1
        ;;
      *)
        echo "$name: $now" >&2
        created=1
        sleep "$poll"
        ;;
    esac
    look ACTIVE || return
  done
}

resume() {
  local code begun lost=0
  while true; do
    ready || return
    code=0
    [[ -z "$created" ]] || setup || code=$?
    begun=$SECONDS
    ((code)) || run || code=$?
    case "$code" in
      0 | 130) return "$code" ;; # done, or stopped by the user
      75) continue ;;            # saved, since a VM was told to stop
    esac
    # Only failures in a row, each soon after the start, count against the limit below:
    # a run of days may lose its connection often.
    ((SECONDS - begun < lasting)) || lost=0
    sleep "$poll" # the state shows a preemption with a delay
    look ACTIVE || return
    [[ "$now" == ACTIVE ]] || continue
    # 1 or a signal's code: a process was lost, which ends all others; 255 is ssh's own.
    # Any other code is a refusal or a fault, which would only come again.
    if ((code > 1 && code < 129)) || ((++lost > 5)); then
      return "$code"
    fi
  done
}

fetch() {
  local folder
  # The folder has the name that scp gives it, so runs from a bucket and from a VM lie
  # side by side.
  to=${to:-$root/runs/$name} folder="$to/$(basename "$workdir")"
  call mkdir -p "$folder" || return
  case "$workdir" in
    gs://*) call gcloud storage rsync --recursive "$workdir" "$folder" ;;
    /*) fetch_from_vm "$workdir" ;;
    *) fetch_from_vm "adadfq_jax/$workdir" ;;
  esac
}

fetch_from_vm() {
  call gcloud compute tpus tpu-vm scp --recurse "$name:$1" "$to" "${place[@]}" \
    --worker=0
}

delete() {
  call gcloud compute tpus queued-resources delete "$name" "${place[@]}" \
    --force --quiet
}

check
place=("--zone=$zone")
[[ -z "$project" ]] || place+=("--project=$project")
"$command"
