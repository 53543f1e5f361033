"""PathFLIP in JAX: vision-language models for whole slide images."""
