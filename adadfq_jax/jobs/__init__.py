"""The jobs of the command lines: they combine the other packages and print."""
