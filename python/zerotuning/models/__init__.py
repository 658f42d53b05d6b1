"""Loading language models: folders, the hub, GGUF files, several devices, several processes."""
