"""What `make bench` measures the program with: stand-ins, the published recipe as a baseline, tables and plots."""
