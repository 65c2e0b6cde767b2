"""Run the stages: `flow.py` lists and runs them, `run.py` does the rest of a command (checks, lock,
`run.json`).
"""
