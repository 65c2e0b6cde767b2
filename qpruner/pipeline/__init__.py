"""Run the stages of a command.

`flow.py` lists and runs them; `run.py` does the rest of a command (checks, lock, `run.json`).
"""
