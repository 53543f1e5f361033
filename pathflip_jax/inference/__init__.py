"""Inference with trained runs: embeddings, grounding and answers."""
