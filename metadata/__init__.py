"""What is written to disk, and how it is checked on the way back."""
