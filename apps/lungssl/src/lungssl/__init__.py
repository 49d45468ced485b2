"""lungssl: the command line, the recipes and the training engine over the lungssl packages."""
