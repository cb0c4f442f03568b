"""One room of the program each, on real files, sockets and threads."""
