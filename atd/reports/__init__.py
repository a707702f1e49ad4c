"""Shows results: tables, pictures, progress."""
