#!/usr/bin/env bash
# Makes .venv ready: torch, the tools, and this checkout installed in place. make calls it, and then compiles.
#   PY=python3        take this interpreter; where it already has torch >= 2.11 (a GPU image, offline) that torch is used
#   TORCH_INDEX=URL   an extra index for torch alone, e.g. https://download.pytorch.org/whl/cpu (0.2 GB, not 2.5 GB)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python=$venv/bin/python
say() { echo "[bootstrap] $*"; }
pip() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
this=(--no-build-isolation --editable)

"${PY:-python3}" - <<'END' || exit 1
import sys
if sys.version_info < (3, 10):
    sys.exit(f"[bootstrap] Python 3.10 or later is needed, {sys.executable} is {sys.version.split()[0]}: name another with PY=")
END

outer_torch() {
  [ -n "${PY:-}" ] && "$PY" - 2>/dev/null <<'END'
import re, setuptools, torch
raise SystemExit(tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 11))
END
}

# ZINIT_BUILD=0: pip would hide the compiler's output; make compiles after this, in the open and incrementally.
export ZINIT_BUILD=0
# VENV may come from the environment, where it may mean anything: only a folder made here is cleared, or filled
if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$venv/.zinit_kernels" ] && [ ! -e "$venv/.ready" ]; then
  say "VENV=$venv is not empty, and no environment of this project: name a new folder with VENV=, or remove it" >&2
  exit 1
fi
mkdir -p "$venv"
touch "$venv/.zinit_kernels"
if outer_torch; then
  say "using the torch of $PY"
  "$PY" -m venv --clear --without-pip "$venv"
  touch "$venv/.zinit_kernels"
  # a .pth file, since --system-site-packages would skip the packages of a $PY that is itself a virtual environment
  "$PY" -c 'import site, sys; print(*[p for p in sys.path if p.endswith(("site-packages", "dist-packages"))], sep="\n")' \
    > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/_outer.pth"
  if ! pip "${this[@]}" '.[dev]'; then
    say "not everything could be installed: going on with what $PY has"
    # without pip, or with a setuptools too old for pyproject.toml: the checkout itself on the path
    pip --no-deps "${this[@]}" . || pwd >> "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/_outer.pth"
  fi
else
  [ -x "$python" ] || "${PY:-python3}" -m venv "$venv"
  say "installing torch and the tools of constraints.txt into $venv"
  # torch first and alone, so that nothing else is asked of the extra index; its dependencies come from the usual one
  pip --constraint constraints.txt --no-deps torch ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
  pip --constraint constraints.txt torch setuptools ninja
  # a source package whose build asks for setuptools_scm: without an environment of its own it calls itself 0.0.0
  pip --constraint constraints.txt --use-pep517 seqeval
  pip --constraint constraints.txt "${this[@]}" '.[dev]'
fi
