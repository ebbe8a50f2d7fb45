"""Modules that are only imported. Of the files in the root they import only model.py and tokenizer.py."""
