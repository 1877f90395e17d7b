"""The ``fingpt`` program: its commands, their errors, and the Trainer behind ``fit``."""
