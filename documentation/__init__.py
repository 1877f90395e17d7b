"""What makes the documentation: the site's hook and the pictures.

Beside the package, not in the wheel.
"""
