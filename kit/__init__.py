"""What the scripts import and nobody runs. Modules here import kit, model and tokenizer, never a script."""
