"""Lightning callbacks that observe a run: memory, throughput, compression, summary.

``DISTRIBUTION`` tells this package from any other one named ``callbacks``.
"""

DISTRIBUTION = "fingpt-lightning"
