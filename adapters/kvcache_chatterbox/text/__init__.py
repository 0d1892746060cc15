"""A text before it is spoken: how long it takes, where it is cut, what speaking it takes."""
