"""Pages of the house in a real browser."""
