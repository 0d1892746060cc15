"""Voices: what upstream makes of a clip, kept and reused."""
