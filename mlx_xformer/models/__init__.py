"""Models: a file or a package for each family, see families.FAMILIES."""
