"""The sections of the page, each drawn from its part of the report alone."""
