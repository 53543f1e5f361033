"""Export of runs to, and import from, other formats: PyTorch, Hugging Face, PEFT."""
