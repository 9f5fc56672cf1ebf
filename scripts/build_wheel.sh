#!/usr/bin/env bash
# make wheel: the sdist, and from it the wheel for machines like this one, into dist/; then the wheel is tried in an
# environment of its own, in an empty folder, without any variable of this one.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${VENV:-.venv}/bin/python")
say() { echo "[wheel] $*"; }

rm -rf dist
ZINIT_CUDA=${ZINIT_CUDA:-0} "$python" -m build --no-isolation --outdir dist .
for wheel in dist/*-linux_*.whl; do
  "$python" -m auditwheel show "$wheel"
  PATH="$(dirname "$python"):$PATH" "$python" -m auditwheel repair --exclude libtorch.so --exclude libtorch_cpu.so -w dist "$wheel"
  rm "$wheel"
done
say "$(cd dist && ls | xargs)"

there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
"$python" -m venv "$there/venv"
mkdir "$there/empty"
"$there/venv/bin/python" -m pip install --quiet --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
  "$(ls "$PWD"/dist/*.whl)[model]"
clean() { (cd "$there/empty" && env -i HOME="$there" PATH="$there/venv/bin" "$@"); }
clean zinit check
clean zinit train --help > /dev/null
clean zinit evaluate --help > /dev/null
clean python -c 'import zinit_kernels.model.llama, zinit_kernels; print("ran from", zinit_kernels.__file__)'
say "dist/ holds the sdist and a wheel that works on its own"
