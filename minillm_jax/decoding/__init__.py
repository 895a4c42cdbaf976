"""Tokens in, tokens out; knows no text."""
