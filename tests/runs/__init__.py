"""The script as a process, seen from outside: the contract that a redesign may not touch."""
