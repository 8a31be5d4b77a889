"""Search: the best sub-network of a network under limits of time, bytes and accuracy. Imports no pipeline."""
