"""The demo's data and lm-eval tasks, written for this project: `data/` and `tasks/`."""
