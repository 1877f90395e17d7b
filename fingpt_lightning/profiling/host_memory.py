"""How the C library treats memory that a training step on the CPU frees and requests again."""

import ctypes
import platform
import sys

# From glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets this process keep the memory it frees, for the next step, until it ends.

    By default glibc gives every large buffer back at once, and each step pays again for the
    kernel's zeroing of the same pages, which on a virtual machine can take a tenth of it and more.
    The peak stays about the same; what is held between the peaks does not shrink.

    Returns:
        Whether it was done: only glibc can do it.

    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    if not (sys.platform == "linux" and platform.libc_ver()[0] == "glibc"):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
