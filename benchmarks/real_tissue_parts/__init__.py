"""Parts of the real-tissue benchmark: images, mosaics, words, baselines, intervals and the table."""
