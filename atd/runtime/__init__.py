"""Running models: evaluation, generation, measuring their speed."""
