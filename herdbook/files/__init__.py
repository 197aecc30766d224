"""Foreign containers read with suspicion, our own files written whole or not at all."""
