"""Studies: points of a grid, trained together where that is faster, resumed whatever happens, one table at the end."""
