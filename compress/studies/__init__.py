"""Studies: questions answered by running the toolkit, and the solutions that came out of them."""
