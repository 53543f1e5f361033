"""Conversion of third-party weights and other versions' runs to flat parameter dicts and current settings."""
