"""What a reply is worth: marks of exactness, overlap, constraints, health."""
