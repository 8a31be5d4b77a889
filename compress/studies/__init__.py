"""Questions answered by running the toolkit, and the solutions that came out of them. Imports what lies on lower floors."""
