"""Versions of what computed a result, for the files that it leaves."""

import importlib.metadata
import platform
from collections.abc import Iterable


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those packages that are installed, by name.

    Args:
        packages: Names of distributions.

    >>> list(installed_versions(["torch", "no-such-package"]))
    ['python', 'torch']
    """
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
