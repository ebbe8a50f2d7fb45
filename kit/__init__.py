"""What the scripts import and nobody runs. Modules here import kit and tokenizer, never a script."""
