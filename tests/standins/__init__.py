"""What stands in for the world: S3 servers, the API, networks, samples, and the script as a process."""
