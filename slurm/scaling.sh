#!/bin/bash
# Train the cells of a sweep, one an array task: sbatch --array=0-23%4 slurm/scaling.sh configs/scaling/NAME.json
# Your site: the ##SBATCH line; ICE_CONTAINER_ARGS=(...), ICE_INTERFACE=... above "source"; or use launch/submit.py.
##SBATCH --account=ACCOUNT --partition=PARTITION --qos=QOS --constraint=FEATURE
#SBATCH --job-name=ice_scaling
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
train_cell "$@"
