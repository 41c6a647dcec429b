"""The report's figures, repeated in small. ``experiments.py`` is their command."""
