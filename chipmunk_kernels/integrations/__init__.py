"""Into other people's models: one file per library and per model family, imported on use."""
