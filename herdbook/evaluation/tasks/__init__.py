"""What a model is asked: tasks, their questions, and the engine's answers."""
