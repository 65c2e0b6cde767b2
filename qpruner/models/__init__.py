"""Model families, loading, checkpoints, blocks of different widths, layouts and memory."""
