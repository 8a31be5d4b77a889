"""What only a scoring panel needs: comparing, the original style of submission, foreign code, the synthetic task."""
