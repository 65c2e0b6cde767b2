"""Write models that vLLM serves: in the layout of compressed-tensors, blocks of different widths
included."""
