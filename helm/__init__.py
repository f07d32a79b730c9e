"""The chart, and the generator of those of its files that are not written by hand."""
