"""A CUDA device without hardware: devices, dtypes, kernels, copies and waits; no numbers."""
