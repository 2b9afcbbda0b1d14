#!/bin/bash
# Prepare a data set on the cluster: sbatch slurm/data.sh --config configs/data/NAME.json [--set a.b=value]...
#
# This job is the driver: it plans, hands out pieces of work to the job arrays that it submits (section
# execution.slurm of the settings: partition, account, time, tasks, ...), trains the tokenizer and publishes. Its
# output folder must be on a file system that all nodes share. Killed, requeued or submitted again with the same
# settings, it goes on from the pieces that are finished, with any number of tasks.
#
# Partition and account of this job are the site's: add them to the sbatch line. Exit status: 0 done, 78 bad
# configuration or data (one line says what), else 1.
#
# ICE_ROOT    the checkout; default: the folder that sbatch was called in
# ICE_PYTHON  default: $ICE_ROOT/.venv/bin/python
#SBATCH --job-name=ice_data
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=16G
#SBATCH --time=7-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

ICE_ROOT="${ICE_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}"
ICE_PYTHON="${ICE_PYTHON:-$ICE_ROOT/.venv/bin/python}"

if [[ ! -x "$ICE_PYTHON" ]]; then
    echo "error: $ICE_PYTHON: no such program; run 'make setup' in $ICE_ROOT, or set ICE_PYTHON" >&2
    exit 78
fi

# Not started by srun: arrays are submitted from here, and a signal to the job must reach Python itself.
exec "$ICE_PYTHON" -u "$ICE_ROOT/data_pipeline/main.py" --executor slurm "$@"
