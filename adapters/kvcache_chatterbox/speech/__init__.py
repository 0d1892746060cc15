"""T3: a text's speech tokens, step by step."""
