"""Trackers: observers that keep a run's options, curves and figures where other experiments' are kept."""
