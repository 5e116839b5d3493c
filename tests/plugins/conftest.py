"""The package of parts is installed by its test; one of its modules is broken on purpose."""

collect_ignore = ["demo_parts"]
