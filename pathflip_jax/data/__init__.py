"""Data pipeline for slides, texts and features: from files to records, and from records to batches."""
