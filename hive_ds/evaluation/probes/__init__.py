"""Probes of a frozen encoder: features by block, computed once, under a linear, an attentive or a kNN head."""
