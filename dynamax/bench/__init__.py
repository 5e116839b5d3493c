"""How fast a model decodes here, with this package and with others, measured in turn in one process."""
