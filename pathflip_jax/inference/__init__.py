"""A run at work: embeddings, groundings and answers (floor 5)."""
