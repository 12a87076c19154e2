"""Commands: python -m launch.train, and so on."""

import os
import signal
import sys


def _too_early(number: int, frame: object) -> None:
    os.write(2, b"interrupted; nothing was begun\n")
    os._exit(75)


# Under `python -m` sys.argv begins with "-m" until the module runs. This handler serves for the
# seconds of imports before `_command.main` sets its own. Programs that import this package keep
# theirs.
if sys.argv[:1] == ["-m"]:
    signal.signal(signal.SIGINT, _too_early)
