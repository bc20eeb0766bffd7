"""Pages have examples that pytest runs; what builds the site has none."""

collect_ignore_glob = ["*.py", "_ext/*", "from/*"]
