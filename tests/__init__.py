"""Tests of s3_bulk_convert.py, and the stand-ins that they and `make demo` run on."""
