"""The tables that set our figures beside the published ones: what they hold, how it is run, how it is written."""
