"""What kvcache's commands ask of a Chatterbox model."""
