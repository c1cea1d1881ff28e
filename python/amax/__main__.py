"""``python -m amax`` is the program."""

import os
import subprocess
import sys

from ._program import find

if os.name == "posix":
    os.execv(find(), ["amax", *sys.argv[1:]])
sys.exit(subprocess.run([find(), *sys.argv[1:]]).returncode)
