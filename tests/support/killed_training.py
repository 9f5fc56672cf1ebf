"""`zinit train` as torchrun starts it; kill -9 ends the second process once, in the middle of the run.

The process kills itself: a test that looks for it from outside comes too late where the run is faster than the test.
"""

import os
import signal

from model import train
from model.errors import run_program
from model.run_folder import MetricsLog

STEP = 3  # of six


class KilledLog(MetricsLog):
    def write(self, **entry):
        is_first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if os.environ["RANK"] == "1" and is_first_start and "loss" in entry and entry["step"] == STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(**entry)


if __name__ == "__main__":
    from model import run_output

    run_output.MetricsLog = KilledLog
    run_program(train.main)
