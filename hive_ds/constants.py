"""Values that data and model must agree on; neither may import the other."""

IGNORE_INDEX = -100
"""Label of a token that carries no loss (torch's and Hugging Face's convention)."""

IMAGE_TOKEN = "<image>"
"""Placeholder of one image in text. It marks a place and is dropped before the model sees the tokens."""
