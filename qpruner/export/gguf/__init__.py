"""Write models and adapters as GGUF files, which llama.cpp, Ollama and LM Studio load."""
