"""Builds the native kernels of zinit_kernels with one ninja graph; the metadata is in pyproject.toml.

    zinit_kernels/_C_cpu.so    operators on libtorch's stable ABI, no Python API: serves every torch >= 2.11
    zinit_kernels/_C_cuda.so   the same for NVIDIA GPUs, where there are nvcc and a torch built for CUDA
    zinit_kernels/_C_host...so beside that, if pybind11 is there: the CUDA launcher's plans and the build's facts

torch is never imported here: only its headers and two of its libraries are used. torch.utils.cpp_extension
has no per-file flags, and each instruction set below needs its own.

Environment: ZINIT_BUILD=0 installs without native kernels, CXX names the compiler, MAX_JOBS the number of
compilations at once, ZINIT_TORCH_DIR the torch to compile against. ZINIT_CUDA=0 leaves the CUDA kernels out,
1 builds them for a torch without CUDA too and fails where it cannot; CUDA_HOME names the toolkit,
TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") the chips. ZINIT_HOST=0 leaves _C_host out, so that a wheel with CUDA kernels
serves every Python; ZINIT_VERSION_TAG=cu130 makes its version 0.1.0+cu130. ccache is used where it is found.
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
from toolchain import (  # noqa: E402 (needs the line above)
    MIN_TORCH,
    Cuda,
    Torch,
    accepts,
    cuda_for,
    fail,
    find_compiler,
    find_torch,
    why_no_host,
    why_pure_python,
)

CFLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]  # gcc 12: false alarms in its own AVX-512 headers
TORCH_TARGET = f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"

NVCC_FLAGS = [  # the time that each file takes is printed
    "-std=c++20", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all",
    "-Xptxas=-v",
]  # fmt: skip

CPU_PART, CUDA_PART, HOST_PART = "zinit_kernels._C_cpu", "zinit_kernels._C_cuda", "zinit_kernels._C_host"
CPU_BINDINGS = [
    "csrc/cpu/dispatch.cpp", "csrc/cpu/bindings_attention.cpp", "csrc/cpu/bindings_decode.cpp",
    "csrc/cpu/bindings_linear.cpp", "csrc/cpu/bindings_layers.cpp", "csrc/cpu/bindings_rows.cpp",
]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
CPU_ISAS = {  # one object file each; dispatch.cpp picks at run time among those that were compiled
    "generic": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],  # every chip with the second has the first
}

CUDA_BINDINGS = ["csrc/cuda/bindings_attention.cpp", "csrc/cuda/bindings_decode.cpp", "csrc/cuda/build.cpp"]
CUDA_KERNELS = [
    *(f"csrc/cuda/decode/{name}.cu" for name in ("decode", "decode_bf16", "decode_fp16", "decode_fp32")),
    *(f"csrc/cuda/prefill/{name}.cu" for name in ("prefill", "prefill_bf16", "prefill_fp16")),
    "csrc/cuda/prompt/prompt.cu",
]
# A100; 30 and 40 series, L40S; H100, H200; B200; 50 series. Those that nvcc does not know are left out. The PTX of 10.0
# is for 10.3 and 11.0 (Thor): a chip takes no PTX that was made for a newer one.
CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0+PTX;12.0+PTX"


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


def arch_flags(cuda: Cuda) -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, or the chips of this machine, or CUDA_ARCHS; PTX of the last one too."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    archs = [arch for arch in re.split(r"[;, ]+", named or ";".join(chips_here()) or CUDA_ARCHS) if arch]
    if not named:
        listed = subprocess.run(
            [cuda.path / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True
        )
        known = set(listed.stdout.split())
        there = [arch for arch in archs if f"compute_{arch.replace('.', '').removesuffix('+PTX')}" in known]
        if (
            not there
        ):  # nvcc is older than the only chip: the driver compiles the PTX of the newest that it knows
            numbers = [int(name.removeprefix("compute_")) for name in known if name[8:].isdigit()]
            there = [f"{max(numbers) // 10}.{max(numbers) % 10}"]
        archs = [*there[:-1], there[-1].removesuffix("+PTX") + "+PTX"]
    old = [arch for arch in archs if re.match(r"[1-7]\.", arch)]
    if old and len(old) < len(archs):  # lists for all of torch name them: NVIDIA's containers do
        say(f"left out {', '.join(old)} of TORCH_CUDA_ARCH_LIST: the kernels are written for 8.0 and newer")
        archs = [arch for arch in archs if arch not in old]
    flags = []
    for arch in archs:
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if parts is None:
            fail(f"TORCH_CUDA_ARCH_LIST must hold chips like 8.0, 9.0a or 9.0+PTX, got {arch!r}")
        number = "".join(parts.groups()[:3])
        if int(parts[1]) < 8:
            fail(f"TORCH_CUDA_ARCH_LIST names {arch}; the kernels are written for 8.0 and newer")
        codes = [f"sm_{number}", *([f"compute_{number}"] if parts[4] else [])]
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def chips_here() -> list[str]:
    """The chips of this machine, "9.0", from the oldest to the newest; none where they are not to be asked for.

    A wheel that is made for others (ZINIT_VERSION_TAG) serves all chips. Each chip takes as long to compile for as the
    first one, a minute on one core.
    """
    program = shutil.which("nvidia-smi")
    if program is None or os.environ.get("ZINIT_VERSION_TAG"):
        return []
    try:
        asked = subprocess.run(
            [program, "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = {tuple(map(int, arch)) for arch in re.findall(r"^(\d+)\.(\d)\s*$", asked.stdout, re.MULTILINE)}
    return (
        [f"{major}.{minor}" for major, minor in sorted(found) if major >= 8] if asked.returncode == 0 else []
    )


def cuda_objects(cuda: Cuda) -> dict[str, list[str]]:
    """source -> its own flags; nvcc compiles what ends in .cu."""
    bindings = {
        source: [TORCH_TARGET, "-DUSE_CUDA", f"-isystem{cuda.path / 'include'}"] for source in CUDA_BINDINGS
    }
    archs = arch_flags(cuda)
    built = " ".join([".".join(map(str, cuda.version)), *(flag.split(",code=")[1] for flag in archs)])
    bindings["csrc/cuda/build.cpp"].append(f'-DZINIT_CUDA_BUILD="{built}"')
    return {**bindings, **{source: archs for source in CUDA_KERNELS}}


def host_objects(cuda: Cuda, torch: Torch, folder: Path) -> dict[str, list[str]]:
    """source -> its own flags; the facts go in as JSON."""
    import pybind11

    facts = {
        "cuda": ".".join(map(str, cuda.version)),
        "torch": torch.version,
        "archs": [flag.split(",code=")[1] for flag in arch_flags(cuda)],
    }
    literal = json.dumps(json.dumps(facts))
    include = [sysconfig.get_path("include"), pybind11.get_include(), folder]
    return {"csrc/host.cpp": [f"-DZINIT_BUILD_FACTS={literal}", *(f"-isystem{path}" for path in include)]}


def jobs() -> int:
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    return len(os.sched_getaffinity(0))


def escape(path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(words) -> str:
    return shlex.join(str(word) for word in words).replace("$", "$$")


def log_of(folder: Path) -> list[list[str]]:
    """Ninja's log: start and end in ms, mtime, output, hash."""
    log = folder / ".ninja_log"
    return [line.split("\t") for line in log.read_text().splitlines()[1:]] if log.is_file() else []


class BuildNative(build_ext):
    cuda: Cuda | None = None
    # said by the build alone: pip asks for requirements and metadata before it builds, and an sdist needs no compiler
    left_out: list[str] = []
    missing = ""

    def get_ext_filename(self, fullname):
        if fullname.endswith("_C_host"):
            return super().get_ext_filename(fullname)
        return str(Path(*fullname.split("."))) + ".so"  # no Python ABI in the name: there is none in the file

    def run(self):
        if self.missing:
            fail(
                f"{self.missing}, so the CPU kernels cannot be compiled.\n"
                "Install g++ 11 or later (Debian, Ubuntu: apt-get install g++) or name another with CXX, and repeat.\n"
                "Without the kernels everything runs in plain PyTorch, several times slower: "
                "ZINIT_BUILD=0 pip install ."
            )
        for part in self.left_out:
            say(part)
        super().run()
        if self.inplace:  # a part of an earlier build that this one left out would be loaded all the same
            built = {extension.name for extension in self.extensions or []}
            for part in {CPU_PART, CUDA_PART, HOST_PART} - built:
                (ROOT / self.get_ext_filename(part)).unlink(missing_ok=True)

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
        (folder / "build.ninja").write_text(self.ninja_graph(compiler, torch, folder))
        # Python's ninja before the system's: two versions in turn discard each other's log and rebuild all.
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        if shutil.which(ninja[0]) is None:
            fail("ninja was not found: pip install ninja")
        before = log_of(folder)
        if subprocess.call([*ninja, "-C", str(folder), "-j", str(jobs())]):
            fail("the native kernels did not compile, see above; ZINIT_BUILD=0 installs without them")
        for start, end, _, output, _ in [row for row in log_of(folder) if row not in before]:
            say(f"{(int(end) - int(start)) / 1000:6.1f} s  {os.path.relpath(output, folder)}")

    def ninja_graph(self, compiler: list[str], torch: Torch, folder: Path) -> str:
        launcher = [name for name in ("ccache",) if shutil.which(name)]
        include = [f"-isystem{torch.path / 'include'}"]
        # error messages name the source file: by its path in the project, not by that of the build machine
        short_names = [f"-fmacro-prefix-map={path}/=" for path in (ROOT, torch.path / "include")]
        libraries = [
            f"-L{torch.path / 'lib'}",
            "-Wl,--no-as-needed",
            "-ltorch",
            "-ltorch_cpu",
            "-Wl,--as-needed",
        ]
        lines = [
            "rule compile",
            f"  command = {quote([*launcher, *compiler])} -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            "  description = link $out",
            f"  command = {quote(compiler)} -shared -o $out $in {quote(libraries)} $flags -Wl,-z,defs -pthread",
            "rule link_host",  # Python's symbols are Python's to provide
            "  description = link $out",
            f"  command = {quote(compiler)} -shared -o $out $in",
        ]
        if self.cuda is not None:
            nvcc = quote([*launcher, self.cuda.path / "bin" / "nvcc", "-ccbin", compiler[0]])
            lines += [
                "rule compile_cuda",
                # ptxas' account of the kernels is kept; it is shown where something fails
                f"  command = {nvcc} -MMD -MF $out.d $flags -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = compile $in",
                "rule kernel_facts",
                f"  command = {quote([sys.executable, ROOT / 'build_backend' / 'kernel_facts.py'])} $out $logs",
                "  description = collect $out",
            ]
            kernels = [escape(folder / Path(source).with_suffix(".o")) for source in CUDA_KERNELS]
            facts = escape(folder / "kernel_facts.inc")
            logs = " ".join(f"{kernel}.log" for kernel in kernels)
            lines += [f"build {facts}: kernel_facts {' '.join(kernels)}", f"  logs = {logs}"]
        parts = {
            CPU_PART: lambda: cpu_objects(compiler),
            CUDA_PART: lambda: cuda_objects(self.cuda),
            HOST_PART: lambda: host_objects(self.cuda, torch, folder),
        }
        for extension in self.extensions:
            objects = []
            for source, flags in parts[extension.name]().items():
                target, is_cuda = escape(folder / Path(source).with_suffix(".o")), source.endswith(".cu")
                own = NVCC_FLAGS if is_cuda else CFLAGS + short_names + WARNINGS
                flags = [*own, *flags, *(include if TORCH_TARGET in flags else [])]
                after = f" | {facts}" if extension.name == HOST_PART else ""
                lines += [
                    f"build {target}: compile{'_cuda' if is_cuda else ''} {escape(ROOT / source)}{after}"
                ]
                lines += [f"  flags = {quote(flags)}"]
                objects.append(target)
            library = Path(self.get_ext_fullpath(extension.name)).resolve()
            library.parent.mkdir(parents=True, exist_ok=True)
            rule = "link_host" if extension.name == HOST_PART else "link"
            lines.append(f"build {escape(library)}: {rule} {' '.join(objects)}")
            if extension.name == CUDA_PART:
                lines.append(
                    f"  flags = {quote([f'-L{self.cuda.libraries}', '-lcudart_static', '-ldl', '-lrt'])}"
                )
        return "\n".join(lines) + "\n"


class Build(build):
    # build_ext also where nothing is compiled: an editable install must not keep what an earlier one compiled
    sub_commands = [(name, None if name == "build_ext" else wanted) for name, wanted in build.sub_commands]

    def run(self):
        # build/lib becomes the wheel: without what an earlier build left there, such as CUDA kernels or renamed modules
        if Path(self.build_base).resolve() in Path(self.build_lib).resolve().parents:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        python, abi, target = super().get_tag()
        names = [extension.name for extension in self.distribution.ext_modules or []]
        return ("py3", "none", target) if names and HOST_PART not in names else (python, abi, target)


def native_parts() -> list[str]:
    """The extensions to build here. Sets what BuildNative says or refuses once something is really built."""
    if reason := why_pure_python():
        BuildNative.left_out = [f"installing without native kernels: {reason}"]
        return []
    compiler, BuildNative.missing = find_compiler()
    if compiler is None:
        return [CPU_PART]
    BuildNative.cuda, reason = cuda_for(find_torch())
    if BuildNative.cuda is None:
        BuildNative.left_out = [f"left out the CUDA kernels: {reason}"]
        return [CPU_PART]
    if reason := why_no_host():
        pass
    elif importlib.util.find_spec("pybind11") is None:
        reason = "pybind11 is not here"
    else:
        return [CPU_PART, CUDA_PART, HOST_PART]
    BuildNative.left_out = [f"left out _C_host, the CUDA launcher's plans for Python: {reason}"]
    return [CPU_PART, CUDA_PART]


if __name__ == "__main__":
    # The folders model/ and evaluate/ are zinit_kernels.model and zinit_kernels.evaluate once installed: a top-level
    # `model` would be anybody's, and `evaluate` is Hugging Face's.
    parts = ["model", "evaluate"]
    named = find_packages(include=[pattern for part in parts for pattern in (part, f"{part}.*")])
    tag = os.environ.get("ZINIT_VERSION_TAG")  # "cu130": version 0.1.0+cu130, for wheels with CUDA kernels
    setup(
        packages=find_packages(include=["zinit_kernels", "zinit_kernels.*"])
        + [f"zinit_kernels.{name}" for name in named],
        package_dir={f"zinit_kernels.{part}": part for part in parts},
        ext_modules=[Extension(name, []) for name in native_parts()],
        cmdclass={"build": Build, "build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
        options={"egg_info": {"tag_build": f"+{tag}"}} if tag else {},
    )
