"""One short YAML per family member."""
