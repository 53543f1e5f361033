"""The decoder as a model: layers, generation, tokenizer and prompts."""
