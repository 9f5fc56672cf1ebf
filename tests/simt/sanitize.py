"""Runs the CUDA kernels on the emulator under the sanitizers: addresses and undefined behaviour, then races.

python tests/simt/sanitize.py [address] [thread]

The thread sanitizer's threads are the kernels' own: barriers and __syncwarp order their memory, nothing orders blocks.
"""

import os
import subprocess
import sys

import compile_host

SCHEDULES = {"address": ("forward", "reverse", "random1"), "thread": ("forward",)}
PROGRAMS = ("check_decode", "check_prefill")


def main(names: list[str]) -> int:
    if reason := compile_host.why_not_here():
        print(f"sanitizers not run on the CUDA kernels: {reason}")
        return 0
    for name in names or SCHEDULES:
        for program in PROGRAMS:
            built = compile_host.build(program, [f"tests/simt/{program}.cpp"], name)
            for schedule in SCHEDULES[name]:
                print(f"[{name}, {schedule}] {built}", flush=True)
                environment = {**os.environ, "SIMT_SCHEDULE": schedule, "TSAN_OPTIONS": "halt_on_error=1"}
                if code := subprocess.call([built], env=environment):
                    return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
