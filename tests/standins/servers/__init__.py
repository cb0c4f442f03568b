"""The S3 servers that the end-to-end tests can be run against, beside Swift: see kinds.py and `make test-real`."""
