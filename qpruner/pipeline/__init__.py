"""Run the flow: `flow.py` has the stages and the loop, `run.py` what a command does around it."""
