"""What a person at a terminal meets: options, messages, progress."""
