# shellcheck shell=bash
# Other scripts source this file. `call COMMAND...` shows a command and executes it;
# with --dry-run it only prints the command, as a line that a shell reads back. The file
# needs Bash 4.4 or newer.

dry_run=
exec 3>&1 # commands that are printed inside $(...) reach the terminal through it

fail() { # fail MESSAGE: ends the script with exit code 2
  echo "error: $1" >&2
  exit 2
}

usage() { # prints the comment at the head of the script
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

quoted() { # quoted WORD...: prints a line that a shell splits into the same words
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
