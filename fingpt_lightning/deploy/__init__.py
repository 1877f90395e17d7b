"""A trained model at work: text, labels over files, many adapters on one base, other formats.

This file imports nothing, so that ``fingpt generate --help`` answers before torch is loaded.
"""
