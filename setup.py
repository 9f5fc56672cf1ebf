"""Builds the native kernels of zinit_kernels with one ninja graph; the metadata is in pyproject.toml.

    zinit_kernels/_C_cpu.so    operators on libtorch's stable ABI, no Python API: serves every torch >= 2.11

torch is never imported here: only its headers and two of its libraries are used. torch.utils.cpp_extension
has no per-file flags, and each instruction set below needs its own.

Environment: ZINIT_BUILD=0 installs without native kernels, CXX names the compiler, MAX_JOBS the number of
compilations at once, ZINIT_TORCH_DIR the torch to compile against. ccache is used where it is found.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
from toolchain import MIN_TORCH, accepts, fail, find_compiler, find_torch  # noqa: E402 (needs the line above)

CFLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]  # gcc 12: false alarms in its own AVX-512 headers
TORCH_TARGET = f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"

CPU_BINDINGS = ["csrc/cpu/dispatch.cpp", "csrc/cpu/bindings_attention.cpp", "csrc/cpu/bindings_decode.cpp"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
CPU_ISAS = {  # one object file each; dispatch.cpp picks at run time among those that were compiled
    "generic": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
}


def say(message: str):
    print(f"[zinit build] {message}", file=sys.stderr, flush=True)


def cpu_objects(compiler: list[str]) -> dict[str, list[str]]:
    """source -> its own flags, for the instruction sets that this compiler and machine type know."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = {name: flags for name, flags in CPU_ISAS.items() if x86 or not flags}
    for name in [name for name, flags in isas.items() if not accepts(compiler, flags)]:
        say(f"left out isa_{name}.cpp: {compiler[0]} does not know {isas.pop(name)[-1]}")
    objects = {f"csrc/cpu/isa_{name}.cpp": flags for name, flags in isas.items()}
    compiled = [f"-DZINIT_HAVE_{name.upper()}" for name in isas]
    return {**{source: [TORCH_TARGET, *compiled] for source in CPU_BINDINGS}, **objects}


# Each native part, a plain shared object: its module name and the function that lists its objects.
NATIVE_PARTS = {"zinit_kernels._C_cpu": cpu_objects}


def jobs() -> int:
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    return len(os.sched_getaffinity(0))


def escape(path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(words) -> str:
    return shlex.join(str(word) for word in words).replace("$", "$$")


class BuildNative(build_ext):
    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"  # no Python ABI in the name: there is none in the file

    def build_extensions(self):
        compiler, _ = find_compiler()
        torch = find_torch()
        if torch is None:
            minimum = ".".join(map(str, MIN_TORCH))
            fail(
                f"torch >= {minimum} was not found, its headers are needed to compile the kernels.\n"
                f"Install it first:  pip install 'torch>={minimum}' && pip install --no-build-isolation .\n"
                "or install without native kernels:  ZINIT_BUILD=0 pip install ."
            )
        say(f"{compiler[0]}, headers of torch {torch.version} at {torch.path}")
        # One folder whatever pip's temporary build folder is: `pip install -e .` again stays incremental.
        folder = ROOT / "build" / "native"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_graph(compiler, torch.path, folder))
        # Python's ninja before the system's: two versions in turn discard each other's log and rebuild all.
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        if shutil.which(ninja[0]) is None:
            fail("ninja was not found: pip install ninja")
        if subprocess.call([*ninja, "-C", str(folder), "-j", str(jobs())]):
            fail("the native kernels did not compile, see above; ZINIT_BUILD=0 installs without them")

    def ninja_graph(self, compiler: list[str], torch: Path, folder: Path) -> str:
        launcher = [name for name in ("ccache",) if shutil.which(name)]
        include = [f"-isystem{torch / 'include'}"]
        # error messages name the source file: by its path in the project, not by that of the build machine
        short_names = [f"-fmacro-prefix-map={path}/=" for path in (ROOT, torch / "include")]
        libraries = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        lines = [
            "rule compile",
            f"  command = {quote([*launcher, *compiler])} -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            "  description = link $out",
            f"  command = {quote(compiler)} -shared -o $out $in {quote(libraries)} -Wl,-z,defs -pthread",
        ]
        for extension in self.extensions:
            objects = []
            for source, flags in NATIVE_PARTS[extension.name](compiler).items():
                target = escape(folder / Path(source).with_suffix(".o"))
                flags = CFLAGS + short_names + WARNINGS + flags + (include if TORCH_TARGET in flags else [])
                lines += [f"build {target}: compile {escape(ROOT / source)}", f"  flags = {quote(flags)}"]
                objects.append(target)
            library = Path(self.get_ext_fullpath(extension.name)).resolve()
            library.parent.mkdir(parents=True, exist_ok=True)
            lines.append(f"build {escape(library)}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        python, abi, target = super().get_tag()
        return ("py3", "none", target) if self.distribution.ext_modules else (python, abi, target)


if __name__ == "__main__":
    compiler, reason = find_compiler()
    if compiler is None:
        say(f"installing without native kernels: {reason}")
    setup(
        ext_modules=[Extension(name, []) for name in NATIVE_PARTS] if compiler else [],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
    )
