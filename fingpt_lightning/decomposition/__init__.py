"""``fingpt decompose``: a dense model made low-rank, layer by layer."""
