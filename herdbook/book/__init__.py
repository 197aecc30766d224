"""The book: every artifact with its parents, its recipe and its measured worth."""
