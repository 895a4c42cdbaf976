"""Command lines; nothing in the library imports them."""
