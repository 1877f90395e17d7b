"""The quality of a model on tasks: scoring, metrics, and what ``fingpt evaluate`` runs.

`fingpt_lightning.evaluation.scoring.score` is the engine. This file imports nothing, so that
``fingpt evaluate --help`` answers before torch is loaded.
"""
