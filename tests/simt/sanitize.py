"""Runs the CUDA kernels on the emulator under the sanitizers: addresses and undefined behaviour, then races.

python tests/simt/sanitize.py [address] [thread]

The thread sanitizer's threads are the kernels' own: barriers and __syncwarp order their memory, nothing orders blocks.
"""

import os
import subprocess
import sys

import compile_host

SCHEDULES = {"address": ("forward", "reverse", "random1"), "thread": ("forward",)}


def main(names: list[str]) -> int:
    if reason := compile_host.why_not_here():
        print(f"sanitizers not run on the CUDA kernels: {reason}")
        return 0
    for name in names or SCHEDULES:
        program = compile_host.build("check_decode", ["tests/simt/check_decode.cpp"], name)
        for schedule in SCHEDULES[name]:
            print(f"[{name}, {schedule}] {program}", flush=True)
            environment = {**os.environ, "SIMT_SCHEDULE": schedule, "TSAN_OPTIONS": "halt_on_error=1"}
            if code := subprocess.call([program], env=environment):
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
