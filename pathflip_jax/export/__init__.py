"""Runs to and from the formats of others: PyTorch, Hugging Face, PEFT."""
