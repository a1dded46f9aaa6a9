"""Defenses against backdoors."""
