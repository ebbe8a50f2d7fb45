"""Modules that nobody runs. They import kit, model and tokenizer, and no other script."""
