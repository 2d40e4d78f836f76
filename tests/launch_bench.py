"""Stubs of gcloud, git and Slurm, which record what the launch scripts execute."""

import shutil
import subprocess
from pathlib import Path

LAUNCH = Path(__file__).parent.parent / "launch"

# Arguments of the job, with all that a shell could misread, and of tpu.sh.
ODD = ["--config=configs/x.py:w4a4,tpu", "--config.note=it's (48, 48, 3) $HOME; *"]
SETTINGS = ["--name=demo", "--zone=us-west4-a", "--type=v5litepod-16", "--poll=0"]
BUCKET = "--workdir=gs://bucket/run"

# Records what it is called with. Answers by the lines of the files `states` (of the
# slice, '-' for none) and `codes` (of the game); ends with code 7 where `fails` says.
STUB = r"""#!/bin/bash
here=$(dirname "$0")
take() { head -n 1 "$here/$1"; sed -i 1d "$here/$1"; }
[[ "$*" == *" status "* ]] && exit
{ printf '%s\0' "${0##*/}" "$@"; echo; } >> "$here/received"
if [[ -f "$here/fails" && "$*" == *"$(cat "$here/fails")"* ]]; then exit 7; fi
case "$*" in
  *"queued-resources list"*) take states | sed s/-// ;;
  *"tpu_vm.sh run"* | *adadfq_jax.main*) exit "$(take codes)" ;;
esac
"""


class Bench:
    """A copy of the scripts, and stubs that come first on the path."""

    def __init__(self, folder):
        self.stubs = folder / "stubs"
        self.stubs.mkdir()
        for name in ("gcloud", "git", "mkdir", "sbatch", "srun", "scontrol"):
            (self.stubs / name).write_text(STUB)
            (self.stubs / name).chmod(0o755)
        self.clone = folder / "clone"
        shutil.copytree(LAUNCH, self.clone / "launch")
        python = self.clone / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.touch(0o755)
        self.env = {
            "PATH": f"{self.stubs}:/usr/bin:/bin",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "SLURM_JOB_ID": "123",
        }

    def answer(self, name, *lines):
        (self.stubs / name).write_text("".join(f"{line}\n" for line in lines))

    def run(self, script, *arguments, **env):
        return subprocess.run(
            [self.clone / "launch" / script, *arguments],
            cwd=self.clone,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def received(self):
        """The commands that were executed, and forgets them."""
        file = self.stubs / "received"
        if not file.exists():
            return []
        commands = [line.split("\0")[:-1] for line in file.read_text().splitlines()]
        file.unlink()
        return commands

    def steps(self):
        """What was done, a word each."""
        words = ["list", "create", "delete", "scp", "tpu_vm.sh setup", "tpu_vm.sh run"]
        return [
            next((w.split()[-1] for w in words if w in " ".join(c)), c[0])
            for c in self.received()
        ]
