"""Measurements behind the README's figures; see README.md here."""
