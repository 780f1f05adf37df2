"""A run as tables and pictures, from its files alone."""
