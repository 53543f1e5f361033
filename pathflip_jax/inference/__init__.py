"""Trained runs at work: embeddings, groundings and answers."""
