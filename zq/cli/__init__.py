"""The command line: one file per command; nothing here imports torch before a command runs."""
