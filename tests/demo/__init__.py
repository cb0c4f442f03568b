"""The main job on this machine, end to end, with real files: what `make demo` shows, and its picture in README."""
