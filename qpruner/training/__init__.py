"""Fine-tune, evaluate and time models."""
