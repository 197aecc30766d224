"""Records and conversations: foreign formats in, training rows out."""
