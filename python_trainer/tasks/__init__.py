"""Built-in tasks: each brings its own data and reward."""
