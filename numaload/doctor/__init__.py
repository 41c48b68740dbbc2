"""What keeps a machine or a process from being fast, and the command that mends it."""
