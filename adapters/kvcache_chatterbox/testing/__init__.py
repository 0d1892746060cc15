"""A model that stands in for one whose parts are not there."""
