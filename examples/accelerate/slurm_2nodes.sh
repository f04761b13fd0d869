#!/bin/bash
# Two machines with 8 GPUs each under SLURM, for as many jobs as it takes:
#
#     sbatch examples/accelerate/slurm_2nodes.sh
#
# Ten minutes before the job's time is over, or when it is pre-empted, the run saves at the end of its step and ends
# with code 75. The job then queues itself again, and goes on where it was. There is no launcher in between, which would
# swallow the code: srun starts one process for each GPU, and accelerate finds the others by these variables.
#SBATCH --job-name=ldae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=ldae-%j.log

export MASTER_ADDR MASTER_PORT=29500
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Edit: the recipe, the data set, and an --output-dir that both machines see. Signals are ignored until the run listens.
# A process that has saved and gone must not end those that have not: hence --kill-on-bad-exit=0.
srun --kill-on-bad-exit=0 bash -c '
    trap "" USR1
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python examples/pretrain.py size_l --dataset ILSVRC/imagenet-1k --num-workers 6 --output-dir runs/large
'
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
