"""Which tokens stay, and how their keys and values are held. Nothing here knows of transformers' models."""
