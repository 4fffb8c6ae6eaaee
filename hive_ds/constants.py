"""Values that parts must agree on which do not import each other."""

IGNORE_INDEX = -100
"""Label of a token that carries no loss (torch's and Hugging Face's convention)."""

IMAGE_TOKEN = "<image>"
"""Placeholder of one image in text. It marks a place and is dropped before the model sees the tokens."""

EXIT_STOPPED = 85
"""Exit code of ranks that stopped early, with a checkpoint: start the same command again to go on."""

EXIT_HUNG = 87
"""Exit code of ranks that ended because nothing moved: start the same command again to go on."""

SLOW_RATIO = 1.3
"""`slowest_ratio` from which a rank is called slow: sound devices of one type differ by some percent."""
