"""Beginnings computed once: snapshots, what keeps them, and the stores behind that."""
