"""The commands of ``dynamax``, a file each; ``dynamax.cli`` imports only the one that is asked for."""
