"""Drop-in adapters: another trainer's function names and arguments, on these ops."""
