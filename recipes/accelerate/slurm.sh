#!/bin/bash
# Four nodes of eight GPUs under SLURM: sbatch recipes/accelerate/slurm.sh finetune --model ... --output-dir ...
# Output and model directories must be on a file system that all nodes see.
#SBATCH --job-name=manticore
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # not head, which ends before all is written: with pipefail that fails
export OMP_NUM_THREADS=8
export ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-recipes/accelerate/fsdp2.yaml}
export GPUS=${SLURM_GPUS_ON_NODE:-8}

# A job that was cut off goes on from its last whole checkpoint when it is submitted again.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
    --config_file "$ACCELERATE_CONFIG" \
    --num_machines "$SLURM_NNODES" \
    --num_processes $((SLURM_NNODES * GPUS)) \
    --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$0" \
    --main_process_port ${PORT:-29500} \
    -m manticore_hf.cli "$@"' "$head_node" "$@"
