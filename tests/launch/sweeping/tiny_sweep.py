"""A run that is hardly one, and a stand-in for training that does in milliseconds what it is told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training_runs import VOCABULARY

STEPS = 20
# What each start of a cell does, by the cell's name: "finish"; "crash" after a checkpoint or "stuck" before one;
# "refuse" with 78; "lie": end with 0 and nothing done; "hold": train until asked to stop, save, and end with 75. After
# these, "finish".
STAND_IN = """
import json, pathlib, signal, sys, time
plan = json.loads(pathlib.Path(sys.argv[-1]).read_text())
run = pathlib.Path(plan["run"]["dir"], plan["run"]["name"])
steps = plan["schedule"]["steps"]
starts = run / "starts"
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
script = json.loads((run.parents[2] / "script.json").read_text()).get(run.name, [])
action = script[number] if number < len(script) else "finish"

def reach(step, evaluated=False):
    lines = [{"step": n, "loss": 5.0 - n / 100, "loops": 2, "tokens": n * 128, "step_seconds": 0.5}
             for n in range(1, step + 1)]
    if evaluated:
        lines.append({"step": step, "validation_bits_per_byte": 2.5, "validation_nats_per_token": 4.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}")

def stop(number, frame):
    reach(7)
    sys.exit(75)

if action == "hold":
    signal.signal(signal.SIGUSR1, stop)
    (run / "holding").touch()
    while True:
        time.sleep(0.01)
if action == "refuse":
    print("error: the vocabulary is wrong")
    sys.exit(78)
if action == "crash":
    reach(5 * (number + 1))
    sys.exit(1)
if action == "stuck":
    print("Traceback: no memory")
    sys.exit(1)
if action == "finish":
    reach(steps, evaluated=True)
"""


def base_settings(data: Path) -> dict[str, Any]:
    """A run of a model that is hardly one."""
    return {
        "model": {
            "vocab_size": VOCABULARY,
            "dim": 16,
            "max_seq_len": 32,
            "max_output_tokens": 32,
            "prelude_layers": 1,
            "coda_layers": 1,
            "max_loop_iters": 2,
            "n_heads": 2,
            "n_kv_heads": 2,
            "ffn_dim": 32,
            "n_experts": 4,
            "n_experts_per_tok": 2,
            "expert_dim": 8,
        },
        "data": {"path": str(data), "sequence_length": 32, "global_batch_size": 4},
        "optim": {"lr": 0.01},
        "schedule": {"steps": STEPS, "warmup_steps": 3},
        "loop": {"distribution": "poisson", "mean_loops": 2, "remat": "none"},
        "precision": {"dtype": "fp32"},
        "parallel": {"micro_batch_size": 2},
        "checkpoint": {"every": 5, "plain_weights": False},
        "eval": {"every": 1000, "sequences": 4},
        "logging": {"tensorboard": False, "plot": False},
    }
