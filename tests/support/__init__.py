"""What the tests share and that is no test."""
