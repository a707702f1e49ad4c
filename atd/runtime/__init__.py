"""Runs models: evaluates them, generates text, measures their speed."""
