"""One runnable module per question: ``python -m fingpt_lightning.benchmarks.NAME --json FILE``."""
