#!/usr/bin/env bash
# All that wants a GPU, in one go: the tests marked gpu, then every benchmark that takes a device.
# Usage: benchmarks/gpu.sh DIR TEXT   (results, as results/ has them, and logs in DIR; TEXT: a text file of some MB)
# A part that fails or runs past its time does not stop the others; what it had measured is kept.
set -uo pipefail
out=$1 text=$2
mkdir -p "$out"

part() {
    local name=$1 seconds=$2
    shift 2
    echo "== $(date +%T) $name"
    timeout "$seconds" "$@" > "$out/$name.log" 2>&1 || echo "   exit status $?"
    tail -n 1 "$out/$name.log" | cut -c1-200
}

nvidia-smi -L | tee "$out/device.txt"
# Memory is planned for torch's own kernels, so mamba-ssm, where installed, has to be out of the way of the plans
hidden=$(mktemp -d)
for package in mamba_ssm causal_conv1d; do
    mkdir "$hidden/$package" && echo 'raise ImportError("hidden by benchmarks/gpu.sh")' > "$hidden/$package/__init__.py"
done
part tests 600 python -m pytest -m gpu -n 8 -rA --tb=short tests/test_gpu.py tests/test_device_map.py
part gpu_kernels 300 python benchmarks/gpu_kernels.py --output "$out/gpu_kernels.json"
part speed 300 python benchmarks/speed.py --device cuda --dtype bfloat16 --width 1024 --large-width 1024 --tokens 1024 \
    --batch 4 --repeats 5 --output "$out/speed_cuda.json"
part gpu_run 300 python benchmarks/gpu_run.py "$text" --output "$out/gpu_run.json"
PYTHONPATH="$hidden${PYTHONPATH:+:$PYTHONPATH}" part plan 600 python benchmarks/plan.py --device cuda \
    --output "$out/plan_cuda.json"
rm -r "$hidden"
