"""Which text is worth keeping: extraction, Unicode, language, quality rules, each drop with a named reason."""
