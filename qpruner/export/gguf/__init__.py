"""Write models as GGUF files, and run them with llama.cpp."""
