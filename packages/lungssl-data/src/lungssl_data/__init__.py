"""lungssl data."""
