"""Parts from outside of dynamax; each file is one part."""
