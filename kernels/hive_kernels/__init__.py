"""Hierarchical attention: text queries over text keys and image keys in one softmax."""
