"""
Starts the plugin server as a gateway would, under conditions that a file names.

A gateway's start command is fixed for its life; this reads what to start from a control file each
time, so that a row can change it and let the gateway start the server anew. Uses the standard
library alone and becomes the plugin server (`execve`): the process is the product's own.
"""

import json
import os
import resource
import sys
from pathlib import Path


def main() -> None:
    control = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if control.get("crash"):
        sys.exit("chaos: this start fails, as an import error would")
    if control.get("nofile"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (control["nofile"], control["nofile"]))
    if control.get("output"):
        # A log on a full disk: every write fails.
        output = os.open(control["output"], os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
    os.chdir(control["root"])
    environ = {**os.environ, "PYTHONPATH": control["root"], **control.get("env", {})}
    os.execve(control["argv"][0], control["argv"], environ)


main()
