#!/bin/bash
# Train configs/ice_10b.json on 4 nodes of 8 GPUs: sbatch slurm/ice_10b.sh [--set a.b=value]...
# Your site: the ##SBATCH line; ICE_CONTAINER_ARGS=(...), ICE_INTERFACE=... above "source"; or use launch/submit.py.
##SBATCH --account=ACCOUNT --partition=PARTITION --qos=QOS --constraint=FEATURE
#SBATCH --job-name=ice_10b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
train configs/ice_10b.json "$@"
