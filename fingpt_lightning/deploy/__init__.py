"""A trained model in use: text, labels over files, many adapters on one base, other formats.

This file imports nothing, so that ``fingpt generate --help`` answers before torch is loaded.
"""
