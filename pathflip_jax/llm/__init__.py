"""Language-model decoder: layers, generation, tokenizer and prompts."""
