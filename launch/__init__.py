"""Commands: python -m launch.train, and so on."""

import os
import signal
import sys


def _too_early(number: int, frame: object) -> None:
    os.write(2, b"interrupted; nothing was begun\n")
    os._exit(75)


if (
    sys.argv[:1] == ["-m"]
    # what Python has there while it looks for the module that it shall run: not where a program imports
    # us
):
    signal.signal(
        signal.SIGINT, _too_early
    )  # until `_command.main` listens: the imports take seconds
