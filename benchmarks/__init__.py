"""Measurements: every number in a document comes from a command in this folder or in tools/."""
