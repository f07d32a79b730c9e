"""The chart, and what makes the parts of it that are not written by hand."""
