"""The command line: a file per group of verbs, and no logic that the API lacks."""
