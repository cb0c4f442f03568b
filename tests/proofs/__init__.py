"""What takes minutes or hours: random kills, an hour of faults, and defects planted to see whether a test notices."""
