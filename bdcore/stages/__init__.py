"""The stages of a run, each from one artifact to the next; only the pipeline calls them."""
