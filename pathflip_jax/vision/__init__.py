"""Patch encoders: one vision transformer for all published ones, their transforms of pixels, and the table of them."""
