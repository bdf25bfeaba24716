#!/bin/sh
# Measures what recipes do to answers: every results file that docs/recipes.md and README.md take their numbers from.
# Takes a GPU half an hour and more; stopped, it goes on where it was. Names of parts run those alone: see the list at the end.
# OUT is where the files go, PROCESSES how many share the GPUs that are visible, RECIPES and CONTEXT what is measured
# instead of all, so that DEVICE=cpu SAMPLES=1 RECIPES=exact,kivi CONTEXT=1024 OUT=/tmp/try … ppl tries it out.
set -eu
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
device=${DEVICE:-cuda}
samples=${SAMPLES:-50}
out=${OUT:-benchmarks/results}
recipes=${RECIPES:-exact,fastkv,shadowkv,sluice,sluice-full,lowrank,snapkv,kivi,kivi-2bit,mikv,pyramidkv,quantized-pruning,fp8,streaming,xkv,xkv-kv}

processes=8
[ "$device" = cpu ] && processes=1
common="--device $device --texts ${TEXTS:-.cache/texts} --processes ${PROCESSES:-$processes}${COMMIT:+ --commit $COMMIT}"

evaluate() {
  name=$1
  shift
  # shellcheck disable=SC2086 # words of $common are options
  "$python" -P -m kvsluice.evals.runner $common --json "$out/$name.json" "$@"
}

chunks() {
  printf '{"retrieval": {"kind": "chunks", "chunk": %s, "outliers": 0, "budget_tokens": %s, "budget_rate": %s, ' "$1" "$2" "$3"
  printf '"landmark_bits": 8, "select_every": %s}}' "${4:-1}"
}

alone() {
  printf '{"retrieval": {"kind": "chunks", "chunk": %s, "outliers": %s, "budget_rate": %s, ' "$1" "$2" "$3"
  printf '"landmark_bits": 16}, "window": {"kind": "ends", "local": 32, "sinks": %s}}' "$4"
}

# a variant of `sluice`: LAYER RATE RECALL STEP
recalling() {
  printf -- '--variant\nT%s-%s-recall%s-%s=sluice:{"propagation": {"kind": "tsp", "layer": %s, "rate": %s, ' "$1" "$2" "$3" "$4" "$1" "$2"
  printf '"window": 64, "chunk_aligned": true, "recall": %s, "recall_step": %s}}\n' "$3" "$4"
}

# every recipe, every task, two lengths, beside transformers
part_ruler() { evaluate ruler --recipe $recipes --context "${CONTEXT:-8192,16384}" --samples "$samples" --against transformers; }

# the same in plain torch: what compiled kernels may cost is rounding
part_reference() {
  evaluate ruler_reference --recipe $recipes --context "${CONTEXT:-8192,16384}" --samples "$(((samples + 2) / 3))" \
    --kernels reference
}

# the same in full precision, where `exact` and transformers must agree sample by sample
part_float32() {
  evaluate ruler_float32 --recipe exact --context "${CONTEXT:-8192}" --samples "$samples" --dtype float32 --against transformers
}

# single parts of recipes, as an early simulation had them
part_simulation() {
  evaluate ruler_variants --recipe exact --context "${CONTEXT:-8192}" --samples "$samples" \
    --variant 'tsp-alone=exact:{"propagation": {"kind": "tsp", "rate": 0.2, "window": 8, "kernel": 7}}' \
    --variant 'chunks-8=exact:{"retrieval": {"kind": "chunks", "chunk": 8, "outliers": 0, "budget_rate": 0.06, "landmark_bits": 16}, "window": {"kind": "ends", "local": 32}}' \
    --variant 'chunks-4=exact:{"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 0, "budget_rate": 0.06, "landmark_bits": 16}, "window": {"kind": "ends", "local": 32}}'
}

# why chunks lose more than that simulation said: sinks, and how many rows the query heads of a KV head read together
part_chunks() {
  hard="--context 4096 --samples 10 --dtype float32 --task niah_multikey_3,niah_multikey_2,niah_single_3,niah_multiquery"
  # shellcheck disable=SC2086
  evaluate ruler_sinks --recipe exact $hard --variant "chunks-4=exact:$(alone 4 0 0.06 0)" \
    --variant "chunks-4-sinks=exact:$(alone 4 0 0.06 4)" --variant "chunks-8=exact:$(alone 8 0 0.06 0)" \
    --variant "chunks-8-sinks=exact:$(alone 8 0 0.06 8)"
  # shellcheck disable=SC2086
  evaluate ruler_reach --recipe exact $hard --variant "chunks-8-outliers=exact:$(alone 8 48 0.06 0)" \
    --variant "chunks-8-thrice=exact:$(alone 8 0 0.18 8)" --variant "chunks-4-thrice=exact:$(alone 4 0 0.18 4)"
}

# how much a step has to read, in chunks of what size, and what packing costs beside it
part_retrieval() {
  exact_rows='{"key_codec": {"kind": "dense"}, "value_codec": {"kind": "dense"}}'
  evaluate ruler_retrieval --recipe exact,sluice-full,shadowkv --context "${CONTEXT:-8192}" --samples "$(((samples + 1) / 2))" \
    --variant "rows-3=sluice-full:$(chunks 4 256 0.03)" --variant "rows-6=sluice-full:$(chunks 4 256 0.06)" \
    --variant "rows-25=sluice-full:$(chunks 4 256 0.25)" --variant "pairs-6=sluice-full:$(chunks 2 256 0.06)" \
    --variant 'packed=sluice-full:{"retrieval": {"kind": "all"}}' --variant "unpacked=sluice-full:$exact_rows" \
    --variant "every-4=sluice-full:$(chunks 4 1024 0.06 4)" \
    --variant 'shadowkv-6=shadowkv:{"retrieval": {"kind": "chunks", "budget_rate": 0.06}}' \
    --variant 'shadowkv-half-rank=shadowkv:{"key_codec": {"kind": "lowrank", "share": 0.5}}'
}

# rows that come back: from which layer, how many, and how many for each row of a step; without any for comparison
part_recall() {
  set --
  while IFS= read -r word; do set -- "$@" "$word"; done <<EOF
$(for each in "19 0.2 0.05 16" "19 0.2 0.1 16" "18 0.2 0 16" "18 0.2 0.05 16" "18 0.2 0.1 16" "18 0.2 0.1 32" \
    "17 0.15 0.05 16" "17 0.15 0.1 16" "17 0.2 0.1 32" "15 0.2 0.05 16" "15 0.2 0.1 32"; do
    # shellcheck disable=SC2086 # words of $each are arguments
    recalling $each
  done)
EOF
  evaluate ruler_recall --recipe exact,sluice --context "${CONTEXT:-8192,16384}" --samples "$samples" "$@"
}

# five questions over one document: as turns, and as prompts of their own that share it
part_multiturn() {
  set --
  while IFS= read -r word; do set -- "$@" "$word"; done <<EOF
$(recalling 18 0.2 0.05 16)
$(recalling 18 0.2 0.1 16)
EOF
  evaluate multiturn --suite multiturn --recipe exact,sluice,fastkv,snapkv,shadowkv --context "${CONTEXT:-8192,16384}" \
    --samples "$samples" "$@"
}

part_prefix() {
  evaluate prefix --suite prefix --recipe exact,sluice,fastkv,shadowkv --context "${CONTEXT:-8192}" --samples "$(((samples + 4) / 5))"
}

# the depths of a sample share its text, so what narrows the intervals is samples: six at six depths, not three at eleven
part_niah() {
  evaluate niah --suite niah --recipe $recipes --context "${CONTEXT:-4096,8192,16384,32768}" --samples "$(((samples + 8) / 9))" \
    --depth 0,0.2,0.4,0.6,0.8,1
}

part_ppl() { evaluate ppl --suite ppl --recipe $recipes --context "${CONTEXT:-4096,16384}" --samples "$(((samples + 6) / 7))"; }

# needs kvpress: see benchmarks/README.md
part_peers() {
  # shellcheck disable=SC2086
  "$python" -P -m kvsluice.benchmarks.peer_kvpress $common --context "${CONTEXT:-8192}" --samples "$samples" \
    --json "$out/peer_kvpress.json"
}

for part in ${*:-ruler reference float32 simulation chunks retrieval recall multiturn prefix niah ppl peers}; do
  case $part in
  ruler | reference | float32 | simulation | chunks | retrieval | recall | multiturn | prefix | niah | ppl | peers) "part_$part" ;;
  *) echo "measure_recipes: unknown part $part" >&2; exit 1 ;;
  esac
done
echo "measure_recipes: done; make readme puts the numbers into the pages"
