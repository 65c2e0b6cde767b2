"""Write models as GGUF files for llama.cpp, and load them there again."""
