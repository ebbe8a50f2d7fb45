"""Modules that are only imported. Of the root they import tokenizer.py alone."""
