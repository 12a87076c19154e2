"""Commands: python -m launch.train, and so on."""

import os
import signal
import sys


def _too_early(number: int, frame: object) -> None:
    os.write(2, b"interrupted; nothing was begun\n")
    os._exit(75)


# Under `python -m` sys.argv begins with "-m" until the module runs. Imports then take seconds, in
# which nothing has begun; `_command.main` listens afterwards. Programs that import us keep theirs.
if sys.argv[:1] == ["-m"]:
    signal.signal(signal.SIGINT, _too_early)
