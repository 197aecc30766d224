"""Did it get better? Perplexity, identity, speed, memory; reports and pages."""
