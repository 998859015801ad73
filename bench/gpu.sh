#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, tests, memory checker, benchmarks. Results land in $OUT.
# A failing part does not stop the later ones; the exit code tells whether all went well.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_out}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$OUT"
failed=0

part() {  # part NAME COMMAND...: run it, keep its output, note how it ended
  local name=$1 log
  log="$OUT/$1.log"
  shift
  "$@" >"$log" 2>&1
  local code=$?
  echo "$name: exit $code" | tee -a "$OUT/summary.txt"
  if [ $code -ne 0 ]; then tail -n 20 "$log"; failed=1; fi
}

export PERA_FAST_REQUIRE_CUDA=1
part build "$PYTHON" -m pip install --no-deps --no-build-isolation -e .
part info "$PYTHON" -m pera_fast.info --json
part tests "$PYTHON" -m pytest -q tests/test_build.py tests/test_disjoint_masks.py \
  tests/test_adamw_ema.py tests/test_ema_update.py tests/test_grad_norm.py tests/test_optim.py tests/test_batch.py \
  tests/test_crop_patches.py tests/test_distill_loss.py tests/test_koleo.py tests/test_packed_attention.py tests/test_residual_norm.py \
  tests/test_patch_embed.py tests/test_model.py tests/test_aot.py tests/test_engine.py tests/test_loader.py
if command -v compute-sanitizer >/dev/null; then
  part sanitizer compute-sanitizer --error-exitcode 1 "$PYTHON" -m pytest -q -k cuda \
    tests/test_disjoint_masks.py tests/test_crop_patches.py tests/test_packed_attention.py tests/test_residual_norm.py \
    tests/test_adamw_ema.py tests/test_ema_update.py tests/test_grad_norm.py
fi
part train "$PYTHON" -m pera_fast.train --device cuda --max-steps 50 --out "$OUT/demo"
part bench "$PYTHON" -m pytest bench/ --benchmark-only -q --benchmark-json="$OUT/benchmark.json"
nvidia-smi >"$OUT/nvidia-smi.txt" 2>&1
exit $failed
