"""Export the final model in other forms, push it to a model hub, and generate answers with it."""
