"""The commands by subject: one function that adds a command to the parser, one that runs it."""
