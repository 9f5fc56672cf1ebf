"""Compiles the CPU kernels and check_kernels.cpp under the sanitizers and runs them: no torch, no Python inside.

python tests/native/sanitize.py [address] [thread]
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "build_backend")]
from toolchain import find_compiler, why_pure_python  # noqa: E402 (needs the line above)

from setup import WARNINGS, cpu_objects, escape, jobs, quote  # noqa: E402

SANITIZERS = {"address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread"}
CFLAGS = ["-std=c++20", "-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]


def ninja_graph(compiler: list[str], folder: Path, sanitizer: str) -> str:
    sources = cpu_objects(compiler)
    kernels = {source: flags for source, flags in sources.items() if "/isa_" in source}
    kernels["tests/native/check_kernels.cpp"] = [f for f in sources["csrc/cpu/dispatch.cpp"] if "HAVE" in f]
    lines = [
        "rule compile",
        f"  command = {quote(compiler)} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        f"  description = compile $in for {sanitizer}",
        "rule link",
        f"  command = {quote(compiler)} {SANITIZERS[sanitizer]} -o $out $in -pthread",
        "  description = link $out",
    ]
    objects = []
    for source, flags in kernels.items():
        objects.append(escape(folder / Path(source).with_suffix(".o")))
        flags = [*CFLAGS, *WARNINGS, SANITIZERS[sanitizer], f"-I{ROOT / 'csrc'}", *flags]
        lines += [f"build {objects[-1]}: compile {escape(ROOT / source)}", f"  flags = {quote(flags)}"]
    lines.append(f"build {escape(folder / 'check_kernels')}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> int:
    compiler, reason = find_compiler()
    if compiler is None or why_pure_python():
        print(f"sanitizers not run: {why_pure_python() or reason}")
        return 0
    ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
    for name in names or SANITIZERS:
        folder = ROOT / "build" / f"sanitize-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_graph(compiler, folder, name))
        for command in (
            [*ninja, "--quiet", "-C", str(folder), "-j", str(jobs())],
            [str(folder / "check_kernels")],
        ):
            print(f"[{name}] {quote(command)}", flush=True)
            if code := subprocess.call(command):
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
