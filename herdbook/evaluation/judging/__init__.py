"""Models judged by models and by people: scores, pairs, votes, ratings."""
