"""What a figure is worth nothing without: the chip, the versions, the commit, how busy the machine was."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import torch

LIBRARIES = (
    "torch", "triton", "transformers", "peft", "litgpt", "flash_attn", "flashinfer-python", "xformers", "liger-kernel"
)  # fmt: skip
SETTINGS = ("ZINIT_AUTOTUNE", "ZINIT_TRY_GPU")  # of the environment: they choose what runs
ROOT = Path(__file__).resolve().parent.parent


def chip(device: torch.device) -> str:
    """The processor's or the accelerator's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Its model name, and its family and model as lscpu says them where that name has no number: a virtual machine's
    "AMD EPYC" is a Zen 4 on one host and a Zen 5 on another, with vector units of half and of full width."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in lines):
        found.setdefault(name.strip(), value.strip())
    name = found.get("model name", "unknown CPU").partition(" @ ")[0]  # what follows is a clock
    told_apart = re.search(r"\d", name) or "cpu family" not in found
    return name if told_apart else f"{name} family {found['cpu family']} model {found['model']}"


def why_missing(*modules: str) -> str:
    """Which of these cannot be imported; "" where all can."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"{' and '.join(missing)} not installed" if missing else ""


def why_failed(error: Exception) -> str:
    """Its kind and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def folder_name(chip: str) -> str:
    """The chip as a folder under bench/results: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", chip.lower()).strip("-")


def versions() -> dict[str, str]:
    """Of the libraries that are installed, and the driver's side of CUDA."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
    return found


def commit() -> str:
    """The checkout's commit, "-dirty" where what runs differs from it: ledgers and pages may. A copy without its
    history, on a GPU machine say, is told by ZINIT_COMMIT where it comes from."""
    git = ["git", "-C", str(ROOT)]
    found = output([*git, "rev-parse", "--short=10", "HEAD"])
    pages = [f":!{path}" for path in ("bench/results", "docs", "*.md")]
    changed = output([*git, "status", "--porcelain", "--untracked-files=no", "--", ".", *pages])
    return f"{found}{'-dirty' if changed else ''}" if found else os.environ.get("ZINIT_COMMIT", "unknown")


def what_and_where(facts: Mapping[str, object]) -> str:
    """Of the conditions what two runs must share to be runs of the same thing."""
    same = ("chip", "instructions", "commit", "versions", "malloc", "settings")
    return json.dumps([facts.get(name) for name in same], sort_keys=True)


def output(command: list[str]) -> str:
    """What a command prints; "" where it fails or is not here."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def conditions(device: torch.device) -> dict[str, object]:
    """One run's, for the ledger."""
    return {
        "chip": chip(device),
        "device": device.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "versions": versions(),
        "load": round(
            os.getloadavg()[0], 2
        ),  # of the last minute: above the threads, somebody else was at work
        "malloc": os.environ.get("GLIBC_TUNABLES", "default"),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }
