"""Bridges that let other libraries' models run on polyattn's backends."""
