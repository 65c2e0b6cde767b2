"""Other forms of the final model: dense, peft, and on a model hub."""
