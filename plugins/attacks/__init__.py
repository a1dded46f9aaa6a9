"""Attacks: how a backdoor gets into a model."""
