#!/bin/bash
# One chapter's measurement on a Slurm cluster: accelerate's launcher once a node, a process on each of its GPUs.
#   sbatch analysis/slurm.sh llava-7b 03
# Answers are stored batch by batch: after a time limit or a lost node submit the same line again, with as many nodes as you
# like; it goes on with what is missing. `python analysis/run.py --profile llava-7b --only 03` then makes the chapter.
#SBATCH --job-name=dyrate
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
set -euo pipefail

export MAIN_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PROFILE=$1 CHAPTER=$2 PORT=$((20000 + SLURM_JOB_ID % 20000))

srun --kill-on-bad-exit=1 bash -c '
    .venv/bin/accelerate launch --multi_gpu --mixed_precision no --dynamo_backend no \
        --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MAIN_NODE" --main_process_port "$PORT" \
        analysis/share.py --profile "$PROFILE" --only "$CHAPTER"'
