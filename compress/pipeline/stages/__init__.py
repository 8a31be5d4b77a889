"""The stages: one class a file, the file's stem is its name in a recipe; nothing else to register."""
