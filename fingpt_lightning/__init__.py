"""Pretrain and finetune financial language models in little memory and time."""

__version__ = "0.1.0"
