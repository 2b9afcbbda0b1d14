"""The arithmetic behind ``launch/plan.py``, one question a file: no tensor, no process, no cluster."""
