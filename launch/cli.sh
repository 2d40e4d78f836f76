# shellcheck shell=bash
# Sourced by the scripts that run commands elsewhere: `call COMMAND...` executes one
# after showing it, or, with --dry-run, prints it as a line that a shell reads back.
# Bash 4.4 or newer.

dry_run=
exec 3>&1 # what is printed inside $(...) is printed all the same

fail() { # fail MESSAGE: input that cannot be used
  echo "error: $1" >&2
  exit 2
}

usage() { # the comment at the head of the script
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

quoted() { # quoted WORD...: one line that a shell splits into the same words
  local word line=
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

call() {
  if [[ -n "$dry_run" ]]; then
    quoted "$@" >&3
  else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}
