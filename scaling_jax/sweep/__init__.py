"""Studies: a grid of runs over the fields of one config, trained together where they can be, resumed whatever happens, one table at the end."""
