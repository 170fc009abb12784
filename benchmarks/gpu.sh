#!/usr/bin/env bash
# Everything that only a GPU machine can show, without a network, in under 9 minutes:
#   bash benchmarks/gpu.sh OUTDIR             the checks, the GPU tests, the ops, and our importances beside a plain pass
#   bash benchmarks/gpu.sh OUTDIR importance  importances against every peer, and memory, in under 9 minutes of its own
# Wants a python3 with torch >= 2.11 (PYTHON=... names another). A step that fails does not stop the others; the last
# line says which failed. Without a GPU the steps run on the CPU and the GPU tests are skipped.
set -uo pipefail
out=${1:?usage: bash benchmarks/gpu.sh OUTDIR [importance]}
part=${2:-checks}
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
failed=()
export XDG_CACHE_HOME="$out/cache" PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8

step() { # step NAME SECONDS COMMAND...: logs to OUTDIR/NAME.log as it goes
  local name=$1 seconds=$2 status
  shift 2
  echo "== $name (at most $seconds s): $*"
  timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then
    failed+=("$name")
    echo "== $name FAILED with status $status" | tee -a "$out/$name.log"
  fi
}

models=(mlp resnet18 gpt2)
workloads=(mlp-b1000 gpt2-124m-t1024-b8 vit-b-16-b64 resnet50-b64)
if ! nvidia-smi >"$out/nvidia-smi.log" 2>&1; then
  models=(mlp resnet18)
  workloads=(mlp-b1000)
  echo "there is no GPU on this machine: running on the CPU alone" | tee -a "$out/nvidia-smi.log"
fi
# The environment's own site-packages if it can be written, else a folder in OUTDIR.
target=()
if ! [ -w "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" ]; then
  target=(--target "$out/site")
  export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
fi
# Built from a copy, so that the checkout stays as it was.
rm -rf "$out/source" && mkdir "$out/source"
cp -r pyproject.toml setup.py README.md LICENSE fastewc csrc "$out/source/"
step install 90 "$python" -m pip install --no-deps --no-build-isolation --force-reinstall "${target[@]}" "$out/source"
rm -rf "$out/source"
# Outside the checkout, where `python -m fastewc` is the installed one.
step info 20 env -C "$out" "$python" -m fastewc info
importance=(-m benchmarks.importance --workloads "${workloads[@]}" --out "$out/importance.json")
if [ "$part" = importance ]; then
  step importance 400 "$python" "${importance[@]}" --seconds 2 --compile-seconds 60
  step memory 120 "$python" -m benchmarks.memory --only "AdamW fused, importance" offload --out "$out/memory.json"
else
  step check 60 env -C "$out" "$python" -m fastewc check
  step pytest 150 "$python" -m pytest -m gpu -p no:cacheprovider
  step ops 100 "$python" -m benchmarks.ops --shapes "${models[@]}" --seconds 0.3 --compile-seconds 10 --out "$out/ops.json"
  step importance 100 "$python" "${importance[@]}" --only plain fastewc --seconds 1 --no-memory
fi

rm -rf "$out/cache" "$out/site"
if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all steps passed"
