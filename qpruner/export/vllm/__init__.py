"""Write models that vLLM serves, and load them there again.

The layout is that of compressed-tensors; blocks may have different widths.
"""
