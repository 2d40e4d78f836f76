"""What the command lines do: they compose the other rooms and print."""
