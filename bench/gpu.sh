#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, tests, benchmarks in order of importance, memory checkers.
# A part that fails, or that the time is over for, does not stop the later ones; the exit code tells whether all
# went well. Few files are left in $OUT, up to date from part to part:
#   summary.txt     how each part ended
#   log.txt         what each part printed
#   results.json    the benchmarks, as bench/results holds them
#   metrics.jsonl   every step of a run of ViT-B with the largest batch
#   ops.txt         time per operation in five of them
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_out}
LIMIT_S=${LIMIT_S:-530}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$OUT"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

part() {  # part NAME SECONDS COMMAND...: run it for at most so long, keep its output, note how it ended
  local name=$1 seconds=$2 left=$((LIMIT_S - SECONDS)) started=$SECONDS
  shift 2
  if [ $left -lt 5 ]; then
    echo "$name: left out, the $LIMIT_S s are over" | tee -a "$OUT/summary.txt"
    failed=1
    return
  fi
  printf '\n===== %s: %s\n' "$name" "$*" >>"$OUT/log.txt"
  # Interrupted rather than ended, pytest tells what failed and writes what was measured.
  timeout -s INT -k 15 $((seconds < left ? seconds : left)) "$@" >"$work/log" 2>&1
  local code=$?
  cat "$work/log" >>"$OUT/log.txt"
  echo "$name: exit $code after $((SECONDS - started)) s" | tee -a "$OUT/summary.txt"
  if [ $code -ne 0 ]; then tail -n 20 "$work/log"; failed=1; fi
}

benchmark() {  # benchmark FILE SECONDS WHICH: of those for a GPU
  part "$1 ($3)" "$2" "$PYTHON" -m pytest "bench/$1.py" -k "(gpu or cuda) and $3" --benchmark-only -q \
    --benchmark-json="$work/$1.json"
  if [ -s "$work/$1.json" ] && saved=$("$PYTHON" bench/results.py save "$work/$1.json" 2>>"$OUT/log.txt"); then
    cp "$saved" "$OUT/results.json"
  fi
}

compiled="(compile or Flex)"  # peers that take minutes to compile come last

: >"$OUT/summary.txt" >"$OUT/log.txt"
nvidia-smi >>"$OUT/log.txt" 2>&1
export PERA_FAST_REQUIRE_CUDA=1
part imports 20 "$PYTHON" -c "import dacite, rasterio, tyro"
part build 120 "$PYTHON" -m pip install --no-deps --no-build-isolation -e .
part info 30 "$PYTHON" -m pera_fast.info
part train 60 "$PYTHON" -m pera_fast.train --device cuda --max-steps 50 --out "$work/demo"
part ops 120 "$PYTHON" -m pytest -q -k "(cuda or gpu or triton) and not compile and not interpreter" \
  tests/test_disjoint_masks.py tests/test_crop_patches.py tests/test_adamw_ema.py tests/test_ema_update.py \
  tests/test_grad_norm.py tests/test_devices.py tests/test_patch_embed.py tests/test_koleo.py \
  tests/test_residual_norm.py tests/test_distill_loss.py tests/test_packed_attention.py tests/test_shapes.py
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    # Without torch's cache every tensor has an allocation, and bounds, of its own.
    part $tool 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 "$PYTHON" \
      -m pytest -q -x -k "cuda and not captured" tests/test_disjoint_masks.py tests/test_crop_patches.py \
      tests/test_adamw_ema.py tests/test_ema_update.py tests/test_grad_norm.py
  done
fi
part engine 60 "$PYTHON" -m pytest -q -k "cuda or gpu" tests/test_engine.py tests/test_batch.py tests/test_model.py \
  tests/test_optim.py tests/test_loader.py
part graph 60 "$PYTHON" -m pytest -q -k "cuda or gpu" tests/test_graph.py  # apart: a failed recording may leave traces
benchmark bench_step 100 "not $compiled"
part vit_b 90 "$PYTHON" -m pera_fast.train --preset vit_b --data pera_fast/demo --device cuda --max-steps 20 \
  --log-every 1 --profile 5 --workers "$(nproc)" --out "$work/vit_b"
cp "$work/vit_b/metrics.jsonl" "$work/vit_b/profile/ops.txt" "$OUT/" 2>>"$OUT/log.txt"
for file in bench_vit bench_packed_attention bench_distill_loss bench_adamw_ema bench_residual_norm bench_crop_patches \
  bench_ema_update bench_grad_norm bench_koleo bench_patch_embed bench_disjoint_masks; do
  benchmark $file 40 "not $compiled"
done
for file in bench_step bench_vit bench_packed_attention bench_distill_loss bench_residual_norm; do
  benchmark $file 120 "$compiled"
done
cat "$OUT/summary.txt"
exit $failed
