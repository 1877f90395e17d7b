"""What a person at a terminal sees: options, messages, progress."""
