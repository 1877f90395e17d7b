"""Folders of ours in the Hugging Face hub: names, uploads, the metadata of model cards."""
