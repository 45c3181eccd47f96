"""Sentences of the papers as tests over readings: one file a paper."""
