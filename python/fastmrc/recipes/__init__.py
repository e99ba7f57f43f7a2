"""Documented ways to make the models that come with the package."""
