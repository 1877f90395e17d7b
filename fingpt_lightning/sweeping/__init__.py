"""Sweeps in W&B's own file format, checked before they start, with a server or without one."""
